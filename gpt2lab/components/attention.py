"""Attention: the part of a block that moves information between tokens.  (B, T, C) -> (B, T, C)

Shapes: B batch, T tokens, C channels, H query heads, G key/value heads, D channels per head.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.attend import attend
from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import SLOTS, Slot

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
        # GPT-2 leaves values, queries and keys as they are, caches nothing in training, and finishes with y itself
        v = ctx.mix_values(v)
        q, k = self.scores.prepare(q, k, ctx)
        q, k = ctx.position.rotate(q, ctx, "q"), ctx.position.rotate(k, ctx, "k")
        dropout = self.dropout if self.training else 0.0
        y = attend(q, ctx.cached("k", k), ctx.cached("v", v), x, ctx, self.mask, self.scores, dropout=dropout)
        y = self.scores.finish(y.transpose(1, 2).reshape(B, T, C), x, v)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class LatentAttention(nn.Module):
    """Keys and values computed from a small latent vector per token, and one rotated key for all heads. The cache holds
    the latent and the rotated key.  L channels of the latent, R of the rotated key."""

    def __init__(self, builder: Builder, latent: int, rotated: int) -> None:
        super().__init__()
        dims = builder.dims
        H, D = dims.n_head, dims.head_size
        self.n_head, self.head_size, self.sizes = H, D, [latent, rotated]
        self.dropout = dims.dropout
        self.c_q = builder.linear(dims.n_embd, H * (D + rotated))
        self.c_latent = builder.linear(dims.n_embd, latent + rotated, rows={"latent": latent, "key": rotated})
        self.ln = builder.at(width=latent).build("norm")
        self.c_kv = builder.linear(latent, 2 * H * D, rows={"key": H * D, "value": H * D})
        self.c_proj = builder.linear(H * D, dims.n_embd, "residual_out")
        self.resid_dropout = nn.Dropout(dims.dropout)
        self.mask = builder.build("mask")
        self.scores = builder.at(width=D + rotated).build("scores")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        B, T, _ = x.shape
        assert ctx.position is not None
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D + R)
        q, q_rotated = q.split([self.head_size, self.sizes[1]], -1)
        q = torch.cat([q, ctx.position.rotate(q_rotated, ctx, "q")], -1)
        latent, k_rotated = self.c_latent(x).split(self.sizes, -1)  # (B, T, L), (B, T, R)
        latent = ctx.cached("latent", self.ln(latent))  # (B, S, L)
        k_rotated = ctx.cached("k_rotated", ctx.position.rotate(k_rotated[:, None], ctx, "k"))  # (B, 1, S, R)
        k, v = (
            part.view(B, -1, self.n_head, self.head_size).transpose(1, 2) for part in self.c_kv(latent).chunk(2, -1)
        )  # (B, H, S, D) each
        k = torch.cat([k, k_rotated.expand(-1, self.n_head, -1, -1)], -1)
        q, k = self.scores.prepare(q, k, ctx)
        y = attend(q, k, v, x, ctx, self.mask, self.scores, dropout=self.dropout if self.training else 0.0)
        y = self.scores.finish(y.transpose(1, 2).reshape(B, T, -1), x, v[:, :, -T:])
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class DifferentialAttention(nn.Module):
    """Two maps of attention weights per head, from the halves of its queries and keys; the second is subtracted."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        dims = builder.dims
        self.n_head, self.head_size = dims.n_head, dims.head_size
        self.dropout = dims.dropout
        self.c_attn = builder.linear(
            dims.n_embd, 3 * dims.n_embd, rows=dict.fromkeys(("query", "key", "value"), dims.n_embd)
        )
        half = dims.head_size // 2
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.full((half,), 0.1)) for _ in range(4)
        )
        self.start = 0.8 - 0.6 * math.exp(-0.3 * (builder.layer or 0))
        self.ln = builder.at(width=dims.head_size).build("norm")
        self.c_proj = builder.linear(dims.n_embd, dims.n_embd, "residual_out")
        self.resid_dropout = nn.Dropout(dims.dropout)
        self.mask = builder.build("mask")
        self.scores = builder.at(dims=dims.model_copy(update={"n_head": 2 * dims.n_head})).build("scores")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        B, T, C = x.shape
        assert ctx.position is not None
        q, k, v = self.c_attn(x).chunk(3, -1)
        q, k = (part.view(B, T, 2 * self.n_head, -1).transpose(1, 2) for part in (q, k))  # (B, 2 H, T, D / 2)
        v = ctx.mix_values(v.view(B, T, self.n_head, -1).transpose(1, 2))  # (B, H, T, D)
        q, k = self.scores.prepare(q, k, ctx)
        q, k = ctx.position.rotate(q, ctx, "q"), ctx.position.rotate(k, ctx, "k")
        k, every_v = ctx.cached("k", k), ctx.cached("v", v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, every_v, x, ctx, self.mask, self.scores, dropout=dropout)  # (B, 2 H, T, D)
        first, second = y.unflatten(1, (self.n_head, 2)).unbind(2)
        added, removed = ((a * b).sum().exp() for a, b in self.lambdas())
        y = self.ln(first - (added - removed + self.start) * second) * (1 - self.start)
        y = self.scores.finish(y.transpose(1, 2).reshape(B, T, C), x, v)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out

    def lambdas(self) -> list[tuple[Tensor, Tensor]]:
        """The two pairs of vectors whose products give the share of the second map."""
        return [(self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)]


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


