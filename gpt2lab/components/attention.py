"""Attention: the part of a block that moves information between tokens.  (B, T, C) -> (B, T, C)

Shapes: B batch, T tokens, C channels, H query heads, G key/value heads, D channels per head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpt2lab.components.attend import attend
from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

attention = Slot("model.attention", "how tokens exchange information", default="mha", arity="per_layer")


class GroupedAttention(nn.Module):
    """Query heads in G groups, each group sharing one key and value head; G = H is multi-head attention."""

    def __init__(self, builder: Builder, n_kv_head: int) -> None:
        super().__init__()
        dims = builder.dims
        self.n_head, self.n_kv_head, self.head_size = dims.n_head, n_kv_head, dims.head_size
        self.dropout = dims.dropout
        rows = {"query": dims.n_embd, "key": n_kv_head * self.head_size, "value": n_kv_head * self.head_size}
        self.sizes = list(rows.values())
        self.c_attn = builder.linear(dims.n_embd, sum(self.sizes), rows=rows)
        self.c_proj = builder.linear(dims.n_embd, dims.n_embd, "residual_out")
        self.resid_dropout = nn.Dropout(dims.dropout)
        self.mask = builder.build("mask")
        self.scores = builder.build("scores")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        B, T, C = x.shape
        assert ctx.position is not None
        q, k, v = (
            part.view(B, T, -1, self.head_size).transpose(1, 2) for part in self.c_attn(x).split(self.sizes, -1)
        )  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        v = ctx.mix_values(v)
        q, k = self.scores.prepare(q, k)
        q, k = (ctx.position.rotate(part, ctx) for part in (q, k))
        k, v = ctx.cached("k", k), ctx.cached("v", v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, ctx, self.mask, self.scores, dropout=dropout)
        y = self.scores.finish(y.transpose(1, 2).reshape(B, T, C), x)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


@attention.register("mha", source="arXiv:1706.03762", can=("bias", "rotate", "value"))
def mha(builder: Builder) -> nn.Module:
    """Multi-head attention, every head with its own queries, keys and values; GPT-2's.  (B, T, C) -> (B, T, C)

    softmax(q k^T / sqrt(D)) v in each of H heads, concatenated and projected.
    """
    return GroupedAttention(builder, builder.dims.n_head)


def gqa_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """n_kv_head must divide n_head."""
    n = options["n_kv_head"]
    if n is not None and (n < 1 or dims.n_head % n):
        return [f"n_kv_head {n} does not divide n_head {dims.n_head}"]
    return []


@attention.register(
    "gqa", source="arXiv:2305.13245", can=("bias", "rotate", "value"), check=gqa_limits, examples=({"n_kv_head": 1},)
)
def gqa(builder: Builder, *, n_kv_head: int | None = None) -> nn.Module:
    """Grouped-query attention: groups of query heads share one key and value head.  (B, T, C) -> (B, T, C)

    n_kv_head: number of key/value heads; null is the largest proper divisor of n_head (half the heads, if their number
    is even). 1 is multi-query attention, n_head is multi-head attention.
    """
    H = builder.dims.n_head
    return GroupedAttention(builder, n_kv_head or max((n for n in range(1, H) if H % n == 0), default=1))


@attention.register("none", source="gpt2lab (a branch switched off)", can=("bias", "rotate", "value"))
def none(builder: Builder) -> None:
    """No attention in this layer, nor its norm: tokens exchange nothing here.

    x = x
    """
