"""Time of a training by phase.

A GPU works asynchronously, so there phases are marked by events on its stream, which are read later without waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

OF_A_STEP = ("data", "forward", "backward", "optimizer")
PHASES = (*OF_A_STEP, "evaluation", "saving")
PENDING_MARKS = 512


class Clock:
    """Seconds by phase on `device`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase = "start"
        """The phase that began last."""
        self.entered = 0
        """Phases of steps begun so far, which shows which of several ranks is ahead."""
        self._on_stream = device is not None and device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the context to `phase`."""
        self.phase = phase
        self.entered += phase in OF_A_STEP
        if self._on_stream:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._marks.append((phase, start, end))
            if len(self._marks) > PENDING_MARKS:
                self._read(self._marks[: PENDING_MARKS // 2])  # old enough to be complete
                del self._marks[: PENDING_MARKS // 2]
            return
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def resume(self, seconds: Mapping[str, float]) -> None:
        """Continue from the times in a checkpoint."""
        self.seconds |= {phase: float(seconds[phase]) for phase in PHASES if phase in seconds}

    def split(self) -> dict[str, float]:
        """Seconds of every phase so far; on a GPU this waits for its queue."""
        self._read(self._marks)
        self._marks.clear()
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}

    def _read(self, marks: list[tuple[str, Any, Any]]) -> None:
        for phase, start, end in marks:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1000
