"""Which parameters a slot gets, and whether a trial goes on: functions of what is stored, and of nothing else.

So a search with one worker is the same search after any number of interruptions, and it does not matter which of many
workers asks. Optuna's TPE is given a study in memory, in which trials are in the order of their slots; its own order,
of creation, would depend on which slots had to be begun again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from gpt2lab.planning.search import Pruner, Sampler
    from gpt2lab.planning.space import Dimension, Space

Direction = Literal["minimize", "maximize"]
LEAST_FOR_IMPORTANCE = 8
"""Finished trials, below which no importance is told."""
WELL_ABOVE = 5
"""Trials that PED-ANOVA compares with the others: Optuna's advice is five or more."""
AT_THE_END = 0.99
"""Share of training from which on stopping would save nothing."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of one slot. `curve`: (tokens, value) of every report; `stop_tokens`: where pruning would have cut
    it, although it went on."""

    slot: int
    outcome: Literal["finished", "pruned", "diverged", "running"]
    params: Mapping[str, Any]
    value: float | None = None
    curve: Sequence[tuple[int, float]] = field(default=())
    stop_tokens: int | None = None


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
    return {one.name: distribution(one) for one in space.dimensions if one.name in params}


def is_complete(space: Space, params: Mapping[str, Any]) -> bool:
    """Whether every dimension that means something beside the others has its value."""
    return all(one.name in params for one in space.dimensions if space.active(one, params))


def startup_trials(sampler: Sampler, slots: int) -> int:
    """Trials that TPE draws at random: a third of all, at most 10, unless told."""
    return sampler.startup or max(1, min(10, math.ceil(slots / 3)))


