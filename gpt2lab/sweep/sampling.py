"""Which settings a trial gets, and whether it goes on: functions of the trials that are stored, and of nothing else.

Optuna's samplers and pruners work on a study in memory that has each trial once, at its index, however many attempts it
took. So a search with one worker is the same search after any number of interruptions, and any of several workers draws
the same. A step of that study is a number of tokens: trials with other batches are compared at equal tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from gpt2lab.records import Importance, Outcome

if TYPE_CHECKING:
    from gpt2lab.planning.space import Dimension, Pruner, Sampler, Space

Direction = Literal["minimize", "maximize"]
LEAST_FOR_IMPORTANCE = 8
"""Finished trials, below which no importance is given."""
WELL_ABOVE = 5
"""Trials that PED-ANOVA compares with the others: Optuna's advice is five or more."""
AT_THE_END = 0.99
"""Share of training from which on stopping would save nothing."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial, as far as samplers and pruners need it."""

    index: int
    outcome: Outcome
    params: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    """of a finished trial"""
    curve: Sequence[tuple[int, int, float]] = ()
    """(step, tokens, value) of every report"""
    stop_at: int | None = None
    """step at which it was told to stop"""
    rungs: Mapping[str, Any] = field(default_factory=dict)
    """what Optuna's successive halving keeps with a trial"""


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension as Optuna has it."""
    if dimension.kind == "categorical":
        return CategoricalDistribution(dimension.choices)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.kind == "int":
        step = int(step or 1)
        return IntDistribution(int(low), int(low) + (int(high) - int(low)) // step * step, log=dimension.log, step=step)
    if step is not None:  # Optuna warns of an end that no step meets, in decimal numbers
        high = float(Decimal(str(low)) + Decimal(str(step)) * math.floor((high - low) / step + 1e-9))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def trial_of(
    space: Space, state: TrialState, params: Mapping[str, Any], *, value: float | None = None,
    curve: Iterable[tuple[int, float]] = (), user: Mapping[str, Any] | None = None,
    system: Mapping[str, Any] | None = None,
) -> FrozenTrial:  # fmt: skip
    """A trial for a storage, which numbers it. Unlike Optuna's create_trial, it accepts known points that lie between
    two steps of their dimension."""
    return FrozenTrial(
        number=-1, trial_id=-1, state=state, value=value, datetime_complete=None, params=dict(params),
        datetime_start=datetime.now() if state == TrialState.RUNNING else None,
        distributions={d.name: distribution(d) for d in space.dimensions if d.name in params},
        user_attrs=dict(user or {}), system_attrs=dict(system or {}), intermediate_values=dict(curve),
    )  # fmt: skip


def draw(
    space: Space, sampler: Sampler, *, index: int, trials: int, known: Iterable[Trial], direction: Direction
) -> dict[str, Any]:
    """Parameters of the trial at `index` by TPE, multivariate and with the constant liar (Bergstra et al. 2011; Falkner
    et al. 2018). It learns after `startup` random trials: a third of all, at most 10, unless set; diverged ones
    count."""
    known = usable(known)
    startup = sampler.startup or max(1, min(10, math.ceil(trials / 3)))
    seed = int(np.random.SeedSequence((sampler.seed, index)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = TPESampler(
            n_startup_trials=max(1, startup - sum(trial.outcome == "diverged" for trial in known)),
            seed=seed, multivariate=True, group=space.conditional, constant_liar=True,
        )  # fmt: skip
    trial = _study(space, known, direction, sampler=tpe).ask()
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        if space.active(dimension, params):
            params[dimension.name] = trial._suggest(dimension.name, distribution(dimension))
    return params


def usable(trials: Iterable[Trial]) -> list[Trial]:
    """Those whose outcome depends on their parameters."""
    return [trial for trial in trials if trial.outcome not in ("waiting", "failed")]


# TPE gets a diverged trial as a running one: the constant liar takes those for bad, whatever they reported. As pruned
# they would be ranked by how far they came, and count as good where nothing better is known.
IN_MEMORY = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.RUNNING,
    "running": TrialState.RUNNING,
}


def _study(
    space: Space, trials: Iterable[Trial], direction: Direction, *, sampler: BaseSampler | None = None, name: str = ""
) -> optuna.Study:
    """A study in memory whose trial numbers are the indices; the others up to the last are failed trials."""
    storage = optuna.storages.InMemoryStorage()
    sampler = sampler or RandomSampler()
    study = optuna.create_study(storage=storage, direction=direction, sampler=sampler, study_name=name or None)
    by_index = {trial.index: trial for trial in trials}
    for index in range(max(by_index, default=-1) + 1):
        made = trial_of(space, TrialState.FAIL, {})
        if trial := by_index.get(index):
            state, curve = IN_MEMORY[trial.outcome], [(tokens, value) for _, tokens, value in trial.curve]
            value = curve[-1][1] if state == TrialState.PRUNED and curve else trial.value
            made = trial_of(
                space, state, trial.params, value=value if state.is_finished() else None, curve=curve,
                system=trial.rungs,
            )  # fmt: skip
        storage.create_new_trial(study._study_id, made)
    return study


def importance(space: Space, trials: Iterable[Trial], direction: Direction) -> Importance | None:
    """How much each dimension decided whether a trial was among the best, as shares of one: PED-ANOVA (Watanabe et al.
    2023). None where too few trials were finished."""
    finished = [trial for trial in trials if trial.outcome == "finished"]
    if len(finished) < LEAST_FOR_IMPORTANCE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rare branches of a conditional space, which then count for little
        best = PedAnovaImportanceEvaluator(target_quantile=max(0.1, WELL_ABOVE / len(finished)))
        values = get_param_importances(_study(space, finished, direction), evaluator=best)
    order = {dimension.name: index for index, dimension in enumerate(space.dimensions)}
    ranked = sorted(values.items(), key=lambda item: (-item[1], order[item[0]]))
    return Importance(method="ped-anova", values={name: float(value) for name, value in ranked})


# Pruning


def pruned(
    pruner: Pruner, space: Space, *, index: int, known: Iterable[Trial], tokens: int, direction: Direction, name: str
) -> tuple[bool, dict[str, Any]]:
    """Whether the trial at `index`, which is among `known` with all its reports, should be stopped now; and its rungs.
    `tokens`: of a whole run. `name`: of the study, by which Hyperband spreads trials.

    Nothing is stopped before enough trials came to their end, nor at the end.
    """
    trials = {trial.index: trial for trial in usable(known)}
    at = trials[index].curve[-1][1]
    if pruner.name == "none" or at >= AT_THE_END * tokens:
        return False, {}
    seen = [trial if trial.index == index else _as_pruned(trial, at) for trial in trials.values()]
    study = _study(space, seen, direction, name=name)
    stop = _optuna_pruner(pruner, tokens).prune(study, study.trials[index])
    enough = sum(other.outcome == "finished" for other in seen) >= pruner.startup_trials
    return stop and enough, study.trials[index].system_attrs


def _optuna_pruner(pruner: Pruner, tokens: int) -> BasePruner:
    if pruner.name == "median":
        return MedianPruner(
            n_startup_trials=pruner.startup_trials, n_min_trials=pruner.startup_trials,
            n_warmup_steps=math.ceil(pruner.warmup * tokens),
        )  # fmt: skip
    smallest = max(1, int(max(pruner.warmup * tokens, tokens / pruner.reduction**4)))
    if pruner.name == "hyperband":
        return HyperbandPruner(min_resource=smallest, max_resource=tokens, reduction_factor=pruner.reduction)
    return SuccessiveHalvingPruner(min_resource=smallest, reduction_factor=pruner.reduction)


def _as_pruned(trial: Trial, at: int) -> Trial:
    """A trial as far as pruning would have let it come, with the value of its curve at `at` tokens."""
    cut = trial.stop_at if trial.outcome == "running" else None
    curve = [point for point in trial.curve if cut is None or point[0] <= cut]
    value = value_at_tokens(curve, at)
    if value is not None and all(tokens != at for _, tokens, _ in curve):
        curve = sorted([*curve, (-1, at, value)], key=lambda point: point[1])
    return replace(trial, curve=curve)


def value_at_tokens(curve: Sequence[tuple[int, int, float]], at: int) -> float | None:
    """A curve's value at a number of tokens, on the line between its neighbours; None outside of what it covers."""
    if not curve or not curve[0][1] <= at <= curve[-1][1]:
        return None
    return float(np.interp(at, [tokens for _, tokens, _ in curve], [value for *_, value in curve]))
