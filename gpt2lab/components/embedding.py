"""From tokens to vectors: an ordered list whose first part embeds tokens and whose other parts modify the result.

Shapes: B batch, T tokens, C channels, V vocabulary, n rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

embedding = Slot("model.embedding", "from tokens to vectors", default=["plain"], arity="list")


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
