"""From the last layer to scores over the vocabulary, row by row, so that a loss may work on any chunk of rows.

Shapes: n rows, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Linear, Role, Site, mark, short_cut
from gpt2lab.components.embedding import Plain
from gpt2lab.registry import Slot

head = Slot("model.head", "from the last layer to scores over the vocabulary", default="tied")

Softcap = Annotated[float, Field(gt=0)] | None


class Head(nn.Module):
    """Scores, then factor and softcap. Without a matrix of its own it asks the embedding."""

    def __init__(self, matrix: Linear | None, bias: int, softcap: float | None, scale: float) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        self.weight = matrix.weight if matrix is not None else None
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def matrix(self, embedding: Plain) -> Tensor | None:
        """The trained matrix (V, C) if the scores are rows times it and nothing else, so that losses can take a short
        cut; None if there is more to them."""
        if self.scale != 1.0 or self.bias is not None or self.softcap is not None:
            return None
        if self.weight is not None:
            return self.weight
        table = short_cut(embedding, "table")
        return table() if table else None

    def forward(self, rows: Tensor, embedding: Plain) -> Tensor:
        """(n, C) -> (n, V)"""
        logits = embedding.unembed(rows) if self.weight is None else nn.functional.linear(rows, self.weight)
        if self.scale != 1.0:
            logits = self.scale * logits
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@head.register("tied", source="arXiv:1608.05859", examples=({"softcap": 15.0}, {"scale": 0.5}))
def tied(site: Site, *, softcap: Softcap = None, scale: float = 1.0, bias: bool = False) -> Head:
    """Score tokens by their own embedding vectors; GPT-2's. No parameters of its own.  (n, C) -> (n, V)

    logits = scale h wte^T + bias, then softcap tanh(logits / softcap) where a softcap is given

    softcap: bound on the scores; null for none.
    scale:   factor on the scores.
    bias:    whether each token of the vocabulary has one.
    """
    return Head(None, site.dims.vocab_size if bias else 0, softcap, scale)


@head.register("untied", source="arXiv:1608.05859 (as its alternative)")
def untied(
    site: Site, *, softcap: Softcap = None, scale: float = 1.0, bias: bool = False, zero_init: bool = False
) -> Head:
    """Score tokens by a matrix of its own, V x C parameters more.  (n, C) -> (n, V)

    logits = scale h W^T + bias, then softcap tanh(logits / softcap) where a softcap is given

    softcap: bound on the scores; null for none.
    scale:   factor on the scores.
    bias:    whether each token of the vocabulary has one.
    zero_init: start W at zero, so that the first loss is ln V.
    """
    matrix = site.linear(site.dims.n_embd, site.dims.vocab_size, "head", bias=False)
    mark(matrix.weight, Role("head", gain=0.0 if zero_init else None))
    return Head(matrix, site.dims.vocab_size if bias else 0, softcap, scale)
