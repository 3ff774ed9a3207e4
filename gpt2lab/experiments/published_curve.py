"""The published loss curve of GPT-2 124M, and departures of a training from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SOURCE = "llm.c's reproduction of GPT-2 124M (KellerJordan/modded-nanogpt, records/track_1_short/2024-10-13_llmc)"
BATCH_TOKENS, STEPS = 524_288, 19_560
FINAL = (3.27, 3.29)
"""Range of the final validation loss of reproductions on FineWeb 10B."""

HELLASWAG = 0.30
"""Their final normalised accuracy by build-nanogpt's rules: 0.299; OpenAI's weights have 0.2955."""

# step -> validation loss in nats on FineWeb
CURVE = {
    0: 11.009, 250: 6.171, 500: 5.374, 750: 4.710, 1000: 4.317, 1500: 4.006, 2000: 3.859, 3000: 3.697, 4000: 3.618,
    6000: 3.507, 8000: 3.443, 10000: 3.392, 12000: 3.351, 14000: 3.315, 16000: 3.288, 18000: 3.275, 19500: 3.272,
}  # fmt: skip

CAUSES = {
    "above": "a batch, rate or warm-up other than the recipe's; batches that repeat or are not shuffled; weights not "
    "scaled at the start; weight decay on norms; dropout; documents that were cut",
    "below": "validation text that is also in training; a mask that lets tokens look ahead; other validation text",
}


@dataclass(frozen=True)
class Departure:
    """A validation loss outside the tolerance of the published curve."""

    step: int
    loss: float
    published: float
    tolerance: float

    def __str__(self) -> str:
        off = self.loss - self.published
        causes = CAUSES["above" if off > 0 else "below"]
        expected = f"{self.published:.3f} +- {self.tolerance:.2f}"
        return (
            f"step {self.step}: validation loss {self.loss:.3f}, published {expected} ({off:+.3f}). "
            f"Usual causes: {causes}"
        )


def tolerance(step: int) -> float:
    """Difference in nats at `step` between correct reproductions with other seeds and builds."""
    return 0.10 if step < 500 else 0.05 if step <= 2000 else 0.02


def departures(rows: Iterable[Mapping[str, Any]]) -> list[Departure]:
    """Validation losses of a journal at published steps that are outside the tolerance."""
    result = []
    for row in rows:
        loss, published = row["metrics"].get("val/loss"), CURVE.get(row["step"])
        if loss is not None and published is not None and not abs(loss - published) <= tolerance(row["step"]):
            result.append(Departure(row["step"], loss, published, tolerance(row["step"])))
    return result
