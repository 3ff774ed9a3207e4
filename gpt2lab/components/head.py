"""From the last layer to logits, row by row, so that a loss can be computed for any chunk of rows.

Shapes: n rows, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Linear, Role, own_method, parameter
from gpt2lab.components.embedding import TokenEmbedding
from gpt2lab.registry import Slot

head = Slot("model.head", "from the last layer to logits over the vocabulary", default="tied", base=nn.Module)

Softcap = Annotated[float, Field(gt=0)] | None


class Head(nn.Module):
    """A product with its own matrix or the embedding's, then factor, bias and softcap."""

    def __init__(self, matrix: Linear | None, bias: int, softcap: float | None, scale: float) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        self.weight = matrix.weight if matrix is not None else None
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def matrix(self, embedding: TokenEmbedding) -> Tensor | None:
        """The trained matrix (V, C) if logits are just rows times its transpose, which losses can use as a shortcut;
        else None."""
        if self.scale != 1.0 or self.bias is not None or self.softcap is not None:
            return None
        if self.weight is not None:
            return self.weight
        table = own_method(embedding, "table")
        return table() if table else None

    def forward(self, rows: Tensor, embedding: TokenEmbedding) -> Tensor:
        """(n, C) -> (n, V)"""
        logits = embedding.unembed(rows) if self.weight is None else nn.functional.linear(rows, self.weight)
        if self.scale != 1.0:
            logits = self.scale * logits
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@head.register("tied", source="arXiv:1608.05859", examples=({"softcap": 15.0}, {"scale": 0.5}))
def tied(builder: Builder, *, softcap: Softcap = None, scale: float = 1.0, bias: bool = False) -> Head:
    """Use the token embedding as output matrix; GPT-2's. No parameters of its own.  (n, C) -> (n, V)

    logits = scale h wte^T + bias, then softcap tanh(logits / softcap) if there is a softcap

    softcap: bound on the absolute value of logits; null for none.
    scale:   factor on logits.
    bias:    whether each token of the vocabulary has a trained bias.
    """
    return Head(None, builder.dims.vocab_size if bias else 0, softcap, scale)


@head.register("untied", source="arXiv:1608.05859 (as its alternative)")
def untied(
    builder: Builder, *, softcap: Softcap = None, scale: float = 1.0, bias: bool = False, zero_init: bool = False
) -> Head:
    """Use a separate output matrix, with V x C parameters.  (n, C) -> (n, V)

    logits = scale h W^T + bias, then softcap tanh(logits / softcap) if there is a softcap

    softcap: bound on the absolute value of logits; null for none.
    scale:   factor on logits.
    bias:    whether each token of the vocabulary has a trained bias.
    zero_init: initialise W with zeros, which makes the first loss ln V.
    """
    matrix = builder.linear(builder.dims.n_embd, builder.dims.vocab_size, "head", bias=False)
    parameter(matrix.weight, Role("head", gain=0.0 if zero_init else None))
    return Head(matrix, builder.dims.vocab_size if bias else 0, softcap, scale)
