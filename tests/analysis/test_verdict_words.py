"""Every verdict word can be reached, none out of turn; numbers in sentences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gpt2lab.analysis import Contrast, Noise, compare
from gpt2lab.analysis.calibration import nominal_level, power
from gpt2lab.analysis.judging import decide
from gpt2lab.analysis.wording import effect, interval, probability

SPREAD = (-0.012, 0.0, 0.012, -0.006, 0.006, -0.012, 0.012, 0.0)
FLOOR = Noise(sd=0.012, df=11, runs=12, scale="nano", stack="torch 2.13.0, cpu")
NAN, INF = float("nan"), float("inf")


def rows(n: int = 3, spread: float = 1.0, **means: float) -> list[dict[str, Any]]:
    """n seeds per arm with a fixed spread of about 0.012 around each mean."""
    return [
        {"arm": arm, "seed": seed, "value": mean + spread * (1 + 0.1 * i) * SPREAD[seed]}
        for i, (arm, mean) in enumerate(means.items())
        for seed in range(n)
    ]


def judged(table: list[dict[str, Any]], **terms: Any) -> Contrast:
    """The first contrast against `base`, at X = 0.05."""
    chosen: dict[str, Any] = {"baseline": "base", "smallest_effect": 0.05} | terms
    return compare(table, **chosen).contrasts[0]


def spoilt(table: list[dict[str, Any]], *places: tuple[str, int], value: float = NAN) -> list[dict[str, Any]]:
    return [row | {"value": value} if (row["arm"], row["seed"]) in places else row for row in table]


@pytest.mark.parametrize(("n", "shift", "word"), [
    (3, -0.25, "better"), (3, 0.25, "worse"),
    (8, -0.02, "better (smaller than 0.05)"), (8, 0.02, "worse (smaller than 0.05)"),
    (5, 0.001, "no difference larger than 0.05"),
])  # fmt: skip
def test_words_of_what_was_found(n: int, shift: float, word: str) -> None:
    found = judged(rows(n, base=2.15, arm=2.15 + shift))
    assert found.word == word
    assert found.verdict.startswith(f"{word}, {shift:+.3f}") and f"(n = {n}, {n})" in found.verdict
    same = word.startswith("no")
    assert ("equivalence Holm p = " in found.verdict) is same and (found.p_equivalence_holm < 0.05 or not same)


def test_inconclusive_counts_seeds_that_would_really_narrow_the_interval() -> None:
    found = judged(rows(3, spread=2, base=2.15, arm=2.12))
    more = int(found.word.removeprefix("inconclusive: need about ").removesuffix(" more seeds per arm"))
    assert more > 0
    fewer = judged(rows(3, spread=3, base=2.15, arm=2.12)).word
    assert int(fewer.split()[3]) > more
    ample = np.random.default_rng(0).normal(0, 0.024, (400, 2, 3 + more))
    wide = [judged([{"arm": a, "seed": s, "value": v} for a, own in zip(("base", "arm"), draw, strict=True)
                    for s, v in enumerate(own)], contrasts=[("arm", "base")]) for draw in ample[:12]]  # fmt: skip
    assert np.mean([(c.high - c.low) / 2 for c in wide]) <= 0.05 / 2


def test_the_seeds_asked_for_come_from_the_upper_limit_of_the_sd_at_the_level_of_the_family() -> None:
    table = rows(3, spread=2, base=2.15, arm=2.12, other=1.8)
    found = judged(table)
    sd = np.hypot(found.sd_arm, found.sd_against) / np.sqrt(2)
    gain = (found.sd_arm**2 + found.sd_against**2) ** 2 / (found.sd_arm**4 + found.sd_against**4)
    upper = sd * np.sqrt(2 * gain / stats.chi2.ppf(0.2, 2 * gain))
    level = 0.05 / 2  # two contrasts
    wide = [
        stats.t.ppf(1 - float(nominal_level(level, (n, n))) / 2, gain * (n - 1)) * upper * np.sqrt(2 / n)
        for n in range(2, 31)
    ]
    n = next(n for n, halfwidth in enumerate(wide, start=2) if halfwidth <= 0.05 / 2)
    assert found.word == f"inconclusive: need about {n - 3} more seeds per arm"
    assert power(found.detectable / sd, (3, 3), alpha=level) == pytest.approx(0.8, abs=1e-3)
    assert found.detectable_upper / found.detectable == pytest.approx(upper / sd)


def test_a_large_difference_takes_as_many_seeds_as_find_one_of_its_size() -> None:
    """Far fewer than an interval that would show the smallest effect."""
    table = rows(3, spread=12, base=2.5, arm=2.15)
    found = judged(table, smallest_effect=0.01)
    upper = found.detectable_upper / found.detectable * np.hypot(found.sd_arm, found.sd_against) / np.sqrt(2)
    n = next(n for n in range(2, 99) if power(abs(found.difference) / upper, (n, n), alpha=0.05) >= 0.8)
    assert 3 < n < 20
    assert (
        found.word == f"inconclusive: need about {n - 3} more seeds per arm, if the difference is as large as it looks"
    )
    assert (found.next.action, found.next.seeds) == ("add seeds", n)


def test_what_a_lent_floor_and_much_noise_leave_open() -> None:
    """By the floor there would be nothing left to train; the arms' own spread says otherwise."""
    noisy = rows(3, spread=2, base=2.15, arm=2.12)
    found = judged(noisy, noise=dataclasses.replace(FLOOR, sd=0.001))
    assert found.word == judged(noisy).word
    assert found.word.startswith("inconclusive: need about") and found.detectable > 0.01
    assert judged(rows(1, base=2.15, arm=2.12), noise=FLOOR).word.startswith("inconclusive: need about")
    hopeless = judged(rows(3, spread=50, base=2.15, arm=2.12))
    assert hopeless.word == "inconclusive: not decidable here, it would take more than 100 further seeds per arm"


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_seeds_are_exploratory_or_likely_never_more(n: int) -> None:
    table = rows(n, base=2.15, arm=1.5)
    assert judged(table).word == "exploratory"
    assert judged(table, noise=FLOOR).word == "likely better (noise borrowed)"
    assert judged(rows(n, base=1.5, arm=2.15), noise=FLOOR).word == "likely worse (noise borrowed)"
    assert judged(table, noise=dataclasses.replace(FLOOR, runs=9)).word == "exploratory"
    assert "12 baseline repeats (nano, torch 2.13.0, cpu): sd 0.012, times 1.5" in judged(table, noise=FLOOR).verdict
    one_sided = [row for row in rows(5, base=2.15, arm=1.5) if row["arm"] == "arm" or row["seed"] < n]
    assert judged(one_sided).word == "exploratory"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_survivors_are_judged_while_at_most_a_quarter_failed(value: float) -> None:
    quarter = judged(spoilt(rows(4, base=2.15, arm=1.9), ("arm", 1), value=value))
    assert quarter.word == "unstable (1 of 4 failed)" and quarter.survivors == "better"
    assert "unstable (1 of 4 failed) in arm; conditional on not failing: better, -0.2" in quarter.verdict
    assert (quarter.n_arm, quarter.failed_arm) == (3, 1)
    third = judged(spoilt(rows(3, base=2.15, arm=1.9), ("arm", 1), value=value))
    assert third.word == third.verdict.removesuffix(" in arm") == "unstable (1 of 3 failed)"
    assert third.survivors is None and np.isnan(third.p_holm)


