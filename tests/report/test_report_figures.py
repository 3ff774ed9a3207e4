"""Figures: drawn from anything, the same every time, and with no name taken for markup or a formula."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from page_reader import assert_plain_svg
from PIL import Image

from gpt2lab.reports import style
from gpt2lab.reports.sections import curves, verdicts

TEXT = f"{{{style.SVG}}}text"
HOSTILE = [
    "<script>alert(1)</script>",
    "$x^2$",
    '" onload="alert(1)',
    "javascript:alert(1)",
    "名前",
    "_hidden",
    "n" * 90,
]
FLOORS = {"unigram": 3.33, "bigram": 2.53}
NAN = math.nan


def look(arms: list[str]) -> dict[str, style.ArmStyle]:
    return style.styles_of(arms, arms[0])


def drawn(make: Callable[..., Figure], *arguments: Any) -> ElementTree.Element:
    with style.drawing():
        alone, inline = style.render(make(*arguments), "name", "A title", "A description")
    ElementTree.fromstring(inline)
    return ElementTree.fromstring(alone)


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(TEXT)]


def curve(*losses: float) -> style.Curve:
    return [1000.0 * i for i in range(len(losses))], list(losses)


def effect(label: str, difference: float, low: float, high: float, words: str) -> style.Interval:
    return style.Interval(label, difference, low, high, words, style.ARMS[0])


def all_figures(arms: list[str]) -> list[tuple[Callable[..., Figure], tuple[Any, ...]]]:
    """Every figure, with these arms in it."""
    shown = look(arms)
    effects = [effect(arm, -0.2, -0.3, -0.1, f"better {arm}") for arm in arms[1:]]
    lines = [style.Curves(arm, [curve(5.5, 3.0, 2.2, 2.1, 2.0), curve(5.5, 3.1, 2.3, 2.1, 2.1)]) for arm in arms]
    lengths = {arm: {64.0: [2.1, 2.2], 128.0: [2.0, 2.1]} for arm in arms}
    return [
        (verdicts.forest, (effects, 0.05, arms[0])),
        (curves.training, (lines, shown, FLOORS, "val/loss")),
        (curves.contexts, (lengths, shown, 128, "val/loss")),
        (curves.seeds, ({arm: [2.0, 2.1] for arm in arms}, shown, 3.28, "val/loss")),
    ]


@pytest.mark.parametrize("index", range(4))
def test_hostile_names_stay_text(index: int) -> None:
    make, arguments = all_figures(["base", *HOSTILE])[index]
    root = drawn(make, *arguments)
    assert_plain_svg(root)
    shown = "\n".join(texts(root))
    for name in HOSTILE[:6]:
        assert style.shorten(name, 22) in shown or style.shorten(name) in shown


@pytest.mark.parametrize("index", range(4))
def test_equal_data_gives_equal_bytes(index: int) -> None:
    make, arguments = all_figures(["a", "b"])[index]
    with style.drawing():
        first, second = (style.render(make(*arguments), "name", "t", "d") for _ in range(2))
    assert first == second


def test_the_drawing_ignores_the_machines_settings_and_leaves_them_alone() -> None:
    make, arguments = all_figures(["a", "$x^2$"])[0]
    expected = ElementTree.tostring(drawn(make, *arguments))
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert ElementTree.tostring(drawn(make, *arguments)) == expected
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("count", [1, 12])
def test_any_number_of_arms(count: int) -> None:
    arms = [f"arm {i}" for i in range(count)]
    assert len(set(look(arms).values())) == count
    for make, arguments in all_figures(arms):
        root = drawn(make, *arguments)
        if make is not verdicts.forest:
            assert {arm for arm in arms if any(arm in text for text in texts(root))} == set(arms)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [style.Curves("a", [])],
        [style.Curves("a", [curve(5.5)])],
        [style.Curves("a", [curve(NAN, NAN)])],
        [style.Curves("a", [curve(5.5, NAN, math.inf)], [curve(5.5, 1e30, NAN)])],
        [style.Curves("a", [curve(2.0, 2.0, 2.0)] * 2)],
        [style.Curves("a", [], [curve(NAN)])],
    ],
)
def test_training_survives(lines: list[style.Curves]) -> None:
    shown = texts(drawn(curves.training, lines, look(["a"]), FLOORS, "val/loss"))
    assert "training tokens" in shown
    assert "unigram 3.33" in shown


def test_training_without_floors_or_runs() -> None:
    assert "training tokens" in texts(drawn(curves.training, [], look(["a"]), {}, "val/loss"))


def test_an_arm_that_learned_nothing_does_not_squeeze_the_others() -> None:
    arms = {"a": [5.5, 2.1, 2.0, 2.0, 1.9], "stuck": [5.5, 3.4, 3.3, 3.3, 3.3]}
    lines = [style.Curves(arm, [curve(*losses)]) for arm, losses in arms.items()]
    with style.drawing():
        zoom = curves.training(lines, look(list(arms)), FLOORS, "val/loss").axes[1]
    assert zoom.get_ylim()[1] < 2.5
    assert "stuck ↑" in texts(drawn(curves.training, lines, look(list(arms)), FLOORS, "val/loss"))


def test_other_figures_survive_nothing_and_nan() -> None:
    one = look(["a"])
    effects = [effect("a", NAN, NAN, NAN, "exploratory"), effect("a", 0.0, NAN, NAN, "x")]
    drawn(verdicts.forest, effects, 0.05, "a")
    drawn(verdicts.forest, [effect("a", 0.1, -1e9, 1e9, "inconclusive")], 0.05, "a")
    drawn(curves.seeds, {"a": []}, one, math.inf, "val/loss")
    assert "× 2 failed" in texts(drawn(curves.seeds, {"a": [NAN, 3.3, 2.0]}, one, 3.28, "val/loss"))
    drawn(curves.contexts, {"a": {128.0: [2.0]}}, one, 128, "val/loss")


def test_forest_frame_holds_every_point_and_is_not_stretched_by_one_interval() -> None:
    effects = [effect("a", -0.3, -0.4, -0.2, ""), effect("b", 0.1, -50, 50, "")]
    with style.drawing():
        axes = verdicts.forest(effects, 0.05, "c").axes[0]
    low, high = axes.get_xlim()
    assert low < -0.4
    assert high > 0.1
    assert high - low < 3


def test_an_arm_that_cannot_extend_says_where_it_ends() -> None:
    losses = {"learned": {64.0: [2.2], 128.0: [2.1]}, "rotary": {64.0: [2.0], 128.0: [1.9], 512.0: [2.3]}}
    shown = texts(drawn(curves.contexts, losses, look(list(losses)), 128, "val/loss"))
    assert "learned ends here" in shown
    assert "rotary" in shown
    assert "512" in shown


def test_the_mean_is_over_points_that_all_seeds_have() -> None:
    x, losses = style.stack([([0, 1, 2], [3.0, 2.0, 1.0]), ([0, 1, 2], [3.0, NAN, 2.0]), ([0, 2], [3.0, 3.0])])
    assert x.tolist() == [0, 2]
    np.testing.assert_allclose(losses.mean(0), [3.0, 2.0])


def test_labels_are_spread_apart_in_order_and_within_the_axes() -> None:
    wanted = {"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.99, "e": 1.0, "f": 0.0}
    placed = style.spread(wanted, 0.06)
    heights = sorted(placed.values())
    assert min(np.diff(heights)) > 0.06 - 1e-9
    assert heights[0] >= 0
    assert heights[-1] <= 1 + 1e-9
    assert sorted(placed, key=placed.__getitem__) == sorted(wanted, key=wanted.__getitem__)
    assert style.spread({}, 0.1) == {}


def test_inline_markup_takes_its_colours_from_the_page_and_its_ids_are_its_own() -> None:
    make, arguments = all_figures(["a", "b"])[1]
    with style.drawing():
        alone, inline = style.render(make(*arguments), "name", "t", "d")
    colours = re.compile(r'(?:fill|stroke)="(#[0-9a-f]{6})"')
    assert set(colours.findall(inline)) == set()
    assert style.ARMS[0] in colours.findall(alone)
    assert all(i.startswith("name-") for i in re.findall(r'\bid="([^"]+)"', inline))
    referenced = set(re.findall(r'href="#([^"]+)"', inline)) | set(re.findall(r"url\(#([^)]+)\)", inline))
    assert referenced
    assert referenced <= set(re.findall(r'\bid="([^"]+)"', inline))


def test_nothing_leaves_the_frame_of_pixels_which_have_the_layout_of_the_svg() -> None:
    for make, arguments in all_figures(["learned", "a rather long name of an arm"]):
        with style.drawing():
            shown = style.picture("name", "t", "d", make(*arguments))
        image = np.asarray(Image.open(io.BytesIO(shown.image("png"))).convert("RGB"))
        for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (edge == 255).all(), make
