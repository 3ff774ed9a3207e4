"""The best value of a setting from trials, the result of a search, and its transfer over model sizes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, stats

from gpt2lab.analysis.parabola import fit
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.tuning import Optimum, chosen, optimum
from gpt2lab.records import SearchRecord

RATES = np.geomspace(0.0005, 0.032, 13)


def losses(rates: Array = RATES, sd: float = 0.01, best: float = 0.004, seed: int = 0) -> Array:
    """2 nats at the best rate, 0.02 more per squared octave, and noise."""
    return 2 + 0.02 * np.log2(rates / best) ** 2 + np.random.default_rng(seed).normal(0, sd, len(rates))


def found(
    rates: Array, values: Array, *, low: float = 0.0005, high: float = 0.032, noise_sd: float | None = None,
    pruned: tuple[float, ...] = (), maximize: bool = False,
) -> Optimum:  # fmt: skip
    return optimum(
        zip(rates.tolist(), values.tolist(), strict=True), low=low, high=high, log=True, effect=0.05,
        noise_sd=noise_sd, pruned=pruned, maximize=maximize,
    )  # fmt: skip


def test_without_lopsidedness_the_curve_is_the_parabola_and_the_interval_holds_that_of_fieller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt2lab.analysis.parabola.LOPSIDED", 1e-5)
    x = np.linspace(-2, 2, 12)
    y = 1 + 0.03 * (x - 0.3) ** 2 + np.random.default_rng(4).normal(0, 0.01, 12)
    ours = fit(x, y, log=False, effect=1.0)
    ols = sm.OLS(y, np.stack([np.ones(12), x, x * x], axis=1)).fit()
    _, b, c = ols.params
    cov, t2 = ols.cov_params(), stats.t.ppf(0.975, 9) ** 2
    # every v with (b + 2 c v)^2 <= t^2 var(b + 2 c v), whose ends solve a quadratic equation
    roots = np.roots([4 * (c * c - t2 * cov[2, 2]), 4 * (b * c - t2 * cov[1, 2]), b * b - t2 * cov[1, 1]])
    assert ours.curve is not None and ours.interval is not None
    place = 4 / 300
    assert ours.curve.at == pytest.approx(-b / (2 * c), abs=place)
    assert ours.interval[0] < min(roots.real) < max(roots.real) < ours.interval[1]
    assert ours.curve.sd == pytest.approx(math.sqrt(ols.scale), rel=0.01)


@pytest.mark.parametrize("noise_sd", [None, 0.006])
def test_the_interval_is_the_profile_of_curves_by_any_powers(noise_sd: float | None) -> None:
    """Each place with each pair of powers fitted by scipy's non-negative least squares."""
    x = np.linspace(-2, 2, 13)
    y = 1 + np.where(x < 0.2, 0.01, 0.06) * (x - 0.2) ** 2 + np.random.default_rng(4).normal(0, 0.006, 13)
    ours = fit(x, y, log=False, effect=1.0, noise_sd=noise_sd)
    places, lack = np.linspace(-2, 2, 301), []
    for place in places:
        sides = [np.maximum(sign * (x - place), 0) for sign in (-1, 1)]
        designs = [
            np.stack([np.ones(13), -np.ones(13), sides[0] ** left, sides[1] ** right], axis=1)
            for left in (1, 2, 3) for right in (1, 2, 3)
        ]  # fmt: skip
        lack.append(min(optimize.nnls(design, y)[1] ** 2 for design in designs))
    variance = min(lack) / 8
    limit = stats.t.ppf(0.975, 8) ** 2 * variance
    if noise_sd is not None:
        limit = stats.norm.ppf(0.975) ** 2 * max(noise_sd**2, variance)
    inside = np.flatnonzero(np.array(lack) <= min(lack) + limit)
    assert ours.interval == pytest.approx((places[inside[0] - 1], places[inside[-1] + 1]))


