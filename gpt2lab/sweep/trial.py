"""A trial that is at work in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpt2lab.events import RunProgress
from gpt2lab.planning.runs import Run
from gpt2lab.planning.search import Search
from gpt2lab.sweep.slots import Slots, Turn
from gpt2lab.tracking.journal import Tail


@dataclass
class Trial:
    """One turn of a slot that is at work here: its runs one after another, the first of which pruning looks at."""

    label: str
    search: Search
    slots: Slots
    turn: Turn
    settings: dict[str, Any]
    runs: tuple[Run, ...]
    views: list[RunProgress]
    tail: Tail
    at: int = 0
    values: dict[str, float] = field(default_factory=dict)
    trained: bool = False
    """whether anything was trained for it here"""
    cut: int | None = None
    """the step at which pruning ended it"""
    would_cut: int | None = None
    """the step at which pruning would have ended it, where it is audited"""
    lost: bool = False
    """whether somebody else has it, who took this worker for dead"""
    begun: bool = False
    """whether its present run was given to the executor"""

    @property
    def run(self) -> Run:
        """The one at work, or next."""
        return self.runs[self.at]
