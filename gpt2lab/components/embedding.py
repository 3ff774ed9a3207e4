"""From tokens to vectors: an ordered list whose first part looks tokens up and whose others change the result.

Shapes: B batch, T tokens, C channels, V vocabulary, n rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.base import Site
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

embedding = Slot("model.embedding", "from tokens to vectors", default=["plain"], arity="list")


@embedding.register("plain", source="GPT-2 (Radford et al. 2019)", can=("table",))
class Plain(nn.Module):
    """One trained vector per token; GPT-2's. It must come first.  tokens (B, T) -> (B, T, C)

    x_t = wte[token_t]   with wte (V, C)
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = site.table(site.dims.vocab_size, site.dims.n_embd, "embedding")

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        return F.embedding(tokens, self.weight)

    def table(self) -> Tensor | None:
        """The trained matrix (V, C) if `unembed` is a product with it and nothing else, else None."""
        return self.weight

    def unembed(self, rows: Tensor) -> Tensor:
        """Scores of every token, by the same table.  (n, C) -> (n, V)"""
        return F.linear(rows, self.weight)


@embedding.register("smear", source="KellerJordan/modded-nanogpt, record of 2025-09-18 (smear)")
class Smear(nn.Module):
    """Let each token take in a little of the token before it.  (B, T, C) -> (B, T, C)

    x_t + a sigmoid(gate x_t) x_(t-1)   with gate (1, C) and a trained factor a that starts at 0
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.gate = site.linear(site.dims.n_embd, 1, bias=False)
        self.amount = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return x + self.amount * torch.sigmoid(self.gate(x)) * step.shift("smear", x)