def test_many_trials_decide_the_shape_of_both_sides() -> None:
    def halves(x: Array, bottom: float, at: float, left: float, right: float) -> Array:
        return bottom + np.where(x < at, left, right) * (x - at) ** 2

    x = np.linspace(-3, 3, 200)
    y = halves(x, 2.0, 0.4, 0.01, 0.04) + np.random.default_rng(2).normal(0, 0.003, 200)
    near = y <= y.min() + 0.1
    by_scipy, _ = optimize.curve_fit(halves, x[near], y[near], p0=(2, 0, 0.02, 0.02))
    curve = fit(x, y, log=False, effect=0.05).curve
    assert curve is not None
    assert (curve.bottom, curve.at, curve.left, curve.right) == pytest.approx(by_scipy, abs=0.02)


def test_the_answer_of_an_ordinary_search() -> None:
    answer = found(RATES, losses())
    assert answer.interval is not None and answer.vertex is not None and answer.flat is not None
    assert answer.interval[0] < 0.004 < answer.interval[1] < 6 * answer.interval[0]
    thrice = found(np.repeat(RATES[::2], 3), losses(np.repeat(RATES[::2], 3), seed=1))  # each trial counts
    assert thrice.interval is not None and thrice.interval[0] < 0.004 < thrice.interval[1]
    assert thrice.curve is not None and thrice.curve.points > 10
    assert answer.flat == pytest.approx((0.004 / 2**1.58, 0.004 * 2**1.58), rel=0.25)  # sqrt(0.05 / 0.02) octaves
    assert answer.edge is None and answer.widen is None and answer.reason == ""
    text = str(answer)
    assert text.startswith("Best learning rate 0.00") and "(95 % interval 0.00" in text
    assert "one loses less than 0.05 nats. The best trial took 0.00" in text
    line = answer.line()
    assert line is not None and line[0][np.argmin(line[1])] == pytest.approx(answer.vertex, rel=0.03)


def test_another_sign_or_unit_moves_everything_along() -> None:
    down, up = found(RATES, losses()), found(RATES, -losses(), maximize=True)
    assert (up.best, up.interval, up.flat) == (down.best, down.interval, down.flat)
    assert down.value is not None and up.value == -down.value
    line, mirrored = up.line(), down.line()
    assert line is not None and mirrored is not None and np.array_equal(line[1], -mirrored[1])
    other = found(RATES * 1024, losses(), low=0.512, high=32.768)
    assert down.interval is not None and other.interval == pytest.approx([1024 * end for end in down.interval])


@pytest.mark.parametrize(
    ("best", "edge", "widen"), [(0.1, "high", (0.0005, 0.128)), (0.0001, "low", (0.000125, 0.032))]
)
def test_a_curve_that_still_falls_at_the_end_of_the_space_is_an_edge(
    best: float, edge: str, widen: tuple[float, float]
) -> None:
    answer = found(RATES, losses(best=best))
    assert (answer.edge, answer.interval) == (edge, None)
    assert answer.widen == pytest.approx(widen)
    end = {"high": "upper edge (0.032): widen to 0.13", "low": "lower edge (0.0005): widen to 0.00013"}[edge]
    assert str(answer).startswith(f"The optimum lies at the {end}.")


def test_a_side_is_closed_by_what_diverged_or_was_stopped_there_and_not_by_a_lucky_trial() -> None:
    values = losses(best=0.1, sd=0)
    open_side, closed = found(RATES[:10], values[:10]), found(RATES, np.where(np.arange(13) < 10, values, np.inf))
    assert open_side.edge == "high" and "nothing was tried above it" not in str(found(RATES, values))
    assert closed.edge is None and closed.diverged == 3 and closed.interval is None
    assert closed.flat is not None and closed.flat[1] == pytest.approx(RATES[9]) and closed.flat_open == (False, False)
    stopped = found(RATES[:10], values[:10], pruned=(0.02, 0.03))
    assert (stopped.edge, stopped.unfinished) == (None, "high")
    assert str(stopped).endswith("Above it, trials were stopped early, so what they would have reached is open.")
    beyond = found(RATES[:6], values[:6])  # the space reaches further than the trials
    assert beyond.edge == "high" and beyond.widen is None and "add trials there" in str(beyond)
    values[-2] = values[-1] - 0.001
    assert found(RATES, values).edge == "high"


