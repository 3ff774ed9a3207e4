"""Causal attention in blocks of queries, for half precision on CPU, where torch's fused kernel takes twice as long.

A block of queries needs the keys up to its own last one and no later ones, so half of the work that the mask would
throw away is never done. Products are in half precision and softmax in float32, as in the fused kernel; scores are
computed in float32, too. The price is memory: the weights of the softmax are kept for the way back.

Shapes: B batch, H heads, T tokens, D channels per head; N = B H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128
"""In a block: fewer make small, slow products, and more of them cross the diagonal."""


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v where no token looks ahead; can be differentiated once.  (B, H, T, D) each -> the same"""
    return Causal.apply(q, k, v, scale)  # type: ignore[no-untyped-call, no-any-return]


class Causal(torch.autograd.Function):
    """See `causal`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape = q.shape
        q, k, v = (x.reshape(-1, *shape[-2:]) for x in (q, k, v))  # (N, T, D)
        y, kept = torch.empty_like(q), []
        exact_q, exact_k = q.float(), k.float()
        for a, b in blocks(shape[-2]):
            ahead = torch.full((b - a, b), float("-inf"), device=q.device).triu(a + 1)
            scores = torch.add(ahead, exact_q[:, a:b] @ exact_k[:, :b].mT, alpha=scale)  # (N, b - a, b)
            weights = torch.softmax(scores, -1).to(q.dtype)
            y[:, a:b] = weights @ v[:, :b]
            kept.append(weights)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *kept)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        shape, by_y = by_y.shape, by_y.reshape(q.shape)
        by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b), weights in zip(blocks(shape[-2]), kept, strict=True):
            by_weights = by_y[:, a:b] @ v[:, :b].mT
            by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_q[:, a:b] = by_scores @ k[:, :b]
            by_k[:, :b] += by_scores.mT @ q[:, a:b]
            by_v[:, :b] += weights.mT @ by_y[:, a:b]
        return by_q.mul_(ctx.scale).view(shape), by_k.mul_(ctx.scale).view(shape), by_v.view(shape), None


def blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """First and end of each block of queries."""
    return ((a, min(a + QUERIES, tokens)) for a in range(0, tokens, QUERIES))
