"""Reads the results of a study from the run store, as tables.

A value counts only if it was measured as the study declares: on its fixed validation tokens, under its evaluation key.
All other runs (failed, unfinished, not started, or without that evaluation) are listed with a reason, never silently
left out and never ranked.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2lab.analysis import Contrast, Noise, Verdicts, compare
from gpt2lab.analysis.best_rate import RateSearch
from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.analysis.metric_names import PLAIN, MetricSpec, metric_spec
from gpt2lab.analysis.scaling import Reach, reach
from gpt2lab.analysis.statistics import document_error, effective_documents
from gpt2lab.analysis.verdicts import FEWEST, Declared, TextNoise
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import clean, damage_text, quantity
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError
from gpt2lab.records import Bracket, Effect, RateTrial, Record, StudyRecord, SweepRecord, Tuned
from gpt2lab.store import Store
from gpt2lab.store.parts import read_parts

if TYPE_CHECKING:
    import pandas as pd

Study = StudyRecord
LOSS, BITS = "val/loss", "val/bits_per_byte"
TARGET = re.compile(r"(tokens|steps|seconds) to val/loss (\S+)")

COMPARED = {"core": "core code", "data": "data", "torch": "torch version", "device": "device"}
"""Parts of a run's identity that must agree before two arms are compared."""

BRACKETING = "the learning rates are still being bracketed"
SEARCHING = "the settings of the arms are still being searched"
RATE = "optim.lr"

ENDED = ("finished", "unevaluated")
"""Statuses of runs whose training is complete."""

LATE = "declared after its results were there"
NOT_DECLARED = "not declared in `evaluate.judged_contexts`"
HERE = "the training context"

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


def target_name(key: str, loss: float) -> str:
    """The metric of `tokens_to`, `steps_to` or `seconds_to`. Raises KeyError, ValueError."""
    if not 0 < loss < math.inf:
        raise ValueError(loss)
    what = {"tokens_to": "tokens", "steps_to": "steps", "seconds_to": "seconds"}[key]
    return f"{what} to {LOSS} {loss:g}"


def target_of(metric: str) -> tuple[str, float] | None:
    """(tokens, steps or seconds, the loss to be reached) of such a metric, else None."""
    match = TARGET.fullmatch(metric)
    return (match[1], float(match[2])) if match else None


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


def judge(study: StudyRecord, store: Store, *, force_exploratory: bool = False) -> Verdicts:
    """The verdicts that the study's record allows; runs without a value make their contrasts exploratory."""
    study = cleaned(study)
    return judge_runs(study, collect(study, store), store, force_exploratory=force_exploratory)


def judge_runs(
    study: StudyRecord, runs: Sequence[StudyRun], store: Store | None = None, *, force_exploratory: bool = False,
    sensitivity: bool = True, text: Mapping[tuple[str, str], TextNoise] | None = None,
) -> Verdicts:  # fmt: skip
    """As `judge`, from runs already read; sensitivity: whether to compute the estimators of the sensitivity table.

    store: for searches of rates and losses by document; without one, neither is used. text: of `text_noise`, where it
    is known.
    """
    waiting = {} if any(run.value is not None for run in runs) else dict.fromkeys(study.arms, _still_looking(study))
    past = study.history
    undeclared = dict.fromkeys(study.arms, _undeclared(study))
    declared = {arm: entry.exploratory for arm, entry in study.arms.items() if entry.exploratory}
    rates = searches(study, store) if store else {}
    read = reading(study)
    column = "value" if read.continuous else study.metric
    started = {run.arm for run in runs}  # of the others tuning is not finished, or has failed
    values = [(run.arm, run.seed, run.value) for run in runs]
    values += [(arm, seed, None) for arm in study.arms if arm not in started for seed in study.seeds]
    return compare(
        [{"arm": arm, "seed": seed, column: value} for arm, seed, value in values],
        value=None if read.continuous else column,
        baseline=study.baseline,
        **_terms(study),
        contrasts=[c.plain() if isinstance(c, Effect) else c for c in study.contrasts],
        unigram=(_floors(study) or {}).get("unigram"),
        noise=noise_of(study),
        exploratory={**waiting, **undeclared, **declared},
        unfair=moving_rate(study),
        late={(str(arm), str(against)): LATE for arm, against in (past.late if past else ())},
        dropped=len(past.dropped) if past else 0,
        not_comparable=_not_comparable(study, runs),
        baseline_seeds=past.first_baseline if past else study.baseline_seeds,
        searches=rates,
        text=text_noise(study, runs, store) if store and text is None else text,
        force_exploratory=force_exploratory,
        sensitivity=sensitivity,
        scope=", ".join([scope_text(study), *(_unbounded(study, rates) if store else [])]),
        at_shared_rate=shares_rate(study),
        caveat=study.caveat,
        unit=read.unit,
        higher_is_better=read.higher_is_better,
    )


