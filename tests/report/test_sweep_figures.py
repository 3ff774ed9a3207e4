"""Figures of a sweep: drawn from anything, in time, the same every time, and with no name taken for markup."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from gpt2lab.report.sweep.axes import Axis, Fitted, Point, best_of, limits_of
from gpt2lab.report.sweep.pictures import COORDINATES, SEARCHES, SIZES, draw
from gpt2lab.report.sweep.read import ReadSweep, read_record
from made_up_sweep import BATCH, LR, NORM, TOKENS, coordinates, hopeless, keep, ladder, search, sweep, variants, wide
from matplotlib.figure import Figure

from gpt2lab.report import marks, svg
from gpt2lab.report.sweep import curves, figures, scales
from gpt2lab.store import Store
from gpt2lab.text import setting

HOSTILE = ["<script>alert(1)</script>", "$x^2$", '" onload="alert(1)', "名前", "n" * 90]
RATE = Axis(name="optim.lr", low=1e-4, high=1e-1, log=True)
NAMES = Axis(name=HOSTILE[0], choices=tuple(HOSTILE))
CURVE: marks.Curve = ([1000.0, 2000.0, 3000.0], [3.0, 2.5, 2.2])
NAN = math.nan


def point(slot: int, lr: float, value: float = 2.0, outcome: str = "finished", **more: Any) -> Point:
    settings = {"optim.lr": lr, HOSTILE[0]: HOSTILE[slot % len(HOSTILE)]}
    return Point(slot=slot, settings=settings, outcome=outcome, value=value, **({"curve": CURVE} | more))


GROUPS = {
    "none": [],
    "one": [point(0, 0.01)],
    "two alike": [point(0, 0.01), point(1, 0.01)],
    "all diverged": [point(i, 0.01 * i, NAN, "diverged", curve=([10.0], [NAN])) for i in range(1, 5)],
    "all failed": [point(i, 0.01 * i, NAN, "failed", curve=((), ())) for i in range(1, 5)],
    "nan": [point(0, 0.01, NAN), point(1, 0.02), point(2, 0.03, 2.1, curve=([1.0, 2.0, 3.0], [NAN, 2.0, NAN]))],
    "no settings": [Point(slot=0, settings={}, outcome="finished", value=2.0)],
    "one far off": [*(point(i, 0.001 * (i + 1), 2 + 0.01 * i) for i in range(8)), point(8, 0.1, 900.0)],
    "many": [point(i, 10 ** (-4 + 3 * i / 200), 2 + (i / 100 - 1) ** 2, ["finished", "pruned"][i % 3 == 0])
             for i in range(200)],
}  # fmt: skip


def every_figure(points: list[Point]) -> list[Figure]:
    """One of each kind, over a rate and over names."""
    look = marks.looks(["a", HOSTILE[0]], "a")
    fitted = Fitted(
        line=([0.001, 0.01, 0.1], [3.0, 2.0, 3.0]), at=0.01, low=0.005, high=0.02, flat_low=0.002, flat_high=NAN
    )
    return [
        figures.against(RATE, points, fitted, "val/loss", 0.05, alone=True),
        figures.against(NAMES, points, Fitted(), "val/loss", 0.05, alone=False),
        figures.history(points, "val/loss"),
        figures.searches(RATE, {"a": (points, fitted), HOSTILE[0]: (points, Fitted())}, look, "val/loss"),
        curves.parallel([RATE, NAMES], points, "val/loss"),
        curves.curves(RATE, points, {"unigram": 3.3}, "val/loss"),
        curves.curves(NAMES, points, {}, "val/loss"),
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_any_trials_can_be_drawn(group: str) -> None:
    allowed = {"svg", "title", "desc", "defs", "clipPath", "g", "path", "rect", "use", "text"}
    with svg.drawing():
        for i, figure in enumerate(every_figure(GROUPS[group])):
            alone, inline = svg.render(figure, f"f{i}", "A title", "A description")
            ElementTree.fromstring(inline)
            found = list(ElementTree.fromstring(alone).iter())
            assert {one.tag.removeprefix(f"{{{svg.SVG}}}") for one in found} <= allowed
            assert not [n for one in found for n in one.attrib if n.startswith("on") or n == "style"]


def test_every_look_of_a_trial_and_colour_of_the_ramp_is_a_variable_of_the_page() -> None:
    with svg.drawing():
        _, inline = svg.render(curves.curves(RATE, GROUPS["many"], {}, "val/loss"), "curves", "", "")
    for i in range(len(svg.RAMP)):
        assert f"var(--ramp-{i})" in inline
    css = (Path(svg.__file__).parent / "templates/report.css").read_text()
    assert all(css.count(f"--ramp-{i}:") == 2 for i in range(len(svg.RAMP)))  # light and dark


def lightness(colour: str) -> float:
    """CIE L* of a colour as #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_the_ramp_reads_in_grey_in_both_schemes() -> None:
    css = (Path(svg.__file__).parent / "templates/report.css").read_text()
    light, dark = (part for part in css.split("prefers-color-scheme: dark")[:2])
    for part, away in ((light, "#ffffff"), (dark, "#171d25")):
        colours = [part.split(f"--ramp-{i}: ")[1][:7] for i in range(len(svg.RAMP))]
        steps = [lightness(b) - lightness(a) for a, b in itertools.pairwise(colours)]
        assert min(steps) > 5
        assert max(steps) < 9
        assert min(abs(lightness(colour) - lightness(away)) for colour in colours) > 22
    assert [light.split(f"--ramp-{i}: ")[1][:7] for i in range(len(svg.RAMP))] == list(svg.RAMP)