@attention.register("gqa", source="arXiv:2305.13245", can=("bias", "rotate", "value"), check=gqa_limits)
def gqa(builder: Builder, *, n_kv_head: int | None = None) -> nn.Module:
    """Grouped-query attention: groups of query heads share one key and value head.  (B, T, C) -> (B, T, C)

    n_kv_head: number of key/value heads; null is the largest proper divisor of n_head (half the heads, if their number
    is even). 1 is `mqa`, n_head is `mha`.
    """
    H = builder.dims.n_head
    return GroupedAttention(builder, n_kv_head or max((n for n in range(1, H) if H % n == 0), default=1))


@attention.register("mqa", source="arXiv:1911.02150", can=("bias", "rotate", "value"))
def mqa(builder: Builder) -> nn.Module:
    """Multi-query attention: all query heads share one key and value head.  (B, T, C) -> (B, T, C)

    The cache is smaller by the number of heads. As the paper's, without a wider MLP for the parameters saved.
    """
    return GroupedAttention(builder, 1)


@attention.register("mla", source="arXiv:2405.04434, section 2.1", can=("bias", "rotate"))
def mla(
    builder: Builder,
    *,
    latent: Annotated[int, Field(ge=1)] | None = None,
    rotated: Annotated[int, Field(ge=2, multiple_of=2)] | None = None,
) -> nn.Module:
    """Multi-head latent attention: keys and values from one small vector per token, which is cached instead of them.

    c = norm(W_c x);  k = [W_k c, rotate(W_r x)], v = W_v c per head, with rotate(W_r x) shared by all heads;  q from x

    latent:  channels of c; null is 4 heads' channels as in the paper, but at most half of n_embd.
    rotated: channels of each query and key for positions that rotate, besides the D others; null is half a head.
    The scale is 1/sqrt(D + rotated). As the paper's smaller model, queries have no latent. With a cache, keys and
    values are computed from it for every new token: it saves memory, not time. `qk_norm` follows the rotation.
    """
    D = builder.dims.head_size
    return LatentAttention(
        builder, latent or max(1, min(4 * D, builder.dims.n_embd // 2)), rotated or max(2, D // 4 * 2)
    )


def differential_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """A head's queries and keys are split in halves."""
    if dims.head_size % 2:
        return [f"differential halves the {dims.head_size} channels of a head (n_embd / n_head): make it even"]
    return []


@attention.register(
    "differential", source="arXiv:2410.05258", can=("bias", "rotate", "value"), check=differential_limits
)
def differential(builder: Builder) -> nn.Module:
    """Two softmax maps in each head, of which the second is subtracted, to cancel attention to what is irrelevant.

    (1 - m) norm((softmax(q_1 k_1^T / sqrt(D/2)) - l softmax(q_2 k_2^T / sqrt(D/2))) v)   in each head, with
    l = exp(a_1 . b_1) - exp(a_2 . b_2) + m,  m = 0.8 - 0.6 exp(-0.3 layer) fixed, layer from 0

    q_i and k_i are halves of the head's channels. The paper compares it with half the heads of twice the width: halve
    n_head for that. It draws a and b, (D/2) each and shared by heads, at random; here they start at 0.1, with the
    same l. The norm is the model's, where the paper has RMSNorm.
    """
    return DifferentialAttention(builder)


class SizedAttention(nn.Module):
    """Multi-head attention whose number of heads and channels per head do not follow from n_embd."""

    def __init__(self, builder: Builder, n_head: int, qk_size: int, v_size: int) -> None:
        super().__init__()
        dims = builder.dims.model_copy(update={"n_head": n_head})
        self.n_head, self.dropout = n_head, dims.dropout
        rows = {"query": n_head * qk_size, "key": n_head * qk_size, "value": n_head * v_size}
        self.sizes = list(rows.values())
        self.c_attn = builder.linear(dims.n_embd, sum(self.sizes), rows=rows)
        self.c_proj = builder.linear(n_head * v_size, dims.n_embd, "residual_out")
        self.resid_dropout = nn.Dropout(dims.dropout)
        self.mask = builder.build("mask")
        self.scores = builder.at(dims=dims, width=qk_size).build("scores")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.position is not None
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).split(self.sizes, -1)
        )  # (B, H, T, D) each, with the sizes of heads
        q, k = self.scores.prepare(q, k, ctx)
        q, k = ctx.position.rotate(q, ctx, "q"), ctx.position.rotate(k, ctx, "k")
        dropout = self.dropout if self.training else 0.0
        y = attend(q, ctx.cached("k", k), ctx.cached("v", v), x, ctx, self.mask, self.scores, dropout=dropout)
        y = self.scores.finish(y.transpose(1, 2).flatten(-2), x, v)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


