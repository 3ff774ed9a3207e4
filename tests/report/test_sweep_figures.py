"""Figures of a sweep: drawn from anything, in time, the same every time, and with no name taken for markup."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_up_sweep import BATCH, LR, NORM, hopeless, read, search, sweep, variants, wide
from matplotlib.figure import Figure
from page_reader import assert_plain_svg

from gpt2lab.analysis.tuning import Optimum
from gpt2lab.records import SearchRecord, TrialRecord, ranked_trials
from gpt2lab.reports import style
from gpt2lab.reports.page import made_of
from gpt2lab.reports.read import Axis, SearchRead
from gpt2lab.reports.sections import searches
from gpt2lab.reports.sections.searches import limits_of

HOSTILE = ["<script>alert(1)</script>", "$x^2$", '" onload="alert(1)', "名前", "n" * 90]
RATE = Axis(name="optim.lr", low=1e-4, high=1e-1, log=True)
NAMES = Axis(name=HOSTILE[0], choices=tuple(HOSTILE))
NAN = math.nan


def point(slot: int, lr: float, value: float = 2.0, outcome: str = "finished") -> TrialRecord:
    settings = {"optim.lr": lr, HOSTILE[0]: HOSTILE[slot % len(HOSTILE)]}
    return TrialRecord(index=slot, settings=settings, outcome=outcome, value=value)  # type: ignore[arg-type]


GROUPS = {
    "none": [],
    "one": [point(0, 0.01)],
    "two alike": [point(0, 0.01), point(1, 0.01)],
    "all diverged": [point(i, 0.01 * i, NAN, "diverged") for i in range(1, 5)],
    "all failed": [point(i, 0.01 * i, NAN, "failed") for i in range(1, 5)],
    "nan": [point(0, 0.01, NAN), point(1, 0.02), point(2, 0.03, 2.1)],
    "no settings": [TrialRecord(index=0, settings={}, outcome="finished", value=2.0)],
    "one far off": [*(point(i, 0.001 * (i + 1), 2 + 0.01 * i) for i in range(8)), point(8, 0.1, 900.0)],
    "many": [point(i, 10 ** (-4 + 3 * i / 200), 2 + (i / 100 - 1) ** 2, ["finished", "pruned"][i % 3 == 0])
             for i in range(200)],
}  # fmt: skip


def made_up(points: list[TrialRecord], *axes: Axis, optimum: Optimum | None = None) -> SearchRead:
    optima = {axes[0].name: optimum} if optimum else {}
    named = {axis.name: axis for axis in axes}
    return SearchRead(label="", record=SearchRecord(trials=points), axes=named, optima=optima, direction="minimize")


def every_figure(points: list[TrialRecord]) -> list[Figure]:
    """One of each kind, over a rate and over names."""
    fitted = read(sweep()).searches["lr"].optima["optim.lr"]
    assert fitted.line() is not None and fitted.interval and fitted.flat
    rate, both = made_up(points, RATE, optimum=fitted), made_up(points, RATE, NAMES)
    look = style.styles_of(["a", HOSTILE[0]], "a")
    return [
        searches.against(rate, RATE, "val/loss", 0.05),
        searches.against(both, NAMES, "val/loss", 0.05),
        searches.beside(RATE, {"a": rate, HOSTILE[0]: both}, look, "val/loss"),
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_any_trials_can_be_drawn(group: str) -> None:
    with style.drawing():
        for i, figure in enumerate(every_figure(GROUPS[group])):
            alone, inline = style.render(figure, f"f{i}", "A title", "A description")
            ElementTree.fromstring(inline)
            assert_plain_svg(ElementTree.fromstring(alone))


def test_a_bad_trial_does_not_squeeze_the_others() -> None:
    low, high = limits_of(GROUPS["one far off"])
    assert low < 2.0
    assert high < 3.0
    assert limits_of([]) == (0.0, 1.0)


def test_the_best_is_the_lowest_or_highest_finished_trial_and_the_first_of_equals() -> None:
    values = [(2.0, "finished"), (1.0, "pruned"), (2.0, "finished"), (NAN, "finished"), (3.0, "finished")]
    points = [point(slot, 0.1, value, outcome) for slot, (value, outcome) in enumerate(values)]
    assert [trial.index for trial in ranked_trials(points)] == [0, 2, 4]
    assert [trial.index for trial in ranked_trials(points, "maximize")] == [4, 0, 2]
    assert made_up(points[1:2], RATE).best is None


def figures_of(record: dict[str, Any], root: Path) -> dict[str, list[style.Picture]]:
    """Title of a section -> its figures."""
    return {one.title: list(one.figures) for one in made_of(read(record, root), "sweep") if one.figures}


@pytest.mark.usefixtures("no_figures")
def test_which_figures_a_page_has(tmp_path: Path) -> None:
    found = figures_of(wide(), tmp_path)
    assert [one.name for one in found.pop("Figures")] == [f"against-{i}" for i in range(4)]
    assert found == {}
    assert [one.name for one in figures_of(hopeless(), tmp_path)["Figures"]] == ["against-0"]


def test_searches_stand_in_one_figure_and_each_by_itself(tmp_path: Path) -> None:
    found = figures_of(variants(), tmp_path)
    assert [one.name for one in found["Figures"]] == ["beside-0"]
    each = [one.title for one in found["Each search by itself"]]
    assert each == ["Loss against optim.lr (standard)", "Loss against optim.lr (mup)"]
    assert ">standard<" in found["Figures"][0].inline  # the name beside the data


def test_what_is_searched_by_number_and_by_name() -> None:
    record = sweep({"lr": search(space=(BATCH, NORM, LR), trials=6)})
    found = read(record).searches["lr"]
    assert [bool(axis.choices) for axis in found.axes.values()] == [False, True, False]
    assert found.alone is None
    assert set(found.optima) == {BATCH["name"], LR["name"]}