def test_a_bad_trial_does_not_squeeze_the_others() -> None:
    low, high = limits_of(GROUPS["one far off"])
    assert low < 2.0
    assert high < 3.0
    assert limits_of([]) == (0.0, 1.0)


def test_the_best_is_the_lowest_or_highest_finished_trial_and_the_first_of_equals() -> None:
    points = [
        point(0, 0.1, 2.0),
        point(1, 0.1, 1.0, "pruned"),
        point(2, 0.1, 2.0),
        point(3, 0.1, NAN),
        point(4, 0.1, 3.0),
    ]
    best, most = best_of(points), best_of(points, maximize=True)
    assert best is not None and best.slot == 0
    assert most is not None and most.slot == 4
    assert best_of(points[1:2]) is None


@pytest.mark.parametrize(("value", "share"), [(1e-4, 0.0), (1e-1, 1.0), (10**-2.5, 0.5), (1e-9, 0.0), (9, 1.0)])
def test_shares_of_a_log_axis(value: float, share: float) -> None:
    assert RATE.share(value) == pytest.approx(share)


def test_shares_of_other_axes() -> None:
    assert Axis(name="x", low=2, high=4).share(3) == 0.5
    assert Axis(name="x", low=2, high=2).share(2) == 0.5
    assert NAMES.share(HOSTILE[-1]) == 1.0
    assert math.isnan(NAMES.share("other"))
    assert math.isnan(RATE.number("text"))
    assert math.isnan(RATE.number(None))


def test_settings_are_written_as_one_types_them() -> None:
    given = [0.00213, 2e-5, 1024, 0.1, 1e6, "rotary", True, 3e-10]
    assert [setting(value) for value in given] == ["0.00213", "2e-5", "1024", "0.1", "1e6", "rotary", "True", "3e-10"]
    assert [float(setting(value)) for value in (0.00213, 2e-5, 1e6)] == [0.00213, 2e-5, 1e6]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time: every figure is drawn, once."""
    monkeypatch.setattr(svg, "png", lambda _: b"")


def read(record: dict[str, Any], root: Path) -> ReadSweep:
    return read_record(record, Store(root))


@pytest.mark.usefixtures("no_pixels")
def test_which_figures_a_page_has(tmp_path: Path) -> None:
    names = [(one.name, one.section) for one in draw(read(wide(), tmp_path))]
    assert names == [(f"against-{i}", "") for i in range(4)] + [
        (name, "") for name in ("parallel", "curves", "history", "importance")
    ]
    assert [one.name for one in draw(read(hopeless(), tmp_path))] == ["against-0", "curves", "history"]


@pytest.mark.usefixtures("no_pixels")
def test_searches_stand_in_one_figure_and_each_by_itself(tmp_path: Path) -> None:
    found = draw(read(variants(), tmp_path))
    assert [one.name for one in found if not one.section] == ["beside-0"]
    each = [one for one in found if one.section == SEARCHES]
    assert [one.title for one in each if "history" in one.name] == [
        "The best so far (standard)",
        "The best so far (mup)",
    ]
    assert ">standard<" in found[0].inline  # the name beside the data


@pytest.mark.usefixtures("no_pixels")
def test_sizes_and_coordinates(tmp_path: Path) -> None:
    ladder(tmp_path)
    record = sweep({"lr": search(trials=2)}, name="lr@next", coordinates=coordinates())
    by_part = {one.section: one for one in draw(read(record, tmp_path))}
    assert "842 k" in by_part[SIZES].inline
    assert all(f">{name}<" in by_part[COORDINATES].inline for name in ("64", "512", "block 0", "logits"))


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


def test_many_trials_take_no_time() -> None:
    points = [point(i, 10 ** (-4 + 3 * i / 400), 2 + i % 7) for i in range(400)]
    with svg.drawing():
        started = time.process_time()
        figures.against(RATE, points, Fitted(), "val/loss", 0.05, alone=True)
        assert time.process_time() - started < 1


@pytest.mark.parametrize("found", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.3, HOSTILE[0]: 0.0}])
def test_importance(found: dict[str, float]) -> None:
    with svg.drawing():
        alone, _ = svg.render(figures.importance(found), "importance", "", "")
    assert ("70 %" in alone) == ("b" in found)


def test_sizes_without_interval_or_law() -> None:
    size = scales.Size(parameters=1e6, at=0.01)
    look = marks.looks(["a", "b"], "a")
    trends = {"a": scales.Trend(sizes=[size]), "b": scales.Trend(sizes=[])}
    with svg.drawing():
        for given in (trends, {"b": trends["b"]}):
            svg.render(scales.across(given, look, HOSTILE[0]), "across", "", "")
        empty: dict[str, Any] = {"a": ([64, 128], [0, 1], {})}
        svg.render(scales.coordinates(empty, "rms"), "coordinates", "", "")
        gaps: dict[str, Any] = {"a": ([64, 128], [0, 1], {"block 0": [[None, None], [0.0, 1.0]]})}
        svg.render(scales.coordinates(gaps, "rms"), "coordinates", "", "")


def test_what_is_searched_by_number_and_by_name(tmp_path: Path) -> None:
    record = sweep({"lr": search(space=(BATCH, NORM, LR), trials=6)})
    found = read(record, tmp_path).searches["lr"]
    assert [bool(axis.choices) for axis in found.axes.values()] == [False, True, False]
    assert found.alone is None
    assert set(found.optima) == {BATCH["name"], LR["name"]}