def test_failures_of_the_other_side_count_too() -> None:
    table = spoilt(rows(4, base=2.15, arm=1.9), ("base", 0), ("base", 1), ("arm", 2))
    found = judged(table)
    assert found.verdict == "unstable (1 of 4 failed) in arm and (2 of 4 failed) in base"
    assert found.reason == "failed runs in arm and base"
    assert found.next.text == "find out why runs of arm and base failed"
    assert judged(spoilt(table, ("arm", 2), value=1.9)).word == "unstable (2 of 4 failed)"


def test_a_run_that_learned_nothing_failed() -> None:
    table = rows(4, base=2.15, arm=1.9)
    for value, failed in ((3.2801, 1), (3.2799, 0)):  # unigram 3.33, less 0.05
        found = judged(spoilt(table, ("arm", 0), value=value), unigram=3.33)
        assert found.failed_arm == failed and found.word.startswith("unstable") == bool(failed)
    assert judged(spoilt(table, ("arm", 0), value=3.3)).failed_arm == 0  # no floor, no such failure


def test_precedence() -> None:
    table = rows(4, base=2.15, arm=1.9)
    failed = spoilt(table, ("arm", 0))
    reasons: dict[str, Any] = {
        "not_comparable": {"arm": "its best rate lies at the edge"},
        "exploratory": {"arm": "rates not bracketed"},
    }
    assert judged(failed, **reasons).word == "not comparable"
    assert judged(failed, **reasons).verdict == "not comparable: its best rate lies at the edge"
    del reasons["not_comparable"]
    assert judged(failed, **reasons).word == "unstable (1 of 4 failed)"
    assert judged(failed, **reasons).survivors == "exploratory"
    assert judged(table, **reasons).word == "exploratory"
    assert judged(table, **reasons).verdict.startswith("exploratory (rates not bracketed), -0.25")
    assert "Holm p" not in judged(table, **reasons).verdict
    assert judged(table, exploratory={"base": "half done"}).word == "exploratory"  # it reaches every contrast
    assert judged(table, screen=True).word == "exploratory"
    assert judged(table).word == "better"