def test_nothing_lies_below_zero() -> None:
    points = [(x, 2 + x) for x in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert optimum(points, low=0, high=0.5, log=False, effect=0.05, what="dropout").edge is None
    assert optimum(points, low=0, high=0.5, log=False, effect=0.05, maximize=True).edge == "high"
    shifted = [(x + 0.1, y) for x, y in points]
    assert optimum(shifted, low=0.1, high=0.6, log=False, effect=0.05).edge == "low"


@pytest.mark.parametrize(("points", "text"), [
    ([], "No trial finished."),
    ([(0.01, math.inf), (0.02, math.nan)], "No trial finished: 2 trials diverged"),
    ([(0.01, 2.0)], "The optimum lies at the upper edge (0.01): widen to 0.04."),
    ([(0.01, 2.0), (0.01, 2.1)], "The optimum lies at the upper edge (0.01): widen to 0.04."),
    ([(0.004, 2.1), (0.008, 2.0), (0.016, 2.2)], "Best learning rate 0.008, of those that were tried; within"),
    ([(0.002, 2.0), (0.004, 2.0), (0.008, 2.0), (0.016, 2.0)], "The optimum lies at the lower edge"),
])  # fmt: skip
def test_too_little_is_said_in_words(points: list[tuple[float, float]], text: str) -> None:
    answer = optimum(points, low=0.002, high=0.016, log=True, effect=0.05)
    assert str(answer).startswith(text)
    assert answer.interval is None and answer.curve is None and answer.reason


def test_few_trials_need_the_noise_to_be_known() -> None:
    rates = np.geomspace(0.001, 0.016, 5)
    values = losses(rates, sd=0.005)
    unsure, sure = found(rates, values), found(rates, values, noise_sd=0.005)
    assert unsure.vertex == pytest.approx(0.004, rel=0.3) and unsure.interval is None
    assert "No interval: too few trials near the best one to tell how noisy they are." in str(unsure)
    assert sure.interval is not None and sure.interval[0] < 0.004 < sure.interval[1]


def test_more_noise_widens_the_interval_until_there_is_none() -> None:
    ends = [found(RATES, losses(sd=0.001), noise_sd=sd).interval for sd in (0.002, 0.004, 0.008)]
    widths = [math.log2(high / low) for low, high in filter(None, ends)]
    assert len(widths) == 3 and all(a < b for a, b in pairwise(widths))
    hopeless = found(RATES, losses(), noise_sd=0.2)
    assert hopeless.interval is None and "too noisy" in hopeless.reason


@pytest.mark.parametrize("noise_sd", [None, 0.002])
def test_a_curve_that_fits_badly_gives_no_interval(noise_sd: float | None) -> None:
    u = np.linspace(-2, 2, 41)
    values = 2 + 0.02 * u**4 + np.random.default_rng(0).normal(0, 0.002, 41)
    answer = found(0.004 * 2**u, values, low=0.001, high=0.016, noise_sd=noise_sd)
    assert answer.interval is None and answer.reason.startswith("the curve fits badly (p = ")


def test_where_other_settings_vary_only_the_place_of_the_best_trial_is_told() -> None:
    points = [*zip(RATES, losses(), strict=True)]
    answer = optimum(points, low=0.0005, high=0.032, log=True, effect=0.05, alone=False)
    assert answer.curve is None and answer.flat is None and answer.edge is None and answer.best is not None
    assert optimum(points[:4], low=0.0005, high=0.032, log=True, alone=False).edge == "high"


RATE = {"name": "optim.lr", "kind": "float", "low": 0.001, "high": 0.016, "log": True, "choices": None, "when": None}
DECAY = {"name": "optim.weight_decay", "kind": "float", "low": 0.0, "high": 0.4, "log": False, "choices": None}
NORM = {"name": "model.norm", "kind": "categorical", "low": None, "high": None, "choices": ["layernorm", "rmsnorm"]}


def trial(slot: int, value: float | None, outcome: str = "finished", **settings: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): setting for key, setting in settings.items()}
    return {"slot": slot, "outcome": outcome, "value": value, "settings": named}


