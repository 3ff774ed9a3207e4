"""What a plan says it can see, against statsmodels' power with floors that are made up."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower
from tiny_plan import ABLATION, Planned

from gpt2lab.planning import machine
from gpt2lab.planning import plan as planning
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.planning.forecast import as_record, clock, forecast, lines, seconds_left
from gpt2lab.planning.noise import Floor
from gpt2lab.planning.plan import Plan
from gpt2lab.store import Store, now

Floored = Callable[..., Plan]
THREE = ABLATION.replace("rotary: {", "rmsnorm: {model.norm: rmsnorm}\n  rotary: {").replace("seeds: 2", "seeds: 5")


def floor(sd: float, df: int) -> Floor:
    return Floor(
        scale="tiny", sd=sd, low=0.7 * sd, high=1.8 * sd, df=df, values={str(s): 2.0 for s in range(df + 1)}, runs=(),
        failed=0, same_seed={}, parameters=1, tokens=1, data="d", evaluation="e", stack={}, created=now(),
    )  # fmt: skip


@pytest.fixture
def floored(planned: Planned) -> Floored:
    """A plan with a floor of that sd, on one place where a run of every arm takes a minute."""

    def plan(sd: float, df: int = 9, text: str = THREE, jobs: int = 1, **options: Any) -> Plan:
        found = planned(text, jobs=jobs, **options)
        arms = {name: dataclasses.replace(arm, seconds=60.0) for name, arm in found.arms.items()}
        return dataclasses.replace(found, floor=floor(sd, df), why_no_floor="", arms=arms)

    return plan


def upper(sd: float, df: int) -> float:
    return float(sd * math.sqrt(df / stats.chi2.ppf(0.2, df)))


def solved(n: int, alpha: float, ratio: float = 1.0) -> float:
    """The effect, in sd, that n seeds find with 80 % power, by statsmodels."""
    return float(TTestIndPower().solve_power(None, n, alpha, 0.8, ratio))


@pytest.mark.parametrize(("sd", "df"), [(0.012, 9), (0.03, 4)])
def test_the_smallest_difference_is_that_of_statsmodels(floored: Floored, sd: float, df: int) -> None:
    """Two contrasts share alpha."""
    found = forecast(floored(sd, df))
    assert found is not None and (found.seeds, found.sd, found.level) == (5, sd, 0.025)
    assert found.detectable == pytest.approx(solved(5, 0.025) * sd, rel=1e-4)
    assert found.detectable_upper == pytest.approx(solved(5, 0.025) * upper(sd, df), rel=1e-4)


def test_more_seeds_of_the_baseline_see_more(floored: Floored) -> None:
    found = forecast(floored(0.02, text=THREE + "baseline_seeds: 10\n"))
    assert found is not None and found.detectable == pytest.approx(solved(5, 0.025, 2.0) * 0.02, rel=1e-4)


def test_looks_share_alpha_too(floored: Floored) -> None:
    """Each of three looks is judged at .022 (docs/statistics.md), over two contrasts."""
    found = forecast(floored(0.02, text=THREE.replace("seeds: 5", "looks: [3, 5, 8]")))
    assert found is not None and found.seeds == 8
    assert found.level == pytest.approx(0.022 / 2, abs=3e-4)
    assert found.detectable == pytest.approx(solved(8, found.level) * 0.02, rel=1e-4)


@pytest.mark.parametrize(("sd", "df", "effect"), [(0.012, 9, 0.05), (0.03, 4, 0.05), (0.03, 9, 0.02)])
def test_seeds_for_the_smallest_effect_are_those_of_statsmodels(
    floored: Floored, sd: float, df: int, effect: float
) -> None:
    found = forecast(floored(sd, df, THREE + f"smallest_effect: {effect}\n"))
    power = TTestIndPower().power
    needed = next(n for n in range(2, 500) if power(effect / upper(sd, df), n, 0.025, 1.0) >= 0.8)
    assert found is not None and found.needed == needed
    assert found.seconds_needed == 3 * needed * 60.0


def test_their_time_is_that_of_the_whole_study(floored: Floored) -> None:
    """Rates first, four runs at a time; then the seeds, with half a run more of the baseline."""
    text = THREE + "lr_bracket: [0.5, 1, 2]\nbudget_curve: [0.5, 1]\n"
    found = forecast(floored(0.012, text=text, jobs=4))
    assert found is not None
    n, runs = found.needed, 3 * found.needed
    bound = runs + n / 2
    assert 3 + bound / 4 <= found.seconds_needed / 60 <= 3 + bound / 4 + 1


def test_the_lines_say_what_is_seen_and_what_the_smallest_effect_takes(floored: Floored) -> None:
    """Nine seeds are statsmodels' number for X = 0.05 at the upper sd."""
    assert TTestIndPower().solve_power(0.05 / upper(0.024, 9), None, 0.025, 0.8) == pytest.approx(8.7, abs=0.3)
    few = lines(floored(0.024))
    assert few == [
        "noise floor: sd 0.024 nats [0.017, 0.043] of 10 repeats, measured today",
        f"with 5 seeds per arm a difference of {solved(5, 0.025) * 0.024:.2g} nats is found four times out of five "
        f"({solved(5, 0.025) * upper(0.024, 9):.2g} if the noise is at its upper 80 % limit)",
        "for 0.05 nats, the smallest effect of interest, it takes 9 seeds per arm: about 27 minutes here",
    ]
    enough = lines(floored(0.012, text=THREE + "smallest_effect: 0.1\n"))
    assert enough[2] == "that is enough for 0.1 nats, the smallest effect of interest: 3 seeds per arm would do"


def test_one_seed_sees_nothing_by_itself(floored: Floored) -> None:
    plan = floored(0.012, text=THREE.replace("seeds: 5", "seeds: 1\nbaseline_seeds: 5"))
    found = forecast(plan)
    assert found is not None and found.detectable == math.inf
    assert len(lines(plan)) == 2 and "it takes" in lines(plan)[1]
    assert json.loads(json.dumps(as_record(plan), allow_nan=False))["detectable"] is None


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
    kept = planning.make_plan(ablation, plain.data, store, jobs=1, seconds=6.5 * run)
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
    store.run(first.id).finish({"status": "diverged"})
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
