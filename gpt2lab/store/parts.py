"""What a run kept of its loss by part, read back: anything that is no such record reads as nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt2lab.basics.text import clean

POSITION, FREQUENCY, DOCUMENT = "position", "frequency", "document"
DIVISIONS = (POSITION, FREQUENCY, DOCUMENT)


@dataclass(frozen=True)
class PartLosses:
    """One division of a final evaluation's targets: its groups, with the mean loss in nats and the targets of each.
    examples: what is in each group, or nothing."""

    groups: tuple[str, ...]
    losses: tuple[float, ...]
    targets: tuple[int, ...]
    examples: tuple[str, ...]


def read_parts(record: Mapping[str, Any] | None) -> dict[str, PartLosses]:
    """The divisions of `RunFolder.parts`, by name; without those that are damaged."""
    parts = (record or {}).get("parts")
    if not isinstance(parts, Mapping):
        return {}
    return {name: part for name in DIVISIONS if (part := _part(parts.get(name))) is not None}


def _part(written: Any) -> PartLosses | None:
    try:
        part = PartLosses(
            groups=tuple(clean(group) for group in written["groups"]),
            losses=tuple(float(loss) for loss in written["losses"]),
            targets=tuple(int(count) for count in written["targets"]),
            examples=tuple(clean(text) for text in written.get("examples", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    alike = 0 < len(part.groups) == len(part.losses) == len(part.targets)
    sound = all(map(math.isfinite, part.losses)) and all(count > 0 for count in part.targets)
    return part if alike and sound else None
