"""Windows of validation text: what is scored, the loss of each, and the document that it lies in, which text noise is
computed from.

Shapes: n windows, r targets, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.batches import Ids, TokenSequence
from gpt2lab.data.prepared import Prepared, split_record

READ_TOKENS = 1 << 22
DIGITS = 7  # losses are float32 per target: more digits would be noise


class Window(NamedTuple):
    """Input tokens [start, start + length); of the tokens that follow each of them, the last `scored` are targets."""

    start: int
    length: int
    scored: int


class Targets(NamedTuple):
    """Some targets. ids: (r,) the tokens. seen: (r,) how many tokens each prediction could see. places: (r,) where the
    targets stand in the validation split."""

    ids: Ids
    seen: Ids
    places: Ids


@dataclass(frozen=True, kw_only=True)
class WindowLosses:
    """Of each plain validation window, in their order: its mean loss in nats, its targets, and the unit that it belongs
    to, by index. `unit` is what that counts: documents, or the windows themselves where all lie in one document."""

    unit: Literal["document", "window"]
    losses: tuple[float, ...]
    targets: tuple[int, ...]
    units: tuple[int, ...]

    def record(self, key: str) -> dict[str, Any]:
        """As the run store keeps it beside the evaluation `key`."""
        return {"key": key, **asdict(self), "losses": [round(loss, DIGITS) for loss in self.losses]}


def batches_of(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """At most `size` neighbouring windows of one length at a time."""
    for _, group in itertools.groupby(windows, key=lambda window: window.length):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def targets_of(batch: Sequence[Window], wanted: NDArray[np.int64]) -> Targets:
    """The targets (n, scored) of windows of one length, one after another."""
    length, scored = batch[0].length, batch[0].scored
    seen = np.arange(length - scored + 1, length + 1)  # (scored,)
    places = np.array([window.start for window in batch])[:, None] + seen  # (n, scored)
    return Targets(ids=wanted.flatten(), seen=np.tile(seen, len(batch)), places=places.flatten())


def by_document(
    losses: Sequence[float],
    targets: Sequence[int],
    starts: Sequence[int],
    documents: NDArray[np.int64] | None,
) -> WindowLosses:
    """Windows with the document that each starts in.

    starts: (n,) first token of each window. documents: first token of each document, rising from 0; None for one.
    """
    found = range(len(starts)) if documents is None else np.searchsorted(documents, starts, side="right") - 1
    units = tuple(map(int, found))
    unit: Literal["document", "window"] = "document"
    if documents is None or len(set(units)) < 2:
        unit, units = "window", tuple(range(len(starts)))
    return WindowLosses(unit=unit, losses=tuple(losses), targets=tuple(targets), units=units)


def validation_documents(data: Prepared) -> NDArray[np.int64] | None:
    """First token of each document in the validation split; None when it is all one document.

    Documents are those of the prepared data's manifest, or, when that lists one only, what its separators divide.
    """
    lengths = [int(one["tokens"]) for one in split_record(data, "validation")["documents"] if one["tokens"]]
    if len(lengths) > 1:
        return np.cumsum([0, *lengths[:-1]])
    separator = data.manifest["separator"]
    return None if separator is None else divided(data.validation, int(separator))


def divided(tokens: TokenSequence, separator: int) -> NDArray[np.int64] | None:
    """First token of each document in `tokens`, each but the last ending in `separator`; None when there is one."""
    ends = [
        np.flatnonzero(tokens[start : start + READ_TOKENS] == separator) + start
        for start in range(0, len(tokens), READ_TOKENS)
    ]
    starts = np.concatenate([np.zeros(1, np.int64), *(end + 1 for end in ends)])
    starts = starts[starts < len(tokens)]
    return starts if len(starts) > 1 else None
