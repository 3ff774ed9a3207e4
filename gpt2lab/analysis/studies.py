"""Judges a study: what its record declares and its runs measured, as arguments of `compare`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt2lab.analysis import Contrast, Noise, Verdicts, compare
from gpt2lab.analysis.best_rate import RateSearch
from gpt2lab.analysis.metric_names import BITS, LOSS, reading
from gpt2lab.analysis.results import (
    StudyRun,
    by_arm,
    cleaned,
    collect,
    contexts_of,
    failure_ceiling,
    loss_floors,
    read_run,
    usable_runs,
)
from gpt2lab.analysis.statistics import document_error, effective_documents
from gpt2lab.analysis.verdicts import FEWEST, Declared, TextNoise
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import quantity
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.records import Bracket, Effect, RateTrial, StudyRecord, SweepRecord, Tuned
from gpt2lab.store import Store

COMPARED = {"core": "core code", "data": "data", "torch": "torch version", "device": "device"}
"""Parts of a run's identity that must agree before two arms are compared."""

BRACKETING = "the learning rates are still being bracketed"
SEARCHING = "the settings of the arms are still being searched"
RATE = "optim.lr"
LATE = "declared after its results were there"
NOT_DECLARED = "not declared in `evaluate.judged_contexts`"
HERE = "the training context"


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
    read = reading(study.metric)
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
        unigram=(loss_floors(study) or {}).get("unigram"),
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


def smallest_effect(study: StudyRecord) -> float:
    """The smallest difference that matters, as it was declared before results were there."""
    return study.history.smallest_effect if study.history else study.smallest_effect


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
