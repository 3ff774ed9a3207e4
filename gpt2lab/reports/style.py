"""The one style of all figures: colours, sizes, fonts and styles of arms, what figures share, and how they are saved.

A figure is drawn with matplotlib's object-oriented API inside `drawing()`, which is set around every section, and
becomes a `Picture`: SVG whose text stays text, without inline style, metadata or anything loaded from elsewhere, and
PNG for slides and papers. Equal data gives equal bytes. matplotlib is slow to import, so only what draws imports it: a
page that is kept needs none of it.

matplotlib writes `style="..."` on every element, which a strict Content-Security-Policy blocks; presentation
attributes (`fill="..."`) it does not. Ids get the figure's name in front, so that several figures share a page, and in
a page the palette becomes CSS variables, so that they follow its light and dark scheme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from gpt2lab.basics.text import ARM_COLOURS, BASELINE_COLOUR, setting, shorten
from gpt2lab.errors import ConfigError
from gpt2lab.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as AxisOfPlot
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float]]
"""(tokens, value), one entry per evaluation."""

WIDE, HALF = 9.2, 4.5
"""Widths in inches."""

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
IMAGES: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200, "metadata": {"Software": None}},
    "pdf": {"metadata": dict.fromkeys(("Creator", "Producer", "CreationDate"))},
}
"""Formats of figures for slides and papers, with the options of each."""
MOST_NAMED = 36
"""Arms that a legend lists."""
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID, SURFACE = "#1b2430", "#5f6b7a", "#e3e7ec", "#ffffff"
BAND = "#eceff3"
BASELINE, ARMS = BASELINE_COLOUR, ARM_COLOURS
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", BAND: "--band", BASELINE: "--arm-0"}
VARIABLES |= {colour: f"--arm-{i}" for i, colour in enumerate(ARMS, start=1)}
OTHER_SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS",
                 "Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Symbola", "Unifont")  # fmt: skip
DRAWING: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpt2lab",  # without it, every id is drawn from a random source
    "text.hinting": "no_hinting",  # text in PNG is as wide as in SVG, whose layout it shares
    "pdf.fonttype": 42,  # text stays text, and conferences refuse fonts of type 3
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # an arm may be called $x^2$
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Figures drawn and saved inside look the same on every machine, whatever its matplotlibrc says."""
    import matplotlib

    defaults: dict[Any, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))
    }
    style = {**defaults, **DRAWING, "font.family": families()}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The browser has glyphs that DejaVu lacks; only the width of such a label is a guess.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        yield


@cache
def families() -> list[str]:
    """DejaVu Sans, which ships with matplotlib and is wider than what browsers put in its place, so labels fit; then
    whatever this machine has for the writing systems that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]


@dataclass(frozen=True)
class Picture:
    """One drawn figure: `alone` is an SVG file, `inline` goes into the page and takes its colours from there. `width`:
    wide, or half of the page. `figure`: matplotlib's, to be changed and saved by those who want it otherwise."""

    name: str
    title: str
    caption: str
    width: str
    alone: str
    inline: str
    figure: Figure

    def __repr__(self) -> str:
        return f"<Picture {self.name}: {self.title}>"

    def _repr_svg_(self) -> str:
        return self.alone

    def save(self, file: str | Path) -> None:
        """Write it as the ending says: svg, png or pdf. Raises ConfigError for another one."""
        ending = Path(file).suffix[1:]
        if ending not in ("svg", *IMAGES):
            raise ConfigError("a name that ends with .svg, .png or .pdf is expected", where=str(file))
        write_atomically(Path(file), self.image(ending) if ending in IMAGES else self.alone)

    def image(self, ending: str) -> bytes:
        """The figure in one of the formats of IMAGES. The same figure gives the same bytes."""
        buffer = io.BytesIO()
        with drawing():
            self.figure.savefig(buffer, format=ending, **IMAGES[ending])
        return buffer.getvalue()


def picture(name: str, title: str, caption: str, figure: Figure, width: str = "wide") -> Picture:
    """Save a figure; call inside `drawing()`. name: of its files."""
    return Picture(name, title, caption, width, *render(figure, name, title, caption), figure)


