"""Causal attention in blocks of queries, for half precision on CPU, where torch's fused kernel takes twice as long.

A block of queries only needs the keys up to its last query, which saves most of the masked half of the work. Products
are in half precision and the softmax in float32, as in the fused kernel; scores are float32, too. It needs more memory:
the weights of the softmax are saved for the backward pass.

Shapes: B batch, H heads, T tokens, D channels of queries and keys, E of values; N = B H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128
"""Queries in a block. Smaller blocks make small, slow products; of larger ones, a larger part is masked."""


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v with a causal mask; can be differentiated once.  -> (B, H, T, E)"""
    return Causal.apply(q, k, v, scale)  # type: ignore[no-untyped-call, no-any-return]


class Causal(torch.autograd.Function):
    """See `causal`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape = v.shape
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))  # (N, T, D), (N, T, D), (N, T, E)
        y, saved = torch.empty_like(v), []
        exact_q, exact_k = q.float(), k.float()
        for a, b in blocks(q.shape[-2]):
            ahead = torch.full((b - a, b), float("-inf"), device=q.device).triu(a + 1)
            scores = torch.add(ahead, exact_q[:, a:b] @ exact_k[:, :b].mT, alpha=scale)  # (N, b - a, b)
            weights = torch.softmax(scores, -1).to(q.dtype)
            y[:, a:b] = weights @ v[:, :b]
            saved.append(weights)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *saved)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        outer, d_y = d_y.shape[:-1], d_y.reshape(v.shape)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b), weights in zip(blocks(q.shape[-2]), saved, strict=True):
            d_weights = d_y[:, a:b] @ v[:, :b].mT
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, a:b] = d_scores @ k[:, :b]
            d_k[:, :b] += d_scores.mT @ q[:, a:b]
            d_v[:, :b] += weights.mT @ d_y[:, a:b]
        d_q, d_k, d_v = (d.view(*outer, -1) for d in (d_q.mul_(ctx.scale), d_k.mul_(ctx.scale), d_v))
        return d_q, d_k, d_v, None


def blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """First and end of each block of queries."""
    return ((a, min(a + QUERIES, tokens)) for a in range(0, tokens, QUERIES))