def _terms(study: StudyRecord) -> dict[str, Any]:
    """The arguments of `compare` that every family of a study's contrasts shares."""
    past = study.history
    first, looks = (past.first_seeds, past.looks) if past else (len(study.seeds), study.looks)
    return {
        "smallest_effect": smallest_effect(study),
        "alpha": past.alpha if past else study.alpha,
        "screen": study.screen,
        "looks": looks or ((first,) if first >= FEWEST else None),
        "extendable": True,
    }


def moving_rate(study: StudyRecord) -> dict[tuple[str, str], str]:
    """(arm, against) of the contrasts whose arms differ in what moves the best learning rate -> why they are
    exploratory."""
    reasons = {}
    for contrast in study.contrasts:
        declared = contrast if isinstance(contrast, Effect) else Declared.pair(*contrast)
        moved = [study.arms[side].moves_rate for side in declared.weights]
        keys = dict.fromkeys(key for settings in moved for key in settings)
        differing = [key for key in keys if len({settings.get(key) for settings in moved}) > 1]
        if differing:
            what = f"it changes {', '.join(differing)}, which moves the best learning rate"
            reasons[declared.arm, declared.against] = f"{what}, and rates were not bracketed"
    return reasons


def _undeclared(study: StudyRecord) -> str:
    """Why nothing of a study is claimed, "" where that is not so."""
    return (study.history and study.history.undeclared) or study.undeclared_look or ""


@dataclass(frozen=True, kw_only=True)
class AtContext:
    """One arm at another context than the training one. `multiple`, `length`: that context, as a multiple and in
    tokens. `loss`: mean over the runs. `contrast`: against the same runs at the training context, on the same
    targets; None where the arm has no positions there."""

    arm: str
    multiple: float
    length: int
    loss: float = math.nan
    contrast: Contrast | None = None


def judge_contexts(study: StudyRecord, runs: Sequence[StudyRun]) -> list[AtContext]:
    """Whether arms hold beyond the training context: for every arm, and every context in `evaluate.judged_contexts`,
    the loss there minus the loss at the training context, run by run. These contrasts are a family of their own, at
    the study's alpha, looks and smallest effect; longer contexts that were scored without being declared so
    are exploratory."""
    if study.metric != LOSS:  # contexts are scored by their loss, and the smallest effect is in the metric's unit
        return []
    declared, past = study.judged_contexts, study.history
    block, usable = study.evaluation.block_size or 1, usable_runs(study, runs)
    at: dict[tuple[str, float], dict[int, float]] = {}
    for arm, seed, multiple, _, loss in contexts_of(study, usable):
        at.setdefault((arm, multiple), {})[seed] = loss
    longer = declared or [multiple for multiple in study.evaluation.contexts if multiple > 1]
    whole = [(arm, multiple) for arm in study.arms for multiple in longer]
    names = {f"{arm} at {round(multiple * block)}": (arm, multiple) for arm, multiple in whole if (arm, multiple) in at}
    if not names or any((arm, 1.0) not in at for arm, _ in names.values()):
        return []
    healthy, late = {run.id for run in usable}, past.late_contexts if past else ()
    values: dict[tuple[str, int], float | None] = {(HERE, run.seed): 0.0 for run in runs}
    for name, (arm, multiple) in names.items():
        of_arm = [run for run in runs if run.arm == arm]
        values |= {(name, run.seed): None if run.value is None else math.nan for run in of_arm if run.id not in healthy}
        values |= {(name, seed): loss - at[arm, 1.0][seed] for seed, loss in at[arm, multiple].items()}
    judged = compare(
        [{"arm": name, "seed": seed, "value": value} for (name, seed), value in values.items()],
        baseline=HERE,
        **_terms(study),
        contrasts=[(name, HERE) for name in names],
        exploratory={
            name: _undeclared(study) or (NOT_DECLARED if not declared else LATE if multiple in late else "")
            for name, (_, multiple) in names.items()
        },
        sensitivity=False,
    )
    contrasts = {names[c.arm]: replace(c, notes=tuple(n for n in c.notes if HERE not in n)) for c in judged.contrasts}
    return [
        AtContext(
            arm=arm, multiple=multiple, length=round(multiple * block), contrast=contrasts.get((arm, multiple)),
            loss=statistics.fmean(at.get((arm, multiple), {0: math.nan}).values()),
        )
        for arm, multiple in whole
    ]  # fmt: skip


def _unbounded(study: StudyRecord, rates: Mapping[str, RateSearch]) -> list[str]:
    """A remark on arms whose search has too few results to bound how far their rate may be from the best."""
    if not study.bracketed and len(tuned_settings(study)) != 1:
        return []
    without = [
        arm
        for arm, entry in study.arms.items()
        if arm not in rates and ((entry.bracket and entry.bracket.best) or (entry.tuned and entry.tuned.settings))
    ]
    if not without:
        return []
    return [f"but of {listed(without)} at the one that was picked, since too few trials finished to bound its best"]


