"""Which settings a trial gets, and whether it goes on: functions of the trials that are stored, and of nothing else.

Optuna's samplers and pruners are given a study in memory, in which each trial stands once, at its index, however many
attempts it took. So a search with one worker is the same search after any number of interruptions, and it does not
matter which of many workers asks. A step of that study is a number of tokens: trials with other batches are compared
at equal tokens.
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
class Known:
    """What is known of a trial. `curve`: (tokens, value) of every report; `stop_tokens`: where pruning would have cut
    it, although it went on; `kept`: what a pruner keeps with a trial."""

    index: int
    outcome: Literal["finished", "pruned", "diverged", "running"]
    params: Mapping[str, Any]
    value: float | None = None
    curve: Sequence[tuple[int, float]] = ()
    stop_tokens: int | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


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


def distributions(space: Space, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Those of the dimensions that have a value."""
    return {dimension.name: distribution(dimension) for dimension in space.dimensions if dimension.name in params}


def trial_of(
    space: Space, state: TrialState, params: Mapping[str, Any], *, value: float | None = None,
    curve: Iterable[tuple[int, float]] = (), user: Mapping[str, Any] | None = None,
    system: Mapping[str, Any] | None = None,
) -> FrozenTrial:  # fmt: skip
    """A trial to be put into a storage, which numbers it. Unlike Optuna's create_trial, it takes known points that lie
    between two steps of their dimension."""
    return FrozenTrial(
        number=-1, trial_id=-1, state=state, value=value, datetime_complete=None, params=dict(params),
        datetime_start=datetime.now() if state == TrialState.RUNNING else None,
        distributions=distributions(space, params), user_attrs=dict(user or {}), system_attrs=dict(system or {}),
        intermediate_values=dict(curve),
    )  # fmt: skip


def draw(
    space: Space, sampler: Sampler, *, index: int, trials: int, known: Sequence[Known], direction: Direction
) -> dict[str, Any]:
    """Parameters of a trial by TPE, multivariate and with the constant liar (Bergstra et al. 2011; Falkner et al.
    2018). It learns after `startup` random trials: a third of all, at most 10, unless set; diverged ones count."""
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
            params[dimension.name] = _suggest(trial, dimension.name, distribution(dimension))
    return params


def _suggest(trial: optuna.Trial, name: str, values: BaseDistribution) -> Any:
    if isinstance(values, CategoricalDistribution):
        return trial.suggest_categorical(name, values.choices)
    if isinstance(values, IntDistribution):
        return trial.suggest_int(name, values.low, values.high, log=values.log, step=values.step)
    assert isinstance(values, FloatDistribution)
    return trial.suggest_float(name, values.low, values.high, log=values.log, step=values.step)


# TPE sees a diverged trial as still running: the constant liar takes those for bad, whatever they reported. As pruned
# they would be ranked by how far they came, and count as good where nothing better is known.
STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.RUNNING,
    "running": TrialState.RUNNING,
}


def _study(
    space: Space, known: Sequence[Known], direction: Direction, *, sampler: BaseSampler | None = None, name: str = ""
) -> optuna.Study:
    """A study in memory whose trial numbers are the indices; an index of which nothing is known is a failed trial."""
    storage = optuna.storages.InMemoryStorage()
    sampler = sampler or RandomSampler()
    study = optuna.create_study(storage=storage, direction=direction, sampler=sampler, study_name=name or None)
    by_index = {trial.index: trial for trial in known}
    for index in range(max(by_index, default=-1) + 1):
        made = trial_of(space, TrialState.FAIL, {})
        if trial := by_index.get(index):
            state = STATES[trial.outcome]
            value = trial.curve[-1][1] if state == TrialState.PRUNED and trial.curve else trial.value
            made = trial_of(
                space, state, trial.params, value=value if state.is_finished() else None, curve=trial.curve,
                system=trial.kept,
            )  # fmt: skip
        storage.create_new_trial(study._study_id, made)
    return study


def importance(space: Space, known: Sequence[Known], direction: Direction) -> dict[str, Any] | None:
    """How much each dimension decided whether a trial was among the best, as shares of one: PED-ANOVA (Watanabe et al.
    2023). None where too few trials were finished."""
    finished = [trial for trial in known if trial.outcome == "finished"]
    if len(finished) < LEAST_FOR_IMPORTANCE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rare branches of a conditional space, which then count for little
        best = PedAnovaImportanceEvaluator(target_quantile=max(0.1, WELL_ABOVE / len(finished)))
        values = get_param_importances(_study(space, finished, direction), evaluator=best)
    order = {dimension.name: index for index, dimension in enumerate(space.dimensions)}
    ranked = sorted(values.items(), key=lambda item: (-item[1], order[item[0]]))
    return {"method": "ped-anova", "values": {name: float(value) for name, value in ranked}}


# Pruning


def pruned(
    pruner: Pruner, space: Space, *, index: int, known: Sequence[Known], tokens: int, direction: Direction, name: str
) -> tuple[bool, dict[str, Any]]:
    """Whether the trial at `index`, which is among `known` with all its reports, should be stopped now; and what the
    pruner keeps with it. `tokens`: of a whole run. `name`: of the study, by which Hyperband spreads trials.

    Nothing is stopped before enough trials came to their end, nor at the end. A trial that pruning would have cut, had
    it not been audited, counts as cut.
    """
    trial = next(other for other in known if other.index == index)
    at = trial.curve[-1][0]
    if pruner.name == "none" or at >= AT_THE_END * tokens:
        return False, {}
    seen = [trial if other is trial else _as_let(other, at) for other in known]
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


def _as_let(trial: Known, at: int) -> Known:
    """A trial as far as pruning would have let it come, with the value of its curve at some tokens."""
    cut = trial.stop_tokens
    curve = [point for point in trial.curve if cut is None or point[0] <= cut]
    value = value_at_tokens(curve, at)
    outcome = "pruned" if cut is not None and trial.outcome == "finished" else trial.outcome
    return replace(trial, outcome=outcome, curve=curve if value is None else sorted({**dict(curve), at: value}.items()))


def value_at_tokens(points: Sequence[tuple[int, float]], at: int) -> float | None:
    """A curve's value at some tokens, on the line between its neighbours; None outside of what it covers."""
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(at, [x for x, _ in points], [y for _, y in points]))
