"""How the trainings of a study went, by their journals and results: gradients, activations, scores, logits, updates,
jumps of the loss and skipped steps. Description only: no verdict is decided here.

Older runs lack some of it or all, and what is missing is `None` or empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.analysis.results import ENDED, StudyRun
from gpt2lab.basics.text import DASH, MINUS, clean, number, plural, shorten
from gpt2lab.errors import DataFault
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary
from gpt2lab.reports.style import ArmStyle, Curve, Curves, finite
from gpt2lab.reports.tables import Cell, Table
from gpt2lab.store import Row as JournalRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIAGNOSTICS = "diag/"
"""How the metrics of diagnostics begin; those by block end with its number."""
GRADIENT = "train/grad_norm"
ACTIVATIONS, SCORES, LOGITS, UPDATES = (
    f"{DIAGNOSTICS}{name}" for name in ("activation_rms", "attention_logit_max", "logit_rms", "update_ratio")
)
TITLES = {
    ACTIVATIONS: "rms of the residual stream", GRADIENT: "gradient norm before clipping",
    SCORES: "largest attention logit", LOGITS: "rms of the output logits",
}  # fmt: skip
"""Metric -> its name in the figure; others go by their own."""

NOTE = (
    "Means over the runs that finished, at the end of training; up to: the largest value of any run. Gradient norm: "
    "before clipping, the median over the last tenth of the steps. Attention logit: the largest score before the "
    "softmax. Activation rms: of the residual stream after the first and the last block. Update ratio: rms of the "
    "last step's update over rms of the weights. A spike is a training loss more than 6 standard deviations above the "
    "mean of up to 128 losses before it. None of this decides a verdict."
)
NOTHING = "Nothing was recorded: these runs were trained before training health was measured, or have not begun."
CAPTION = (
    "Over blocks: at the end of training. Activations, scores and logits are measured on the same few windows of "
    "validation text. Lines, bands and crosses as in the figure of the validation loss."
)

MOST_PANELS, COLUMNS = 15, 3
"""Of the figure."""

MOST_POINTS = 60
"""Of a curve that has one per step; more could not be distinguished on the page."""

LOGARITHMIC_FROM = 10.0
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""


@section(order=160, title="Training health")
def training_health(read: StudyRead) -> Section:
    runs = read.once(health)
    title = f"Training health{headline(runs)}"
    if not any(run.has_records for arm in runs.values() for run in arm):
        return Section(title=title, note=NOTHING, folded=True)
    figures = drawn(runs, read.styles)
    return Section(title=title, table=table(read), note=NOTE, figures=figures, folded=True)


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """One run: its losses, gradient norm and diagnostics over training, and what its result says; what a record does
    not have, or not as expected, is missing."""

    run: StudyRun
    damage: str = ""
    """why its journal cannot be read"""
    losses: Curve = ((), ())
    """on the validation text"""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """metric -> its values, of the gradient norm and diagnostics"""
    spikes: int | None = None
    """losses that jumped"""
    skipped: int | None = None
    """steps that were not taken because their numbers were not finite"""
    notes: Sequence[str] = ()
    """what the reader should know about its machine"""

    @property
    def ended(self) -> bool:
        return self.run.status in ENDED

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        return next(reversed(self.curves.get(metric, ((), ()))[1]), None)

    def finite(self, metric: str) -> list[float]:
        """Its finite values."""
        return [value for value in self.curves.get(metric, ((), ()))[1] if math.isfinite(value)]

    def late(self, metric: str) -> float | None:
        """What it was at the end; of the gradient norm the median over the last tenth of the steps."""
        values = self.finite(metric)
        if metric != GRADIENT or not values:
            return self.last(metric)
        return statistics.median(values[-max(1, len(values) // 10) :])

    def parts(self, name: str) -> dict[str, float | None]:
        """Part -> the last value of `name`/part."""
        return {m.removeprefix(f"{name}/"): self.last(m) for m in self.curves if m.startswith(f"{name}/")}

    def by_block(self, name: str) -> dict[int, float]:
        """Block -> the last value there, in the order of blocks; some may have none, as those without attention."""
        parts = {int(part): value for part, value in self.parts(name).items() if part.isdecimal()}
        return {block: math.nan if (value := parts[block]) is None else value for block in sorted(parts)}

    @property
    def has_records(self) -> bool:
        return bool(self.curves) or self.spikes is not None or self.skipped is not None


Health = Mapping[str, Sequence[RunHealth]]
"""arm -> its runs, those that left nothing included."""


def health(read: StudyRead) -> dict[str, list[RunHealth]]:
    """Of every run that the study declares, by arm. Journals are read here alone, each once."""
    by_arm: dict[str, list[RunHealth]] = {arm: [] for arm in read.study.arms}
    for run in read.runs:
        try:
            rows = read.store.run(run.id).rows() if run.status != "absent" else []
            by_arm[run.arm].append(of_run(run, rows))
        except DataFault as fault:  # one damaged file must not cost the others their curves
            by_arm[run.arm].append(of_run(run, [], str(fault)))
    return by_arm


def of_run(run: StudyRun, rows: Sequence[JournalRow], damage: str = "") -> RunHealth:
    """What the rows of one journal, and the run's result, hold."""
    curves: dict[str, Curve] = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
        if metric in (GRADIENT, LOSS) or metric.startswith(DIAGNOSTICS):
            having = [row for row in rows if metric in row["metrics"]]
            values = [float(row["metrics"][metric]) for row in having]
            curves[metric] = [float(row["tokens"]) for row in having], values

    def recorded(key: str, kind: type) -> Any:
        value = run.result.get(key)
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    spikes = recorded("spikes", list)
    return RunHealth(
        run=run,
        damage=damage,
        losses=curves.pop(LOSS, ((), ())),
        curves=curves,
        spikes=None if spikes is None else len(spikes),
        skipped=recorded("skipped_steps", int),
        notes=[clean(note) for note in recorded("notes", list) or ()],
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Over the values that are there and finite; None when none is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def table(read: StudyRead) -> Table | None:
    """One row per arm."""

    def cells(arm: Summary) -> dict[str, Cell | str]:
        runs = read.once(health)[arm.arm]
        ended = [run for run in runs if run.ended] or runs

        def over_time(metric: str) -> Cell:
            tops = [max(values) for run in runs if (values := run.finite(metric))]
            return Cell(short(mean(run.late(metric) for run in ended)), f"up to {short(max(tops))}" if tops else "")

        depths = [list(depth.values()) for run in ended if (depth := run.by_block(ACTIVATIONS))]
        first, last = (mean(depth[i] for depth in depths) for i in (0, -1))
        updates = [run.parts(UPDATES) for run in ended]
        groups = dict.fromkeys(group for by_group in updates for group in by_group)
        ratios = [f"{group} {short(mean(by_group.get(group) for by_group in updates), 2)}" for group in groups]
        return {
            "Gradient norm:number": over_time(GRADIENT),
            "Attention logit:number": over_time(SCORES),
            "Logit rms:number": over_time(LOGITS),
            "Activation rms:number": DASH if first is None and last is None else f"{short(first)} to {short(last)}",
            "Update ratio:words": Cell(short(mean(run.last(UPDATES) for run in ended)), ", ".join(ratios)),
            "Spikes:number": _count(run.spikes for run in runs),
            "Skipped steps:number": _count(run.skipped for run in runs),
            "Diverged:number": _count(run.run.status == "diverged" if run.run.result else None for run in runs),
        }

    return read.arm_table(cells)


def _count(by_run: Iterable[int | None]) -> Cell:
    counts = [count for count in by_run if count is not None]
    within = sum(count > 0 for count in counts)
    return Cell(str(sum(counts)) if counts else DASH, f"in {within} of {plural(len(counts), 'run')}" if within else "")


def headline(health: Health) -> str:
    """The events that the folded section describes: ` (2 spikes, 1 run diverged)`, or nothing."""
    everything = [run for runs in health.values() for run in runs]
    counts = {
        "spike": sum(run.spikes or 0 for run in everything),
        "skipped step": sum(run.skipped or 0 for run in everything),
    }
    parts = [plural(count, what) for what, count in counts.items() if count]
    diverged = sum(run.run.status == "diverged" for run in everything)
    parts += [f"{plural(diverged, 'run')} diverged"] if diverged else []
    return f" ({', '.join(parts)})" if parts else ""


def deviations(health: Health) -> list[str]:
    """What results note about their machine, and steps that were not taken: neither was planned."""
    arms: dict[str, list[str]] = {}
    for arm, runs in health.items():
        for note in dict.fromkeys(note for run in runs for note in run.notes):
            arms.setdefault(note, []).append(arm)
    sentences = [f"{'All arms' if len(of) == len(health) else ', '.join(of)}: {note}." for note, of in arms.items()]
    skipped = {arm: sum(run.skipped or 0 for run in runs) for arm, runs in health.items()}
    listed = ", ".join(f"{count} in {arm}" for arm, count in skipped.items() if count)
    return [*sentences, f"Steps skipped because their numbers were not finite: {listed}."] if listed else sentences


def short(value: float | None, digits: int = 3) -> str:
    """So many significant digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{digits}g}".replace("-", MINUS)


@dataclass(frozen=True)
class Panel:
    """One diagnostic in the figure: over blocks at the end of training, or over training tokens."""

    title: str
    over_blocks: bool
    curves: Sequence[Curves]


def drawn(health: Health, look: Mapping[str, ArmStyle]) -> list[style.Picture]:
    """A figure with a panel for every diagnostic, those of plug-ins included; nothing where none was measured."""
    panels = panels_of(health)[:MOST_PANELS]
    return [style.picture("health", "Diagnostics", CAPTION, draw(panels, look))] if panels else []


def panels_of(health: Health) -> list[Panel]:
    """Those that have something to draw: gpt2lab's own first."""
    metrics = dict.fromkeys(metric for runs in health.values() for run in runs for metric in run.curves)
    split = {metric: metric.rpartition("/") for metric in metrics}
    names = dict.fromkeys((start, True) if end.isdecimal() else (m, False) for m, (start, _, end) in split.items())
    known = [(name, name == ACTIVATIONS) for name in TITLES]
    panels = []
    for name, over_blocks in dict.fromkeys([*known, *names]):
        if name.startswith(UPDATES):
            continue
        curves = [
            Curves(arm, *([_curve(run, name, over_blocks=over_blocks) for run in runs if run.ended is ended]
                          for ended in (True, False)))
            for arm, runs in health.items()
        ]  # fmt: skip
        drawable = [arm for arm in curves if arm.points()]
        if drawable:
            panels.append(Panel(TITLES.get(name, name.removeprefix(DIAGNOSTICS)), over_blocks, drawable))
    return panels


def _curve(run: RunHealth, name: str, *, over_blocks: bool) -> Curve:
    if over_blocks:
        values = run.by_block(name)
        return [float(block) for block in values], list(values.values())
    return thinned(run.curves.get(name, ((), ())), largest=name == GRADIENT)


def draw(panels: Sequence[Panel], look: Mapping[str, ArmStyle]) -> Figure:
    """A line for each arm in every panel, and one legend for all."""
    from matplotlib.ticker import MaxNLocator

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = style.empty(style.WIDE, 0.5 + 2.3 * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        for arm in panel.curves:
            style.draw_curves(axes, arm, look[arm.arm])
        style.title(axes, shorten(panel.title, 34))
        axes.set_xlabel("block" if panel.over_blocks else "training tokens")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=panel.over_blocks))
        if not panel.over_blocks:
            axes.xaxis.set_major_formatter(style.thousands)
        _scale(axes, [value for arm in panel.curves for _, values in arm.points() for value in values])
    for axes in places[len(panels) :]:
        axes.remove()
    style.legend(figure, dict.fromkeys(arm.arm for panel in panels for arm in panel.curves), look)
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) >= LOGARITHMIC_FROM * min(values):
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis, min(values), max(values), style.thousands)


def thinned(curve: Curve, *, largest: bool = False) -> Curve:
    """At most MOST_POINTS points: the median of each equal stretch, or its largest value, at its end."""
    x, y = finite(curve)
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    value_of = np.max if largest else np.median
    ends, values = np.array_split(x, MOST_POINTS), np.array_split(y, MOST_POINTS)
    return [float(stretch[-1]) for stretch in ends], [float(value_of(stretch)) for stretch in values]
