"""The self-test: the code that decides verdicts passes it, wrong methods fail it, and its limits are sound."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks import searches
from gpt2lab.analysis import judging, planning, selftest, statistics
from gpt2lab.analysis.compare import compare
from gpt2lab.analysis.planning import Look, declared_looks
from gpt2lab.analysis.selftest import BANKS, PARTS, QUICK, Draws, Measurement, chance, level, near
from gpt2lab.analysis.statistics import Comparison, adjust, welch
from gpt2lab.analysis.verdicts import TextNoise
from gpt2lab.errors import ConfigError

Array = NDArray[np.float64]
FEW = 1000
MIXED = (-4.0, -1.5, 0.0, 1.0)
"""True differences, in sd, that get every kind of verdict."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One noise bank, three seeds, few studies of a kind: the faults below show in any of them."""
    for name, value in (
        ("BANKS", BANKS[:1]), ("SEEDS", (3,)), ("TIMES", 4), ("UNEQUAL", ((4, 3, 10),)),
    ):  # fmt: skip
        monkeypatch.setattr(selftest, name, value)


def failed(part: str, draws: int = 500) -> set[str]:
    """The checks of a part that are rejected, or wrong methods that it misses."""
    return {row.check for row in PARTS[part][1](Draws(count=draws, seed=0)) if not row.ok}


@pytest.mark.slow
def test_the_code_that_decides_verdicts_is_calibrated() -> None:
    """The self-test as `--quick` runs it."""
    quick = selftest.selftest(QUICK)
    assert not quick.wrong and quick.ok
    assert {row.part for row in quick.rows} == set(PARTS)
    rates = {(row.check, row.bank, row.n) for row in quick.rows if row.part == "rates"}
    assert rates == set(itertools.product({check for check, _, _ in rates}, BANKS, (3, 5, 8))) and len(rates) == 108


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_accepts_the_right_method_and_flags_the_wrong_ones(part: str) -> None:
    assert failed(part) == set()


def patched_welch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Comparison, Array, Array], Comparison]) -> None:
    """Another estimator for `findings`; `compare` keeps the right one."""

    def estimator(arm: ArrayLike, against: ArrayLike, **terms: Any) -> Comparison:
        return change(welch(arm, against, **terms), np.asarray(arm), np.asarray(against))

    monkeypatch.setattr(judging, "welch", estimator)


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
    (judging, "adjust", unadjusted, "rates", "all null: no difference larger than X"),
    (planning, "declared_looks", lambda at, alpha: [Look(n, alpha) for n in (3, 5, 8)], "looks",
     "looks at n = 3, 5, 8, 1 arm, all null: any better/worse"),
    (statistics, "adjust", lambda tests, **terms: adjust(tests, **terms | {"dropped": 0}), "looks",
     "the best of 4 arms kept, 3 dropped: better/worse"),
    (selftest, "SIGMAS", 30.0, "controls", "control: percentile bootstrap"),
])  # fmt: skip
def test_each_wrong_part_fails(
    where: Any, name: str, wrong: Any, part: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, wrong)
    assert check in failed(part, 4000 if part == "looks" else 500)


@pytest.mark.usefixtures("small")
def test_a_turned_sign_fails_where_there_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = judging.decide
    monkeypatch.setattr(judging, "decide", lambda d, *p, **terms: right(-np.asarray(d), *p, **terms))
    assert failed("rates") == {"true -3 sd: better", "true -2 sd: better"}


