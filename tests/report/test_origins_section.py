"""Where differences come from: numbers by hand, sentences whose signs are those of the numbers, and what is missing."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_study import IDENTITY, KEY, run_id, write
from scipy import stats

from gpt2lab.analysis.calibration import nominal_level
from gpt2lab.analysis.results import load_results
from gpt2lab.reports import style
from gpt2lab.reports.read import read_study
from gpt2lab.reports.sections import origins
from gpt2lab.reports.sections.origins import Origins
from gpt2lab.reports.study import write_report

MakeStudy = Callable[..., dict[str, Any]]
GROUPS = {
    "position": (["1-1", "2-7", "8-128"], [10, 30, 60]),
    "frequency": (["1-1", "2-9", "10-256"], [30, 40, 30]),
    "document": (["hamlet.txt", "macbeth.txt", "7 others"], [50, 30, 20]),
}
EXAMPLES = ["␣", "e t a", "T k"]
BASE = {"position": [2.6, 2.2, 2.0], "frequency": [1.0, 2.0, 3.4], "document": [2.1, 2.2, 2.0]}
SURE = 1 - float(nominal_level(0.05, (3, 3)))
"""Confidence at which Welch's interval of three against three seeds holds in 95 % of cases, whatever their noise."""
HOSTILE = '<script>alert("1")</script>'


def leave(
    runs: Path, arm: str, seed: int, moved: Mapping[str, Sequence[float]], noise: float = 0.0, **part: Any
) -> None:
    """What a run keeps: the baseline's losses moved by so much in each group, and by `noise` in all."""
    parts = {}
    for name, (groups, targets) in GROUPS.items():
        losses = [loss + by + noise for loss, by in zip(BASE[name], moved[name], strict=True)]
        parts[name] = {"groups": groups, "losses": losses, "targets": targets} | part
    parts["frequency"]["examples"] = EXAMPLES
    write(runs / run_id(arm, seed) / "evaluations" / "parts" / f"{KEY}.json", {"key": KEY, "parts": parts})


def same(*values: float) -> dict[str, list[float]]:
    return {name: list(values) for name in GROUPS}


LATE = same(-0.01, -0.1, -0.3)
"""Gains that grow to the end of every division."""


@pytest.fixture
def study(make_study: MakeStudy, tmp_path: Path) -> Path:
    """runs/ of a baseline, an arm whose gain lies at the end, and one that loses there."""
    make_study({"learned": 2.15, "rotary": 1.95, "none": 2.2})
    for seed, noise in enumerate((0.0, 0.01, 0.03)):
        leave(tmp_path / "runs", "learned", seed, same(0, 0, 0), noise)
        leave(tmp_path / "runs", "rotary", seed, LATE, -noise)
        leave(tmp_path / "runs", "none", seed, same(-0.2, 0.0, 0.2), -2 * noise)
    return tmp_path / "runs"


def read(runs: Path) -> Origins:
    return read_study("posenc", runs).once(origins.origins)


def section_of(runs: Path) -> str:
    """The section's text on the page; "" without one."""
    source = html.unescape(write_report(read_study("posenc", runs), runs.parent / "reports").read_text())
    _, there, rest = source.partition("<h2>Where the difference comes from</h2>")
    text = re.sub(r"</?code>", "`", rest.partition("<h2>")[0])
    return re.sub(r"<[^>]+>", " ", text) if there else ""


def test_every_difference_is_welchs_over_seeds(study: Path) -> None:
    found = read(study)
    assert [division.name for division in found.divisions] == ["position", "frequency", "document"]
    assert not found.lacking
    ours, theirs = -np.array([0.0, 0.01, 0.03]), np.array([0.0, 0.01, 0.03])
    for division in found.divisions:
        rotary = division.arms["rotary"]
        for place, by in enumerate((-0.01, -0.1, -0.3)):
            interval = stats.ttest_ind(ours + by, theirs, equal_var=False).confidence_interval(SURE)
            assert rotary.difference[place] == pytest.approx(by + ours.mean() - theirs.mean())
            assert (rotary.low[place], rotary.high[place]) == pytest.approx(tuple(interval))
        assert division.changes["none"].difference == pytest.approx(0.4)
    whole = 0.1 * -0.01 + 0.3 * -0.1 + 0.6 * -0.3 - 2 * 0.04 / 3
    assert found.totals["rotary"].difference == pytest.approx(whole)


def test_a_change_has_the_noise_of_the_ends_and_not_of_the_whole(study: Path) -> None:
    """Here seeds move all groups alike, so that a change has no noise at all; and then the last group alone."""
    assert np.isnan(read(study).divisions[0].changes["rotary"].low)  # no spread: nothing to test with
    for seed, by in enumerate((-0.28, -0.3, -0.32)):
        leave(study, "rotary", seed, same(-0.01, -0.1, by), -0.01 * seed)
    change = read(study).divisions[0].changes["rotary"]
    interval = stats.ttest_ind([-0.27, -0.29, -0.31], [0, 0, 0], equal_var=False).confidence_interval(SURE)
    assert (change.difference, change.low, change.high) == pytest.approx((-0.29, *interval))


