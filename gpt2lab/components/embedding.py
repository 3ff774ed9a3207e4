"""From tokens to vectors: an ordered list whose first part embeds tokens and whose other parts modify the result.

Shapes: B batch, T tokens, C channels, V vocabulary, n rows.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

embedding = Slot("model.embedding", "from tokens to vectors", default=["plain"], arity="list", base=nn.Module)


@embedding.register("plain", source="GPT-2 (Radford et al. 2019)", can=("table",))
class TokenEmbedding(nn.Module):
    """One trained vector per token; GPT-2's. It must be the first part.  tokens (B, T) -> (B, T, C)

    x_t = wte[token_t]   with wte (V, C)
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.weight = builder.table(builder.dims.vocab_size, builder.dims.n_embd, "embedding")

    def forward(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        return F.embedding(tokens, self.weight)

    def table(self) -> Tensor | None:
        """The trained matrix (V, C) if `unembed` is just a product with it, else None."""
        return self.weight

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits by the same table.  (n, C) -> (n, V)"""
        return F.linear(rows, self.weight)


@embedding.register("smear", source="KellerJordan/modded-nanogpt, record of 2025-09-18 (smear)")
class Smear(nn.Module):
    """Add a small, gated share of the previous token's embedding.  (B, T, C) -> (B, T, C)

    x_t + a sigmoid(gate x_t) x_(t-1)   with gate (1, C) and a trained factor a, initially 0
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.gate = builder.linear(builder.dims.n_embd, 1, bias=False)
        self.amount = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x + self.amount * torch.sigmoid(self.gate(x)) * ctx.previous("smear", x)


@embedding.register("normed", source="KellerJordan/modded-nanogpt, record of 2024-11-06; arXiv:2211.05100 (BLOOM)")
class Normed(nn.Module):
    """Normalise embedded tokens with the model's norm.  (B, T, C) -> (B, T, C)

    norm(x);  learned positions are added afterwards
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.ln = builder.build("norm")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out: Tensor = self.ln(x)
        return out


@embedding.register("scaled", source="arXiv:1706.03762, section 3.4; Gemma (arXiv:2403.08295)")
class Scaled(nn.Module):
    """Multiply embedded tokens with a constant; a tied head's logits are not affected.  (B, T, C) -> (B, T, C)

    f x

    factor: f; null is sqrt(C).
    """

    def __init__(self, builder: Builder, *, factor: Annotated[float, Field(gt=0)] | None = None) -> None:
        super().__init__()
        self.factor = factor or builder.dims.n_embd**0.5

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.factor * x


@embedding.register("factorized", source="arXiv:1909.11942, section 3.1", can=("table",), examples=({"rank": 4},))
class Factorized(nn.Module):
    """A narrow table and a matrix that widens it, in place of a wide table.  tokens (B, T) -> (B, T, C)

    x_t = U table[token_t]   with table (V, rank) and U (C, rank);  a tied head computes logits by table U^T

    rank: channels of the table; null is a quarter of C. ALBERT has 128 of them at every width.
    """

    def __init__(self, builder: Builder, *, rank: Annotated[int, Field(ge=1)] | None = None) -> None:
        super().__init__()
        rank = rank or max(1, builder.dims.n_embd // 4)
        self.weight = builder.table(builder.dims.vocab_size, rank, "embedding")
        self.widen = builder.linear(rank, builder.dims.n_embd, bias=False)

    def forward(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        out: Tensor = self.widen(F.embedding(tokens, self.weight))
        return out

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits by both matrices.  (n, C) -> (n, V)"""
        return F.linear(F.linear(rows, self.widen.weight.T), self.weight)


@embedding.register("bigram_hash", source="KellerJordan/modded-nanogpt, record of 2026-01-19 (bigram hash embedding)")
class BigramHash(nn.Module):
    """Add a trained vector for each pair of neighbouring tokens, found by a hash.  (B, T, C) -> (B, T, C)

    x_t + table[hash(token_(t-1), token_t) mod buckets]   with the table initially zero

    buckets: rows of the table; null is 5 V, as in the source. Pairs with equal hashes share a row.
    The source adds the vectors in front of every block, with a trained factor for each.
    """

    def __init__(self, builder: Builder, *, buckets: Annotated[int, Field(ge=2)] | None = None) -> None:
        super().__init__()
        self.buckets = buckets or 5 * builder.dims.vocab_size
        self.weight = builder.at(gain=0.0).table(self.buckets, builder.dims.n_embd, "embedding")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        before = ctx.previous("bigram_hash", ctx.tokens + 1)  # 0 in front of the first token
        index = (1_000_003 * before + 998_244_353 * ctx.tokens) % 2_147_483_647 % self.buckets
        return x + F.embedding(index, self.weight)
