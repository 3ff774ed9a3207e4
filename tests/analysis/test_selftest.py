"""The self-test: the code that decides verdicts passes it, wrong methods fail it, and its limits are sound."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from gpt2lab.analysis import judging, planning, selftest, statistics
from gpt2lab.analysis.planning import Look, declared_looks, seeds_for_power
from gpt2lab.analysis.selftest import BANKS, PARTS, QUICK, Draws, Measurement, chance, level, near
from gpt2lab.analysis.statistics import Comparison, adjust, linear, welch
from gpt2lab.errors import ConfigError

Array = NDArray[np.float64]
FEW = 1000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One noise bank, three seeds, few studies of a kind: the faults below show in any of them."""
    for name, value in (
        ("BANKS", BANKS[:1]), ("SEEDS", (3,)), ("TIMES", 4), ("UNEQUAL", ((4, 3, 10),)),
        ("CURVATURES", ((0.005, 0.005),)), ("SEARCHED", (10,)), ("SINGLE", 20), ("FORECASTS", ((5, 5),)),
        ("SEEDS_NEEDED", ((1, 2.0, 6), (4, 3.0, 5))),
        ("SHAPES", {"a parabola": selftest.SHAPES["a parabola"]}),
    ):  # fmt: skip
        monkeypatch.setattr(selftest, name, value)


def failed(part: str, draws: int = 500) -> set[str]:
    """The checks of a part that are rejected, or wrong methods that it misses."""
    return {row.check for row in PARTS[part][1](Draws(count=draws, seed=0)) if not row.ok}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_code_that_decides_verdicts_is_calibrated(part: str) -> None:
    """The self-test as `--quick` runs it."""
    quick = selftest.selftest(QUICK, parts=[part])
    assert not quick.wrong and quick.ok
    assert {row.part for row in quick.rows} == {part}
    if part == "rates":
        rates = {(row.check, row.bank, row.n) for row in quick.rows}
        assert rates == set(itertools.product({check for check, _, _ in rates}, BANKS, (3, 5, 8))) and len(rates) == 108


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_accepts_the_right_method_and_flags_the_wrong_ones(part: str) -> None:
    assert failed(part) == set()


def patched_welch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Comparison, Array, Array], Comparison]) -> None:
    """Another estimator for many studies at once; `compare` keeps the right one."""

    def estimator(arm: ArrayLike, against: ArrayLike, **terms: Any) -> Comparison:
        return change(welch(arm, against, **terms), np.asarray(arm), np.asarray(against))

    monkeypatch.setattr(selftest, "welch", estimator)


