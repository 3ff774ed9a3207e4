"""Which settings a trial gets, and whether it goes on: functions of the trials that are stored, and of nothing else.

Optuna's samplers and pruners work on a study in memory that is made from what is stored, so a search with one worker is
the same search after any number of interruptions, and any of several workers draws the same.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
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
AT_THE_END = 99
"""Percent of training from which on stopping would save nothing."""
REPORTS = "reports"
"""User attribute of a trial: {curve: [(step, tokens, value)], rungs: what Optuna's successive halving keeps with it,
stop_at: the step at which it was to stop}. One write, so a kill leaves all of it or nothing."""


STATES: dict[Outcome, TrialState] = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,  # never the best; an infinite value would be complete to Optuna
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
}


def outcome_of(trial: FrozenTrial) -> Outcome:
    """What became of a trial so far. Optuna's state decides; what was noted refines it."""
    noted: Outcome | None = (trial.user_attrs.get("end") or {}).get("outcome")
    possible = [outcome for outcome, state in STATES.items() if state == trial.state]
    return noted if noted in possible else possible[0]


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


def draw(
    space: Space, sampler: Sampler, *, index: int, trials: int, known: Iterable[FrozenTrial], direction: Direction
) -> dict[str, Any]:
    """Parameters of the trial at `index` by TPE, multivariate and with the constant liar (Bergstra et al. 2011; Falkner
    et al. 2018). It learns after `startup` random trials: a third of all, at most 10, unless set; diverged ones
    count."""
    known = list(known)
    startup = sampler.startup or max(1, min(10, math.ceil(trials / 3)))
    seed = int(np.random.SeedSequence((sampler.seed, index)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = TPESampler(
            n_startup_trials=max(1, startup - sum(outcome_of(trial) == "diverged" for trial in known)),
            seed=seed, multivariate=True, group=any(dimension.when for dimension in space.dimensions),
            constant_liar=True,
        )  # fmt: skip
    trial = _study(known, direction, sampler=tpe, without=index).ask()
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        if space.active(dimension, params):
            params[dimension.name] = trial._suggest(dimension.name, distribution(dimension))
    return params


def _study(
    trials: Iterable[FrozenTrial], direction: Direction, *, sampler: BaseSampler | None = None, name: str = "",
    without: int | None = None,
) -> optuna.Study:  # fmt: skip
    """A study in memory with these trials, which are all up to the last one; those whose outcome does not depend on
    their parameters, and the one `without` parameters as yet, count as failed.

    A diverged trial is a running one there: TPE's constant liar takes those for bad, whatever they reported. As pruned
    they would be ranked by how far they came, and count as good where nothing better is known.
    """
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, direction=direction, sampler=sampler or RandomSampler(), study_name=name or None
    )
    for trial in trials:
        made = copy.copy(trial)
        if trial.state == TrialState.WAITING or trial.number == without:
            made.state = TrialState.FAIL
        elif outcome_of(trial) == "diverged":
            made.state = TrialState.RUNNING
        made.system_attrs = trial.user_attrs.get(REPORTS, {}).get("rungs", {})
        storage.create_new_trial(study._study_id, made)
    return study


def importance(space: Space, trials: Iterable[FrozenTrial], direction: Direction) -> Importance | None:
    """How much each dimension decided whether a trial was among the best, as shares of one: PED-ANOVA (Watanabe et al.
    2023). None where too few trials were finished."""
    study = _study(trials, direction)
    finished = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    if finished < LEAST_FOR_IMPORTANCE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rare branches of a conditional space, which then count for little
        best = PedAnovaImportanceEvaluator(target_quantile=max(0.1, WELL_ABOVE / finished))
        values = get_param_importances(study, evaluator=best)
    order = {dimension.name: index for index, dimension in enumerate(space.dimensions)}
    ranked = sorted(values.items(), key=lambda item: (-item[1], order[item[0]]))
    return Importance(method="ped-anova", values={name: float(value) for name, value in ranked})


# Pruning


def pruned(
    pruner: Pruner, trials: Sequence[FrozenTrial], index: int, direction: Direction, name: str
) -> tuple[bool, dict[str, Any]]:
    """Whether the trial at `index` should be stopped at the last of its reports, and its rungs. Reports are made by
    percent of training, so that trials with other batches are compared at equal tokens. `name`: of the study, by which
    Hyperband spreads trials.

    Nothing is stopped before enough trials came to their end, nor at the end.
    """
    study = _study(trials, direction, name=name)
    trial = study.trials[index]
    if (trial.last_step or 0) >= AT_THE_END:
        return False, trial.system_attrs
    stop = _optuna_pruner(pruner).prune(study, trial)
    finished = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    return stop and finished >= pruner.startup_trials, study.trials[index].system_attrs


def _optuna_pruner(pruner: Pruner) -> BasePruner:
    if pruner.name == "median":
        return MedianPruner(
            n_startup_trials=pruner.startup_trials, n_min_trials=pruner.startup_trials,
            n_warmup_steps=math.ceil(100 * pruner.warmup),
        )  # fmt: skip
    smallest = max(1, int(100 * max(pruner.warmup, pruner.reduction**-4)))
    if pruner.name == "hyperband":
        return HyperbandPruner(min_resource=smallest, max_resource=100, reduction_factor=pruner.reduction)
    return SuccessiveHalvingPruner(min_resource=smallest, reduction_factor=pruner.reduction)