def searches(study: StudyRecord, store: Store) -> dict[str, RateSearch]:
    """Arm -> the search of its learning rate, or of another single setting. Empty without a search, or if several
    settings were searched at once, since then no curve can be fitted."""
    if study.metric != LOSS:
        return {}
    by_arm = {
        arm: _bracketed(study, store, arm, entry.bracket) if entry.bracket else _tuned(entry.tuned, store)
        for arm, entry in study.arms.items()
    }
    return {arm: search for arm, search in by_arm.items() if search is not None}


def _bracketed(study: StudyRecord, store: Store, arm: str, bracket: Bracket) -> RateSearch | None:
    losses = {math.log2(trial.factor): trial_loss(study, store, arm, trial) for trial in bracket.trials}
    return _search(losses, math.log2(bracket.best) if bracket.best else None)


def trial_loss(study: StudyRecord, store: Store, arm: str, trial: RateTrial) -> float | None:
    """The final loss at one rate of a bracket: infinity where the run failed, None where it has not finished."""
    try:
        value = read_run(study, store, arm, trial.seed, trial.run).value
    except DataFault:
        return None
    return None if value is None else value if value < failure_ceiling(study) else math.inf


def _tuned(tuned: Tuned | None, store: Store) -> RateSearch | None:
    if tuned is None or not tuned.settings:
        return None
    settings = tuned.settings
    try:
        record = store.sweep(tuned.sweep).searches[tuned.label]
    except (DataFault, ConfigError, KeyError):
        return None
    [dimension, *further] = record.space
    if further or dimension.kind == "categorical" or record.study != tuned.study:
        return None

    def scaled(value: Any) -> float:
        return math.log2(value) if dimension.log else float(value)

    name = dimension.name
    losses = {
        scaled(trial.settings[name]): math.inf if trial.outcome == "diverged" else trial.value
        for trial in record.trials
        if trial.outcome in ("finished", "diverged")
    }
    return _search(losses, scaled(settings[name]))


def _search(losses: Mapping[float, float | None], chosen: float | None) -> RateSearch | None:
    """None with fewer than two finite losses, or three results in all, which do not determine a curve."""
    good = {at: loss for at, loss in losses.items() if loss is not None and math.isfinite(loss)}
    diverged = tuple(at for at, loss in losses.items() if loss is not None and not math.isfinite(loss))
    if chosen not in good or len(good) < 2 or len(good) + len(diverged) < FEWEST:
        return None
    return RateSearch(tried=tuple(good), losses=tuple(good.values()), chosen=chosen, diverged=diverged)


def text_noise(study: StudyRecord, runs: Sequence[StudyRun], store: Store) -> dict[tuple[str, str], TextNoise]:
    """(arm, against) -> the noise of the validation text, for every declared pair of arms whose final evaluations
    stored their windows."""
    if study.metric not in (LOSS, BITS):
        return {}
    usable, key = by_arm(usable_runs(study, runs)), study.evaluation.key
    last = {arm: runs[-1] for arm, runs in usable.items()}
    windows = {arm: _mean_windows(store, runs, key) for arm, runs in usable.items()}
    noise = {}
    for pair in (contrast for contrast in study.contrasts if not isinstance(contrast, Effect)):
        a, b = windows.get(pair[0]), windows.get(pair[1])
        if a is None or b is None or a["units"] != b["units"]:
            continue
        if last[pair[0]].identity.get("data") != last[pair[1]].identity.get("data"):  # other tokens in these windows
            continue
        se, count = document_error([a["losses"]], [b["losses"]], a["units"], targets=a["targets"])
        if math.isfinite(se):
            metrics = last[pair[0]].evaluation["metrics"]
            factor = metrics[BITS] / metrics[LOSS] if study.metric == BITS else 1.0  # equal for equal data
            effective = effective_documents(a["units"], targets=a["targets"])
            noise[pair[0], pair[1]] = TextNoise(se=factor * se, count=count, unit=f"{a['unit']}s", effective=effective)
    return noise


def _mean_windows(store: Store, runs: Sequence[StudyRun], key: str) -> Any:
    """The stored windows of the final evaluation of one arm's runs, with the means of their losses; None unless all are
    there, undamaged and of the same units."""
    try:
        windows: list[Any] = [store.run(run.id).windows(key) for run in runs]
    except DataFault:
        return None
    if None in windows or any(run["units"] != windows[0]["units"] for run in windows):
        return None
    return {**windows[0], "losses": np.mean([run["losses"] for run in windows], axis=0)}