def pooled(right: Comparison, arm: Array, against: Array) -> Comparison:
    """The variance of four quiet arms for the noisy one too, as in a pooled analysis of variance."""
    n = arm.shape[-1]
    se = np.sqrt((against.var(-1, ddof=1) * 4 + arm.var(-1, ddof=1)) / 5 * 2 / n)
    return replace(right, se=se, p=2 * stats.t.sf(np.abs(right.difference) / se, 5 * (n - 1)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("change", "checks"), [
    (lambda right, *_: replace(right, p=right.p / 10), {"all null: any better/worse", "one arm at 2 sd: better/worse"}),
    (pooled, {"one arm at 4 sd: better/worse", "one of 4 arms at 4 sd: any better/worse"}),
    (lambda right, *_: replace(right, p_equivalence=right.p_equivalence / 4),
     {"true difference X: called smaller", "all null: no difference larger than X"}),
    (lambda right, *_: replace(right, low=right.low + 1, high=right.high - 1), {"95 % interval: holds the truth"}),
])  # fmt: skip
def test_a_wrong_estimator_fails(change: Any, checks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    patched_welch(monkeypatch, change)
    assert checks <= failed("rates")


def unadjusted(comparisons: Any, **terms: Any) -> statistics.Family:
    family = adjust(comparisons, **terms)
    return replace(family, p_holm=family.p, p_equivalence_holm=family.p_equivalence)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("where", "name", "wrong", "part", "check"), [
    (statistics, "adjust", unadjusted, "rates", "all null: no difference larger than X"),
    (planning, "declared_looks", lambda at, alpha: [Look(n, alpha) for n in (3, 5, 8)], "looks",
     "looks at n = 3, 5, 8, noise 1:4, 1 arm, all null: any better/worse"),
    (statistics, "adjust", lambda tests, **terms: adjust(tests, **terms | {"dropped": 0}), "looks",
     "the best of 4 arms kept, 3 dropped: better/worse"),
    (statistics, "at_best_rates", lambda test, *_, **__: test, "searched",
     "bracket, a parabola, curvature 0.005 and 0.005, sd 0.0015: better/worse"),
    (statistics, "effective_documents", lambda labels: 20, "measures", "95 % interval over 3 documents"),
    (planning, "seeds_for_power", lambda effect, *, alpha: seeds_for_power(effect, alpha=alpha) + 1, "planned",
     "seeds for 80 % power unlike those by simulation"),
    (selftest, "power", lambda *_, **__: 0.9, "planned", "power for 2 sd, 5 seeds against 5, 1 contrast"),
    (judging, "linear", lambda arms, *more, **terms: linear([arms[0] + 1.5, *arms[1:]], *more, **terms), "agreement",
     "compare against findings, other word or number"),
    (sys.modules["gpt2lab.analysis.compare"], "declared_looks",
     lambda at, alpha: [Look(n, alpha / 50) for n in at], "agreement",
     "compare against findings, at looks: other word"),
    (selftest, "SIGMAS", 30.0, "controls", "control: percentile bootstrap"),
])  # fmt: skip
def test_each_wrong_part_fails(
    where: Any, name: str, wrong: Any, part: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, wrong)
    assert check in failed(part, {"looks": 1500, "searched": 4000}.get(part, 500))


@pytest.mark.usefixtures("small")
def test_a_turned_sign_fails_where_there_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = judging.decide
    monkeypatch.setattr(judging, "decide", lambda d, *p, **terms: right(-np.asarray(d), *p, **terms))
    assert failed("rates") == {"true -3 sd: better", "true -2 sd: better"}
    assert failed("agreement") == {"golden mudd_skips: better"}


@pytest.mark.usefixtures("small")
def test_the_same_draws_and_seed_give_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (selftest.selftest(FEW, seed, parts=["controls"]) for seed in (3, 3, 4))
    assert first == again and first.rows != other.rows
    told: list[tuple[str, int]] = []
    both = selftest.selftest(FEW, 3, parts=["measures", "controls"], progress=lambda part, n: told.append((part, n)))
    assert both.rows[-len(first.rows) :] == first.rows  # no part depends on the others
    assert told[0] == ("measures", 0) and told[-1] == ("controls", len(both.rows))
    record = json.loads(json.dumps(both.to_json(), allow_nan=False))
    assert (record["ok"], record["draws"], record["seed"], len(record["rows"])) == (True, FEW, 3, len(both.rows))
    assert record["rows"][0].keys() >= {"check", "bank", "n", "measured", "reference", "low", "high", "ok", "status"}


@pytest.mark.parametrize("draws", [0, -5, 999, 10**9])
def test_numbers_of_draws_out_of_range_are_refused(draws: int) -> None:
    with pytest.raises(ConfigError, match="draws"):
        selftest.selftest(draws)
    with pytest.raises(ConfigError, match="did you mean 'looks'"):
        selftest.selftest(FEW, parts=["look"])


def test_limits_are_exact_and_nan_is_never_accepted() -> None:
    def wrong(share: float) -> NDArray[np.bool_]:
        return np.arange(10_000) < share * 10_000

    limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 10_000)
    assert chance(0.05, 10_000) == pytest.approx(limit - 0.05)
    for control in (False, True):
        assert level("", wrong(limit - 1e-4), control=control).ok is not control
        assert level("", wrong(limit + 1e-4), control=control).ok is control
    assert near("", wrong(0.52), 0.5).ok and not near("", wrong(0.54), 0.5).ok and not near("", wrong(0.46), 0.5).ok
    assert level("", np.stack([wrong(0.03), ~wrong(0.97)], -1)).measured == pytest.approx(0.06)  # by study
    assert Measurement(check="", measured=float("nan")).status == "rejected"


def test_studies_have_the_noise_and_shifts_that_they_are_drawn_with() -> None:
    assert len(selftest.real()) == 1261
    raw = [float(row["val_loss"]) for row in selftest.table("seed_noise_124m.csv")]
    assert [np.mean(raw), np.std(raw, ddof=1)] == pytest.approx([3.27939, 0.00185], abs=1e-5)
    for bank in BANKS:
        drawn = Draws(count=20_000, seed=1).studies("some", bank, 5, (0, 2), (4, 1), base=7)
        assert [arm.shape for arm in drawn] == [(20_000, 7), (20_000, 5), (20_000, 5)]
        assert [arm.mean() for arm in drawn] == pytest.approx([0, 0, 2], abs=0.06)
        assert [arm.std() for arm in drawn] == pytest.approx([1, 4, 1], abs=0.08)


def test_one_look_is_findings_and_every_word_occurs() -> None:
    arms = Draws(count=500, seed=1).studies("one look", BANKS[1], 8, selftest.MIXED, (0.5, 2.0, 0.2, 1.0))
    decisions = selftest.judged(arms)[1]
    assert (selftest.words_at_looks(arms, declared_looks((8,), 0.05)) == decisions).all()
    assert set(decisions.ravel()) >= {"better", "better (smaller)", "worse (smaller)", "no difference", "inconclusive"}
