"""Where a training's time goes, by phase.

A GPU computes behind the program's back, so there phases are marked by events on its stream and read later, when
nobody has to wait for them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

OF_A_STEP = ("data", "forward", "backward", "optimizer")
PHASES = (*OF_A_STEP, "evaluation", "saving")
MANY = 512  # marks that wait to be read


class Clock:
    """Seconds by phase on `device`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase = "start"
        """the last one that began"""
        self.entered = 0
        """phases of a step begun so far, which tells who of several ranks is farthest"""
        self._on_stream = device is not None and device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside as `phase`."""
        self.phase = phase
        self.entered += phase in OF_A_STEP
        if self._on_stream:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._marks.append((phase, start, end))
            if len(self._marks) > MANY:
                self._read(self._marks[: MANY // 2])  # these lie far enough back to be over
                del self._marks[: MANY // 2]
            return
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def resume(self, seconds: Mapping[str, float]) -> None:
        """Count on from what a checkpoint says."""
        self.seconds |= {phase: float(seconds[phase]) for phase in PHASES if phase in seconds}

    def split(self) -> dict[str, float]:
        """Seconds of every phase so far; on a GPU this waits for it."""
        self._read(self._marks)
        self._marks.clear()
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}

    def _read(self, marks: list[tuple[str, Any, Any]]) -> None:
        for phase, start, end in marks:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1000
