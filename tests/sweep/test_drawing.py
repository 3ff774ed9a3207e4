"""Parameters and pruning follow from what is stored; pruners agree with Optuna's, TPE learns what is bad."""

from __future__ import annotations

import math
import random
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from small_search import (
    BRANCHED,
    LR,
    SPACE,
    Counted,
    Killed,
    in_memory,
    kill,
    objective,
    slots_of,
    work_all,
)

from gpt2lab.planning.search import Pruner, Sampler
from gpt2lab.planning.space import Dimension, Space
from gpt2lab.sweep import ledger
from gpt2lab.sweep.sampling import Past, bracket_of, distribution, draw, importance, stops, value_at_tokens


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ELECTION_SECONDS", 0.0)


def drawn(past: list[Past], slot: int, **options: Any) -> float:
    params = draw(SPACE, Sampler(startup=4), slot=slot, slots=40, past=past, direction="minimize", **options)
    return float(params["lr"])


def finished(slot: int, lr: float) -> Past:
    return Past(slot=slot, outcome="finished", params={"lr": lr}, value=objective({"lr": lr}))


def test_one_worker_draws_the_same_whatever_the_storage_and_however_often_it_is_killed() -> None:
    options = {"space": BRANCHED, "pruner": "median", "sampler": {"name": "tpe", "seed": 3, "startup": 3}}

    def trials(every: int | None) -> list[tuple[Any, ...]]:
        storage = in_memory()
        for attempt in range(200):
            worker = f"elsewhere:boot:{attempt}:1"
            counted = Counted(storage, at=-1 if every is None else every, then=kill)
            try:
                mine = slots_of(counted, 12, worker=worker, grace_seconds=0.0, unowned_seconds=0.0, **options)
                mine.repair()
                work_all(mine)
            except Killed:
                continue
            return [(one["settings"], one["outcome"], one["value"], one["stopped_at"]) for one in mine.trials()]
        raise AssertionError("no end")

    undisturbed = trials(None)
    assert len({repr(one[0]) for one in undisturbed}) == 12
    assert {"finished", "pruned"} <= {one[1] for one in undisturbed}
    assert trials(97) == undisturbed
    assert trials(None) == undisturbed


@pytest.mark.parametrize("name", ["random", "grid", "qmc"])
def test_points_that_need_no_results_are_there_from_the_start(name: str) -> None:
    space = Space((Dimension(name="lr", kind="float", low=1e-4, high=1e-1, log=True, points=5, when={}),))
    storage = in_memory()
    slots_of(storage, 3, space=space, sampler=name, known=[{"lr": 0.02}])
    more = slots_of(storage, 5, space=space, sampler=name, known=[{"lr": 0.02}])
    stored = [trial.params["lr"] for trial in storage.get_all_trials(0)]
    assert stored == [0.02, *(one["lr"] for one in space.points(name, 0, 4))]  # type: ignore[arg-type]
    assert len(more.trials()) == 5 and [one["enqueued"] for one in more.trials()] == [True] + [False] * 4


def test_slots_have_points_of_their_own() -> None:
    assert len({drawn([], slot) for slot in range(20)}) == 20
    past = [finished(slot, lr) for slot, lr in enumerate((1e-3, 1e-2, 3e-2, 1e-4, 8e-2))]
    assert len({drawn(past, slot) for slot in range(20)}) == 20


def test_tpe_goes_where_it_is_good() -> None:
    past = [finished(slot, 10 ** random.Random(slot).uniform(-4, -1)) for slot in range(15)]
    near = [abs(math.log10(drawn(past, slot) / 0.01)) < 0.75 for slot in range(40)]
    assert sum(near) > 30  # half of the space is as near as that


def test_tpe_keeps_away_from_what_diverged_even_where_nothing_was_reported() -> None:
    good = [finished(slot, lr) for slot, lr in enumerate((1e-4, 2e-4, 8e-4))]
    bad = [
        Past(slot=3 + i, outcome="diverged", params={"lr": lr}) for i, lr in enumerate((0.02, 0.03, 0.05, 0.08, 0.09))
    ]
    assert sum(drawn(good + bad, slot) > 0.015 for slot in range(10, 50)) <= 4
    assert sum(drawn(good, slot) > 0.015 for slot in range(10, 50)) > 4
    late = [
        Past(slot=one.slot, outcome="diverged", params=one.params, curve=[(900, 0.1)]) for one in bad
    ]  # coming far before it diverged makes a trial no better
    assert sum(drawn(good + late, slot) > 0.015 for slot in range(10, 50)) <= 4