def sized_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """A bias by position is for the model's heads; an output gate for n_embd channels."""
    n_head, problems = options["n_head"] or dims.n_head, []
    schemes = [choice.name for choice in getattr(dims, "position", ())]
    biases = [name for name in schemes if SLOTS["position"][name].needs.get("attention") == "bias"]
    if biases and n_head % dims.n_head:
        problems.append(f"{biases[0]} has a bias for each of n_head {dims.n_head}; {n_head} is not a multiple of it")
    gated = any(choice.options.get("gate") for choice in getattr(dims, "scores", ()))
    if gated and n_head * (options["v_size"] or dims.head_size) != dims.n_embd:
        problems.append("scores with gate need n_head times v_size equal to n_embd")
    return problems


@attention.register(
    "sized",
    source="arXiv:2002.07028 (low-rank bottleneck of heads); x-transformers (dim_head, value_dim_head)",
    can=("bias", "rotate"),
    check=sized_limits,
    examples=({"n_head": 8, "qk_size": 4, "v_size": 6},),
)
def sized(
    builder: Builder,
    *,
    n_head: Annotated[int, Field(ge=1)] | None = None,
    qk_size: Annotated[int, Field(ge=2, multiple_of=2)] | None = None,
    v_size: Annotated[int, Field(ge=1)] | None = None,
) -> nn.Module:
    """Multi-head attention with sizes of its own, in each layer if you like.  (B, T, C) -> (B, T, C)

    softmax(q k^T / sqrt(qk_size)) v in each of n_head heads, concatenated and projected from n_head v_size to C

    n_head:  number of heads; null is the model's.
    qk_size: channels of each query and key; null is n_embd / model.n_head.
    v_size:  channels of each value; null is n_embd / model.n_head.
    With all of them null it is `mha`.
    """
    dims = builder.dims
    return SizedAttention(builder, n_head or dims.n_head, qk_size or dims.head_size, v_size or dims.head_size)


@attention.register("none", source="gpt2lab (a branch switched off)", can=("bias", "rotate", "value"))
def none(builder: Builder) -> None:
    """No attention in this layer, nor its norm: tokens exchange nothing here.

    x = x
    """
