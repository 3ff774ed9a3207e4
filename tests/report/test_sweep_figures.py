"""Figures of a sweep: drawn from anything, in time, the same every time, and with no name taken for markup."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_up_sweep import BATCH, LR, NORM, TOKENS, coordinates, hopeless, keep, ladder, search, sweep, variants, wide
from matplotlib.figure import Figure
from page_reader import assert_plain_svg

from gpt2lab.analysis.scaling import transfer
from gpt2lab.analysis.tuning import Optimum
from gpt2lab.reports import style
from gpt2lab.reports.page import made_of
from gpt2lab.reports.read import Axis, SearchRead, SweepRead, TrialPoint, ranked, read_chosen, read_record
from gpt2lab.reports.sections import searches, sizes
from gpt2lab.reports.sections.searches import limits_of
from gpt2lab.store import Store

HOSTILE = ["<script>alert(1)</script>", "$x^2$", '" onload="alert(1)', "名前", "n" * 90]
RATE = Axis(name="optim.lr", low=1e-4, high=1e-1, log=True)
NAMES = Axis(name=HOSTILE[0], choices=tuple(HOSTILE))
CURVE: style.Curve = ([1000.0, 2000.0, 3000.0], [3.0, 2.5, 2.2])
NAN = math.nan


def point(slot: int, lr: float, value: float = 2.0, outcome: str = "finished", **more: Any) -> TrialPoint:
    settings = {"optim.lr": lr, HOSTILE[0]: HOSTILE[slot % len(HOSTILE)]}
    return TrialPoint(slot=slot, settings=settings, outcome=outcome, value=value, **({"curve": CURVE} | more))


GROUPS = {
    "none": [],
    "one": [point(0, 0.01)],
    "two alike": [point(0, 0.01), point(1, 0.01)],
    "all diverged": [point(i, 0.01 * i, NAN, "diverged", curve=([10.0], [NAN])) for i in range(1, 5)],
    "all failed": [point(i, 0.01 * i, NAN, "failed", curve=((), ())) for i in range(1, 5)],
    "nan": [point(0, 0.01, NAN), point(1, 0.02), point(2, 0.03, 2.1, curve=([1.0, 2.0, 3.0], [NAN, 2.0, NAN]))],
    "no settings": [TrialPoint(slot=0, settings={}, outcome="finished", value=2.0)],
    "one far off": [*(point(i, 0.001 * (i + 1), 2 + 0.01 * i) for i in range(8)), point(8, 0.1, 900.0)],
    "many": [point(i, 10 ** (-4 + 3 * i / 200), 2 + (i / 100 - 1) ** 2, ["finished", "pruned"][i % 3 == 0])
             for i in range(200)],
}  # fmt: skip


def made_up(points: list[TrialPoint], *axes: Axis, optimum: Optimum | None = None) -> SearchRead:
    optima = {axes[0].name: optimum} if optimum else {}
    named = {axis.name: axis for axis in axes}
    return SearchRead(label="", record={}, axes=named, points=points, optima=optima, maximize=False)


def every_figure(points: list[TrialPoint]) -> list[Figure]:
    """One of each kind, over a rate and over names."""
    fitted = read_chosen(search(), sweep()).optima["optim.lr"]
    assert fitted.line() is not None and fitted.interval and fitted.flat
    rate, both = made_up(points, RATE, optimum=fitted), made_up(points, RATE, NAMES)
    look = style.looks(["a", HOSTILE[0]], "a")
    return [
        searches.against(rate, RATE, "val/loss", 0.05),
        searches.against(both, NAMES, "val/loss", 0.05),
        searches.history(both, "val/loss"),
        searches.beside(RATE, {"a": rate, HOSTILE[0]: both}, look, "val/loss"),
        searches.parallel(both, "val/loss"),
        searches.curves(rate, RATE, {"unigram": 3.3}, "val/loss"),
        searches.curves(both, NAMES, {}, "val/loss"),
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_any_trials_can_be_drawn(group: str) -> None:
    with style.drawing():
        for i, figure in enumerate(every_figure(GROUPS[group])):
            alone, inline = style.render(figure, f"f{i}", "A title", "A description")
            ElementTree.fromstring(inline)
            assert_plain_svg(ElementTree.fromstring(alone))


def test_every_look_of_a_trial_and_colour_of_the_ramp_is_a_variable_of_the_page() -> None:
    with style.drawing():
        _, inline = style.render(searches.curves(made_up(GROUPS["many"], RATE), RATE, {}, "val/loss"), "curves", "", "")
    for i in range(len(style.RAMP)):
        assert f"var(--ramp-{i})" in inline
    css = (Path(style.__file__).parent / "templates/page.css").read_text()
    assert all(css.count(f"--ramp-{i}:") == 2 for i in range(len(style.RAMP)))  # light and dark


def lightness(colour: str) -> float:
    """CIE L* of a colour as #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_the_ramp_reads_in_grey_in_both_schemes() -> None:
    css = (Path(style.__file__).parent / "templates/page.css").read_text()
    light, dark = (part for part in css.split("prefers-color-scheme: dark")[:2])
    for part, away in ((light, "#ffffff"), (dark, "#171d25")):
        colours = [part.split(f"--ramp-{i}: ")[1][:7] for i in range(len(style.RAMP))]
        steps = [lightness(b) - lightness(a) for a, b in itertools.pairwise(colours)]
        assert min(steps) > 5
        assert max(steps) < 9
        assert min(abs(lightness(colour) - lightness(away)) for colour in colours) > 22
    assert [light.split(f"--ramp-{i}: ")[1][:7] for i in range(len(style.RAMP))] == list(style.RAMP)


