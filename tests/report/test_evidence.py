"""What a report says beside its verdicts: worth in compute, rates, noise floor, effects of factors, shared runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_study import STEPS, run_id, write, write_run
from page_reader import part_of
from scipy import stats

from gpt2lab.analysis.results import tokens_to
from gpt2lab.reports.read import Summary, read_study, speed_change
from gpt2lab.reports.sections.curves import curves
from gpt2lab.reports.sections.scaling import horizon, loss_at, worth
from gpt2lab.reports.study import write_report
from gpt2lab.reports.tables import p_text
from gpt2lab.store import Store

MakeStudy = Callable[..., dict[str, Any]]
TOKENS = STEPS * 1024


def add_curve(root: Path, study: dict[str, Any], arm: str, means: dict[float, float], sd: float = 0.002) -> None:
    """Runs of an arm at other budgets, three seeds each."""
    dice, points = random.Random(3), []
    for budget, mean in means.items():
        ids = {str(seed): run_id(f"{arm} at {budget}", seed) for seed in range(3)}
        for run in ids.values():
            write_run(root / run, mean + dice.gauss(0, sd), True, dice)
        points.append({"budget": budget, "tokens": int(budget * TOKENS), "runs": ids})
    study["arms"][arm]["curve"] = points


def told(root: Path, study: dict[str, Any]) -> str:
    write(root / "runs/studies/posenc@nano.json", study)
    index = write_report(read_study("posenc", root / "runs"), root / "reports")
    return (index.parent / "report.md").read_text().replace("\\", "")


@pytest.mark.usefixtures("no_figures")
def test_a_difference_is_worth_what_the_baselines_curve_says(make_study: MakeStudy, tmp_path: Path) -> None:
    """The baseline gains 0.26 a doubling by construction; rotary is 0.26 better: worth twice the tokens, and since its
    tokens cost 10 % more here, 2 / 1.1 times the compute."""
    study = make_study({"learned": 2.15, "rotary": 1.89})
    study["arms"]["rotary"]["flops_per_token"] *= 1.1
    add_curve(tmp_path / "runs", study, "learned", {0.5: 2.41, 4: 1.63})
    add_curve(tmp_path / "runs", study, "rotary", {0.25: 2.41, 0.5: 2.15})
    said = told(tmp_path, study)
    evidence = read_study("posenc", tmp_path / "runs").once(worth)
    assert evidence.in_tokens["rotary"].value == pytest.approx(2, rel=0.06)
    ratio = evidence.in_tokens["rotary"].value / evidence.multipliers["rotary"].value
    assert ratio == pytest.approx(1.1, rel=1e-3)
    reach = evidence.multipliers["rotary"]
    assert 1.3 < reach.low < reach.value < reach.high < 2.2
    assert evidence.shares["rotary"].value == pytest.approx(0.5, rel=0.06)
    worth_of = f"rotary: worth {reach.value:.2f}x compute [{reach.low:.2f}, {reach.high:.2f}]"
    assert f"In the baseline's own terms, {worth_of}" in said
    row = next(line for line in part_of(said, "What differences are worth").splitlines() if line.startswith("| rotary"))
    assert f"{100 * evidence.shares['rotary'].value:.0f} %" in row and f"{reach.value:.2f}x" in row
    verdicts = json.loads((tmp_path / "reports/posenc@nano/verdicts.json").read_text())
    assert verdicts["multipliers"]["rotary"]["value"] == pytest.approx(reach.value)


def test_tokens_to_a_loss_lie_between_finished_schedules(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study({"learned": 2.15, "rotary": 1.89})
    add_curve(tmp_path / "runs", study, "learned", {0.5: 2.41, 2: 1.89})
    write(tmp_path / "runs/studies/posenc@nano.json", study)
    found = tokens_to("posenc", 2.02, tmp_path / "runs")
    assert found["learned"].value == pytest.approx(math.sqrt(2) * TOKENS, rel=0.05)
    assert math.isnan(found["rotary"].value) and "two budgets" in found["rotary"].reason
    assert math.isnan(tokens_to("posenc", 1.0, tmp_path / "runs")["learned"].value)


def test_speeds_of_runs_that_overlap_are_not_compared() -> None:
    """As on a machine that others use."""

    def arm(*speeds: float) -> Summary:
        return Summary(
            arm="", look=0, n=len(speeds), failed=0, missing=0, mean=None, sd=None, peak_memory_bytes=None,
            speeds=speeds, tokens_per_second=sorted(speeds)[len(speeds) // 2] if speeds else None,
        )  # fmt: skip

    reference = arm(100, 110, 120)
    assert speed_change(arm(121, 132, 140), reference) == "+20.0 %"
    assert speed_change(arm(40, 44, 99), reference) == "×0.4"
    assert [speed_change(other, reference) for other in (arm(90, 100, 240), arm(), reference)] == ["", "", ""]
    early, late = (replace(speeds, span=span) for speeds, span in ((reference, (0.0, 9.0)), (arm(200), (10.0, 19.0))))
    assert speed_change(late, early) == "" and speed_change(replace(late, span=(5.0, 19.0)), early) != ""


@pytest.mark.usefixtures("no_figures")
def test_how_rates_were_found_is_shown(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study({"learned": 2.15, "rotary": 1.89}, bracketed=True, lr_bracket=[0.5, 1, 2])
    dice = random.Random(5)
    losses = {"learned": {0.5: 2.3, 1.0: 2.16, 2.0: 2.25}, "rotary": {0.5: 2.0, 1.0: 2.5, 2.0: 4.9}}
    for arm, tried in losses.items():
        trials = []
        for factor, loss in tried.items():
            run = run_id(f"{arm} x{factor}", 100)
            write_run(tmp_path / "runs" / run, loss, True, dice)
            trials.append({"factor": factor, "lr": 4e-3 * factor, "run": run, "seed": 100})
        best = min(tried, key=lambda factor: tried[factor])
        study["arms"][arm] |= {"bracket": {"trials": trials, "best": best, "at_edge": False}, "lr": 4e-3 * best}
    said = told(tmp_path, study)
    section = part_of(said, "How each arm's learning rate was found")
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("|")}
    assert "2.1600; best" in rows["learned"] and "0.004; x1" in rows["learned"]
    assert "2.0000; best" in rows["rotary"] and "failed" in rows["rotary"] and "0.002; x0.5" in rows["rotary"]
    assert "+0.340; one seed" in rows["rotary"]  # worse at the shared rate, better at its own
    assert "−0.2" in rows["rotary"]
    assert "at the shared rate" not in said.partition("## Verdicts")[0]


@pytest.mark.usefixtures("no_figures")
def test_the_noise_floor_is_named_with_its_date(make_study: MakeStudy, tmp_path: Path) -> None:
    stack = {"torch": "2.13.0", "device": "cpu"}
    floor = {"sd": 0.0251, "low": 0.017, "high": 0.045, "df": 9, "runs": 10, "failed": 0, "scale": "nano",
             "created": "2026-11-11T12:00:00+00:00", "tokens": TOKENS, "stack": stack}  # fmt: skip
    study = make_study(noise=floor)
    said = told(tmp_path, study)
    assert "Noise floor: sd 0.025" in said and "from 10 repeats of the recipe at nano" in said
    assert "measured 2026-11-11" in said
    assert "`gpt2lab noise nano` measures one" in told(tmp_path, study | {"noise": None})


def test_a_factorial_is_shown_by_its_effects(make_study: MakeStudy, tmp_path: Path) -> None:
    cells = {"layernorm+learned": 2.2, "layernorm+rotary": 1.9, "rmsnorm+learned": 2.1, "rmsnorm+rotary": 1.7}

    def weigh(signs: tuple[float, ...]) -> dict[str, float]:
        return dict(zip(cells, signs, strict=True))

    effects = [
        {"arm": "norm=rmsnorm", "against": "norm=layernorm", "weights": weigh((-0.5, -0.5, 0.5, 0.5))},
        {"arm": "position=rotary", "against": "position=learned", "weights": weigh((-0.5, 0.5, -0.5, 0.5))},
        {
            "arm": "norm=rmsnorm with position=rotary",
            "against": "their effects added",
            "weights": weigh((1, -1, -1, 1)),
        },
    ]
    factors = {"norm": ["layernorm", "rmsnorm"], "position": ["learned", "rotary"]}
    study = make_study(
        cells,
        seeds=5,
        baseline=next(iter(cells)),
        contrasts=effects,
        factors=factors,
        design="factorial",
        expected={"norm=rmsnorm": "better, a little (a book)"},
    )
    said = told(tmp_path, study)
    assert "position=rotary is better than position=learned by 0.3" in said
    assert "over 4 cells" in said and "part of effects" in said
    [row] = [line for line in said.splitlines() if line.startswith("| norm=rmsnorm; against norm=layernorm")]
    assert row.endswith("better, a little (a book) |")
    drawn = (tmp_path / "reports/posenc@nano/figures/differences.svg").read_text()
    assert "norm=rmsnorm" in drawn and "Effects of the factors" in drawn


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_serves_two_studies_is_named(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    write(tmp_path / "runs/studies/other@nano.json", study | {"name": "other@nano"})
    said = told(tmp_path, study)
    assert "shared with other@nano" in said
    assert "9 runs shared with other@nano: trained once, so these studies are not independent" in said


@pytest.mark.usefixtures("no_figures")
def test_runs_are_linked_to_mlflow_and_to_nothing_else(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    first, second = study["arms"]["learned"]["runs"]["0"], study["arms"]["learned"]["runs"]["1"]
    links = {"uri": "https://tracking.example:5000/", "experiment_id": "3", "parent_run_id": "abc",
             "runs": {first: "0a1b2c", second: 'x" onclick="alert(1)'}}  # fmt: skip
    write(tmp_path / "runs/tracking/posenc@nano.json", links)
    told(tmp_path, study)
    source = (tmp_path / "reports/posenc@nano/index.html").read_text()
    page = "https://tracking.example:5000/#/experiments/3/runs/0a1b2c?workflowType=machine_learning"
    assert f'<a href="{page}">{first}</a>' in source
    assert "onclick" not in source
    write(tmp_path / "runs/tracking/posenc@nano.json", links | {"uri": "javascript:alert(1)"})
    told(tmp_path, study)
    source = (tmp_path / "reports/posenc@nano/index.html").read_text()
    assert "javascript" not in source and 'href="http://127.0.0.1:5000/#/experiments/3/runs/0a1b2c?' in source


def test_the_order_of_arms_during_training_against_the_end(make_study: MakeStudy, tmp_path: Path) -> None:
    """All curves fall at one rate towards their ends, so the order shows early; tau is scipy's."""
    means = {"learned": 2.15, "rotary": 1.89, "none": 2.4, "alibi": 2.0}
    make_study(means)
    read = read_study("posenc", tmp_path / "runs")
    found, drawn, runs = horizon(read), read.once(curves), read.runs
    assert [one.fraction for one in found] == [0.1, 0.25, 0.5, 0.75]
    for one in found:
        early = [np.mean([loss_at(drawn[r.id], one.fraction) for r in runs if r.arm == arm]) for arm in means]
        final = [np.mean([r.value for r in runs if r.arm == arm]) for arm in means]
        assert one.tau == pytest.approx(stats.kendalltau(early, final).statistic)
    assert found[-1].tau == 1


