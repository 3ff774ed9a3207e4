"""What a plan says it can see, against the power of drawn studies, with floors that are made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn import NOISE, floor, is_smallest, power, upper
from made_up_runs import end
from scipy import stats
from statsmodels.stats.power import TTestIndPower
from tiny_plan import ABLATION, Planned

from gpt2lab.analysis.verdicts import as_json
from gpt2lab.planning import machine
from gpt2lab.planning import plan as planning
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.planning.forecast import as_record, clock, forecast, lines, seconds_left
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import repetition
from gpt2lab.store import Store

Floored = Callable[..., Plan]
THREE = ABLATION.replace("rotary: {", "rmsnorm: {model.norm: rmsnorm}\n  rotary: {").replace("seeds: 2", "seeds: 5")


@pytest.fixture
def floored(planned: Planned) -> Floored:
    """A plan with a floor of that sd, on one place where a run of every arm takes a minute."""

    def plan(sd: float, df: int = 9, text: str = THREE, jobs: int = 1, **options: Any) -> Plan:
        found = planned(text, jobs=jobs, **options)
        arms = {name: dataclasses.replace(arm, seconds=60.0) for name, arm in found.arms.items()}
        return dataclasses.replace(found, floor=floor(sd, df), why_no_floor="", arms=arms)

    return plan


def test_a_text_that_training_repeats_often_is_said(planned: Planned) -> None:
    plan = planned(ABLATION)
    text = len(plan.data.train)
    assert repetition(4 * text, plan.data) == [] and not any("epochs" in line for line in lines(plan))
    assert repetition(9 * text, plan.data)[0].endswith("repeated text teaches little (arXiv:2305.16264)")
    steps = 9 * text // 64
    assert "9.0 epochs of a text of " in lines(planned(ABLATION, overrides=(f"training.steps={steps}",)))[0]


@pytest.mark.parametrize(("sd", "df"), [(0.012, 9), pytest.param(0.03, 4, marks=pytest.mark.slow)])
def test_the_smallest_difference_is_found_in_four_of_five_drawn_studies(floored: Floored, sd: float, df: int) -> None:
    """Two contrasts share the four fifths of alpha that the first look has. A pooled t-test, which knows that all arms
    are equally noisy, would see a little less: statsmodels."""
    found = forecast(floored(sd, df))
    assert found is not None and (found.seeds, found.sd, found.level) == (5, sd, pytest.approx(0.8 * 0.05 / 2))
    assert power(found.detectable / sd, (5, 5), level=0.02) == pytest.approx(0.8, abs=NOISE)
    pooled = float(TTestIndPower().solve_power(None, 5, 0.02, 0.8)) * sd
    assert pooled < found.detectable < 1.2 * pooled
    assert found.detectable_upper == pytest.approx(found.detectable * upper(sd, df) / sd, rel=1e-9)


def test_more_seeds_of_the_baseline_see_more(floored: Floored) -> None:
    found, without = (forecast(floored(0.02, text=THREE + more)) for more in ("baseline_seeds: 10\n", ""))
    assert found is not None and without is not None and found.detectable < without.detectable
    assert power(found.detectable / 0.02, (5, 10), level=0.02) == pytest.approx(0.8, abs=NOISE)


def test_looks_share_alpha_too(floored: Floored) -> None:
    """At three looks of a level each, a contrast without an effect passes at one of them with nine tenths of four
    fifths of .05: three means that share their seeds are normal, with correlations sqrt(n / m), and the tenth is for
    few seeds, whose t follows that worse. Two contrasts share the level."""
    found = forecast(floored(0.02, text=THREE.replace("seeds: 5", "looks: [3, 5, 8]")))
    assert found is not None and found.seeds == 8
    bound = stats.norm.isf(found.level)  # of two sides and two contrasts
    shared = [[math.sqrt(min(n, m) / max(n, m)) for m in (3, 5, 8)] for n in (3, 5, 8)]
    inside = stats.multivariate_normal(cov=shared).cdf([bound] * 3, lower_limit=[-bound] * 3)
    assert 1 - inside == pytest.approx(0.9 * 0.8 * 0.05, abs=2e-4)
    assert power(found.detectable / 0.02, (8, 8), level=found.level) == pytest.approx(0.8, abs=NOISE)


@pytest.mark.parametrize(
    ("sd", "df", "effect"),
    [(0.012, 9, 0.05), (0.03, 4, 0.05), pytest.param(0.03, 9, 0.02, marks=pytest.mark.slow)],
)
def test_seeds_for_the_smallest_effect_find_it_in_four_of_five_drawn_studies(
    floored: Floored, sd: float, df: int, effect: float
) -> None:
    found = forecast(floored(sd, df, THREE + f"smallest_effect: {effect}\n"))
    assert found is not None and is_smallest(found.needed, lambda n: power(effect / upper(sd, df), (n, n), level=0.02))
    assert found.seconds_needed == 3 * found.needed * 60.0


def test_their_time_is_that_of_the_whole_study(floored: Floored) -> None:
    """Rates first, four runs at a time; then the seeds, with half a run more of the baseline."""
    text = THREE + "tune: {grid: {optim.lr: [0.5x, 1x, 2x]}}\nbudget_curve: [0.5, 1]\n"
    found = forecast(floored(0.012, text=text, jobs=4))
    assert found is not None
    n, runs = found.needed, 3 * found.needed
    bound = runs + n / 2
    assert 3 + bound / 4 <= found.seconds_needed / 60 <= 3 + bound / 4 + 1


def test_the_lines_say_what_is_seen_and_what_the_smallest_effect_takes(floored: Floored) -> None:
    """What drawn studies find: see above."""
    few, found = lines(floored(0.024)), forecast(floored(0.024))
    assert found is not None and is_smallest(10, lambda n: power(0.05 / upper(0.024, 9), (n, n), level=0.02))
    assert few == [
        "noise floor: sd 0.024 nats [0.017, 0.043] of 10 repeats, measured today",
        f"with 5 seeds per arm a difference of {found.detectable:.2g} nats is found four times out of five "
        f"({found.detectable_upper:.2g} if the noise is at its upper 80 % limit)",
        "for 0.05 nats, the smallest effect of interest, it takes 10 seeds per arm: about 30 minutes here",
    ]
    enough = lines(floored(0.012, text=THREE + "smallest_effect: 0.1\n"))
    assert enough[2] == "that is enough for 0.1 nats, the smallest effect of interest: 3 seeds per arm would do"


def test_one_seed_sees_nothing_by_itself(floored: Floored) -> None:
    plan = floored(0.012, text=THREE.replace("seeds: 5", "seeds: 1\nbaseline_seeds: 5"))
    found = forecast(plan)
    assert found is not None and found.detectable == math.inf
    assert len(lines(plan)) == 2 and "it takes" in lines(plan)[1]
    assert as_json(as_record(plan))["detectable"] is None


def test_without_a_floor_the_command_that_measures_one_is_named(planned: Planned) -> None:
    plan = planned()
    assert forecast(plan) is None and as_record(plan) is None
    assert plan.ablation.noise_command.startswith("gpt2lab noise /")
    assert lines(plan) == [
        f"no noise floor for tiny (none has been measured), so power is unknown; `{plan.ablation.noise_command}` "
        "measures one"
    ]


def test_a_floor_without_noise_promises_nothing(floored: Floored) -> None:
    plan = floored(0.0)
    assert lines(plan) == [
        f"no noise floor for tiny (its runs do not differ), so power is unknown; `{plan.ablation.noise_command}` "
        "measures one"
    ]


def test_what_a_budget_left_out_comes_first(floored: Floored) -> None:
    plan = dataclasses.replace(floored(0.01), left_out=("arm d", "2 of 5 seeds per arm"))
    assert lines(plan)[0] == "left out to fit the budget: arm d; 2 of 5 seeds per arm"


def test_a_budget_reaches_the_plan_its_runs_and_its_contrasts(
    planned: Planned, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the time of six runs and a half there is room for three seeds of two arms."""
    monkeypatch.setattr(machine, "estimate_speed", lambda *_: (1e6, "a test"))
    plain = planned(THREE + "baseline_seeds: 7\n", jobs=1)
    run, store = max(arm.seconds for arm in plain.arms.values()), Store(preset.parent / "runs")
    ablation = load_ablation(preset.parent / "ablation.yaml")
    kept = planning.make_plan(ablation, plain.data, store, plain.machine, seconds=6.5 * run)
    assert tuple(kept.arms) == ("learned", "rmsnorm") and kept.seeds == (0, 1, 2)
    assert [len(arm.runs) for arm in kept.arms.values()] == [3, 3]
    assert [(c.arm, c.against) for c in kept.ablation.contrasts] == [("rmsnorm", "learned")]
    assert kept.ablation.baseline_seeds == 3
    assert kept.left_out == ("arm rotary", "2 of 5 seeds per arm", "4 of 7 seeds of the baseline")
    assert plain.ablation.baseline_seeds == 7 and plain.left_out == ()


def test_time_left_is_that_of_runs_which_are_not_finished(floored: Floored, planned: Planned, tmp_path: Any) -> None:
    plan, store = floored(0.01), Store(tmp_path / "others")
    assert seconds_left(plan, store) == 15 * 60
    first = plan.runs()[0]
    end(store.run(first.id), {"status": "diverged"})
    assert seconds_left(plan, store) == 14 * 60
    two = dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, jobs=4))
    assert seconds_left(two, store) == 4 * 60  # 14 runs on 4 places
    curve = floored(0.01, text=THREE + "budget_curve: [0.5, 1]\n")
    assert seconds_left(curve, Store(tmp_path / "none")) == 15 * 60 + 5 * 30


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(40.2, "40 s here"), (720.0, "12 minutes here"), (5399.0, "90 minutes here"), (12_240.0, "3.4 hours here")],
)
def test_times_are_said_as_people_do(seconds: float, said: str) -> None:
    assert clock(seconds) == said
