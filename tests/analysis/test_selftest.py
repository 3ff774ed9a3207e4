"""The self-test of the statistics: our code passes it, and its yardsticks, noise banks and random tables are sound."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
from numpy.typing import NDArray

from gpt2lab.analysis.planning import declared_looks
from gpt2lab.analysis.selftest import BANKS, PARTS, QUICK, Row, SelfTest, designs, noise, sameness, selftest
from gpt2lab.analysis.selftest.claims import words
from gpt2lab.analysis.selftest.noise import Draws
from gpt2lab.analysis.selftest.plans import words_at_looks
from gpt2lab.analysis.selftest.rows import chance, flagged, level, near
from gpt2lab.analysis.selftest.wrong_methods import bootstrap_differs
from gpt2lab.analysis.verdicts import findings
from gpt2lab.errors import ConfigError

FEW = 1000


@functools.cache
def small() -> SelfTest:
    """All but the parts that judge studies one by one, which take long."""
    return selftest(FEW, parts=[part for part in PARTS if part not in ("agreement", "searched")])


@pytest.mark.slow
def test_the_code_that_writes_verdicts_is_calibrated() -> None:
    """The self-test as `--quick` runs it."""
    quick = selftest(QUICK)
    assert not quick.wrong and quick.ok
    assert {row.part for row in quick.rows} == set(PARTS)


def test_searches_are_calibrated_at_one_steepness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(designs, "CURVATURES", ((0.03, 0.03),))
    monkeypatch.setattr(designs, "SEARCHED", (10,))
    found = selftest(QUICK, parts=["searched"])
    assert found.ok and len(found.rows) == 10


def test_every_rate_is_there_for_every_bank_and_number_of_seeds() -> None:
    rates = [row for row in small().rows if row.part == "rates"]
    checks = {row.check for row in rates}
    assert len(checks) == 10
    assert {(row.check, row.bank, row.n) for row in rates} == set(itertools.product(checks, BANKS, (3, 5, 8)))
    assert len(rates) == 90


def test_every_wrong_method_is_flagged_and_nothing_else_is() -> None:
    controls = [row for row in small().rows if row.control]
    assert len(controls) == 15 and {row.part for row in controls} == {"controls"}
    assert all(row.status == "flagged" and row.measured > 0.05 + chance(0.05, FEW) for row in controls)
    assert {(row.check, row.status) for row in small().rows if not row.control and row.status != "accepted"} == set()


@pytest.mark.parametrize(("n", "lowest", "highest"), [(3, 0.20, 0.25), (5, 0.12, 0.17)])
def test_the_bootstrap_is_as_wrong_on_real_noise_as_is_known(n: int, lowest: float, highest: float) -> None:
    baseline, arm = Draws(count=20_000, seed=0).studies("bootstrap", noise.REAL, n, shifts=(0.0,))
    assert lowest <= bootstrap_differs(baseline, arm, np.random.default_rng(0)).mean() <= highest


def test_the_same_draws_and_seed_give_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (selftest(FEW, seed, parts=["looks", "controls"]) for seed in (3, 3, 4))
    assert first == again and first.rows != other.rows


def test_what_one_part_draws_does_not_depend_on_the_others() -> None:
    alone = selftest(FEW, parts=["controls"]).rows
    assert selftest(FEW, parts=["looks", "controls"]).rows[-len(alone) :] == alone


def test_the_result_is_plain_json() -> None:
    record = json.loads(json.dumps(small().to_json(), allow_nan=False))
    assert (record["ok"], record["draws"], record["seed"]) == (True, FEW, 0)
    assert len(record["rows"]) == len(small().rows)
    assert record["rows"][0].keys() >= {"check", "bank", "n", "measured", "reference", "low", "high", "ok", "status"}


def test_progress_is_told_by_part() -> None:
    told: list[tuple[str, int]] = []
    selftest(FEW, parts=["golden", "looks"], progress=lambda part, rows: told.append((part, rows)))
    assert told[0] == ("golden", 0) and told[-1] == ("looks", 14)


@pytest.mark.parametrize("draws", [0, -5, 999, 10**9])
def test_numbers_of_draws_that_prove_nothing_or_do_not_fit_are_refused(draws: int) -> None:
    with pytest.raises(ConfigError, match="draws"):
        selftest(draws)


def test_an_unknown_part_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'looks'"):
        selftest(FEW, parts=["look"])


def test_a_rate_that_cannot_be_had_is_never_accepted() -> None:
    assert Row(check="", measured=float("nan"), low=0, high=1).status == "rejected"


def test_the_yardsticks_turn_at_their_limits() -> None:
    def wrong(share: float) -> NDArray[np.bool_]:
        return np.arange(10_000) < share * 10_000

    limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 10_000)
    assert level("", wrong(limit - 1e-4)).ok and not level("", wrong(limit + 1e-4)).ok
    assert not flagged("", wrong(limit - 1e-4)).ok and flagged("", wrong(limit + 1e-4)).ok
    assert near("", wrong(0.52), 0.5).ok and not near("", wrong(0.54), 0.5).ok and not near("", wrong(0.46), 0.5).ok
    assert level("", np.stack([wrong(0.03), ~wrong(0.97)], -1)).measured == pytest.approx(0.06)  # by study


def test_every_bank_has_mean_0_and_sd_1_and_the_real_one_has_all_repeats() -> None:
    assert len(noise.real()) == 1261 and noise.real().mean() == pytest.approx(0, abs=1e-9)
    raw = [float(row["val_loss"]) for row in noise.table("seed_noise_124m.csv")]
    assert [np.mean(raw), np.std(raw, ddof=1)] == pytest.approx([3.27939, 0.00185], abs=1e-5)
    for bank in BANKS:
        values = noise.noise(np.random.default_rng(1), bank, (200_000,))
        assert (values.mean(), values.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.02))


def test_shifts_and_noise_reach_the_arms_that_they_are_meant_for() -> None:
    drawn = Draws(count=20_000, seed=1).studies("some", BANKS[0], 5, shifts=(0, 2), sds=(4, 1))
    assert [arm.shape for arm in drawn] == [(20_000, 5)] * 3
    assert [arm.mean() for arm in drawn] == pytest.approx([0, 0, 2], abs=0.06)
    assert [arm.std() for arm in drawn] == pytest.approx([1, 4, 1], abs=0.06)


def test_every_word_occurs_among_the_random_tables() -> None:
    rng = np.random.default_rng(0)
    seen = {str(w) for _ in range(100) for w in words([arm[None] for arm in sameness.random_study(rng, 5)])[0]}
    assert seen == {"better", "worse", "better (smaller)", "worse (smaller)", "no difference", "inconclusive"}


def test_one_look_alone_is_what_findings_says() -> None:
    arms = Draws(count=500, seed=1).studies("one look", BANKS[1], 5, shifts=sameness.MIXED)
    assert (
        words_at_looks(arms, declared_looks((5,), 0.05)) == findings(arms[0], arms[1:], smallest_effect=3.0)[1]
    ).all()