def lay_out(figure: Figure) -> None:
    """Place what a figure has, by the widths of its text in SVG. All formats share the places: a figure with a layout
    engine is placed, and drawn twice, each time that it is saved."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    FigureCanvasSVG(figure)
    figure.dpi = 72  # that of SVG and PDF
    engine = ConstrainedLayoutEngine()
    figure.set_layout_engine(engine)
    engine.execute(figure)
    figure.set_layout_engine(None)


def empty(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panel(width: float, height: float, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes, and the labels of these."""
    figure = empty(width, height)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def render(figure: Figure, name: str, title: str, description: str) -> tuple[str, str]:
    """Lay out `figure`, and save it as (a stand-alone file with its own colours, markup for a page that defines the
    palette's variables).

    Call inside `drawing()`. The same figure gives the same text.
    """
    lay_out(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                element.remove(child)
        _to_attributes(element)
        _prefix_ids(element, name)
    _head(root, name, title, description)
    ElementTree.register_namespace("", SVG)
    alone = ElementTree.tostring(root, encoding="unicode")
    for element in root.iter():
        for key in ("fill", "stroke"):
            if variable := VARIABLES.get(element.get(key, "")):
                element.set(key, f"var({variable})")
    root.attrib.pop("width")
    root.attrib.pop("height")
    return alone, ElementTree.tostring(root, encoding="unicode")


def _head(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    """The text for screen readers, and the defaults that matplotlib keeps in a style element."""
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "font-family": FONTS}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)


def _to_attributes(element: ElementTree.Element) -> None:
    for item in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size.group(1) if size else "9.5")
            if "bold" in value or re.search(r"\b[67]00\b", value):
                element.set("font-weight", "600")
        elif key == "font-size":
            element.set(key, value.removesuffix("px"))
        elif key and key not in ("font-family", "white-space"):
            element.set(key, value)
    if element.tag == f"{{{SVG}}}text":  # a halo, so that a label stays readable where a line runs behind it
        element.attrib |= {"stroke": SURFACE, "stroke-width": "2.5", "paint-order": "stroke"}
    if href := element.attrib.pop(f"{{{XLINK}}}href", None):
        element.set("href", href)


def _prefix_ids(element: ElementTree.Element, name: str) -> None:
    if identifier := element.get("id"):
        element.set("id", f"{name}-{identifier}")
    if (href := element.get("href", "")).startswith("#"):
        element.set("href", f"#{name}-{href[1:]}")
    if clip := element.get("clip-path"):
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))


MARKERS = "osD^vPX"
DASHES: tuple[tuple[int, tuple[float, ...]] | str, ...] = ("solid", (0, (4, 1.6)), (0, (1.2, 1.4)))


@dataclass(frozen=True)
class ArmStyle:
    """How one arm is drawn, everywhere."""

    colour: str
    marker: str
    dash: tuple[int, tuple[float, ...]] | str


def styles_of(arms: Sequence[str], baseline: str) -> dict[str, ArmStyle]:
    """One look per arm: the baseline in grey, the others by colour, then dashed, then dotted."""
    styles = {baseline: ArmStyle(BASELINE, MARKERS[0], DASHES[0])}
    for i, arm in enumerate(arm for arm in arms if arm != baseline):
        turn, colour = divmod(i, len(ARMS))
        styles[arm] = ArmStyle(ARMS[colour], MARKERS[(i + 1) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return styles


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], coords: str, **style: Any
) -> None:
    """A small muted remark; `coords` has what each number of `at` is: `d` data, `f` fraction of the axes."""
    names = {"d": "data", "f": "axes fraction"}
    options: dict[str, Any] = {"color": MUTED, "fontsize": 8.5, "zorder": 5} | style
    place = (names[coords[0]], names[coords[1]])
    axes.annotate(text, at, offset, xycoords=place, textcoords="offset points", **options)


def title(axes: Axes, text: str) -> None:
    """The small title of one of several panels."""
    axes.set_title(text, fontsize=9.5, color=MUTED, loc="left")


def zero_line(axes: Axes, direction: str) -> None:
    """No difference, as a line that is `vertical` or `horizontal`."""
    draw = axes.axvline if direction == "vertical" else axes.axhline
    draw(0, color=MUTED, linewidth=1, zorder=1)


