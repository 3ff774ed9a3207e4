"""How the trainings of a study went, as their journals and results tell: gradients, activations, scores, logits,
updates, jumps of the loss, skipped steps, and where the time went. Description only: no word is decided here.

Older runs lack some of it or all, and what is missing is `None` or empty. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.errors import DataFault
from gpt2lab.results import Study, StudyRun
from gpt2lab.store import Row, Store
from gpt2lab.text import clean, quantity

GRADIENT, SCORES, LOGITS = "train/grad_norm", "diag/attention_logit_max", "diag/logit_rms"
ACTIVATIONS, MOVED = "diag/activation_rms", "diag/update_ratio"  # by block call, and by group of weights
OVER_TIME = (GRADIENT, SCORES, LOGITS)
PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "other")

Curve = tuple[list[float], list[float]]
"""(tokens, value), one entry per row that has it."""


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """One run. `depth`: rms of the residual stream behind each block call, and `moved`: update ratio by group of
    weights ("" for all), both of the last row that has them."""

    run: StudyRun
    curves: Mapping[str, Curve] = field(default_factory=dict)
    depth: Sequence[float] = ()
    moved: Mapping[str, float] = field(default_factory=dict)

    def last(self, metric: str) -> float | None:
        """The last value of a metric over time."""
        values = self.curves.get(metric, ([], []))[1]
        return values[-1] if values else None

    def largest(self, metric: str) -> float | None:
        """Its largest finite value."""
        return max((v for v in self.curves.get(metric, ([], []))[1] if math.isfinite(v)), default=None)

    @property
    def watched(self) -> bool:
        """Whether the inside of the model was measured."""
        return bool(self.depth) or any(self.curves.get(metric, ((),))[0] for metric in (SCORES, LOGITS))

    @property
    def skipped(self) -> int | None:
        """Steps that were not taken because their numbers were not finite."""
        return _whole(self.run.result.get("skipped_steps"))

    @property
    def spikes(self) -> list[Mapping[str, Any]] | None:
        """Losses that jumped: step, loss, threshold."""
        found = self.run.result.get("spikes")
        return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else None

    @property
    def divergence(self) -> Mapping[str, Any]:
        """Where it broke off: step, lr, loss, grad_norm, batch; empty when it did not."""
        found = self.run.result.get("divergence")
        return found if isinstance(found, Mapping) else {}

    @property
    def time(self) -> dict[str, float]:
        """Seconds by phase; empty when the run did not say."""
        found = self.run.result.get("time")
        return {phase: as_number(found.get(phase, 0)) for phase in PHASES} if isinstance(found, Mapping) else {}

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the model's FLOPs took."""
        value = as_number(self.run.result.get("mfu"))
        return value if math.isfinite(value) else None

    @property
    def peak(self) -> str:
        """That peak in words, empty where none is known."""
        flops, words = as_number(self.run.result.get("peak_flops")), self.run.result.get("peak_from")
        return f"{quantity(flops, 'FLOP/s')} ({clean(words or 'source not recorded')})" if math.isfinite(flops) else ""

    @property
    def notes(self) -> list[str]:
        """What the reader should know about its machine."""
        found = self.run.result.get("notes")
        return [clean(note) for note in found] if isinstance(found, list) else []


Health = Mapping[str, Sequence[RunHealth]]
"""arm -> its runs, those that left nothing included."""


def health(study: Study, runs: Sequence[StudyRun], store: Store) -> dict[str, list[RunHealth]]:
    """Of every run that the study declares, by arm."""
    found: dict[str, list[RunHealth]] = {arm: [] for arm in study["arms"]}
    for run in runs:
        try:
            rows = store.run(run.id).rows() if run.status != "absent" else []
        except DataFault:  # told where its curve is missing
            rows = []
        found[run.arm].append(of_run(run, rows))
    return found


def of_run(run: StudyRun, rows: Sequence[Row]) -> RunHealth:
    """What the rows of one journal hold."""
    curves = {}
    for metric in OVER_TIME:
        points = [(float(row["tokens"]), as_number(row["metrics"][metric])) for row in rows if metric in row["metrics"]]
        curves[metric] = ([tokens for tokens, _ in points], [value for _, value in points])
    depth = _last_below(ACTIVATIONS, rows)
    return RunHealth(
        run=run,
        curves=curves,
        depth=[depth[key] for key in sorted((key for key in depth if key.isdecimal()), key=int)],
        moved=_last_below(MOVED, rows),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Over the values that are there and finite; None when none is."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def as_number(value: object) -> float:
    """A number of a record, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _last_below(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """What follows `name` and a slash -> value, in the last row that has any; "" for `name` itself."""
    for row in reversed(rows):
        found = {
            key.removeprefix(name).removeprefix("/"): as_number(value)
            for key, value in row["metrics"].items()
            if key == name or key.startswith(f"{name}/")
        }
        if found:
            return found
    return {}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
