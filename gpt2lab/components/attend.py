"""Softmax attention, and the only place that chooses an attention kernel.

Shapes: B batch, H query heads, G key/value heads, T new tokens, S all tokens so far, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.components.blockwise import causal

if TYPE_CHECKING:
    from gpt2lab.components.context import ForwardContext
    from gpt2lab.components.scores import Scores


SHORT_KEYS = 512
"""Up to as many keys, attention on CPU under autocast does not use torch's fused kernel in half precision."""


@dataclass(frozen=True)
class Mask:
    """Which earlier tokens a token may attend to: the last `window` (None: all) and always the first `sinks`. With a
    `separator`, which begins a document, only tokens of its own document. Subclasses override `allowed`."""

    window: int | None = None
    sinks: int = 0
    separator: int | None = None

    def allowed(self, ctx: ForwardContext) -> Tensor:
        """-> (T, S) bool, or (B, 1, T, S) if documents are separated."""
        q, k = ctx.q_positions[:, None], ctx.k_positions[None]
        allowed = k <= q
        if self.window is not None:
            allowed &= (q - k < self.window) | (k < self.sinks)
        for documents in (ctx.documents, self.document_index(ctx)):
            if documents is not None:
                own = documents[:, -len(ctx.q_positions) :]
                allowed = allowed & (own[:, None, :, None] == documents[:, None, None, :])
        return allowed

    def is_causal(self, ctx: ForwardContext) -> bool:
        """Whether every token may attend to itself and all earlier tokens."""
        restricted = self.window is not None or self.separator is not None or ctx.documents is not None
        return not restricted and type(self).allowed is Mask.allowed

    def document_index(self, ctx: ForwardContext) -> Tensor | None:
        """The number of separators up to and including each token.  -> (B, S)"""
        if self.separator is None:
            return None
        name, begins = f"begins.{self.separator}", ctx.tokens == self.separator
        index: Tensor = ctx.once(name, lambda: ctx.cached(name, begins, dim=-1).cumsum(-1))
        return index


def attend(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, mask: Mask, scores: Scores, *, dropout: float = 0.0
) -> Tensor:
    """Softmax attention.  q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), G divides H -> (B, H, T, E)

    x (B, T, C) is the input of the attention. The bias of the layer's position scheme and that of `scores` are added to
    the scores. torch's fused kernel is used for everything that it supports (`Scores.fused`); flex_attention has no
    backward on CPU, so the rest is computed by `unfused_attention`.
    """
    heads, (T, S) = q.shape[1], (q.shape[-2], k.shape[-2])
    k, v = (
        part if part.shape[1] == heads else part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v)
    )
    scale = scores.factor(q, ctx)
    biases = [bias for bias in (position_bias(ctx, heads), scores.bias(q, k, x, ctx)) if bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    if ctx.observer is not None:
        ctx.observer.attention(ctx.depth, q, k, allowed_bias(ctx, mask, bias, torch.float32), scores, scale)
    if not scores.fused:
        return unfused_attention(q, k, v, allowed_bias(ctx, mask, bias, torch.float32), scores, scale, ctx, dropout)
    # is_causal aligns queries with the first keys, so with a cache (T < S) it would hide almost everything
    if bias is None and mask.is_causal(ctx) and T == S:
        return fused_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
    if bias is None and mask.is_causal(ctx) and T == 1:
        return fused_attention(q, k, v, dropout_p=dropout, scale=scale)
    return fused_attention(q, k, v, allowed_bias(ctx, mask, bias, q.dtype), dropout_p=dropout, scale=scale)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """torch's fused kernel, or a faster replacement. Shapes as in `attend`, with as many key as query heads.

    On CPU with few keys, the kernel is up to three times slower in half precision than in float32
    (docs/performance.md), so autocast is switched off for it.
    """
    if q.device.type != "cpu" or k.shape[-2] > SHORT_KEYS or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)
    with torch.autocast("cpu", enabled=False):
        if (
            q.dtype == k.dtype == v.dtype == torch.bfloat16
            and options.get("is_causal")
            and not options.get("dropout_p")
        ):
            return causal(q, k, v, options["scale"])
        bias = None if bias is None else bias.float()
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias, **options)
    return y.to(torch.get_autocast_dtype("cpu"))


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scores: Scores,
    scale: float,
    ctx: ForwardContext,
    dropout: float,
) -> Tensor:
    """Product, softcap, bias, weights, product, with the weights in float32. Shapes as in `attend`, G = H."""
    weights = scores.weights(score_map(q, k, bias, scores, scale), ctx)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(v.dtype) @ v


def score_map(q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> Tensor:
    """The input of the softmax, in float32 or float64: dot products, scaled, capped, biased.  -> (B, H, T, S)"""
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    return logits + bias


def position_bias(ctx: ForwardContext, heads: int) -> Tensor | None:
    """The bias of this layer's position scheme, computed once per forward pass.  -> (H, T, S) or None"""
    assert ctx.position is not None
    position = ctx.position
    bias: Tensor | None = ctx.once(f"bias.{position.key}", lambda: position.bias(ctx.q_positions, ctx.k_positions))
    if bias is not None and bias.shape[0] != heads:  # an attention with several score maps per head repeats them
        bias = bias.repeat_interleave(heads // bias.shape[0], dim=0)
    return bias


def allowed_bias(ctx: ForwardContext, mask: Mask, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mask and position bias as one additive tensor, -inf where attention is masked.  -> broadcasts to (B, H, T, S)"""

    def mask_bias() -> Tensor:
        allowed = mask.allowed(ctx)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))

    # layers share masks of equal fields; a subclass may have attributes that its text does not show
    name = mask if type(mask) is Mask else f"own.{id(mask)}"
    masked: Tensor = ctx.once(f"mask.{name}.{dtype}", mask_bias)
    return masked if bias is None else masked + bias.to(dtype)
