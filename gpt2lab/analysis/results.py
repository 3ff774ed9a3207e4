"""Reads the results of a study from the run store, as tables.

A value counts only if it was measured as the study declares: on its fixed validation tokens, under its evaluation key.
All other runs (failed, unfinished, not started, or without that evaluation) are listed with a reason, never silently
left out and never ranked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.analysis.metric_names import LOSS, target_of
from gpt2lab.analysis.scaling import Reach, reach
from gpt2lab.basics.text import clean, damage_text
from gpt2lab.errors import DataFault, Gpt2labError
from gpt2lab.records import Record, StudyRecord
from gpt2lab.store import Store
from gpt2lab.store.parts import read_parts

if TYPE_CHECKING:
    import pandas as pd

Study = StudyRecord


ENDED = ("finished", "unevaluated")
"""Statuses of runs whose training is complete."""


NOISE_DESIGN = "noise floor"
"""Design of a study that compares nothing: repeats of one recipe."""

FINAL = "final/"
"""Prefix of metrics from the final evaluation, which scores other tokens than the evaluations during training."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One arm at one seed, with its current status."""

    arm: str
    seed: int
    id: str
    status: str
    """finished, diverged, running, partial, failed, absent, unevaluated or damaged"""
    reason: str | None = None
    """why there is no final value, or why the run diverged"""
    value: float | None = None
    """the primary metric of the final evaluation; NaN when the run diverged, None while there is none"""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """the parts of its identity"""
    result: Mapping[str, Any] = field(default_factory=dict)
    """result.json; empty while there is none"""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """the final evaluation; empty while there is none"""
    adopted_from: str | None = None
    """the run of older code from which it was adopted"""


def collect(study: StudyRecord, store: Store) -> list[StudyRun]:
    """Every run that the study declares, in its order of arms and seeds."""
    runs = []
    for arm, entry in study.arms.items():
        for seed, run_id in sorted(entry.runs.items(), key=lambda item: int(item[0])):
            try:
                runs.append(read_run(study, store, arm, int(seed), run_id))
            except Gpt2labError as fault:  # one damaged file must not cost the page of the others
                runs.append(StudyRun(arm=arm, seed=int(seed), id=run_id, status="damaged", reason=damage_text(fault)))
    return runs


def until(what: str, loss: float, rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens, steps or seconds of training when the validation loss was first at most `loss`, on the straight line
    between two evaluations; NaN where it never was."""
    before: tuple[float, float] | None = None
    key = "step" if what == "steps" else what
    for at, reached in ((float(row[key]), row["metrics"][LOSS]) for row in rows if LOSS in row["metrics"]):
        if reached <= loss:
            share = (before[1] - loss) / (before[1] - reached) if before else 1.0
            return before[0] + share * (at - before[0]) if before else at
        before = at, reached
    return math.nan


def unevaluated(study: StudyRecord) -> str:
    """The evaluation that a run without a value lacks."""
    named = study.metric.startswith("task/")
    return study.metric if named else f"evaluation {study.evaluation.key}"


def read_run(study: StudyRecord, store: Store, arm: str, seed: int, run_id: str) -> StudyRun:
    """One run of a study, with its value under the study's evaluation key. Raises DataFault."""
    folder = store.run(run_id)
    ended, record, evaluations = folder.verified()
    result, record, key = ended or {}, record or folder.identity() or {}, study.evaluation.key
    evaluation = (evaluations.get(key) if ended else folder.evaluation(key)) or {}
    status: str = result["status"] if result else folder.status()
    if status == "damaged" and (damage := folder.damage()):
        raise damage
    reason, value = None, None
    if status == "diverged":
        reason, value = clean(result.get("reason") or "the loss is not finite"), math.nan
    elif status == "finished":
        measured = result if study.metric.startswith("task/") else evaluation
        value = measured.get("metrics", {}).get(study.metric)
        if evaluation and (target := target_of(study.metric)):
            value = until(*target, folder.rows())
            reason = None if math.isfinite(value) else f"{LOSS} never reached {target[1]:g}"
        elif value is None or not evaluation:
            status, reason, value = "unevaluated", f"finished, but {unevaluated(study)} has not been done", None
        elif not math.isfinite(value):
            status, reason, value = "diverged", f"the final {study.metric} is not finite", math.nan
    elif status == "failed":
        failure = folder.failure() or {}
        reason = clean(f"{failure.get('phase', 'training')}, step {failure.get('step', '?')}: {failure.get('reason')}")
    else:
        reason = {"absent": "not started", "partial": "stopped before its end", "running": "still running"}[status]
    return StudyRun(
        arm=arm, seed=seed, id=run_id, status=status, reason=reason, value=value,
        identity=record.get("identity") or {}, adopted_from=record.get("adopted_from"), result=result,
        evaluation=evaluation,
    )  # fmt: skip


def final_values(study: StudyRecord, store: Store) -> pd.DataFrame:
    """Columns arm, seed, value: the primary metric of each run's final evaluation, NaN where the run diverged.

    Runs without a value are not in it; see `missing_runs`.
    """
    rows = [(r.arm, r.seed, r.value) for r in collect(study, store) if r.value is not None]
    return _frame(rows, arm=object, seed=int, value=float)


def _frame(rows: Sequence[tuple[Any, ...]], **columns: type) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def missing_runs(study: StudyRecord, store: Store) -> pd.DataFrame:
    """Columns arm, seed, run, status, reason: the declared runs that have no final value, and why."""
    rows = [(r.arm, r.seed, r.id, r.status, r.reason) for r in collect(study, store) if r.value is None]
    return _frame(rows, arm=object, seed=int, run=object, status=object, reason=object)


def loss_floors(study: StudyRecord) -> dict[str, float] | None:
    """The floors of the study, if they are in the unit of the primary metric."""
    return study.floors if study.metric == LOSS else None


def failure_ceiling(study: StudyRecord) -> float:
    """The final value from which on a run counts as failed; infinity where the study has no such floor."""
    return failure_ceiling_of(loss_floors(study))


def cleaned(value: Any) -> Any:
    """A record in which every string, keys included, can be printed, drawn and written anywhere."""
    if isinstance(value, Record):
        return type(value).model_validate(cleaned(value.plain()))
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key): cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def contexts_of(study: StudyRecord, runs: Sequence[StudyRun]) -> list[tuple[str, int, float, int, float]]:
    """(arm, seed, multiple, length, loss): the final loss at each context length that the arm has. Lengths to which an
    arm cannot extend, and diverged runs, have none."""
    block = study.evaluation.block_size or 1
    rows = [
        (run.arm, run.seed, float(multiple), round(float(multiple) * block), float(loss))
        for run in runs
        if run.value is not None and math.isfinite(run.value)
        for multiple, loss in run.evaluation.get("contexts", {}).items()
        if loss is not None
    ]
    return sorted(rows, key=lambda row: row[:3])


