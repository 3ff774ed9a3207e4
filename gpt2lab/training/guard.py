"""The numerics watch: steps whose numbers are not finite, and losses that jump.

What it remembers is part of the checkpoint, so that a resumed training decides as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2lab.errors import NumericsFault

NonFinite = Literal["stop", "skip"]
WINDOW, FEWEST, SIGMAS = 128, 32, 6.0  # as OLMo-core's skip-step optimizer has it: 6 sd over the last 128 steps
MOST_SPIKES = 100  # are remembered; more say nothing new


class Diverged(NumericsFault):
    """A loss or gradient that is not finite, once or too often in a row. The weights are still those before `step`,
    counted from 1."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float, in_a_row: int = 1) -> None:
        often = f", {in_a_row} steps in a row were skipped" if in_a_row > 1 else ""
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}{often}; the weights were left as they were",
            where="training",
            hint="a lower optim.lr, a longer optim.warmup_steps, or optim.grad_clip",
        )
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr


@dataclass
class Guard:
    """What a training remembers of its numbers.

    skipped:  steps without an update so far.  in_a_row: of these, the last ones without a good step between.
    recent:   the last losses in nats.  spikes: {"step", "loss", "threshold"} of losses that jumped.
    """

    skipped: int = 0
    in_a_row: int = 0
    recent: list[float] = field(default_factory=list)
    spikes: list[dict[str, float]] = field(default_factory=list)

    def bad(self, step: int, loss: float, grad_norm: float, lr: float, most_in_a_row: int) -> None:
        """Note a step that was skipped because its numbers are not finite. Raises Diverged at `most_in_a_row`."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= most_in_a_row:
            raise Diverged(step, loss, grad_norm, lr, self.in_a_row)

    def good(self, step: int, loss: float) -> float | None:
        """Note a step that was taken; -> its distance above the mean of the last losses in their standard deviations,
        where that makes it a spike."""
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
        """Plain numbers, which JSON carries exactly."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": self.recent, "spikes": self.spikes}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.skipped, self.in_a_row = int(saved["skipped"]), int(saved["in_a_row"])
        self.recent, self.spikes = list(saved["recent"]), list(saved["spikes"])
