"""How many seeds of which arms, worked out by hand and by drawn studies, judged by the test that writes verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from drawn import floor, is_smallest, power, upper
from statsmodels.stats.power import TTestIndPower

from gpt2lab.errors import ConfigError
from gpt2lab.planning.ablation import LoadedAblation, load_ablation
from gpt2lab.planning.scope import StudyScope, fit, makespan, needed, study_seconds

HEAD = "ablation: mine\nquestion: Which one?\nbase: nano\n"
ARMS = (
    HEAD + "baseline: a\nsmallest_effect: 0.05\narms:\n  a: {}\n  b: {model.norm: rmsnorm}\n"
    "  c: {model.position: rotary}\n  d: {model.mlp: relu2}\n"
)
FACTORS = HEAD + "smallest_effect: 0.05\nfactors: {model.norm: [layernorm, rmsnorm], model.mlp: [gelu_tanh, relu2]}\n"
MINUTE = 60.0
FIRST = 0.8 * 0.05
"""Alpha at the first look, with the seeds that were declared; a fifth is kept back for those that may be added."""


@pytest.fixture
def ablation(tmp_path: Path) -> Any:
    """An ablation from text; keywords go to `load_ablation`."""

    def load(text: str = ARMS, more: str = "", **options: Any) -> LoadedAblation:
        file = tmp_path / "mine.yaml"
        file.write_text(text + more)
        return load_ablation(file, **options)

    return load


def minutes(one: LoadedAblation, **other: float) -> dict[str, float]:
    """A run of every arm takes a minute, or what is said."""
    return {name: MINUTE * other.get(name, 1.0) for name in one.arms}


# As declared, and automatic.


def test_seeds_are_as_declared_and_the_baseline_may_have_more(ablation: Any) -> None:
    one = ablation(more="seeds: [4, 7]\nbaseline_seeds: 5\n")
    assert fit(one, None, minutes(one), seconds=None, jobs=1) == StudyScope(
        ("a", "b", "c", "d"), (4, 7), (4, 7, 0, 1, 2)
    )
    fewer = ablation(more="seeds: 6\nbaseline_seeds: 5\n")
    assert fit(fewer, None, minutes(fewer), seconds=None, jobs=1).baseline_seeds == tuple(range(6))


@pytest.mark.parametrize(
    ("sd", "df"),
    [
        (0.012, 9),
        *(pytest.param(*floor, marks=pytest.mark.slow) for floor in ((0.03, 4), (0.02, 9), (0.03, 9), (0.02, 29))),
    ],
)
def test_automatic_seeds_find_the_smallest_effect_in_four_of_five_drawn_studies(
    ablation: Any, sd: float, df: int
) -> None:
    """Three contrasts share alpha; the sd is taken at its upper 80 % limit. A pooled t-test would need hardly fewer."""
    one, effect = ablation(more="seeds: auto\n"), 0.05 / upper(sd, df)
    n = needed(one, floor(sd, df))
    assert is_smallest(n, lambda n: power(effect, (n, n), level=FIRST / 3))
    pooled = TTestIndPower().solve_power(effect, alpha=FIRST / 3, power=0.8)
    assert pooled < n <= math.ceil(pooled) + 1
    scope = fit(one, floor(sd, df), minutes(one), seconds=None, jobs=1)
    assert scope.seeds == tuple(range(min(max(n, 3), 20))) and scope.left_out == ()


def test_automatic_seeds_by_the_planning_table(ablation: Any) -> None:
    """One contrast, an sd that is known (from a million repeats), and effects of 0.5, 1, 1.5, 2 and 3 sd."""
    one = ablation(arms=["a", "b"], seeds="auto")
    found = [needed(one, floor(0.05 / effect, 10**6)) for effect in (0.5, 1, 1.5, 2, 3)]
    for n, effect in zip(found, (0.5, 1, 1.5, 2, 3), strict=True):
        assert is_smallest(n, lambda n, effect=effect: power(effect, (n, n), level=FIRST))  # type: ignore[misc]
    chosen = [len(fit(one, floor(0.05 / e, 10**6), minutes(one), seconds=None, jobs=1).seeds) for e in (0.5, 1, 3, 9)]
    assert chosen == [20, found[1], found[4], 3]  # never more than 20 or fewer than 3
    assert len(fit(one, floor(0.0), minutes(one), seconds=None, jobs=1).seeds) == 3


def test_more_seeds_of_the_baseline_save_seeds_of_the_arms(ablation: Any) -> None:
    one = ablation(more="seeds: auto\nbaseline_seeds: 20\n")
    n, effect = needed(one, floor(0.02)), 0.05 / upper(0.02, 9)
    assert is_smallest(n, lambda n: power(effect, (n, 20), level=FIRST / 3))
    assert n < needed(ablation(more="seeds: auto\n"), floor(0.02))


@pytest.mark.slow
def test_an_interaction_takes_four_times_the_seeds_of_a_main_effect(ablation: Any) -> None:
    """Of four cells, each with n seeds: two against two for a main effect, as with 2n seeds per arm; an interaction of
    weights 1, -1, -1, 1 has 4 times the variance, so it is what the seeds are for."""
    one = ablation(FACTORS, "seeds: auto\n")
    n, effect = needed(one, floor(0.03)), 0.05 / upper(0.03, 9)
    assert is_smallest(n, lambda n: power(effect, (n,) * 4, (1, -1, -1, 1), level=FIRST / 3))


def test_without_a_floor_automatic_seeds_say_which_command_measures_one(ablation: Any) -> None:
    one = ablation(more="seeds: auto\n")
    with pytest.raises(ConfigError) as caught:
        fit(one, None, minutes(one), seconds=None, jobs=1, why_no_floor="none has been measured")
    assert str(caught.value) == "seeds: automatic seeds need the noise floor of nano: none has been measured"
    assert caught.value.hint == "gpt2lab noise nano"


# Budgets of time.


def test_makespan_is_that_of_runs_side_by_side() -> None:
    assert makespan([], 3) == 0
    assert makespan([1, 1, 1, 1], 2) == 2
    assert makespan([1] * 9, 8) == 2  # nine on eight places are two rounds, not 1.125
    assert makespan([2, 3, 7], 2) == 7
    assert makespan([5], 4) == 5


def test_time_counts_trials_budgets_and_the_baselines_seeds(ablation: Any) -> None:
    one = ablation(
        more="seeds: 3\nbaseline_seeds: 5\ntune: {grid: {optim.lr: [0.5x, 1x, 2x]}}\n"
        "budget_curve: {budgets: [0.5, 1, 2], arms: [b]}\n"
    )
    whole = fit(one, None, minutes(one, d=2), seconds=None, jobs=1)
    trials = 3 * (1 + 1 + 1 + 2)
    runs = 5 * 3.5 + 3 * 3.5 + 3 * 1 + 3 * 2
    assert study_seconds(one, whole, minutes(one, d=2), 1) == MINUTE * (trials + runs)
    assert study_seconds(one, whole, minutes(one), 100) == MINUTE * (1 + 2)  # the rates first, then the longest run


def test_a_budget_that_is_enough_leaves_everything(ablation: Any) -> None:
    one = ablation(more="seeds: 5\n")
    assert fit(one, floor(0.02), minutes(one), seconds=20 * MINUTE, jobs=1).left_out == ()
    assert fit(one, floor(0.02), minutes(one), seconds=10 * MINUTE, jobs=2).left_out == ()
    assert fit(one, floor(0.02), minutes(one), seconds=19.9 * MINUTE, jobs=1).left_out != ()


def expected_by_draws(sd: float, df: int, contrasts: int, n: int) -> float:
    """Contrasts that are expected to be found."""
    return contrasts * power(0.05 / upper(sd, df), (n, n), level=FIRST / contrasts)


@pytest.mark.parametrize(("sd", "budget"), [(0.009, 16), (0.012, 16), (0.02, 16), (0.03, 16), (0.02, 24), (0.04, 30)])
def test_a_budget_takes_the_arms_and_seeds_that_find_most(ablation: Any, sd: float, budget: int) -> None:
    """2 to 4 arms, each number with the most seeds for which their runs take at most `budget` minutes."""
    one = ablation(more="seeds: 10\n")
    choices = [(arms, min(10, budget // arms)) for arms in (2, 3, 4)]
    best = max(choices, key=lambda choice: expected_by_draws(sd, 9, choice[0] - 1, choice[1]))
    scope = fit(one, floor(sd), minutes(one), seconds=budget * MINUTE, jobs=1)
    assert (len(scope.arms), len(scope.seeds)) == best
    assert scope.arms == tuple("abcd")[: best[0]] and scope.baseline_seeds == scope.seeds


def test_close_effects_cost_arms_and_large_ones_seeds(ablation: Any) -> None:
    one = ablation(more="seeds: 10\n")
    clear = fit(one, floor(0.01), minutes(one), seconds=20 * MINUTE, jobs=1)
    assert clear.arms == ("a", "b", "c", "d") and len(clear.seeds) == 5
    assert clear.left_out == ("5 of 10 seeds per arm",)
    close = fit(one, floor(0.03), minutes(one), seconds=20 * MINUTE, jobs=1)
    assert close.arms == ("a", "b") and len(close.seeds) == 10
    assert close.left_out == ("arms c, d",)


def test_without_a_floor_arms_come_before_seeds(ablation: Any) -> None:
    one = ablation(more="seeds: 10\n")
    scope = fit(one, None, minutes(one), seconds=13 * MINUTE, jobs=1)
    assert scope.arms == tuple("abcd") and scope.seeds == (0, 1, 2) and scope.left_out == ("7 of 10 seeds per arm",)


def test_arms_go_before_seeds_below_three_do(ablation: Any) -> None:
    """Ten runs are 2 seeds of 4 arms, or 3 of 3."""
    one = ablation(more="seeds: 5\n")
    scope = fit(one, floor(0.001), minutes(one), seconds=10 * MINUTE, jobs=1)
    assert scope.arms == ("a", "b", "c") and scope.seeds == (0, 1, 2)
    assert scope.left_out == ("arm d", "2 of 5 seeds per arm")


def test_fewer_than_three_seeds_only_where_nothing_else_fits_and_then_it_is_said(ablation: Any) -> None:
    one = ablation(more="seeds: 5\n")
    scope = fit(one, floor(0.001), minutes(one), seconds=5 * MINUTE, jobs=1)
    assert scope.arms == ("a", "b") and scope.seeds == (0, 1)
    assert scope.left_out == (
        "arms c, d",
        "3 of 5 seeds per arm (not even 3 fit, and below 3 no contrast is called better or worse)",
    )


def test_below_three_seeds_seeds_come_before_arms_also_without_a_floor(ablation: Any) -> None:
    """Four runs are 1 seed of 4 arms, or 2 of 2."""
    one = ablation(more="seeds: 5\n")
    assert len(fit(one, None, minutes(one), seconds=4 * MINUTE, jobs=1).seeds) == 2


@pytest.mark.parametrize(("run", "hint"), [(1.0, "--budget 3m"), (300.0, "--budget 660m"), (0.001, "--budget 1m")])
def test_a_budget_for_nothing_says_what_the_least_takes(ablation: Any, run: float, hint: str) -> None:
    one = ablation(more="seeds: 5\nbaseline_seeds: 9\n")
    times = dict.fromkeys(one.arms, run * MINUTE)
    with pytest.raises(ConfigError, match=r"--budget: not even 2 arms with 1 seed fit: they take about") as caught:
        fit(one, None, times, seconds=0.0009 * MINUTE, jobs=1)
    assert caught.value.hint == hint
    seconds = 60.0 * int(hint.removeprefix("--budget ").removesuffix("m"))
    assert fit(one, None, times, seconds=seconds, jobs=1).arms


def test_more_seeds_of_the_baseline_are_given_up_only_when_that_finds_more(ablation: Any) -> None:
    one = ablation(more="seeds: 3\nbaseline_seeds: 6\n", arms=["a", "b"])
    scope = fit(one, floor(0.02), minutes(one), seconds=8 * MINUTE, jobs=1)
    assert scope.seeds == scope.baseline_seeds == (0, 1, 2)
    assert scope.left_out == ("3 of 6 seeds of the baseline",)
    wide = ablation(more="seeds: 10\nbaseline_seeds: 12\n", arms=["a", "b"])
    scope = fit(wide, floor(0.02), minutes(wide), seconds=18 * MINUTE, jobs=1)  # 6 + 12 or 9 + 9
    effect = 0.05 / upper(0.02, 9)
    assert power(effect, (6, 12), level=FIRST) < power(effect, (9, 9), level=FIRST)
    assert len(scope.seeds) == len(scope.baseline_seeds) == 9
    assert scope.left_out == ("1 of 10 seeds per arm", "3 of 12 seeds of the baseline")


def test_declared_looks_keep_their_seeds(ablation: Any) -> None:
    one = ablation(more="looks: [3, 5, 8]\n")
    scope = fit(one, floor(0.001), minutes(one), seconds=20 * MINUTE, jobs=1)
    assert scope.arms == ("a", "b") and len(scope.seeds) == 8
    with pytest.raises(ConfigError, match="not even 2 arms with 8 seeds fit") as caught:
        fit(one, floor(0.001), minutes(one), seconds=15 * MINUTE, jobs=1)
    assert caught.value.hint == "--budget 18m"


def test_seeds_that_are_added_until_decided_are_as_many_as_the_budget_allows(ablation: Any) -> None:
    one = ablation(until_decided=True)
    assert one.seeds == tuple(range(12)) and one.looks == tuple(range(3, 13))
    scope = fit(one, None, minutes(one), seconds=21 * MINUTE, jobs=1)
    assert (scope.arms, scope.seeds, scope.left_out) == (tuple(one.arms), tuple(range(5)), ("7 of 12 seeds per arm",))
    assert ablation(until_decided=True, seeds=8).looks == tuple(range(3, 9))
    for more, options in (("looks: [3, 5]\n", {}), ("", {"seeds": 3}), ("", {"seeds": "auto"})):
        with pytest.raises(ConfigError, match="--until decided: "):
            ablation(more=more, until_decided=True, **options)
    with pytest.raises(ConfigError, match="not even 2 arms with 3 seeds fit"):
        fit(one, None, minutes(one), seconds=5 * MINUTE, jobs=1)


def test_a_factorial_design_keeps_all_of_its_arms(ablation: Any) -> None:
    one = ablation(FACTORS, "seeds: 8\n")
    scope = fit(one, floor(0.02), minutes(one), seconds=20 * MINUTE, jobs=1)
    assert scope.arms == tuple(one.arms) and len(scope.seeds) == 5


def test_a_baseline_that_is_not_first_is_kept_and_the_order_of_the_file_too(ablation: Any) -> None:
    text = ARMS.replace("baseline: a", "baseline: c").replace("a: {}", "a: {model.bias: false}")
    one = ablation(text.replace("c: {model.position: rotary}", "c: {}"), "seeds: 5\n")
    scope = fit(one, floor(0.03), minutes(one), seconds=10 * MINUTE, jobs=1)
    assert scope.arms == ("a", "c") and scope.left_out == ("arms b, d",)
