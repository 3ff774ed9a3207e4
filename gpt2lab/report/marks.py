"""What the figures share: one look per arm, names beside the data, rows, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from gpt2lab.report.svg import ARMS, BASELINE, INK, MUTED
from gpt2lab.text import shorten

Array = NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float]]
"""(tokens, loss), one entry per evaluation."""

MARKERS = "osD^vPX"
DASHES: tuple[tuple[int, tuple[float, ...]] | str, ...] = ("solid", (0, (4, 1.6)), (0, (1.2, 1.4)))


@dataclass(frozen=True)
class Look:
    """How one arm is drawn, everywhere."""

    colour: str
    marker: str
    dash: tuple[int, tuple[float, ...]] | str


def looks(arms: Sequence[str], baseline: str) -> dict[str, Look]:
    """One look per arm: the baseline in grey, the others by colour, then dashed, then dotted."""
    found = {baseline: Look(BASELINE, MARKERS[0], DASHES[0])}
    for i, arm in enumerate(arm for arm in arms if arm != baseline):
        turn, colour = divmod(i, len(ARMS))
        found[arm] = Look(ARMS[colour], MARKERS[(i + 1) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], coords: str, **style: Any
) -> None:
    """A small muted remark; `coords` says what each number of `at` is: `d` data, `f` fraction of the axes."""
    names = {"d": "data", "f": "axes fraction"}
    given: dict[str, Any] = {"color": MUTED, "fontsize": 8.5, "zorder": 5} | style
    place = (names[coords[0]], names[coords[1]])
    axes.annotate(text, at, offset, xycoords=place, textcoords="offset points", **given)


def rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row per label, the first on top."""
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def label_ends(axes: Axes, values: Mapping[str, float], look: Mapping[str, Look], gap: float = 0.062) -> None:
    """Names right of the axes at the height of their values, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    place_of = axes.yaxis.get_transform().transform  # an axis may be logarithmic
    bottom, top = place_of(np.array([low, high]))
    shown = {arm: float(place_of(np.array([y]))[0]) for arm, y in values.items() if math.isfinite(y)}
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
    free = isotonic_regression([wanted[arm] for arm in order] - steps).x
    placed = np.clip(free, 0, max(0.0, 1 - steps[-1])) + steps
    return {arm: float(at) for arm, at in zip(order, placed, strict=True)}


def finite(curve: Curve) -> tuple[Array, Array]:
    """The points of a curve that can be drawn."""
    x, y = np.asarray(curve[0], float), np.asarray(curve[1], float)
    return x[np.isfinite(y)], y[np.isfinite(y)]


def stack(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """The points that every seed has -> x (K,), losses (seed, K): a mean over changing seeds would draw false steps."""
    by_seed = [dict(zip(*finite(curve), strict=True)) for curve in curves]
    by_seed = [points for points in by_seed if points]
    shared = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return np.array(shared, float), np.array([[points[x] for x in shared] for points in by_seed], float)


def since(curves: Sequence[Curve], start: float) -> tuple[Array, Array]:
    """The mean curve from `start` on."""
    x, losses = stack(curves)
    return (x[x >= start], losses.mean(0)[x >= start]) if x.size else (x, x)


def thousands(value: float, _position: float = 0) -> str:
    """Tick labels such as 600k and 1.2M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
