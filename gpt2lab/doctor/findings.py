"""What an examination says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a sound training does not show.

    evidence: a sentence with the numbers.  causes: what usually lies behind it, the commonest first.  severity: `error`
    where the run's result cannot be trusted, `warning` where it is probably not what was meant.
    """

    name: str
    severity: Severity
    evidence: str
    causes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "causes": list(self.causes)}


class NotExamined(Exception):
    """Why a check cannot say anything of this run: no failure, and no clean bill either."""