def load_results(name: str, root: str | Path = "runs") -> pd.DataFrame:
    """All that a study measured, one row per arm, seed, step and metric: columns arm, seed, step, metric, value.

    Curves keep their names (train/loss, val/loss, ...); the final evaluation, on the study's own validation tokens,
    is at the last step as final/val/loss and so on, NaN for a run that diverged. Of runs that kept it, so is the
    loss by part: final/val/loss/position/1-1, final/val/loss/frequency/1-3, final/val/loss/document/NAME. Steps at
    which a metric was not measured have no row, nor have runs without data; `missing_runs` lists them.
    Raises ConfigError for an unknown study, DataFault for damaged metrics.
    """
    store = Store(root)
    study = store.study(name)
    rows: list[tuple[str, int, int, str, float]] = []
    for run in collect(study, store):
        folder = store.run(run.id)
        curve = folder.rows()
        rows += [(run.arm, run.seed, row["step"], key, v) for row in curve for key, v in row["metrics"].items()]
        metrics = {study.metric: math.nan} if run.status == "diverged" else dict(run.evaluation.get("metrics", {}))
        if run.evaluation and run.status != "diverged":
            for division, part in read_parts(folder.parts(study.evaluation.key)).items():
                groups = zip(part.groups, part.losses, strict=True)
                metrics |= {f"{LOSS}/{division}/{group}": loss for group, loss in groups}
        last = max([int(run.result.get("steps") or 0), *(row["step"] for row in curve)])
        rows += [(run.arm, run.seed, last, FINAL + key, value) for key, value in metrics.items()]
    return _frame(rows, arm=object, seed=int, step=int, metric=object, value=float)


def usable_runs(study: Study, runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs that have a final value and did not fail."""
    ceiling = failure_ceiling(study)
    return [run for run in runs if run.value is not None and run.value < ceiling]


def by_arm(runs: Iterable[StudyRun]) -> dict[str, list[StudyRun]]:
    """The runs of every arm that has any."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def first_runs(runs: Sequence[StudyRun]) -> dict[str, StudyRun]:
    """Arm -> its finished run of the lowest seed."""
    return {run.arm: run for run in reversed(runs) if run.status == "finished"}


def usable_values(study: Study, runs: Sequence[StudyRun], arm: str) -> list[float]:
    """Final values of an arm's runs that did not fail."""
    return [float(run.value or 0) for run in usable_runs(study, [run for run in runs if run.arm == arm])]


def budget_losses(study: Study, runs: Sequence[StudyRun], store: Store, arm: str) -> dict[float, list[float]]:
    """Tokens -> final losses of one arm, its own runs and those at other budgets; failed runs are left out."""
    entry = study.arms[arm]
    losses = {float(entry.tokens): usable_values(study, runs, arm)}
    for point in entry.curve:
        other_runs = []
        for seed, run in point.runs.items():
            with contextlib.suppress(DataFault):
                other_runs.append(read_run(study, store, arm, int(seed), run))
        losses[float(point.tokens)] = usable_values(study, other_runs, arm)
    return {tokens: values for tokens, values in losses.items() if values}


def tokens_to(name: str, loss: float, root: str | Path = "runs") -> dict[str, Reach]:
    """Training tokens at which each arm of a study reaches `loss`, read off runs that finished their own schedules.

    Needs final losses at two budgets or more (`budget_curve`); an arm without them has a reason instead of a
    value. Raises ConfigError for an unknown study.
    """
    store = Store(root)
    study = cleaned(store.study(name))
    runs = collect(study, store)
    return {arm: reach(budget_losses(study, runs, store, arm), loss) for arm in study.arms}