def test_where_everything_diverged_nothing_is_taken_for_good() -> None:
    bad = [Past(slot=i, outcome="diverged", params={"lr": 0.09 + i * 1e-4}) for i in range(20)]
    assert sum(drawn(bad, slot) > 0.05 for slot in range(20, 60)) < 12  # 4 would be even


def test_what_diverged_is_never_the_best() -> None:
    storage = in_memory()
    mine = slots_of(storage, 3)
    for value in (math.inf, -math.inf, 2.0):
        turn = mine.claim()
        assert turn is not None
        assert not mine.report(turn, 1, 500, math.nan)
        mine.finish(turn, value)
    best = mine.best()
    assert best is not None and best["slot"] == 2
    assert [one["outcome"] for one in mine.trials()] == ["diverged", "diverged", "finished"]
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.best_trial.number == 2 and study.trials[0].state == TrialState.PRUNED
    assert mine.trials()[0]["value"] is None


def random_curves(seed: int, trials: int, reports: int, direction: str) -> list[list[float]]:
    """Curves that get better at rates of their own, with noise."""
    chance, sign = random.Random(seed), 1 if direction == "minimize" else -1
    rates = [chance.random() for _ in range(trials)]
    return [
        [sign * (3 - rate * math.log(step + 1) + chance.gauss(0, 0.05)) for step in range(reports)] for rate in rates
    ]


def decide_ours(pruner: Pruner, curves: list[list[float]], at: list[int], direction: Any) -> list[int | None]:
    past: list[Past] = []
    cut: list[int | None] = []
    for slot, curve in enumerate(curves):
        points = list(zip(at, curve, strict=True))
        stop = next(
            (
                n
                for n in range(1, len(points) + 1)
                if stops(pruner, slot=slot, curve=points[:n], others=past, tokens=81, direction=direction)
            ),
            None,
        )
        seen = points[:stop]
        past.append(
            Past(slot=slot, outcome="pruned" if stop else "finished", params={"lr": 0.1}, value=seen[-1][1], curve=seen)
        )
        cut.append(stop)
    return cut


def decide_optuna(pruner: Any, curves: list[list[float]], at: list[int], direction: str) -> list[int | None]:
    study = optuna.create_study(storage=in_memory(), direction=direction, pruner=pruner)
    cut: list[int | None] = []
    for curve in curves:
        trial, stop = study.ask(), None
        for n, (tokens, value) in enumerate(zip(at, curve, strict=True), 1):
            trial.report(value, tokens)
            if trial.should_prune():
                stop = n
                break
        study.tell(trial, state=TrialState.PRUNED) if stop else study.tell(trial, curve[-1])
        cut.append(stop)
    return cut


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("seed", range(4))
def test_the_median_rule_is_optunas(seed: int, direction: str) -> None:
    curves, at = random_curves(seed, 30, 16, direction), list(range(5, 85, 5))
    ours = decide_ours(Pruner(name="median", startup_trials=4, warmup=20 / 81), curves, at, direction)
    theirs = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=20, n_min_trials=4)
    assert ours == decide_optuna(theirs, curves, at, direction)
    assert 3 < sum(one is not None for one in ours) < 27


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("seed", range(4))
def test_successive_halving_is_optunas(seed: int, direction: str) -> None:
    curves, at = random_curves(seed, 40, 80, direction), list(range(1, 81))
    pruner = Pruner(name="successive_halving", startup_trials=1, warmup=3 / 81, reduction=3)
    theirs = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3)
    ours = decide_ours(pruner, curves, at, direction)
    assert ours == decide_optuna(theirs, curves, at, direction)
    assert {3, 9, None} <= set(ours) <= {3, 9, 27, None}


def test_hyperband_spreads_slots_over_its_brackets() -> None:
    shares = [sum(bracket_of(slot, 3, 3) == one for slot in range(170)) for one in range(3)]
    assert shares == [pytest.approx(170 * budget / 17, abs=2) for budget in (9, 5, 3)]
    curves, at = random_curves(1, 60, 80, "minimize"), list(range(1, 81))
    cut = decide_ours(Pruner(name="hyperband", startup_trials=1, warmup=3 / 81, reduction=3), curves, at, "minimize")
    by_bracket = [{one for slot, one in enumerate(cut) if bracket_of(slot, 4, 3) == b} for b in range(4)]
    assert by_bracket[0] >= {3, 9} and by_bracket[1] <= {9, 27, None} and by_bracket[2] <= {27, None}
    assert by_bracket[3] == {None}


