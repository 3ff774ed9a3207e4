"""Parameters and pruning follow from what is stored; pruners are Optuna's, TPE learns what is bad."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from small_search import LR, SPACE, in_memory, objective, stored_trial

from gpt2lab.planning.space import Dimension, Pruner, Sampler, Space
from gpt2lab.sweep.sampling import distribution, draw, importance, pruned

Direction = Literal["minimize", "maximize"]
DRAWS = [0.004043878009515107, 0.005853446837908606, 0.005048373931660187]


def drawn(known: list[FrozenTrial], index: int) -> float:
    params = draw(SPACE, Sampler(startup=4), index=index, trials=40, known=known, direction="minimize")
    return float(params["lr"])


def finished(index: int, lr: float) -> FrozenTrial:
    return stored_trial(index, "finished", {"lr": lr}, objective({"lr": lr}))


def test_trials_have_points_of_their_own() -> None:
    assert len({drawn([], index) for index in range(20)}) == 20
    known = [finished(index, lr) for index, lr in enumerate((1e-3, 1e-2, 3e-2, 1e-4, 8e-2))]
    assert len({drawn(known, index) for index in range(20)}) == 20


def test_draws_are_those_of_earlier_versions() -> None:
    """A search that is continued tries what it would have tried, and finds the runs that others trained."""
    known = [finished(index, 10 ** random.Random(index).uniform(-4, -1)) for index in range(9)]
    known[3] = stored_trial(3, "diverged", {"lr": 0.09}, curve={50: 9.0})
    known[5] = stored_trial(5, "pruned", {"lr": 0.0002}, curve={25: 5.0, 50: 4.0})
    known[7] = stored_trial(7, "failed", {})
    assert [drawn([], 0), drawn(known, 9), drawn(known, 20)] == DRAWS


def test_tpe_goes_where_it_is_good() -> None:
    known = [finished(index, 10 ** random.Random(index).uniform(-4, -1)) for index in range(15)]
    near = [abs(math.log10(drawn(known, index) / 0.01)) < 0.75 for index in range(40)]
    assert sum(near) > 30  # half of the space is as near as that


def test_tpe_keeps_away_from_what_diverged_even_where_nothing_was_reported() -> None:
    good = [finished(index, lr) for index, lr in enumerate((1e-4, 2e-4, 8e-4))]
    assert sum(drawn(good, index) > 0.015 for index in range(10, 50)) > 4
    for curve in ({}, {90: 0.1}):  # coming far before it diverged makes a trial no better
        rates = enumerate((0.02, 0.03, 0.05, 0.08, 0.09), 3)
        bad = [stored_trial(index, "diverged", {"lr": lr}, curve=curve) for index, lr in rates]
        assert sum(drawn(good + bad, index) > 0.015 for index in range(10, 50)) <= 4


def test_where_everything_diverged_nothing_is_taken_for_good() -> None:
    bad = [stored_trial(i, "diverged", {"lr": 0.09 + i * 1e-4}) for i in range(20)]
    assert sum(drawn(bad, index) > 0.05 for index in range(20, 60)) < 12  # 4 would be even


def random_curves(seed: int, trials: int, reports: int, direction: str) -> list[list[float]]:
    """Curves that get better at rates of their own, with noise."""
    chance, sign = random.Random(seed), 1 if direction == "minimize" else -1
    rates = [chance.random() for _ in range(trials)]
    return [
        [sign * (3 - rate * math.log(step + 1) + chance.gauss(0, 0.05)) for step in range(reports)] for rate in rates
    ]


def cut(
    pruner: Pruner, curves: list[list[float]], at: list[int], direction: Direction = "minimize"
) -> list[int | None]:
    """The report at which each trial is stopped, as the trials of a search come one after another."""
    known: list[FrozenTrial] = []
    cuts: list[int | None] = []
    for index, curve in enumerate(curves):
        stop, rungs, seen = None, dict[str, Any](), dict[int, float]()
        for count, (percent, value) in enumerate(zip(at, curve, strict=True), 1):
            seen[percent] = value
            mine = stored_trial(index, "running", {"lr": 0.1}, curve=seen, rungs=rungs)
            stopped, rungs = pruned(pruner, [*known, mine], index, direction, "s")
            if stopped:
                stop = count
                break
        outcome = "pruned" if stop else "finished"
        known.append(stored_trial(index, outcome, {"lr": 0.1}, None if stop else value, curve=seen, rungs=rungs))
        cuts.append(stop)
    return cuts


def cut_by_optuna(pruner: Any, curves: list[list[float]], at: list[int], direction: str) -> list[int | None]:
    study = optuna.create_study(storage=in_memory(), direction=direction, pruner=pruner, study_name="s")
    cuts: list[int | None] = []
    for curve in curves:
        trial, stop = study.ask(), None
        for count, (tokens, value) in enumerate(zip(at, curve, strict=True), 1):
            trial.report(value, tokens)
            if trial.should_prune():
                stop = count
                break
        study.tell(trial, state=TrialState.PRUNED) if stop else study.tell(trial, curve[-1])
        cuts.append(stop)
    return cuts


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["median", "successive_halving", "hyperband"])
def test_a_search_in_which_all_report_at_the_same_tokens_is_pruned_as_by_optuna_alone(
    name: Any, seed: int, direction: Direction
) -> None:
    curves, at = random_curves(seed, 30, 20, direction), list(range(4, 84, 4))
    pruner, theirs = {
        "median": (
            Pruner(name="median", startup_trials=4, warmup=0.2),
            optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=20, n_min_trials=4),
        ),
        "successive_halving": (
            Pruner(name="successive_halving", startup_trials=1, warmup=0.09, reduction=3),
            optuna.pruners.SuccessiveHalvingPruner(min_resource=9, reduction_factor=3),
        ),
        "hyperband": (
            Pruner(name="hyperband", startup_trials=1, warmup=0.09, reduction=3),
            optuna.pruners.HyperbandPruner(min_resource=9, max_resource=100, reduction_factor=3),
        ),
    }[name]
    cuts = cut(pruner, curves, at, direction)
    assert cuts == cut_by_optuna(theirs, curves, at, direction)
    assert 3 < sum(stop is not None for stop in cuts) < 27


@pytest.mark.parametrize("name", ["median", "successive_halving", "hyperband"])
def test_nothing_is_pruned_before_enough_trials_are_finished_nor_at_the_end(name: Any) -> None:
    def bad(others: int, percent: int) -> bool:
        curve = {25: 1.0, 50: 1.0, 100: 1.0}
        good = [
            stored_trial(i, "finished", {}, 1.0, curve=curve, rungs={"completed_rung_0": 1.0}) for i in range(others)
        ]
        seen = {at: 9.0 for at in curve if at <= percent}
        pruner = Pruner(name=name, startup_trials=4)
        indices = range(others, 60)  # trials of Hyperband's last bracket are never cut
        return any(
            pruned(
                pruner, [*good, *(stored_trial(i, "failed", {}) for i in range(others, index)),
                         stored_trial(index, "running", {}, curve=seen)], index, "minimize", "s",
            )[0]
            for index in indices
        )  # fmt: skip

    assert bad(40, 25)
    assert not bad(3, 25)
    assert not bad(40, 100)


def test_the_dimension_that_matters_has_the_greatest_importance() -> None:
    space = Space((LR, Dimension(name="wd", kind="float", low=0.0, high=1.0, when={})))
    chance = random.Random(0)
    known = []
    for index in range(24):
        params = {"lr": 10 ** chance.uniform(-4, -1), "wd": chance.random()}
        known.append(stored_trial(index, "finished", params, objective(params), space=space))
    found = importance(space, known, "minimize")
    assert found is not None and found.method == "ped-anova"
    assert next(iter(found.values)) == "lr" and found.values["lr"] > 0.5
    assert sum(found.values.values()) == pytest.approx(1)
    assert importance(space, known[:7], "minimize") is None


@pytest.mark.parametrize(
    "dimension",
    [
        Dimension(name="x", kind="float", low=0.0, high=1.0, step=0.3, when={}),
        Dimension(name="x", kind="int", low=2, high=9, step=3, when={}),
        Dimension(name="x", kind="int", low=1, high=64, log=True, when={}),
        Dimension(name="x", kind="categorical", choices=("a", "b"), values=("a", "b"), when={}),
    ],
    ids=lambda one: f"{one.kind}-{one.step}-{one.log}",
)
def test_every_kind_of_dimension_can_be_drawn(dimension: Dimension) -> None:
    space = Space((dimension,))
    values = set()
    known: list[FrozenTrial] = []
    for index in range(12):
        params = draw(space, Sampler(startup=3), index=index, trials=12, known=known, direction="minimize")
        known.append(stored_trial(index, "finished", params, float(index), space=space))
        values.add(space.settings(params)["x"])
    assert values <= set(dimension.choices or dimension.grid() if not dimension.log else range(1, 65))
    assert len(values) > 1
    create_trial(
        params={"x": params["x"]}, distributions={"x": distribution(dimension)}, value=1.0
    )  # Optuna's own check
