"""What all layers share during one forward pass, and the cache that lets several passes continue one sequence.

Shapes: B batch, T new tokens, S all tokens so far (cached and new), C channels, H heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2lab.components.position import Position
    from gpt2lab.components.scores import Scores
    from gpt2lab.components.stack import CrossLayer


class Observer(Protocol):
    """Receives intermediate values of a forward pass without changing them. `depth` counts block calls from 0."""

    def stream(self, depth: int, x: Tensor) -> None:
        """The residual stream after a block, (B, T, C), or with several streams."""
        ...

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """The arguments of `score_map`, once per attention kernel; bias is -inf where attention is masked."""
        ...


class Cache:
    """Values of earlier tokens, so that a pass over new tokens need not compute them again.

    rows:   tensors that grow along time, such as keys and values.
    last:   the newest token's row, for components that look one token back.
    length: number of cached tokens.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.length = 0
        self._buffers: dict[str, Tensor] = {}

    def append(self, name: str, x: Tensor, dim: int) -> Tensor:
        """Append `x` along time `dim` to the rows called `name`, and return all of them.

        They are a view of a buffer that doubles when it is full: concatenating for every token would copy everything
        each time. With gradients they are concatenated, because rows of a buffer are written in place.
        """
        earlier = self.rows.get(name)
        if x.requires_grad or (earlier is not None and earlier.requires_grad):
            self._buffers.pop(name, None)
            self.rows[name] = x if earlier is None else torch.cat([earlier, x], dim)
            return self.rows[name]
        start = 0 if earlier is None else earlier.shape[dim]
        buffer, end = self._buffers.get(name), start + x.shape[dim]
        if buffer is None or buffer.shape[dim] < end:
            shape = list(x.shape)
            shape[dim] = max(end, 2 * start)
            buffer = self._buffers[name] = x.new_empty(shape)
            if earlier is not None:
                buffer.narrow(dim, 0, start).copy_(earlier)
        buffer.narrow(dim, start, x.shape[dim]).copy_(x)
        self.rows[name] = buffer.narrow(dim, 0, end)
        return self.rows[name]


class ForwardContext:
    """One forward pass, as every layer receives it.

    tokens:       (B, T) int64.
    q_positions:  (T,) positions of these tokens.  k_positions: (S,) positions of all tokens that they may attend to.
    documents:    (B, S) document of each token, or None; attention stays within a document where it is given.
    depth:        index of the block call. Blocks with shared weights have separate cache rows because of it.
    carry:        values passed from one layer to another, such as skips or the first layer's v.
    losses:       auxiliary losses by name, added to the training objective.
    score_factor: factor on every attention score, besides the scale of the layer.
    progress:     () share of the training done, from 0 to 1; 1 outside training.
    observer:     receives intermediate values, if there is one.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        stack: Sequence[CrossLayer] = (),
        score_factor: float = 1.0,
        progress: Tensor | None = None,
    ) -> None:
        start = cache.length if cache is not None else 0
        self.tokens, self.cache, self.stack = tokens, cache, stack
        self.k_positions = torch.arange(start + tokens.shape[1], device=tokens.device)
        self.q_positions = self.k_positions[start:]
        self.depth, self.score_factor = 0, score_factor
        self.progress = torch.ones((), device=tokens.device) if progress is None else progress
        self.position: Position | None = None
        self.carry: dict[str, Any] = {}
        self.losses: dict[str, Tensor] = {}
        self.observer: Observer | None = None
        self._shared: dict[str, Any] = {}
        self.documents = None if documents is None else self.cached("documents", documents, dim=-1)

    def enter(self, depth: int, position: Position) -> None:
        """Begin the next block call, whose layer uses `position`."""
        self.depth, self.position = depth, position

    def cached(self, name: str, x: Tensor, dim: int = -2) -> Tensor:
        """`x` after the rows of earlier tokens that this block call has cached under `name`, along time `dim`; `x`
        itself without a cache."""
        return x if self.cache is None else self.cache.append(f"{self.depth}.{name}", x, dim)

    def previous(self, name: str, x: Tensor) -> Tensor:
        """For every token the row of the token before it, zeros for the first of a text, and of a document where
        `documents` are given.  (B, T, ...) -> (B, T, ...)"""
        first = torch.zeros_like(x[:, :1])
        if self.cache is not None:
            key = f"{self.depth}.{name}"
            first = self.cache.last.get(key, first)
            self.cache.last[key] = x[:, -1:]
        rows = torch.cat([first, x[:, :-1]], 1)
        if self.documents is None:
            return rows
        changes = self.documents.diff(dim=1, prepend=self.documents[:, :1])[:, -x.shape[1] :] != 0
        return rows.masked_fill(changes.view(*changes.shape, *(1 for _ in x.shape[2:])), 0)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, called once per forward pass: all layers share masks, rotation tables and biases."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def mix_values(self, v: Tensor) -> Tensor:
        """This layer's attention values after every cross-layer part has changed them.  (B, H, T, D) -> the same"""
        for part in self.stack:
            v = part.mix_values(self.depth, v, self)
        return v