def test_a_bad_trial_does_not_squeeze_the_others() -> None:
    low, high = limits_of(GROUPS["one far off"])
    assert low < 2.0
    assert high < 3.0
    assert limits_of([]) == (0.0, 1.0)


def test_the_best_is_the_lowest_or_highest_finished_trial_and_the_first_of_equals() -> None:
    values = [(2.0, "finished"), (1.0, "pruned"), (2.0, "finished"), (NAN, "finished"), (3.0, "finished")]
    points = [point(slot, 0.1, value, outcome) for slot, (value, outcome) in enumerate(values)]
    assert [p.slot for p in ranked(points)] == [0, 2, 4]
    assert [p.slot for p in ranked(points, maximize=True)] == [4, 0, 2]
    assert made_up(points[1:2], RATE).best_point is None


@pytest.mark.parametrize(
    ("axis", "value", "share"),
    [
        *((RATE, value, share) for value, share in {1e-4: 0.0, 1e-1: 1.0, 10**-2.5: 0.5, 1e-9: 0.0, 9: 1.0}.items()),
        (Axis(name="x", low=2, high=4), 3, 0.5),
        (Axis(name="x", low=2, high=2), 2, 0.5),
        (NAMES, HOSTILE[-1], 1.0),
        (NAMES, "other", NAN),
    ],
)
def test_shares_of_an_axis(axis: Axis, value: Any, share: float) -> None:
    assert axis.share(value) == pytest.approx(share, nan_ok=True)
    assert math.isnan(RATE.number("text")) and math.isnan(RATE.number(None))


def read(record: dict[str, Any], root: Path) -> SweepRead:
    return read_record(record, Store(root))


def figures_of(record: dict[str, Any], root: Path) -> dict[str, list[style.Picture]]:
    """Title of a section -> its figures."""
    return {one.title: list(one.figures) for one in made_of(read(record, root), "sweep") if one.figures}


@pytest.mark.usefixtures("no_figures")
def test_which_figures_a_page_has(tmp_path: Path) -> None:
    found = figures_of(wide(), tmp_path)
    assert [one.name for one in found.pop("Figures")] == [
        *(f"against-{i}" for i in range(4)), "parallel", "curves", "history", "importance"
    ]  # fmt: skip
    assert found == {}
    assert [one.name for one in figures_of(hopeless(), tmp_path)["Figures"]] == ["against-0", "curves", "history"]