def search(trials: list[dict[str, Any]], *space: dict[str, Any]) -> SearchRecord:
    return SearchRecord.read({"space": list(space or (RATE,)), "trials": trials}, "here")


def rates(values: dict[float, float]) -> list[dict[str, Any]]:
    return [trial(slot, value, optim__lr=rate) for slot, (rate, value) in enumerate(values.items())]


VALLEY = {
    rate: 2 + 0.02 * float(np.log2(rate / 0.0041)) ** 2 for rate in (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.016)
}


def test_the_best_finished_trial_is_chosen_and_of_equals_the_first() -> None:
    found = chosen(search([*rates(VALLEY), trial(7, 1.0, "pruned", optim__lr=0.009)]), effect=0.05, noise_sd=0.01)
    assert found.best and found.best.index == 3
    assert (found.best.settings, found.best.value) == ({"optim.lr": 0.004}, VALLEY[0.004])
    assert found.reason is None and not found.edge
    assert str(found.optima["optim.lr"]).startswith("Best learning rate 0.0041 (95 % interval 0.00")
    trials = [trial(2, 1.0, optim__lr=0.004), trial(1, 1.0, optim__lr=0.003), trial(0, 3.0, optim__lr=0.002)]
    lowest, highest = chosen(search(trials)).best, chosen(search(trials), "maximize").best
    assert lowest and highest and (lowest.index, highest.index) == (1, 0)


def test_a_search_at_an_edge_or_not_over_or_without_a_result_is_not_comparable() -> None:
    rising = search(rates({0.004: 2.3, 0.008: 2.2, 0.016: 2.0}))
    edge = chosen(rising)
    assert edge.edge == {"optim.lr": "high"} and edge.optima["optim.lr"].widen == pytest.approx((0.001, 0.064))
    assert edge.reason == "its best learning rate lies at the upper edge (0.016)"
    assert chosen(rising, "maximize").edge == {"optim.lr": "low"}
    waiting = [*rates(VALLEY), trial(8, None, "waiting", optim__lr=0.01)]
    assert chosen(search(waiting)).reason == "1 of 8 trials of its search have not ended"
    assert chosen(search(rates(VALLEY)), count=9).reason == "2 of 9 trials of its search have not ended"
    nothing = chosen(search([trial(0, None, "diverged", optim__lr=0.01), trial(1, None, "failed")]))
    assert nothing.best is None
    assert nothing.reason == "no trial of its search finished"
    assert "1 trial diverged" in str(nothing.optima["optim.lr"])


def test_of_several_settings_edges_go_by_the_place_of_the_best_trial() -> None:
    values = ((2.2, 0.002, 0.1, "layernorm"), (2.0, 0.004, 0.3, "rmsnorm"), (2.1, 0.008, 0.2, "rmsnorm"))
    trials = [trial(k, value, optim__lr=rate, optim__weight_decay=decay, model__norm=norm)
              for k, (value, rate, decay, norm) in enumerate(values)]  # fmt: skip
    found = chosen(search(trials, RATE, DECAY, NORM), effect=0.05)
    assert found.edge == {"optim.weight_decay": "high"}
    assert found.reason == "its best weight decay lies at the upper edge (0.3)"
    assert {name: optimum.curve for name, optimum in found.optima.items()} == {
        "optim.lr": None, "optim.weight_decay": None,
    }  # fmt: skip
    without = [trial(0, 2.0, optim__lr=0.004), trial(1, 2.2, optim__lr=0.002, optim__weight_decay=0.1),
               trial(2, 2.3, optim__lr=0.008)]  # fmt: skip
    found = chosen(search(without, RATE, DECAY))  # a setting that the best trial does not have is left out
    assert found.optima.keys() == {"optim.lr"} and found.reason is None