def draw(
    space: Space, sampler: Sampler, *, slot: int, slots: int, past: Sequence[Past], direction: Direction
) -> dict[str, Any]:
    """Parameters by TPE, multivariate and with the constant liar (Bergstra et al. 2011; Falkner et al. 2018), from the
    slots that are known."""
    diverged = sum(one.outcome == "diverged" for one in past)
    startup = max(1, startup_trials(sampler, slots) - diverged)  # they teach something too
    seed = int(np.random.SeedSequence((sampler.seed, slot)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = TPESampler(
            n_startup_trials=startup, seed=seed, multivariate=True, group=space.conditional, constant_liar=True
        )
    study = _in_memory(space, past, direction, tpe)
    trial = study.ask()
    params: dict[str, Any] = {}
    for one in space.dimensions:
        if space.active(one, params):
            params[one.name] = _suggest(trial, one.name, distribution(one))
    return params


def _suggest(trial: optuna.Trial, name: str, one: BaseDistribution) -> Any:
    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(name, one.choices)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(name, one.low, one.high, log=one.log, step=one.step)
    assert isinstance(one, FloatDistribution)
    return trial.suggest_float(name, one.low, one.high, log=one.log, step=one.step)


# What diverged is shown to TPE as still running: the constant liar takes those for bad, whatever they reported, and
# never for good. As pruned they would be ranked by how far they came, and count as good where nothing better is known.
_SHOWN_AS = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.RUNNING,
    "running": TrialState.RUNNING,
}


def _in_memory(
    space: Space, past: Sequence[Past], direction: Direction, sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, direction=direction, sampler=sampler or optuna.samplers.RandomSampler()
    )
    for one in sorted(past, key=lambda one: one.slot):
        state = _SHOWN_AS[one.outcome]
        value = one.curve[-1][1] if state == TrialState.PRUNED and one.curve else one.value
        trial = FrozenTrial(
            number=-1, trial_id=-1, state=state, value=value if state.is_finished() else None, datetime_start=None,
            datetime_complete=None, params=dict(one.params), distributions=distributions(space, one.params),
            user_attrs={}, system_attrs={}, intermediate_values=dict(one.curve),
        )  # fmt: skip
        storage.create_new_trial(study._study_id, trial)
    return study


def importance(space: Space, past: Sequence[Past], direction: Direction) -> dict[str, Any] | None:
    """How much each dimension decided whether a trial was among the best, as shares of one: PED-ANOVA (Watanabe et al.
    2023). None where too few trials were finished."""
    finished = [one for one in past if one.outcome == "finished"]
    if len(finished) < LEAST_FOR_IMPORTANCE:
        return None
    study = _in_memory(space, finished, direction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rare branches of a conditional space, which then count for little
        best = PedAnovaImportanceEvaluator(target_quantile=max(0.1, WELL_ABOVE / len(finished)))
        values = get_param_importances(study, evaluator=best)
    order = {one.name: index for index, one in enumerate(space.dimensions)}
    ranked = sorted(values.items(), key=lambda item: (-item[1], order[item[0]]))
    return {"method": "ped-anova", "values": {name: float(value) for name, value in ranked}}


# Pruning


def stops(
    pruner: Pruner,
    *,
    slot: int,
    curve: Sequence[tuple[int, float]],
    others: Sequence[Past],
    tokens: int,
    direction: Direction,
) -> bool:
    """Whether a trial that has just reported the last point of `curve` should be stopped. `tokens`: of a whole run.

    Trials are compared at equal tokens, so that batches of other sizes are no advantage. Nothing is stopped before
    enough trials came to their end, nor at the end. Others count only as far as pruning would have let them come.
    """
    if pruner.name == "none" or not curve or curve[-1][0] >= AT_THE_END * tokens:
        return False
    sign = 1.0 if direction == "minimize" else -1.0
    mine = [(at, sign * value) for at, value in curve]
    rest = [(one, _as_far_as_let(one, sign)) for one in others if one.slot != slot]
    finished = [points for one, points in rest if one.outcome == "finished" and one.stop_tokens is None]
    if len(finished) < pruner.startup_trials:
        return False
    if pruner.name == "median":
        return _worse_than_median(mine, finished, pruner.startup_trials, pruner.warmup * tokens)
    smallest = max(pruner.warmup * tokens, tokens / pruner.reduction**4, 1)
    brackets = 1
    if pruner.name == "hyperband":
        brackets = math.floor(math.log(tokens / smallest, pruner.reduction) + 1e-9) + 1
    bracket = bracket_of(slot, brackets, pruner.reduction)
    same = [points for one, points in rest if bracket_of(one.slot, brackets, pruner.reduction) == bracket]
    return _not_promoted(mine, same, smallest * pruner.reduction**bracket, pruner.reduction, tokens)


def _as_far_as_let(one: Past, sign: float) -> list[tuple[int, float]]:
    return [(at, sign * v) for at, v in one.curve if one.stop_tokens is None or at <= one.stop_tokens]


def _worse_than_median(
    mine: Sequence[tuple[int, float]], finished: Sequence[Sequence[tuple[int, float]]], least: int, warmup: float
) -> bool:
    """The median stopping rule (Golovin et al. 2017, as in Optuna): the best value so far is worse than the median of
    what finished trials had at these tokens."""
    at = mine[-1][0]
    there = [value for points in finished if (value := value_at_tokens(points, at)) is not None]
    return at >= warmup and len(there) >= least and min(v for _, v in mine) > float(np.median(there))


def value_at_tokens(points: Sequence[tuple[int, float]], at: int) -> float | None:
    """A curve's value at some tokens, on the line between its neighbours; None outside of what it covers."""
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(at, [x for x, _ in points], [y for _, y in points]))


def _not_promoted(
    mine: Sequence[tuple[int, float]],
    others: Sequence[Sequence[tuple[int, float]]],
    smallest: float,
    reduction: int,
    tokens: int,
) -> bool:
    """Asynchronous successive halving (Li et al. 2018): at each rung the best of every `reduction` go on."""
    rung = smallest
    while rung < AT_THE_END * tokens and rung <= mine[-1][0]:
        if len(mine) == 1 or mine[-2][0] < rung:  # reached with this report
            value = mine[-1][1]
            there = sorted([value, *(v for points in others if (v := _at_rung(points, rung)) is not None)])
            if value > there[max(len(there) // reduction - 1, 0)]:
                return True
        rung *= reduction
    return False


def _at_rung(points: Sequence[tuple[int, float]], rung: float) -> float | None:
    return next((value for at, value in points if at >= rung), None)


def bracket_of(slot: int, brackets: int, reduction: int) -> int:
    """Which of Hyperband's brackets a slot is in; they get shares as in Li et al. 2017, evenly spread over the slots.

    Bracket 0 has the earliest rung.
    """
    budgets = [math.ceil(brackets * reduction**s / (s + 1)) for s in range(brackets - 1, -1, -1)]
    place = (slot * GOLDEN) % 1 * sum(budgets)
    for bracket, budget in enumerate(budgets):
        place -= budget
        if place < 0:
            return bracket
    return brackets - 1