@pytest.mark.parametrize("name", ["median", "successive_halving", "hyperband"])
def test_nothing_is_pruned_before_enough_trials_are_finished_nor_at_the_end(name: Any) -> None:
    def bad(others: int, tokens: int) -> bool:
        good = [
            Past(slot=i, outcome="finished", params={}, value=1.0, curve=[(250, 1.0), (500, 1.0), (1000, 1.0)])
            for i in range(others)
        ]
        pruner = Pruner(name=name, startup_trials=4)
        curve = [(at, 9.0) for at in (250, 500, 1000) if at <= tokens]
        same = next(slot for slot in range(100, 200) if bracket_of(slot, 2, 3) == 0)
        return stops(pruner, slot=same, curve=curve, others=good, tokens=1000, direction="minimize")

    assert bad(4, 250)
    assert not bad(3, 250)
    assert not bad(4, 1000)


def test_trials_with_other_batches_are_compared_at_equal_tokens() -> None:
    falling = [(100, 4.0), (300, 2.0), (500, 1.0)]
    assert value_at_tokens(falling, 200) == 3.0
    assert value_at_tokens(falling, 400) == 1.5
    assert value_at_tokens(falling, 99) is None and value_at_tokens(falling, 501) is None


def test_what_pruning_would_have_cut_counts_only_up_to_there() -> None:
    def past(stop_tokens: int | None) -> list[Past]:
        curve = [(250, 1.0), (500, 1.0)]
        return [
            Past(slot=i, outcome="finished", params={}, value=1.0, curve=curve, stop_tokens=stop_tokens if i else None)
            for i in range(4)
        ]

    pruner = Pruner(name="median", startup_trials=4)
    options: Any = {"slot": 9, "curve": [(500, 9.0)], "tokens": 1000, "direction": "minimize"}
    assert stops(pruner, others=past(None), **options)
    assert not stops(pruner, others=past(250), **options)


def test_reporting_is_idempotent_and_audit_goes_on() -> None:
    storage = in_memory()
    mine = slots_of(storage, 6, pruner={"name": "median", "startup_trials": 2, "warmup": 0.4})
    for _ in range(2):
        turn = mine.claim()
        assert turn is not None
        assert not mine.report(turn, 1, 250, 1.0) and not mine.report(turn, 2, 500, 1.0)
        mine.finish(turn, 1.0)
    turn = mine.claim()
    assert turn is not None
    assert not mine.report(turn, 1, 250, 5.0)
    assert mine.report(turn, 2, 500, 9.0)
    assert not mine.report(turn, 1, 250, 99.0) and mine.report(turn, 2, 500, 0.0) and mine.report(turn, 3, 750, 0.1)
    mine.finish(turn, 0.5)
    record = mine.trials()[turn.slot]
    assert record["curve"] == [[1, 250, 5.0], [2, 500, 9.0], [3, 750, 0.1]]
    assert (record["outcome"], record["would_stop_at"], record["stopped_at"]) == ("finished", 2, None)


def test_importance_tells_which_dimension_matters() -> None:
    space = Space((LR, Dimension(name="wd", kind="float", low=0.0, high=1.0, when={})))
    chance = random.Random(0)
    past = []
    for slot in range(24):
        params = {"lr": 10 ** chance.uniform(-4, -1), "wd": chance.random()}
        past.append(Past(slot=slot, outcome="finished", params=params, value=objective(params)))
    found = importance(space, past, "minimize")
    assert found is not None and found["method"] == "ped-anova"
    assert next(iter(found["values"])) == "lr" and found["values"]["lr"] > 0.5
    assert sum(found["values"].values()) == pytest.approx(1)
    assert importance(space, past[:7], "minimize") is None


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
    past: list[Past] = []
    for slot in range(12):
        params = draw(space, Sampler(startup=3), slot=slot, slots=12, past=past, direction="minimize")
        past.append(Past(slot=slot, outcome="finished", params=params, value=float(slot)))
        values.add(space.settings(params)["x"])
    assert values <= set(dimension.choices or dimension.grid() if not dimension.log else range(1, 65))
    assert len(values) > 1
    create_trial(
        params={"x": params["x"]}, distributions={"x": distribution(dimension)}, value=1.0
    )  # Optuna's own check
