"""What a report says of arms that were tuned: both differences, each arm's search, and why some cannot be compared."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import made_up_sweep
import pytest
from made_up_study import declare, run_id, typed, write, write_run
from made_up_sweep import LR
from page_reader import part_of

from gpt2lab.analysis.studies import judge, scope_text
from gpt2lab.reports.read import read_study
from gpt2lab.reports.sections.tuned import tunings
from gpt2lab.reports.study import terminal_summary, write_report
from gpt2lab.store import Store

MakeStudy = Callable[..., dict[str, Any]]
WRITTEN = {"learned": 2.25, "rotary": 1.84}
"""Mean losses at the settings as written: there rotary is 0.41 better, at each arm's own 0.26."""
TUNE = {
    "space": {"optim.lr": {"low": 0.05, "high": 50.0, "log": True, "relative": True, "choices": None}}, "trials": 24,
    "sampler": {"name": "qmc", "seed": 0}, "pruner": {"name": "none"}, "seeds": 1, "centre": {},
    "tuning_seeds": [100],
}  # fmt: skip


def tuned_study(
    make_study: MakeStudy, root: Path, written: Mapping[str, float] = WRITTEN, *, searches: Any = None, **changed: Any
) -> dict[str, Any]:
    """A finished study whose arms were tuned, with its searches and its runs at the settings as written."""
    study = make_study({"learned": 2.15, "rotary": 1.89})
    found = searches or {
        "learned": made_up_sweep.search("learned", prune=False),
        "rotary": made_up_sweep.search("rotary", optimum=0.009, prune=False),
    }
    record = made_up_sweep.sweep(found, name="posenc@nano", part_of="posenc@nano")
    made_up_sweep.keep(root, record)
    dice = random.Random(5)
    for arm, entry in study["arms"].items():
        start = {"step": 0, "tokens": 0, "seconds": 0.0, "metrics": {"val/loss": 5.55}}  # before training
        journal = root / found[arm]["trials"][0]["runs"]["100"] / "metrics.jsonl"
        journal.parent.mkdir(parents=True)
        journal.write_text(json.dumps(start) + "\n")
        done = [t for t in found[arm]["trials"] if t["outcome"] == "finished"]
        best = min(done, key=lambda t: t["value"], default={"settings": None, "value": None})
        ids = {str(seed): run_id(f"{arm} as written", seed) for seed in range(3)} if arm in written else {}
        for run in ids.values():
            write_run(root / run, written[arm] + dice.gauss(0, 0.012), arm != "learned", dice)
        entry |= {
            "tuned": {"sweep": "posenc@nano", "label": arm, "study": found[arm]["study"], "over": True,
                      "settings": best["settings"], "value": best["value"], "edge": {}, "trials": 24},
            "shared": {"settings": {"optim.lr": 0.004}, "lr": 0.004, "runs": ids},
            "not_comparable": None,
        }  # fmt: skip
    study |= {"tune": TUNE, **changed}
    write(root / "studies" / "posenc@nano.json", study)
    return study


def told(root: Path, **options: Any) -> str:
    write_report(read_study("posenc@nano", root / "runs", **options), root / "reports")
    return (root / "reports/posenc@nano/report.md").read_text()


@pytest.mark.usefixtures("no_figures")
def test_both_differences_stand_beside_each_other(make_study: MakeStudy, tmp_path: Path) -> None:
    study = tuned_study(make_study, tmp_path / "runs")
    said = told(tmp_path)
    section = part_of(said, "Each arm tuned")
    [row] = [line for line in section.splitlines() if line.startswith("| rotary")]
    written, tuned = (cell.partition(";")[0].strip().replace("−", "-") for cell in row.split("|")[2:4])
    assert float(written) == pytest.approx(-0.41, abs=0.03) and float(tuned) == pytest.approx(-0.26, abs=0.03)
    assert "**better**" in row and "| Contrast | At the shared rate | Each at its own rate |" in section
    read = read_study("posenc@nano", tmp_path / "runs")
    assert read.once(tunings).written is not None
    [line] = [str(part) for part in terminal_summary(read, tmp_path).renderables if "shared rate" in str(part)]
    assert line.startswith("rotary against learned: −0.39") and "at its own rate (better)" in line
    verdicts = json.loads((tmp_path / "reports/posenc@nano/verdicts.json").read_text())
    assert verdicts["as_written"][0]["difference"] == pytest.approx(-0.41, abs=0.03)
    assert verdicts["contrasts"][0]["difference"] == pytest.approx(-0.26, abs=0.03)
    assert scope_text(typed(study)).endswith("at each arm's own best learning rate")
    [contrast] = judge(typed(study), Store(tmp_path / "runs")).contrasts
    assert "at the shared rate" not in contrast.verdict and "at each arm's own best learning rate" in contrast.verdict
    assert "All arms share one learning rate" not in said


@pytest.mark.usefixtures("no_figures")
def test_every_arms_search_is_told_with_what_it_cost(make_study: MakeStudy, tmp_path: Path) -> None:
    tuned_study(make_study, tmp_path / "runs")
    said = told(tmp_path)
    section = part_of(said, "What each arm's search found")
    [learned] = [line for line in section.splitlines() if line.startswith("| learned")]
    [rotary] = [line for line in section.splitlines() if line.startswith("| rotary")]
    for line, optimum in ((learned, 0.006), (rotary, 0.009)):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert float(cells[1].partition(";")[0]) == pytest.approx(optimum, rel=0.5)
        assert float(cells[3].partition(";")[0]) == pytest.approx(optimum, rel=0.3)  # the fitted one
        assert cells[2] == "0.004" and cells[5] == "**inside**"
        assert "finished" in cells[6] and "diverged" in cells[6] and "runs" in cells[7]
    spent = sum(t["tokens"] for t in Store(tmp_path / "runs").sweep("posenc@nano")["searches"]["learned"]["trials"])
    assert f"{spent / 1e6:.1f}" in learned or f"{spent / 1e6:.3g}" in learned
    method = part_of(said, "Method")
    assert "every arm, the baseline included, had 24 trials over optim.lr from 0.05 to 50 times the arm's own" in method
    assert "sampler qmc with seed 0 for all, no pruning; trained on seed 100" in method
    assert "Verdicts use seeds 0, 1, 2" in method
    assert said.partition("## Runs")[2].count("rotary, as written") == 3


