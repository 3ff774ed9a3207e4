"""The only place that picks an attention kernel.

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
    from gpt2lab.components.scores import Scores
    from gpt2lab.components.step import Step


SHORT = 512
"""Keys up to which attention on CPU goes another way under autocast."""


@dataclass(frozen=True)
class Mask:
    """Which earlier tokens a token may look at: the last `window` (None: all) and always the first `sinks`; of its own
    document only, where a token `separator` begins one."""

    window: int | None = None
    sinks: int = 0
    separator: int | None = None

    def allowed(self, step: Step) -> Tensor:
        """-> (T, S) bool, or (B, 1, T, S) when documents are told apart."""
        q, k = step.q_positions[:, None], step.k_positions[None]
        allowed = k <= q
        if self.window is not None:
            allowed &= (q - k < self.window) | (k < self.sinks)
        for documents in (step.documents, self.begun(step)):
            if documents is not None:
                here = documents[:, -len(step.q_positions) :]
                allowed = allowed & (here[:, None, :, None] == documents[:, None, None, :])
        return allowed

    def begun(self, step: Step) -> Tensor | None:
        """How many documents have begun up to each token, its own included.  -> (B, S)"""
        if self.separator is None:
            return None
        name, begins = f"begins.{self.separator}", step.tokens == self.separator
        found: Tensor = step.once(name, lambda: step.keep(name, begins, dim=-1).cumsum(-1))
        return found


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, mask: Mask, scores: Scores, *, dropout: float = 0.0) -> Tensor:
    """Softmax attention.  q (B, H, T, D), k and v (B, G, S, D), G divides H -> (B, H, T, D)

    The bias of the layer's position scheme is added to the scores. The fused kernel serves whatever it can express;
    softcap and sink logits take the written-out form, because the fused kernel has neither and flex_attention has no
    backward on CPU.
    """
    heads, (T, S) = q.shape[1], (q.shape[-2], k.shape[-2])
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scale = (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale) * step.score_factor
    bias = position_bias(step, heads)
    if step.watch is not None:
        step.watch.attention(step.depth, q, k, allowed_bias(step, mask, bias, torch.float32), scores, scale)
    whole = mask.window is None and mask.separator is None and step.documents is None
    if scores.softcap is None and scores.sink is None:
        # is_causal aligns queries with the first keys, so with a cache (T < S) it would hide almost everything
        if bias is None and whole and T == S:
            return fused(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
        if bias is None and whole and T == 1:
            return fused(q, k, v, dropout_p=dropout, scale=scale)
        combined = allowed_bias(step, mask, bias, q.dtype)
        return fused(q, k, v, combined, dropout_p=dropout, scale=scale)
    return written_out(q, k, v, allowed_bias(step, mask, bias, torch.float32), scores, scale, dropout)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
    """torch's fused kernel, or what takes its place where that is faster. Shapes as in `attend`, all heads alike.

    On CPU the kernel takes half precision up to three times as long as float32 where there are few keys
    (docs/performance.md), so there autocast is left for its time.
    """
    if q.device.type != "cpu" or k.shape[-2] > SHORT or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **how)
    with torch.autocast("cpu", enabled=False):
        if q.dtype == k.dtype == v.dtype == torch.bfloat16 and how.get("is_causal") and not how.get("dropout_p"):
            return causal(q, k, v, how["scale"])
        bias = None if bias is None else bias.float()
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias, **how)
    return y.to(torch.get_autocast_dtype("cpu"))


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scores: Scores, scale: float, dropout: float) -> Tensor:
    """Matmul, softcap, bias, softmax, matmul, with the softmax in float32. Shapes as in `attend`."""
    logits = score_map(q, k, bias, scores, scale)
    if scores.sink is not None:
        sink = scores.sink.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(v.dtype) @ v


def score_map(q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> Tensor:
    """What the softmax is taken of, in float32: dot products, scaled, capped, biased.  -> (B, H, T, S)"""
    logits = (q @ k.mT).float() * scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    return logits + bias


def position_bias(step: Step, heads: int) -> Tensor | None:
    """The bias of this layer's position scheme, once per call.  -> (H, T, S) or None"""
    assert step.position is not None
    position = step.position
    bias: Tensor | None = step.once(f"bias.{position.key}", lambda: position.bias(step.q_positions, step.k_positions))
    if bias is not None and bias.shape[0] != heads:  # an attention with more score maps than heads shares them evenly
        bias = bias.repeat_interleave(heads // bias.shape[0], dim=0)
    return bias


def allowed_bias(step: Step, mask: Mask, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mask and position bias as one additive tensor: -inf where a token may not look.  -> broadcasts to (B, H, T, S)"""

    def closed() -> Tensor:
        allowed = mask.allowed(step)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))

    bars: Tensor = step.once(f"mask.{mask}.{dtype}", closed)
    return bars if bias is None else bars + bias.to(dtype)
