"""One forward pass: what all layers share while it lasts, and the cache that joins several passes into one.

Shapes: B batch, T new tokens, S tokens seen before, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2lab.components.position import Position
    from gpt2lab.components.scores import Scores
    from gpt2lab.components.stack import Across


class Watch(Protocol):
    """Looks on during a forward pass and changes nothing. `depth` counts block calls from 0."""

    def stream(self, depth: int, x: Tensor) -> None:
        """The stream as the block call hands it on, (B, T, C) or with several streams."""
        ...

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """What `score_map` needs, once per attention kernel; bias is -inf where a token may not look."""
        ...


class Cache:
    """What earlier tokens left behind, so that new ones need no second look at them.

    `rows` grow along time (keys, values); `last` holds the newest token's row (for parts that look one token back).
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.seen = 0
        self._buffers: dict[str, Tensor] = {}

    def append(self, name: str, x: Tensor, dim: int) -> Tensor:
        """Put `x` behind the rows of that name, along time `dim`; -> all of them.

        They lie in a buffer that is made twice as long when it is full: joining them anew for each token would copy
        everything each time. Where gradients are wanted they are joined, as a buffer's rows are written in place.
        """
        before = self.rows.get(name)
        if x.requires_grad or (before is not None and before.requires_grad):
            self._buffers.pop(name, None)
            self.rows[name] = x if before is None else torch.cat([before, x], dim)
            return self.rows[name]
        seen = 0 if before is None else before.shape[dim]
        buffer, end = self._buffers.get(name), seen + x.shape[dim]
        if buffer is None or buffer.shape[dim] < end:
            shape = list(x.shape)
            shape[dim] = max(end, 2 * seen)
            buffer = self._buffers[name] = x.new_empty(shape)
            if before is not None:
                buffer.narrow(dim, 0, seen).copy_(before)
        buffer.narrow(dim, seen, x.shape[dim]).copy_(x)
        self.rows[name] = buffer.narrow(dim, 0, end)
        return self.rows[name]


class Step:
    """One model call. Made once, handed to every layer.

    tokens:      (B, T) int64.
    q_positions: (T,) positions of these tokens; k_positions: (S + T,) of all tokens that they may look at.
    documents:   (B, S + T) document of each token, or None: attention does not cross documents when given.
    depth:       index of the block call, so that blocks with shared weights keep separate cache rows.
    carry:       values that travel across layers (skips, the first layer's v).
    losses:      auxiliary losses by name, added to the training objective.
    score_factor: on every attention score, beside what its own layer says.
    watch:       who looks on, if anyone; no part of the model needs to know but those that show it something.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        stack: Sequence[Across] = (),
        score_factor: float = 1.0,
    ) -> None:
        seen = cache.seen if cache is not None else 0
        self.tokens, self.cache, self.stack = tokens, cache, stack
        self.k_positions = torch.arange(seen + tokens.shape[1], device=tokens.device)
        self.q_positions = self.k_positions[seen:]
        self.depth, self.score_factor = 0, score_factor
        self.position: Position | None = None
        self.carry: dict[str, Any] = {}
        self.losses: dict[str, Tensor] = {}
        self.watch: Watch | None = None
        self._once: dict[str, Any] = {}
        self.documents = None if documents is None else self.keep("documents", documents, dim=-1)

    def enter(self, depth: int, position: Position) -> None:
        """Move on to the next block call and the position scheme of its layer."""
        self.depth, self.position = depth, position

    def keep(self, name: str, x: Tensor, dim: int = -2) -> Tensor:
        """Append `x` along time `dim` to what this depth has kept under `name`; -> everything. Without a cache: x."""
        return x if self.cache is None else self.cache.append(f"{self.depth}.{name}", x, dim)

    def shift(self, name: str, x: Tensor) -> Tensor:
        """Every token's predecessor row, zeros before the first token.  (B, T, ...) -> (B, T, ...)"""
        first = torch.zeros_like(x[:, :1])
        if self.cache is not None:
            key = f"{self.depth}.{name}"
            first = self.cache.last.get(key, first)
            self.cache.last[key] = x[:, -1:]
        return torch.cat([first, x[:, :-1]], 1)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, computed at most once during this call: masks, rotation tables and biases serve all layers."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def value(self, v: Tensor) -> Tensor:
        """The values of this layer after every part of the stack had its say.  (B, H, T, D) -> (B, H, T, D)"""
        for part in self.stack:
            v = part.value(self.depth, v, self)
        return v