def test_searches_stand_in_one_figure_and_each_by_itself(tmp_path: Path) -> None:
    found = figures_of(variants(), tmp_path)
    assert [one.name for one in found["Figures"]] == ["beside-0"]
    each = [one.title for one in found["Each search by itself"] if "history" in one.name]
    assert each == ["The best so far (standard)", "The best so far (mup)"]
    assert ">standard<" in found["Figures"][0].inline  # the name beside the data


def test_sizes_and_coordinates(tmp_path: Path) -> None:
    ladder(tmp_path)
    found = figures_of(sweep({"lr": search(trials=2)}, name="lr@next", coordinates=coordinates()), tmp_path)
    assert "842 k" in found["Across size"][0].inline
    assert all(f">{name}<" in found["Coordinate check"][0].inline for name in ("64", "512", "block 0", "logits"))


def test_the_rate_is_drawn_where_the_store_has_the_run(tmp_path: Path) -> None:
    record = sweep({"lr": search(trials=6)})
    keep(tmp_path, record)
    done = record["searches"]["lr"]["trials"][0]
    run = tmp_path / done["runs"]["100"]
    run.mkdir()
    rows = [
        f'{{"step": {s}, "tokens": {s * 1024}, "seconds": 1, "metrics": {{"val/loss": {4 - s / 440}}}}}'
        for s in range(0, 441, 4)
    ]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    points = read(record, tmp_path).searches["lr"].points
    assert len(points[0].curve[0]) == 111  # the journal has more than the record
    assert points[0].curve[0][-1] == TOKENS
    assert len(points[1].curve[0]) == len(record["searches"]["lr"]["trials"][1]["curve"])
    (run / "metrics.jsonl").write_text("not json\n" * 3)
    assert len(read(record, tmp_path).searches["lr"].points[0].curve[0]) == 10


@pytest.mark.parametrize("found", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.3, HOSTILE[0]: 0.0}])
def test_importance(found: dict[str, float]) -> None:
    with style.drawing():
        alone, _ = style.render(searches.importance(found), "importance", "", "")
    assert ("70 %" in alone) == ("b" in found)


def test_sizes_without_interval_or_law() -> None:
    optimum = Optimum(what="rate", unit="nats", low=1e-4, high=0.1, log=True, maximize=False, effect=None, finished=1,
                      diverged=0, pruned=0, best=0.01)  # fmt: skip
    size = sizes.AtScale(scale="nano", parameters=1e6, optimum=optimum)
    law = transfer([1e6], [0.01], [None], what="rate")
    look = style.looks(["a", "b"], "a")
    found = {
        label: sizes.SearchOverScales(name="lr", scales=one, transfer=law) for label, one in (("a", [size]), ("b", []))
    }
    with style.drawing():
        for given in (found, {"b": found["b"]}):
            style.render(sizes.best_by_size(given, look, HOSTILE[0]), "across", "", "")
        empty: dict[str, Any] = {"a": ([64, 128], [0, 1], {})}
        style.render(sizes.coordinates(empty, "rms"), "coordinates", "", "")
        gaps: dict[str, Any] = {"a": ([64, 128], [0, 1], {"block 0": [[None, None], [0.0, 1.0]]})}
        style.render(sizes.coordinates(gaps, "rms"), "coordinates", "", "")


def test_what_is_searched_by_number_and_by_name(tmp_path: Path) -> None:
    record = sweep({"lr": search(space=(BATCH, NORM, LR), trials=6)})
    found = read(record, tmp_path).searches["lr"]
    assert [bool(axis.choices) for axis in found.axes.values()] == [False, True, False]
    assert found.alone is None
    assert set(found.optima) == {BATCH["name"], LR["name"]}