@pytest.mark.usefixtures("no_figures")
def test_one_seed_has_numbers_and_no_interval(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study({"learned": 2.15, "rotary": 1.95}, seeds=1)
    leave(tmp_path / "runs", "learned", 0, same(0, 0, 0))
    leave(tmp_path / "runs", "rotary", 0, LATE)
    text = section_of(tmp_path / "runs")
    assert "−0.290" in text and "[" not in text


@pytest.mark.usefixtures("no_figures")
def test_runs_without_parts_are_named(make_study: MakeStudy, study: Path) -> None:
    (study / run_id("none", 1) / "evaluations/parts" / f"{KEY}.json").unlink()
    text = section_of(study)
    assert "Without losses by part of the text: none (1 run)." in text
    for seed in range(3):
        (study / run_id("learned", seed) / "evaluations/parts" / f"{KEY}.json").unlink()
    text = section_of(study)  # without the baseline there is no difference
    assert "learned (3 runs)" in text and "All targets" not in text


def test_what_failed_or_cannot_be_compared_takes_no_part(study: Path) -> None:
    result = study / run_id("rotary", 2) / "result.json"
    write(result, json.loads(result.read_text()) | {"status": "diverged"})
    assert read(study).totals["rotary"].sizes == (2, 3)
    for seed in range(3):
        write(study / run_id("none", seed) / "run.json", {"identity": {**IDENTITY, "core": "other"}})
    found = read(study)
    assert found.apart == ["none"] and found.totals.keys() == {"rotary"}
    assert "Not comparable, so without a difference: none." in origins.left_out(found)


def test_runs_that_were_divided_otherwise_are_not_mixed(study: Path) -> None:
    leave(study, "rotary", 1, LATE, targets=[10, 30, 59])
    found = read(study)
    assert all(division.arms.keys() == {"none"} for division in found.divisions)


@pytest.mark.parametrize(
    "damage",
    [{"parts": 3}, {"parts": {"position": [1]}}, {"parts": {"position": {"groups": ["a"]}}},
     {"parts": {"position": {"groups": ["1-1"], "losses": [math.nan], "targets": [1]}}},
     {"parts": {"position": {"groups": ["1-1"], "losses": [1.0], "targets": [0]}}},
     {"parts": {"position": {"groups": ["1-1"], "losses": ["much"], "targets": [1]}}}],
)  # fmt: skip
def test_a_damaged_record_counts_as_none(study: Path, damage: Any) -> None:
    write(study / run_id("rotary", 0) / "evaluations/parts" / f"{KEY}.json", damage)
    found = read(study)
    assert found.lacking == {"rotary": 1} and found.totals.keys() == {"none"}


@pytest.mark.parametrize("damage", [None, [], "x"])
def test_a_file_that_is_no_record_makes_its_run_damaged(study: Path, damage: Any) -> None:
    path = study / run_id("rotary", 0) / "evaluations/parts" / f"{KEY}.json"
    write(path, damage)
    [run] = [run for run in read_study("posenc", study).runs if run.value is None]
    assert (run.arm, run.seed, run.status) == ("rotary", 0, "damaged")
    assert str(path) in str(run.reason) and "try: rm" in str(run.reason)


def test_page_and_twin_show_table_and_figure(study: Path, tmp_path: Path) -> None:
    index = write_report(read_study("posenc", study), tmp_path / "reports")
    source, twin = index.read_text(), (index.parent / "report.md").read_text()
    places = [source.index(part) for part in ("Verdicts", "Where the difference comes from", "What it costs")]
    assert places == sorted(places)
    assert 'id="origins-title"' in source and "(figures/origins.svg)" in twin
    for title in ("1 token seen", "8–128 tokens seen", "Change with tokens seen", "Rank 1", "Ranks 10–256",
                  "Below 0 in 3 documents"):  # fmt: skip
        assert title in source and title in twin
    text = section_of(study)
    assert "Exploratory: none of this was declared" in text and "of these 18 about 1 would miss" in text
    assert not re.search(r"\b(better|worse|significant|proves?)\b", text)


@pytest.mark.parametrize("arms", [1, 9])
def test_figures_can_be_drawn_from_any_names_and_numbers(arms: int, make_study: MakeStudy, tmp_path: Path) -> None:
    names = ["learned", *(f"{HOSTILE} {number}" for number in range(arms))]
    make_study(dict.fromkeys(names, 2.0), seeds=2)
    for arm in names:
        for seed in range(2):
            leave(tmp_path / "runs", arm, seed, same(0, 0, 0), groups=["1-1", "2-2", "3-128"])
    found = read(tmp_path / "runs")
    assert len(found.totals) == arms
    with style.drawing():
        for picture in origins.drawn(found, style.styles_of(names, "learned"), "learned"):
            assert "<script" not in picture.alone


def test_results_have_the_losses_by_part_as_rows(study: Path) -> None:
    frame = load_results("posenc", study)
    rows = frame[(frame.arm == "rotary") & (frame.seed == 1)].set_index("metric")["value"]
    assert rows["final/val/loss/position/8-128"] == pytest.approx(2.0 - 0.3 - 0.01)
    assert rows["final/val/loss/frequency/1-1"] == pytest.approx(1.0 - 0.01 - 0.01)
    assert rows["final/val/loss/document/7 others"] == pytest.approx(2.0 - 0.3 - 0.01)
    result = study / run_id("rotary", 1) / "result.json"
    write(result, json.loads(result.read_text()) | {"status": "diverged"})
    frame = load_results("posenc", study)
    assert not frame[(frame.arm == "rotary") & (frame.seed == 1)].metric.str.contains("position").any()
