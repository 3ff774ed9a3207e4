"""Figures of how the trainings went: over training tokens, and over the depth of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gpt2lab.health import GRADIENT, LOGITS, SCORES, Health, RunHealth
from gpt2lab.report.figures import HALF, Curves, draw_curves
from gpt2lab.report.marks import Curve, Look, finite, label_ends, stack, thousands

MOST_POINTS = 60
"""Of a curve that has one per step; more could not be told apart on the page."""

LOGARITHMIC_FROM = 10.0
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""

Parts = tuple[str, str, str, str, Figure]
"""name, title, caption, width, figure"""

OVER_TOKENS = (
    ("gradient", "Gradient norm", "gradient norm before clipping", GRADIENT,
     f"Before clipping; of longer trainings the median over each of {MOST_POINTS} equal stretches."),
    ("scores", "Largest attention logit", "largest score before the softmax", SCORES,
     "Over all layers, heads and pairs of tokens that may see each other, on the same few windows of validation text."),
    ("logits", "Logit rms", "rms of the output logits", LOGITS,
     "Root mean square of the scores over the vocabulary, on the same windows."),
)  # fmt: skip
BANDS = "Lines, bands and crosses as in the figure of the validation loss."


def draw(health: Health, look: Mapping[str, Look]) -> list[Parts]:
    """Every figure that the runs have data for."""
    drawn: list[Parts] = []
    depths = _by_arm(health, lambda run: (list(map(float, range(len(run.depth)))), list(run.depth)))
    if depths:
        caption = f"Root mean square of the residual stream behind each block, at the end of training. {BANDS}"
        figure = lines(depths, look, "block", "rms of the residual stream")
        drawn.append(("activations", "Activations over depth", caption, "half", figure))
    for name, title, axis, metric, caption in OVER_TOKENS:
        curves = _by_arm(health, partial(_over_time, metric))
        if curves:
            drawn.append((name, title, caption, "half", lines(curves, look, "training tokens", axis)))
    return drawn


def lines(curves: Sequence[Curves], look: Mapping[str, Look], x: str, y: str) -> Figure:
    """One line per arm, with its name at the end."""
    figure = Figure(figsize=(HALF, 2.9), layout="constrained")
    axes = figure.subplots()
    for arm in curves:
        draw_curves(axes, arm, look[arm.arm])
    if x == "block":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.xaxis.set_major_formatter(thousands)
        axes.locator_params(axis="x", nbins=4)
    _scale(axes, [value for arm in curves for _, values in arm.points() for value in values])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    means = {arm.arm: stack(arm.healthy)[1] for arm in curves}
    label_ends(axes, {arm: float(values.mean(0)[-1]) for arm, values in means.items() if values.size}, look, gap=0.075)
    return figure


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: the median of each equal stretch, at its end."""
    x, y = finite(curve)
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return [float(x[part[-1]]) for part in parts], [float(np.median(y[part])) for part in parts]


def _over_time(metric: str, run: RunHealth) -> Curve:
    return thinned(run.curves.get(metric, ([], [])))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if not values or min(values) <= 0 or max(values) < LOGARITHMIC_FROM * min(values):
        return
    axes.set_yscale("log")
    between = (1.0, 2.0, 5.0) if max(values) < 1000 * min(values) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_major_formatter(thousands)
    axes.yaxis.set_minor_locator(NullLocator())


def _by_arm(health: Health, curve_of: Callable[[RunHealth], Curve]) -> list[Curves]:
    """Arms that have something to draw."""
    found = []
    for arm, runs in health.items():
        ended = [run.run.status in ("finished", "unevaluated") for run in runs]
        both = [
            [curve_of(run) for run, at_end in zip(runs, ended, strict=True) if at_end is side] for side in (True, False)
        ]
        curves = Curves(arm, *both)
        if curves.points():
            found.append(curves)
    return found
