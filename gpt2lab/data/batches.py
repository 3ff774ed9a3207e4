"""Batches as a pure function of (seed, step): the same for every arm, on any number of ranks, after any resume.

N tokens, T block size, n sequences of one rank
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2lab.errors import ConfigError

Ids = NDArray[np.int64]


class TokenSequence(Protocol):
    """A sequence of tokens: `prepared.Tokens`, or an int64 array."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Ids: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Training batches: each epoch has all non-overlapping blocks of T tokens once, in a new order.

    tokens:          the training tokens.
    block_size:      T, tokens per sequence.
    batch_sequences: sequences per optimizer step, over all ranks.
    seed:            the data seed, at least 0.

    Each epoch has its own offset, so that borders between blocks move and every token is used. Raises ConfigError if
    there are fewer than T + 1 tokens.
    """

    tokens: TokenSequence
    block_size: int
    batch_sequences: int
    seed: int

    def __post_init__(self) -> None:
        assert self.block_size > 0 and self.batch_sequences > 0 and self.seed >= 0, self
        if len(self.tokens) < self.block_size + 1:
            raise ConfigError(
                f"training needs at least {self.block_size + 1} tokens, and there are {len(self.tokens)}",
                where="data.corpus",
                hint="more text, or a smaller block_size",
            )

    @property
    def epoch_blocks(self) -> int:
        """Blocks per epoch: one fewer than fit, so that every offset below T is possible; at least one."""
        return max(1, (len(self.tokens) - self.block_size) // self.block_size)

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[Ids, Ids]:
        """Inputs and targets of one rank at `step`, counted from 0.  -> (n, T), (n, T) int64

        Ranks have neighbouring rows of one global batch. Raises ConfigError if it cannot be divided evenly.
        """
        assert step >= 0 and 0 <= rank < world, (step, rank, world)
        n, remainder = divmod(self.batch_sequences, world)
        if remainder:
            raise ConfigError(
                f"{self.batch_sequences} sequences per step cannot be divided evenly among {world} ranks",
                where="training.batch_tokens",
                hint=f"a batch of a multiple of {world * self.block_size} tokens",
            )
        first = step * self.batch_sequences + rank * n
        rows = np.stack([self._block(first + row) for row in range(n)])  # (n, T + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def where(self, step: int) -> dict[str, Any]:
        """The text of a step: its epoch and the first token of each sequence, over all ranks."""
        first = step * self.batch_sequences
        starts = [self._start(first + row) for row in range(self.batch_sequences)]
        return {"seed": self.seed, "epoch": first // self.epoch_blocks, "first_tokens": starts}

    def _block(self, index: int) -> Ids:
        """The index-th sequence since the start of training, with the token after it.  -> (T + 1,)"""
        start = self._start(index)
        return self.tokens[start : start + self.block_size + 1]

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.epoch_blocks)
        slack = len(self.tokens) - 1 - self.epoch_blocks * self.block_size
        offset, order = epoch_order(self.seed, epoch, self.epoch_blocks, slack)
        return offset + int(order[position]) * self.block_size


@lru_cache(maxsize=2)  # a batch spans two epochs at a border
def epoch_order(seed: int, epoch: int, blocks: int, largest_offset: int) -> tuple[int, Ids]:
    """An epoch's offset, from 0 to `largest_offset`, and the order of its blocks, a permutation.  -> (blocks,)"""
    # Raw bits and a stable sort: numpy guarantees the stream of bit generators, but not that of `permutation`.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(blocks + 1)
    order = np.argsort(raw[1:], kind="stable")
    order.flags.writeable = False
    return int(raw[0]) % (largest_offset + 1), order
