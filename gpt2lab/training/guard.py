"""Steps with numbers that are not finite, and losses that jump.

The guard's state is part of the checkpoint, so that a resumed training decides like an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2lab.errors import NumericsFault

NonFinite = Literal["stop", "skip"]
WINDOW, FEWEST, SIGMAS = 128, 32, 6.0  # as in OLMo-core's skip-step optimizer: 6 sd over the last 128 steps
MOST_SPIKES = 100  # recorded


class Diverged(NumericsFault):
    """A loss or gradient that is not finite, once or too often in a row. The weights are those before `step`,
    counted from 1."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float, in_a_row: int = 1) -> None:
        often = f", {in_a_row} steps in a row were skipped" if in_a_row > 1 else ""
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}{often}; the weights are unchanged",
            where="training",
            hint="a lower optim.lr, a longer optim.warmup_steps, or optim.grad_clip",
        )
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr


@dataclass
class Guard:
    """Counters and recent losses of a training.

    skipped:  steps without an update so far.  in_a_row: skipped steps since the last update.
    recent:   the last losses in nats.  spikes: {"step", "loss", "threshold"} of losses that jumped.
    """

    skipped: int = 0
    in_a_row: int = 0
    recent: list[float] = field(default_factory=list)
    spikes: list[dict[str, float]] = field(default_factory=list)

    def skip(self, step: int, loss: float, grad_norm: float, lr: float, most_in_a_row: int) -> None:
        """Record a step that was skipped. Raises Diverged at `most_in_a_row`."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= most_in_a_row:
            raise Diverged(step, loss, grad_norm, lr, self.in_a_row)

    def accept(self, step: int, loss: float) -> float | None:
        """Record a step that was taken. Returns how far its loss is above the mean of the last losses, in standard
        deviations, if that is a spike."""
        self.in_a_row = 0
        jump = None
        if len(self.recent) >= FEWEST:
            mean = math.fsum(self.recent) / len(self.recent)
            sd = math.sqrt(math.fsum((x - mean) ** 2 for x in self.recent) / len(self.recent))
            threshold = mean + SIGMAS * sd
            if loss > threshold:
                jump = (loss - mean) / sd if sd > 0 else math.inf
                if len(self.spikes) < MOST_SPIKES:
                    self.spikes.append({"step": step, "loss": loss, "threshold": threshold})
        self.recent = [*self.recent[1 - WINDOW :], loss]
        return jump

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which JSON stores exactly."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": self.recent, "spikes": self.spikes}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.skipped, self.in_a_row = int(saved["skipped"]), int(saved["in_a_row"])
        self.recent, self.spikes = list(saved["recent"]), list(saved["spikes"])