def test_what_cannot_be_judged_still_counts_in_the_family() -> None:
    alone = judged(rows(3, base=2.15, arm=2.10))
    table = rows(3, base=2.15, arm=2.10) + rows(1, other=2.0)
    among = judged(table)
    assert among.p == alone.p and among.p_holm == pytest.approx(2 * alone.p)
    assert among.high - among.low > alone.high - alone.low


def test_significance_is_holms_not_raw() -> None:
    for shift in np.arange(0.02, 0.1, 0.001):
        if judged(rows(3, base=2.15, arm=2.15 - shift)).p < 0.03:
            break
    assert judged(rows(3, base=2.15, arm=2.15 - shift)).word.startswith("better")
    assert not judged(rows(3, base=2.15, arm=2.15 - shift, b=2.15, c=2.15, d=2.15)).word.startswith("better")


def test_decide_by_table() -> None:
    d = np.array([-1, 1, -1, 1, 1, 1, 1])
    p = np.array([0.01, 0.01, 0.01, 0.01, 0.5, 0.5, np.nan])
    same = np.array([0.9, 0.9, 0.01, 0.01, 0.01, 0.9, np.nan])
    words = ["better", "worse", "better (smaller)", "worse (smaller)", "no difference", "inconclusive", ""]
    assert decide(d, p, same).tolist() == words
    assert decide(1.0, 0.05, 0.05).item() == "inconclusive"  # alpha itself is not below alpha


@pytest.mark.parametrize("arm", [2.1, 2.3])
def test_identical_seeds_carry_no_noise_to_judge_by(arm: float) -> None:
    found = judged(rows(3, spread=0, base=2.1, arm=arm))
    assert found.word == "exploratory" and "no spread between seeds" in found.verdict
    assert "all 3 values of arm are equal" in found.notes
    one_sided = judged(rows(3, base=2.15) + rows(3, spread=0, arm=1.9))
    assert one_sided.word == "better" and one_sided.notes == ("all 3 values of arm are equal",)


def test_all_failed_and_none_there() -> None:
    table = rows(3, base=2.15, arm=1.9)
    everything = [(arm, seed) for arm in ("base", "arm") for seed in range(3)]
    assert judged(spoilt(table, *everything)).word == "unstable (3 of 3 failed)"
    absent = judged(table, contrasts=[("ghost", "base")])
    assert absent.word == "exploratory" and absent.verdict == "exploratory (no value for ghost)"
    waiting = judged([row | {"value": None} if row["seed"] == 2 and row["arm"] == "arm" else row for row in table])
    assert waiting.word == "exploratory" and "1 run of arm without a value" in waiting.verdict


def test_small_significant_effects_come_with_their_exaggeration() -> None:
    small = judged(rows(5, base=2.15, arm=2.133))
    assert small.word.startswith("better") and abs(small.difference) < small.detectable
    assert small.exaggeration is not None and 1.3 < small.exaggeration < 2
    assert f"exaggerated about {small.exaggeration:.1f} times" in small.verdict
    large = judged(rows(5, base=2.15, arm=1.9))
    assert large.exaggeration is None and "exaggerated" not in large.verdict


def test_estimators_that_disagree_are_printed() -> None:
    base, steps = [2.10, 2.15, 2.20, 2.25], (-0.021, -0.019, -0.02, -0.022)
    table = [{"arm": "base", "seed": s, "value": v} for s, v in enumerate(base)]
    table += [{"arm": "arm", "seed": s, "value": v + step} for s, (v, step) in enumerate(zip(base, steps, strict=True))]
    found = judged(table)
    assert found.word.startswith("inconclusive")
    assert "unlike Welch" in found.verdict and "paired by seed p = " in found.verdict