def _still_looking(study: StudyRecord) -> str:
    """Why a study has no runs yet: its tuning is not finished; "" otherwise."""
    if study.tune and not all(entry.tuned and entry.tuned.over for entry in study.arms.values()):
        return SEARCHING
    return BRACKETING if study.bracketed else ""


def tuned_settings(study: StudyRecord) -> list[str]:
    """Dotted keys of the settings that were tuned per arm; empty without `tune`."""
    return list((study.tune or {}).get("space") or {})


def shares_rate(study: StudyRecord) -> bool:
    """Whether arms are compared at a learning rate that was not tuned per arm."""
    return not study.bracketed and RATE not in tuned_settings(study)


def as_written(study: StudyRecord) -> StudyRecord:
    """The same study at the settings of its file, instead of the tuned ones."""
    reset: dict[str, Any] = {"tuned": None, "not_comparable": None, "exploratory": None, "moves_rate": {}}
    arms = {
        arm: entry.with_(runs=entry.shared.runs if entry.shared else {}, **reset) for arm, entry in study.arms.items()
    }
    return study.with_(arms=arms, tune=None)


def noise_of(study: StudyRecord) -> Noise | None:
    """The noise floor with which the study was planned."""
    floor = study.noise
    if not floor or study.metric != LOSS:
        return None
    stack = f"torch {floor.stack.get('torch')}, {floor.stack.get('device')}"
    return Noise(sd=floor.sd, df=floor.df, runs=floor.runs, scale=floor.scale, stack=stack)


def _not_comparable(study: StudyRecord, runs: Sequence[StudyRun]) -> dict[str, str]:
    """Arms whose rate lies at the edge of its bracket, or whose runs rest on other core code, data, torch or kind of
    device than the baseline's, or do not say on which."""
    reasons = {arm: entry.not_comparable for arm, entry in study.arms.items() if entry.not_comparable}
    compared = {part: name for part, name in COMPARED.items() if part != "data" or study.validation_text is None}
    with_value = by_arm(run for run in runs if run.value is not None)
    for arm in study.arms:
        both = [run for name in {study.baseline, arm} for run in with_value.get(name, ())]
        parts = {part: {str(run.identity.get(part)) for run in both} for part in compared}
        differing = [name for part, name in compared.items() if len(parts[part]) > 1]
        missing = sorted({run.id for run in both if any(run.identity.get(part) is None for part in COMPARED)})
        if differing and arm != study.baseline:
            reason = f"{' and '.join(differing)} differ between its runs and the baseline's"
            if missing:
                reason = f"{' and '.join(differing)} not recorded in run.json of {listed(missing)}"
            reasons.setdefault(arm, reason)
    return reasons


def _floors(study: StudyRecord) -> dict[str, float] | None:
    """The floors of the study, if they are in the unit of the primary metric."""
    return study.floors if study.metric == LOSS else None


def failure_ceiling(study: StudyRecord) -> float:
    """The final value from which on a run counts as failed; infinity where the study has no such floor."""
    return failure_ceiling_of(_floors(study))


def smallest_effect(study: StudyRecord) -> float:
    """The smallest difference that matters, as it was declared before results were there."""
    return study.history.smallest_effect if study.history else study.smallest_effect


def unit(study: StudyRecord | SweepRecord) -> str:
    """Of the primary metric and of differences in it."""
    return reading(study).unit


def reading(study: StudyRecord | SweepRecord) -> MetricSpec:
    """How the primary metric is read; one whose name says nothing as a loss in nats."""
    if target := target_of(study.metric):
        return MetricSpec(higher_is_better=False, unit=target[0], continuous=False)
    return metric_spec(study.metric) or PLAIN


def scope_text(study: StudyRecord | SweepRecord) -> str:
    """What the results hold for: `at 842 k parameters, 819 k tokens, shakespeare (bytes), adamw, lr 0.004`."""
    scope = study.scope
    sizes = f"at {quantity(scope.parameters)} parameters, {quantity(scope.tokens)} tokens"
    parts = [sizes, *(part for part in (scope.data, scope.optimizer) if part)]
    if isinstance(study, SweepRecord):
        searched = {dimension.name for search in study.searches.values() for dimension in search.space}
        return ", ".join([*parts[:-1], parts[-1].partition(", lr ")[0]] if RATE in searched else parts)
    if not (tuned_settings(study) or study.bracketed):
        return ", ".join(parts)
    parts[-1] = parts[-1].partition(", lr ")[0]  # no rate in particular
    keys = tuned_settings(study) or [RATE]
    names = listed("learning rate" if key == RATE else key.rpartition(".")[2].replace("_", " ") for key in keys)
    best = f"at each arm's own best {names}"
    several = f"at the {names} that each arm's search found, which need not be its best"
    return ", ".join([*parts, best if len(keys) == 1 else several])


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