def test_the_same_draws_and_seed_give_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (selftest.selftest(FEW, seed, parts=["controls"]) for seed in (3, 3, 4))
    assert first == again and first.rows != other.rows
    told: list[tuple[str, int]] = []
    both = selftest.selftest(FEW, 3, parts=["unequal", "controls"], progress=lambda part, n: told.append((part, n)))
    assert both.rows[-len(first.rows) :] == first.rows  # no part depends on the others
    assert told[0] == ("unequal", 0) and told[-1] == ("controls", len(both.rows))
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
    arms = Draws(count=500, seed=1).studies("one look", BANKS[1], 8, MIXED, (0.5, 2.0, 0.2, 1.0))
    decisions = selftest.judged(arms)[1]
    assert (selftest.words_at_looks(arms, declared_looks((8,), 0.05)) == decisions).all()
    assert set(decisions.ravel()) >= {"better", "better (smaller)", "worse (smaller)", "no difference", "inconclusive"}


@pytest.mark.parametrize("at", [(), (3, 5, 8)])
def test_one_study_at_a_time_is_judged_as_many_at_once(at: tuple[int, ...]) -> None:
    """`compare`, which judges studies, against the code that the self-test simulates."""
    numbers = ("difference", "p", "p_holm", "p_equivalence_holm", "low", "high", "joint_low", "joint_high")
    arms = Draws(count=8 if at else 30, seed=0).studies("agreement", BANKS[1], 8, MIXED, (0.5, 2.0, 0.2, 1.0))
    family, decisions = selftest.judged(arms)
    if at:
        decisions = selftest.words_at_looks(arms, declared_looks(at, selftest.ALPHA))
    for i, study in enumerate(zip(*arms, strict=True)):
        rows = [{"arm": str(a), "seed": s, "value": v} for a, arm in enumerate(study) for s, v in enumerate(arm)]
        verdicts = compare(rows, baseline="0", smallest_effect=selftest.X, looks=at or None, sensitivity=False)
        for k, contrast in enumerate(verdicts.contrasts):
            word = contrast.word.partition(":")[0].replace(" larger than 3", "").replace(" than 3", "")
            assert word == decisions[i, k]
            for name in () if at else numbers:
                assert getattr(contrast, name) == pytest.approx(getattr(family, name)[i, k], rel=1e-9), name


@pytest.mark.parametrize(
    ("name", "word", "difference"),
    [("mudd_skips", "better", -0.0084), ("fp8_mlp_down", "no difference larger than 0.005", 0.0001)],
)
def test_two_public_ablations_get_their_words(name: str, word: str, difference: float) -> None:
    rows = [row for row in selftest.table("golden_contrasts.csv") if row["contrast"] == name]
    [golden] = compare(rows, baseline="baseline", smallest_effect=0.005, metric="val_loss").contrasts
    assert golden.word == word and golden.difference == pytest.approx(difference, abs=0.00005)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (54, 5, 40), (4,) * 5, (2, 4, 8, 16, 32), (4,) * 20])
def test_the_interval_over_documents_is_covered(sizes: tuple[int, ...]) -> None:
    labels, held, draws = np.repeat(np.arange(len(sizes)), sizes), [], 1000
    for losses in np.random.default_rng(sizes).standard_normal((draws, len(sizes)))[:, labels]:
        se, count = statistics.document_error([losses], [np.zeros_like(losses)], labels)
        text = TextNoise(se=se, count=count, unit="documents", effective=statistics.effective_documents(labels))
        held.append(abs(losses.mean()) <= text.halfwidth)
    assert np.mean(held) >= 0.95 - chance(0.05, draws)


def test_arms_that_are_equal_at_their_best_rates_differ_only_where_the_search_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(searches, "CURVATURES", ((0.005, 0.005),))
    monkeypatch.setattr(searches, "SEARCHED", (10,))
    monkeypatch.setattr(searches, "SHAPES", {"a parabola": searches.SHAPES["a parabola"]})
    assert all(row.ok for row in searches.searched(Draws(count=500, seed=0)))
    monkeypatch.setattr(statistics, "at_best_rates", lambda test, *_, **__: test)
    wrong = [row.check for row in searches.searched(Draws(count=4000, seed=0)) if not row.ok]
    assert "bracket, a parabola, curvature 0.005 and 0.005, sd 0.0015: better/worse" in wrong