def test_an_interval_wider_than_x_beside_no_difference_is_explained() -> None:
    arms = {"base": 2.15, "a": 2.143, "b": 1.9, "c": 1.8, "d": 2.4}
    found = judged(rows(3, spread=1.0, **arms), smallest_effect=0.058)
    assert found.word == "no difference larger than 0.058" and found.low < -0.058
    note = next(note for note in found.notes if "equivalence goes by" in note)
    low = float(note.split("[")[1].split(",")[0])
    assert -0.058 < low < 0


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((-0.257, -0.281, -0.233), "-0.257 nats [-0.281, -0.233]"),
        ((5.0, 4.89, 5.11), "+5.00 nats [+4.89, +5.11]"),
        ((-0.018, -0.0352, -0.0003), "-0.0180 nats [-0.0352, -0.0003]"),  # it leaves out zero, so no bound shows zero
        ((0.018, 4e-09, 0.0352), "+0.0180000 nats [+4e-09, +0.0352000]"),
        ((-0.0002, -0.0193, 0.0189), "+0.000 nats [-0.019, +0.019]"),
        ((1e300, 0.8e300, 1.2e300), "+1.00e+300 nats [+8.00e+299, +1.20e+300]"),
        ((2e-12, 1e-12, 3e-12), "+2.0e-12 nats [+1.0e-12, +3.0e-12]"),
        ((0.2, math.nan, math.nan), "+0.200 nats"),
        ((0.0, math.nan, math.nan), "0 nats"),
        ((1e-200, math.nan, math.nan), "+1.00e-200 nats"),
        ((0.0, 0.0, 0.0), "0 nats [0, 0]"),
    ],
)
def test_differences_of_every_size(numbers: tuple[float, float, float], said: str) -> None:
    assert effect(*numbers, "nats") == said


def test_an_interval_alone() -> None:
    assert interval(-0.281, -0.233) == "[-0.281, -0.233]"
    assert interval(-1e9, 1e9) == "[-1.0e+09, +1.0e+09]"


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.036, "= 0.036"), (0.0499, "= 0.0499"), (0.04999, "= 0.04999"), (0.0, "< 1e-15"), (3e-16, "< 1e-15")],
)
def test_p_values(p: float, said: str) -> None:
    assert probability(p, 0.05) == said


def test_bounds_are_where_other_margins_would_change_the_verdict() -> None:
    table = rows(5, base=2.15, near=2.155, far=1.9)
    near, far = compare(table, baseline="base", smallest_effect=0.05).contrasts
    for margin, passes in ((1.001 * near.at_most, True), (0.999 * near.at_most, False)):
        # an arm without an equivalence of its own, such as `far`, counts in the family
        again = compare(table, baseline="base", smallest_effect=margin).contrasts[0]
        assert (again.p_equivalence_holm < 0.05) is passes
    assert near.at_least == 0 and far.at_least == pytest.approx(-far.joint_high) and 0.2 < far.at_least < 0.25
    assert far.at_most > 0.25
    unknown = judged(rows(3, base=2.15, arm=1.9), screen=True)
    assert math.isnan(unknown.at_least) and math.isnan(unknown.at_most)


@pytest.mark.parametrize(
    ("table", "terms", "action", "seeds"),
    [
        (rows(3, base=2.15, arm=1.9), {}, "keep", None),
        (rows(3, base=2.15, arm=2.4), {}, "drop", None),
        (rows(5, base=2.15, arm=2.151), {}, "either", None),
        (rows(8, base=2.15, arm=2.13), {}, "either", None),
        (rows(3, base=2.15, arm=2.12), {"looks": (3, 6), "extendable": True}, "add seeds", 12),
        (rows(3, spread=2, base=2.15, arm=2.12), {"looks": (3,)}, "confirm", None),
        (rows(3, spread=90, base=2.15, arm=2.12), {}, "stop", None),
        (rows(2, base=2.15, arm=1.9), {"noise": FLOOR}, "add seeds", 3),
        (rows(2, base=2.15, arm=1.9), {}, "add seeds", 3),
        (rows(3, base=2.15, arm=1.9), {"screen": True}, "confirm", None),
        (rows(3, base=2.15, arm=1.9), {"late": {("arm", "base"): "late"}}, "confirm", None),
        ([*rows(3, base=2.15, arm=1.9)[:-1], {"arm": "arm", "seed": 2, "value": None}], {}, "finish", None),
        (rows(3, base=2.15, arm=1.9), {"not_comparable": {"arm": "other data"}}, "repair", None),
        (spoilt(rows(3, base=2.15, arm=1.9), ("arm", 0)), {}, "repair", None),
    ],
)
def test_every_verdict_says_what_to_do_next(table: Any, terms: Any, action: str, seeds: int | None) -> None:
    found = judged(table, **terms).next
    assert found.action == action and found.text
    assert seeds is None or found.seeds == seeds
    if action == "add seeds":
        assert f"{found.seeds} seeds per arm" in found.text


def test_next_steps_are_in_json_and_tables() -> None:
    verdicts = compare(rows(3, base=2.15, arm=1.9), baseline="base", smallest_effect=0.05)
    [plain] = verdicts.to_json()["contrasts"]
    assert plain["next"] == {"action": "keep", "text": "keep arm, and test it at the next scale", "seeds": None}
    assert verdicts.table()["next"].tolist() == ["keep"] and plain["at_least"] < 0.25 < plain["at_most"]