@pytest.mark.usefixtures("no_figures")
def test_an_optimum_at_the_edge_is_told_first_and_nothing_is_claimed(make_study: MakeStudy, tmp_path: Path) -> None:
    low = LR | {"low": 1e-4, "high": 2e-3}
    searches = {
        "learned": made_up_sweep.search("learned", prune=False),
        "rotary": made_up_sweep.search("rotary", space=(low,), optimum=0.02, cliff=1.0, prune=False),
    }
    study = tuned_study(make_study, tmp_path / "runs", searches=searches)
    study["arms"]["rotary"]["not_comparable"] = "its best learning rate lies at the upper edge (0.0019)"
    write(tmp_path / "runs/studies/posenc@nano.json", study)
    said = told(tmp_path)
    head = said.partition("## Verdicts")[0]
    assert "**1 arm cannot be compared.** rotary: its best learning rate lies at the upper edge (0.0019)" in head
    assert "optim.lr from " in head and "would close it" in head
    assert "**at the high edge**" in said
    [contrast] = judge(typed(study), Store(tmp_path / "runs")).contrasts
    assert contrast.word == "not comparable" and "upper edge" in contrast.verdict
    forced = told(tmp_path, force_exploratory=True)
    assert (
        "--force-exploratory shows numbers where verdicts were refused: none of them is a finding" in forced
        and "**exploratory**" in forced
    )


@pytest.mark.usefixtures("no_figures")
def test_a_search_without_a_finished_trial_costs_its_arm_and_not_the_page(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    """Neither that of an arm nor that of the baseline, with which no arm can then be compared."""
    high = LR | {"low": 0.5, "high": 50.0}
    lost = made_up_sweep.search("lost", space=(high,))
    for broken in ("rotary", "learned"):
        root = tmp_path / broken
        other = "learned" if broken == "rotary" else "rotary"
        searches = {broken: lost, other: made_up_sweep.search(other, prune=False)}
        study = tuned_study(
            partial(declare, root / "runs"), root / "runs",
            {other: 2.2}, searches=searches,
        )  # fmt: skip
        study["arms"][broken] |= {"runs": {}, "not_comparable": "no trial of its search finished (24 diverged)"}
        write(root / "runs/studies/posenc@nano.json", study)
        said = told(root)
        assert f"{broken}: no trial of its search finished (24 diverged)" in said.partition("## Verdicts")[0]
        [contrast] = judge(typed(study), Store(root / "runs")).contrasts
        assert contrast.word == "not comparable"
        assert "24 diverged" in said.partition("## What each arm's search found")[2]


@pytest.mark.usefixtures("no_figures")
def test_while_searches_are_open_the_page_waits(make_study: MakeStudy, tmp_path: Path) -> None:
    study = tuned_study(make_study, tmp_path / "runs")
    for entry in study["arms"].values():
        entry["runs"] = {}
        entry["shared"]["runs"] = {}
        entry["tuned"] |= {"over": False, "settings": None}
    write(tmp_path / "runs/studies/posenc@nano.json", study)
    said = told(tmp_path)
    assert "**No verdict yet.** The settings of the arms are still being searched: 48 of 48 trials had ended" in said


@pytest.mark.usefixtures("no_figures")
def test_a_lost_record_of_searches_costs_its_tables_alone(make_study: MakeStudy, tmp_path: Path) -> None:
    tuned_study(make_study, tmp_path / "runs")
    (tmp_path / "runs/sweeps/posenc@nano.json").unlink()
    said = told(tmp_path)
    assert "the record of its searches cannot be read" in said and "## Each arm tuned" in said
    assert "## What each arm's search found" not in said


@pytest.mark.usefixtures("no_figures")
def test_searches_that_the_study_does_not_rest_on_are_not_told(make_study: MakeStudy, tmp_path: Path) -> None:
    """The record of an ablation's searches is written anew by later code, and with other arms."""
    tuned_study(make_study, tmp_path / "runs")
    record = Store(tmp_path / "runs").sweep("posenc@nano").plain()
    record["searches"]["rotary"]["study"] = "another"
    made_up_sweep.keep(tmp_path / "runs", record)
    section = part_of(told(tmp_path), "What each arm's search found")
    assert "| learned" in section and "| rotary" not in section


def test_the_figure_has_every_arm_in_its_own_colour(make_study: MakeStudy, tmp_path: Path) -> None:
    tuned_study(make_study, tmp_path / "runs")
    html = write_report(read_study("posenc@nano", tmp_path / "runs"), tmp_path / "reports").read_text()
    drawn = (tmp_path / "reports/posenc@nano/figures/tuned.svg").read_text()
    assert "optim.lr" in drawn and "rotary" in drawn and "learned" in drawn
    assert "#0072b2" in drawn.lower() and "#4a5563" in drawn.lower()
    section = html.partition("Each arm tuned")[2]
    assert "Each arm&#39;s loss against its learning rate" in section