def test_a_loss_counts_for_a_fraction_only_where_it_was_taken() -> None:
    curve = ([0.0, 50.0, 90.0, 100.0], [5.0, 3.0, 2.5, 2.4])
    assert loss_at(curve, 0.5) == 3.0
    assert loss_at(curve, 0.75) is None
    assert loss_at(([], []), 0.5) is None
    assert loss_at(([0.0], [5.0]), 0.5) is None


@pytest.mark.usefixtures("no_figures")
def test_text_noise_stands_beside_seed_noise(make_study: MakeStudy, tmp_path: Path) -> None:
    """Eight windows of four documents; rotary gains in one document only, so its gain hangs on that text."""
    study = make_study({"learned": 2.15, "rotary": 1.89})
    store = Store(tmp_path / "runs")
    units, targets = [0, 0, 1, 1, 2, 2, 3, 3], [128] * 8
    gains = np.array([2.08, 2.08, 0, 0, 0, 0, 0, 0])
    losses: dict[str, list[list[float]]] = {}
    for arm, gain in (("learned", 0 * gains), ("rotary", gains)):
        for run in study["arms"][arm]["runs"].values():
            final = (store.run(run).evaluation(study["evaluation"]["key"]) or {})["metrics"]["val/loss"]
            own = [round(float(x), 7) for x in final + gain.mean() - gain]
            losses.setdefault(arm, []).append(own)
            kept = {"key": study["evaluation"]["key"], "unit": "document", "losses": own, "units": units}
            store.run(run).write_windows(kept | {"targets": targets})
    said = told(tmp_path, study)
    per_document = np.array([2.08, 0, 0, 0])
    half = stats.t.ppf(0.975, 3) * per_document.std(ddof=1) / 2  # of a mean of four
    assert f"| ±{half:.1f}; 4 documents |" in said
    assert f"on other text ±{half:.2g} (by 4 documents), so the sign may be that of this text alone" in said

    # windows that were never kept say nothing, and neither do those of other tokens
    folder = tmp_path / "runs" / study["arms"]["rotary"]["runs"]["1"]
    next((folder / "evaluations/windows").iterdir()).unlink()
    assert "4 documents" not in told(tmp_path, study)


@pytest.mark.parametrize(
    ("p", "shown"), [(0.002, "0.002"), (0.04999, "0.05"), (1e-17, "< 1e-15"), (0.0, "< 1e-15"), (math.nan, "–")]
)
def test_a_p_value_in_its_column_has_no_sign_but_where_it_is_a_bound(p: float, shown: str) -> None:
    assert p_text(p, 0.04) == shown
