"""Attention: how tokens read from one another.  (B, T, C) -> (B, T, C)

Shapes: B batch, T tokens, C channels, H query heads, G key/value heads, D channels per head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpt2lab.components.attend import attend
from gpt2lab.components.base import Dims, Site
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

attention = Slot("model.attention", "how tokens read from one another", default="mha", arity="per_layer")


class GroupedAttention(nn.Module):
    """Query heads in G groups, each group sharing one key and value head; G = H is multi-head attention."""

    def __init__(self, site: Site, n_kv_head: int) -> None:
        super().__init__()
        dims = site.dims
        self.n_head, self.n_kv_head, self.head_size = dims.n_head, n_kv_head, dims.head_size
        self.dropout = dims.dropout
        rows = {"query": dims.n_embd, "key": n_kv_head * self.head_size, "value": n_kv_head * self.head_size}
        self.sizes = list(rows.values())
        self.c_attn = site.linear(dims.n_embd, sum(self.sizes), rows=rows)
        self.c_proj = site.linear(dims.n_embd, dims.n_embd, "residual_out")
        self.resid_dropout = nn.Dropout(dims.dropout)
        self.mask = site.make("mask")
        self.scores = site.make("scores")

    def forward(self, x: Tensor, step: Step) -> Tensor:
        B, T, C = x.shape
        assert step.position is not None
        q, k, v = (
            part.view(B, T, -1, self.head_size).transpose(1, 2) for part in self.c_attn(x).split(self.sizes, -1)
        )  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        v = step.value(v)
        q, k = self.scores.prepare(q, k)
        q, k = (step.position.rotate(part, step) for part in (q, k))
        k, v = step.keep("k", k), step.keep("v", v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, step, self.mask, self.scores, dropout=dropout)
        y = self.scores.finish(y.transpose(1, 2).reshape(B, T, C), x)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


@attention.register("mha", source="arXiv:1706.03762", can=("bias", "rotate", "value"))
def mha(site: Site) -> nn.Module:
    """Multi-head attention, every head with its own queries, keys and values; GPT-2's.  (B, T, C) -> (B, T, C)

    softmax(q k^T / sqrt(D)) v in each of H heads, joined and projected.
    """
    return GroupedAttention(site, site.dims.n_head)


def gqa_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """n_kv_head must divide n_head."""
    n = options["n_kv_head"]
    if n is not None and (n < 1 or dims.n_head % n):
        return [f"n_kv_head {n} does not divide n_head {dims.n_head}"]
    return []


@attention.register(
    "gqa", source="arXiv:2305.13245", can=("bias", "rotate", "value"), check=gqa_limits, examples=({"n_kv_head": 1},)
)
def gqa(site: Site, *, n_kv_head: int | None = None) -> nn.Module:
    """Grouped-query attention: groups of query heads share one key and value head.  (B, T, C) -> (B, T, C)

    n_kv_head: how many key/value heads there are; null is the largest proper divisor of n_head (half the heads, if
    their number is even). 1 is multi-query attention, n_head is multi-head attention.
    """
    H = site.dims.n_head
    return GroupedAttention(site, n_kv_head or max((n for n in range(1, H) if H % n == 0), default=1))