def log_ticks(axis: AxisOfPlot, low: float, high: float, label: Callable[..., str] = setting) -> None:
    """Ticks of a logarithmic axis from `low` to `high`: the fewer of each power of ten, the more of these there are."""
    from matplotlib.ticker import LogLocator, NullLocator

    decades = math.log10(high / low)
    multiples = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    axis.set_major_locator(LogLocator(subs=multiples, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: label(value))


def legend(figure: Figure, arms: Iterable[str], look: Mapping[str, ArmStyle]) -> None:
    """The arms below a figure of several panels, unless they would take its place."""
    from matplotlib.lines import Line2D

    arms = list(arms)
    if len(arms) > MOST_NAMED:
        return
    styles: dict[str, dict[str, Any]] = {arm: {"color": look[arm].colour, "linestyle": look[arm].dash} for arm in arms}
    lines = {arm: Line2D([], [], **style) for arm, style in styles.items()}
    labels = [f" {shorten(arm, 22)}" for arm in lines]  # matplotlib leaves out labels that begin with _
    figure.legend(list(lines.values()), labels, loc="outside lower left", ncols=min(6, len(lines)), frameon=False)


def rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row per label, the first on top."""
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def label_ends(axes: Axes, values: Mapping[str, float], look: Mapping[str, ArmStyle], gap: float = 0.062) -> None:
    """Names right of the axes at the height of their values, pushed apart where they would touch. Where there are more
    than fit, some of them from the lowest value to the highest."""
    low, high = axes.get_ylim()
    place_of = axes.yaxis.get_transform().transform  # an axis may be logarithmic
    bottom, top = place_of(np.array([low, high]))
    order = sorted((arm for arm, y in values.items() if math.isfinite(y)), key=lambda arm: values[arm])
    fit = int(1 / gap) + 1
    if len(order) > fit:
        order = [order[round(i * (len(order) - 1) / (fit - 1))] for i in range(fit)]
    shown = {arm: float(place_of(np.array([y]))[0]) for arm, y in values.items() if arm in order}
    height = {arm: min(max((y - bottom) / (top - bottom), 0.0), 1.0) for arm, y in shown.items()}
    for arm, at in spread(height, gap).items():
        colour, marker, dash = look[arm].colour, look[arm].marker, look[arm].dash
        place = axes.transAxes
        axes.plot([1.005, 1.035], [height[arm], at], color=colour, ls=dash, lw=1.2, transform=place, clip_on=False)
        axes.plot([1.045], [at], marker, color=colour, markersize=5, transform=place, clip_on=False)
        outside = " ↑" if values[arm] > high else " ↓" if values[arm] < low else ""
        note(axes, shorten(arm, 22) + outside, (1.045, at), (7, 0), "ff", va="center", color=INK)


def spread(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights at least `gap` apart, in the order of the wanted ones and as near to them as they can be."""
    order = sorted(wanted, key=lambda arm: wanted[arm])
    if not order:
        return {}
    steps = gap * np.arange(len(order))
    free = scipy.optimize.isotonic_regression([wanted[arm] for arm in order] - steps).x
    placed = np.clip(free, 0, max(0.0, 1 - steps[-1])) + steps
    return {arm: float(at) for arm, at in zip(order, placed, strict=True)}


def finite(curve: tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
    """The points of a curve that can be drawn."""
    x, y = np.asarray(curve[0], float), np.asarray(curve[1], float)
    known = np.isfinite(y)
    return x[known], y[known]


def stack(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """The points that every seed has -> x (K,), losses (seed, K): a mean over changing seeds would draw false steps."""
    by_seed = [dict(zip(*finite(curve), strict=True)) for curve in curves]
    by_seed = [points for points in by_seed if points]
    shared = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return np.array(shared, float), np.array([[points[x] for x in shared] for points in by_seed], float)


def thousands(value: float, _position: float = 0) -> str:
    """Tick labels such as 600k and 1.2M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


@dataclass(frozen=True)
class Interval:
    """A difference with its interval as one row shows it, and the text at its side; NaN where there is no number."""

    label: str
    difference: float
    low: float
    high: float
    text: str
    colour: str
    marker: str = "o"


def draw_intervals(axes: Axes, lines: Sequence[Interval], limits: tuple[float, float], sides: tuple[str, str]) -> None:
    """A row for each: hollow without an interval, with an arrow where it leaves the frame.

    sides: what it means to lie left and right of the middle.
    """
    for row, line in enumerate(lines):
        has_interval = math.isfinite(line.low) and math.isfinite(line.high)
        if has_interval:
            low, high = (min(max(value, limits[0]), limits[1]) for value in (line.low, line.high))
            axes.plot([low, high], [row, row], color=line.colour, linewidth=2.4, zorder=2)
            for at, cut, arrow in ((low, line.low < low, "<"), (high, line.high > high, ">")):
                axes.plot([at], [row], arrow if cut else "|", color=line.colour, markersize=7, clip_on=False)
        if math.isfinite(line.difference):
            fill = line.colour if has_interval else SURFACE
            at = min(max(line.difference, limits[0]), limits[1])
            axes.plot([at], [row], line.marker, color=line.colour, markerfacecolor=fill, markersize=7.5, zorder=3)
        note(axes, shorten(line.text, 44), (1, row), (10, 0), "fd", va="center", color=INK)
    rows(axes, [line.label for line in lines])
    axes.set_xlim(*limits)
    note(axes, f"◂ {sides[0]}", (0, 1), (0, 3), "ff", ha="left", va="bottom")
    note(axes, f"{sides[1]} ▸", (1, 1), (0, 3), "ff", ha="right", va="bottom")


def intervals_within(points: Sequence[float], ends: Sequence[float], widest: float) -> tuple[float, float]:
    """The frame of all points, and of the intervals' ends unless these would squeeze the points."""
    low = min(*points, *(max(end, -widest) for end in ends if math.isfinite(end)))
    high = max(*points, *(min(end, widest) for end in ends if math.isfinite(end)))
    return low, high


@dataclass(frozen=True)
class Curves:
    """Curves of one arm, one per seed: those that stayed finite, and those that did not."""

    arm: str
    healthy: Sequence[Curve]
    failed: Sequence[Curve] = ()

    def points(self) -> list[tuple[Array, Array]]:
        """Every curve that has something to draw."""
        return [xy for xy in map(finite, (*self.healthy, *self.failed)) if xy[0].size]


def draw_curves(axes: Axes, curves: Curves, look: ArmStyle) -> None:
    """The mean of the healthy ones over a band from lowest to highest; each failed one dashed up to a cross."""
    for curve in curves.failed:
        x, y = finite(curve)
        axes.plot(x, y, color=look.colour, linewidth=1, dashes=(2, 2), zorder=2)
        axes.plot(x[-1:], y[-1:], "x", color=look.colour, markersize=7, markeredgewidth=2, zorder=4)
    x, losses = stack(curves.healthy)
    if x.size == 1:
        axes.plot(np.repeat(x, len(losses)), losses[:, 0], look.marker, color=look.colour, markersize=6, zorder=3)
    elif x.size:
        if len(losses) > 1:
            axes.fill_between(x, losses.min(0), losses.max(0), color=look.colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(x, losses.mean(0), color=look.colour, linestyle=look.dash, zorder=3)


Measured = Mapping[str, Mapping[float, Sequence[float]]]
"""arm -> a number on a logarithmic axis -> one finite loss per seed"""


def draw_measured(
    axes: Axes, measured: Measured, look: Mapping[str, ArmStyle], ticks: Mapping[float, str]
) -> dict[str, tuple[float, float]]:
    """A line through the means of every arm over a dot for each seed -> arm -> where its line ends."""
    axes.set_xscale("log", base=2)
    ends = {}
    for arm, losses in measured.items():
        style, x = look[arm], sorted(losses)
        means = [float(np.mean(losses[at])) for at in x]
        axes.plot(x, means, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=5.5, zorder=3)
        for at in x:
            axes.plot([at] * len(losses[at]), losses[at], ".", color=style.colour, markersize=4, alpha=0.6, zorder=2)
        if x:
            ends[arm] = (x[-1], means[-1])
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    return ends


def half_height(arms: int) -> float:
    """Inches of figures that stand side by side, with a row for every arm."""
    return max(2.9, 1.0 + 0.34 * arms)
