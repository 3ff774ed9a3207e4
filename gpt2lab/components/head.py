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


class SigmoidSoftcap(Head):
    """A head whose logits are bounded by a sigmoid."""

    def __init__(self, matrix: Linear | None, cap: float, shift: float, width: float) -> None:
        super().__init__(matrix, 0, None, 1.0)
        self.cap, self.shift, self.width = cap, shift, width

    def matrix(self, embedding: TokenEmbedding) -> Tensor | None:
        return None

    def forward(self, rows: Tensor, embedding: TokenEmbedding) -> Tensor:
        logits = super().forward(rows, embedding).float()  # around cap/2 16-bit numbers are too coarse for differences
        return self.cap * torch.sigmoid((logits + self.shift) / self.width)


@head.register("sigmoid_softcap", source="KellerJordan/modded-nanogpt, record of 2025-12-26 (asymmetric logit rescale)")
def sigmoid_softcap(
    builder: Builder, *, cap: Annotated[float, Field(gt=0)] = 23.0, shift: float = 5.0,
    width: Annotated[float, Field(gt=0)] = 7.5, tied: bool = True,
) -> Head:  # fmt: skip
    """Bound logits between 0 and a cap, unevenly around zero.  (n, C) -> (n, V)

    logits = cap sigmoid((z + shift) / width)   with z = h wte^T, or h W^T if not tied

    cap:   the largest logit.
    shift: how far the middle of the sigmoid is below z = 0.
    width: of the sigmoid, in units of z.
    tied:  whether the token embedding is the output matrix.
    """
    matrix = None if tied else builder.linear(builder.dims.n_embd, builder.dims.vocab_size, "head", bias=False)
    return SigmoidSoftcap(matrix, cap, shift, width)


class MixtureOfSoftmaxes(Head):
    """Several softmaxes by one matrix, from several vectors per row, averaged by trained weights."""

    def __init__(self, builder: Builder, softmaxes: int) -> None:
        super().__init__(None, 0, None, 1.0)
        C = builder.dims.n_embd
        self.mix = builder.linear(C, softmaxes, "router", bias=False)
        self.project = builder.linear(C, softmaxes * C, bias=False)

    def matrix(self, embedding: TokenEmbedding) -> Tensor | None:
        return None

    def forward(self, rows: Tensor, embedding: TokenEmbedding) -> Tensor:
        shares: Tensor = self.mix(rows).float().log_softmax(-1)  # (n, K)
        vectors: Tensor = torch.tanh(self.project(rows)).unflatten(-1, (shares.shape[-1], -1))  # (n, K, C)
        parts: Tensor = embedding.unembed(vectors.flatten(0, 1)).float().log_softmax(-1).unflatten(0, vectors.shape[:2])
        return (shares[..., None] + parts).logsumexp(1)


@head.register("mixture_of_softmaxes", source="arXiv:1711.03953")
def mixture_of_softmaxes(builder: Builder, *, softmaxes: Annotated[int, Field(ge=2)] = 4) -> Head:
    """Average several softmaxes, which a single product of rank C cannot express.  (n, C) -> (n, V)

    log sum_k pi_k softmax(tanh(P_k h) wte^T)   with pi = softmax(W h)

    softmaxes: number of them; each costs a product with the vocabulary.
    """
    return MixtureOfSoftmaxes(builder, softmaxes)
