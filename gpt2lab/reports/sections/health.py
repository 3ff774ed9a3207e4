"""How the trainings of a study went, by their journals and results: gradients, activations, scores, logits, updates,
jumps of the loss, skipped steps, and where the time went. Description only: no verdict is decided here.

Older runs lack some of it or all, and what is missing is `None` or empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2lab.analysis.results import ENDED, StudyRun
from gpt2lab.basics.text import DASH, MINUS, clean, number, plural, quantity, time_taken
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

GRADIENT, SCORES, LOGITS = "train/grad_norm", "diag/attention_logit_max", "diag/logit_rms"
ACTIVATIONS, UPDATES = "diag/activation_rms", "diag/update_ratio"  # by block call, and by group of weights
OVER_TIME = (GRADIENT, SCORES, LOGITS)
DIAGNOSTICS, MOST_FIGURES = "diag/", 12
"""How the metrics of diagnostics begin, and how many figures those of plug-ins get at most."""
PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "other")

NOTE = (
    "Means over the runs that finished, at the end of training; up to: the largest value of any run. Gradient norm: "
    "before clipping, the median over the last tenth of the steps. Attention logit: the largest score before the "
    "softmax. Activation rms: of the residual stream behind the first and the last block. Update ratio: rms of the "
    "last step's update over rms of the weights. A spike is a training loss more than 6 standard deviations above the "
    "mean of up to 128 losses before it. None of this decides a verdict."
)
NOTHING = "Nothing was recorded: these runs were trained before a training's health was measured, or have not begun."
MOST_EVENTS = 12
"""Runs whose divergence or spikes are described; more are counted."""

MOST_POINTS = 60
"""Of a curve that has one per step; more could not be told apart on the page."""

LOGARITHMIC_FROM = 10.0
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""

OVER_TOKENS = (
    ("gradient", "Gradient norm", "gradient norm before clipping", GRADIENT,
     f"Before clipping; of longer trainings the largest of each of {MOST_POINTS} equal stretches."),
    ("scores", "Largest attention logit", "largest score before the softmax", SCORES,
     "Over all layers, heads and pairs of tokens that may see each other, on the same few windows of validation text."),
    ("logits", "Logit rms", "rms of the output logits", LOGITS,
     "Root mean square of the scores over the vocabulary, on the same windows."),
)  # fmt: skip
BANDS = "Lines, bands and crosses as in the figure of the validation loss."


@section(order=160, title="Training health")
def training_health(read: StudyRead) -> Section:
    runs = read.once(health)
    title = f"Training health{headline(runs)}"
    if not any(run.has_records for arm in runs.values() for run in arm):
        return Section(title=title, note=NOTHING, figures=drawn(runs, read.looks), folded=True)
    return Section(
        title=title, table=table(read), note=NOTE, points=points(runs), figures=drawn(runs, read.looks), folded=True
    )


@section(order=60, title="Where the time went")
def where_the_time_went(read: StudyRead) -> Section | None:
    runs = read.once(health)
    if not any(run.time for arm in runs.values() for run in arm):
        return None
    return Section(table=_time_table(read), note=time_note(runs), folded=True)


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """One run. `depth`: rms of the residual stream behind each block call, `updates`: update ratio by group of weights
    ("" for all), `by_block`: other diagnostics by block call; all of the last row that has them."""

    run: StudyRun
    curves: Mapping[str, Curve] = field(default_factory=dict)
    by_block: Mapping[str, Sequence[float]] = field(default_factory=dict)
    depth: Sequence[float] = ()
    updates: Mapping[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.run.status in ENDED

    @property
    def name(self) -> str:
        return f"{self.run.arm}, seed {self.run.seed}"

    def values(self, metric: str) -> Sequence[float]:
        """Of a metric over time."""
        return self.curves.get(metric, ((), ()))[1]

    def last(self, metric: str) -> float | None:
        """The last value of a metric over time."""
        return next(reversed(self.values(metric)), None)

    def largest(self, metric: str) -> float | None:
        """Its largest finite value."""
        return max(filter(math.isfinite, self.values(metric)), default=None)

    @property
    def late_gradient(self) -> float | None:
        """The median of the gradient norm over the last tenth of the steps."""
        values = [value for value in self.values(GRADIENT) if math.isfinite(value)]
        return statistics.median(values[-max(1, len(values) // 10) :]) if values else None

    @property
    def watched(self) -> bool:
        """Whether the inside of the model was measured."""
        return bool(self.depth) or any(self.values(metric) for metric in (SCORES, LOGITS))

    @property
    def has_records(self) -> bool:
        events = self.spikes is not None or self.skipped is not None or bool(self.divergence)
        return self.watched or events or bool(self.values(GRADIENT))

    @property
    def skipped(self) -> int | None:
        """Steps that were not taken because their numbers were not finite."""
        value = self.run.result.get("skipped_steps")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def spikes(self) -> list[Mapping[str, Any]] | None:
        """Losses that jumped: step, loss, threshold."""
        spikes = self.run.result.get("spikes")
        return [spike for spike in spikes if isinstance(spike, Mapping)] if isinstance(spikes, list) else None

    @property
    def divergence(self) -> Mapping[str, Any]:
        """Where it broke off: step, lr, loss, grad_norm, batch; empty when it did not."""
        divergence = self.run.result.get("divergence")
        return divergence if isinstance(divergence, Mapping) else {}

    @property
    def time(self) -> dict[str, float]:
        """Seconds by phase; empty when they were not recorded."""
        time = self.run.result.get("time")
        return {phase: as_number(time.get(phase, 0)) for phase in PHASES} if isinstance(time, Mapping) else {}

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the model's FLOPs took."""
        value = as_number(self.run.result.get("mfu"))
        return value if math.isfinite(value) else None

    @property
    def peak(self) -> str:
        """That peak with its source, empty where none is known."""
        flops, source = as_number(self.run.result.get("peak_flops")), self.run.result.get("peak_from")
        return f"{quantity(flops, 'FLOP/s')} ({clean(source or 'source not recorded')})" if math.isfinite(flops) else ""

    @property
    def notes(self) -> list[str]:
        """What the reader should know about its machine."""
        notes = self.run.result.get("notes")
        return [clean(note) for note in notes] if isinstance(notes, list) else []


Health = Mapping[str, Sequence[RunHealth]]
"""arm -> its runs, those that left nothing included."""


def health(read: StudyRead) -> dict[str, list[RunHealth]]:
    """Of every run that the study declares, by arm."""
    by_arm: dict[str, list[RunHealth]] = {arm: [] for arm in read.study.arms}
    for run in read.runs:
        try:
            rows = read.store.run(run.id).rows() if run.status != "absent" else []
        except DataFault:  # reported where its curve is missing
            rows = []
        by_arm[run.arm].append(of_run(run, rows))
    return by_arm


def of_run(run: StudyRun, rows: Sequence[JournalRow]) -> RunHealth:
    """What the rows of one journal hold."""
    curves = {}
    others = plugged_in(rows)
    for metric in (*OVER_TIME, *(metric for metric in others if not metric.rpartition("/")[2].isdecimal())):
        points = [(float(row["tokens"]), as_number(row["metrics"][metric])) for row in rows if metric in row["metrics"]]
        curves[metric] = ([tokens for tokens, _ in points], [value for _, value in points])
    by_block = {
        name: _by_block(name, rows)
        for name in (ACTIVATIONS, *dict.fromkeys(m.rpartition("/")[0] for m in others if m not in curves))
    }
    depth = by_block.pop(ACTIVATIONS)
    return RunHealth(run=run, curves=curves, by_block=by_block, depth=depth, updates=_last_below(UPDATES, rows))


def plugged_in(rows: Sequence[JournalRow]) -> list[str]:
    """The metrics of diagnostics that have no figure of their own."""
    metrics = dict.fromkeys(metric for row in rows for metric in row["metrics"] if metric.startswith(DIAGNOSTICS))
    return [metric for metric in metrics if not metric.startswith((SCORES, LOGITS, ACTIVATIONS, UPDATES))]


def _by_block(name: str, rows: Sequence[JournalRow]) -> list[float]:
    """The values of the last row that has any, in the order of blocks."""
    values = _last_below(name, rows)
    return [values[block] for block in sorted(filter(str.isdecimal, values), key=int)]


def mean(values: Iterable[float | None]) -> float | None:
    """Over the values that are there and finite; None when none is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def as_number(value: object) -> float:
    """A number of a record, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _last_below(name: str, rows: Sequence[JournalRow]) -> dict[str, float]:
    """What follows `name` and a slash -> value, in the last row that has any; "" for `name` itself."""
    for row in reversed(rows):
        values = {
            key.removeprefix(name).removeprefix("/"): as_number(value)
            for key, value in row["metrics"].items()
            if key == name or key.startswith(f"{name}/")
        }
        if values:
            return values
    return {}


def table(read: StudyRead) -> Table | None:
    """One row per arm."""

    def cells(arm: Summary) -> dict[str, Cell | str]:
        runs = read.once(health)[arm.arm]
        ended = [run for run in runs if run.ended] or runs

        def over_time(metric: str) -> Cell:
            late = mean(run.late_gradient if metric == GRADIENT else run.last(metric) for run in ended)
            tops = [top for run in runs if (top := run.largest(metric)) is not None]
            return Cell(short(late), f"up to {short(max(tops))}" if tops else "")

        first, last = (mean(run.depth[i] for run in ended if run.depth) for i in (0, -1))
        groups = dict.fromkeys(group for run in ended for group in run.updates if group)
        ratios = [f"{group} {short(mean(run.updates.get(group) for run in ended), 2)}" for group in groups]
        return {
            "Gradient norm:number": over_time(GRADIENT),
            "Attention logit:number": over_time(SCORES),
            "Logit rms:number": over_time(LOGITS),
            "Activation rms:number": DASH if first is None and last is None else f"{short(first)} to {short(last)}",
            "Update ratio:words": Cell(short(mean(run.updates.get("") for run in ended)), ", ".join(ratios)),
            "Spikes:number": _count(None if run.spikes is None else len(run.spikes) for run in runs),
            "Skipped steps:number": _count(run.skipped for run in runs),
            "Diverged:number": _count(run.run.status == "diverged" if run.run.result else None for run in runs),
        }

    return read.arm_table(cells)


def _count(by_run: Iterable[int | None]) -> Cell:
    counts = [count for count in by_run if count is not None]
    within = sum(count > 0 for count in counts)
    return Cell(str(sum(counts)) if counts else DASH, f"in {within} of {plural(len(counts), 'run')}" if within else "")


def points(health: Health) -> list[str]:
    """What broke off, what jumped, and what was not measured, in sentences."""
    everything = [run for runs in health.values() for run in runs]
    events = [_divergence(run, run.divergence) for run in everything if run.divergence]
    events += [_spikes(run, run.spikes) for run in everything if run.spikes]
    more = len(events) - MOST_EVENTS
    if more > 0:
        events[MOST_EVENTS:] = [f"And {more} more of that kind; every run's result.json has its own."]
    lacking = {arm: sum(bool(r.run.result) and not r.watched for r in runs) for arm, runs in health.items()}
    listed = ", ".join(f"{arm} ({count} of {len(health[arm])} runs)" for arm, count in lacking.items() if count)
    return [*events, f"Without measurements of activations, scores and logits: {listed}."] if listed else events


def headline(health: Health) -> str:
    """The events that the folded section describes: ` (2 spikes, 1 run diverged)`, or nothing."""
    everything = [run for runs in health.values() for run in runs]
    counts = {
        "spike": sum(len(run.spikes or ()) for run in everything),
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


def _time_table(read: StudyRead) -> Table | None:
    """Where the time of an arm's runs went, in shares."""

    def cells(arm: Summary) -> dict[str, str]:
        recorded = [run.time for run in read.once(health)[arm.arm] if run.time]
        times = [time for time in recorded if all(map(math.isfinite, time.values()))]
        totals = [sum(time.values()) for time in times]
        shares = {phase: 100 * sum(time[phase] for time in times) / (sum(totals) or math.nan) for phase in PHASES}
        return {
            "Per run:number": time_taken(statistics.median(totals)) if totals else DASH,
            **{f"{phase.capitalize()}:number": f"{share:.1f} %" if share == share else DASH
               for phase, share in shares.items()},
        }  # fmt: skip

    return read.arm_table(cells)


def time_note(health: Health) -> str:
    """What the shares are of, and what MFU is measured against."""
    peaks = dict.fromkeys(run.peak for runs in health.values() for run in runs if run.peak)
    text = "Per run: the median; shares are of the time of all of an arm's runs, evaluations and checkpoints included."
    against = f" MFU, in the table above, is the model's FLOPs per second over the peak: {'; '.join(peaks)}."
    return text + (against if peaks and any(run.mfu for runs in health.values() for run in runs) else "")


def short(value: float | None, digits: int = 3) -> str:
    """So many significant digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{digits}g}".replace("-", MINUS)


def _divergence(run: RunHealth, divergence: Mapping[str, object]) -> str:
    lr, loss, norm = (short(as_number(divergence.get(key))) for key in ("lr", "loss", "grad_norm"))
    where = f"rate {lr}, loss {loss}, gradient norm {norm}{_batch(divergence.get('batch'))}"
    return f"{run.name}, diverged at step {_whole(divergence.get('step'))}: {where}."


def _batch(batch: object) -> str:
    """Which text it was, where the record has that."""
    starts = batch.get("first_tokens") if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(starts, list) or not starts:
        return ""
    more = f" and {len(starts) - 3} more" if len(starts) > 3 else ""
    places = ", ".join(_whole(start) for start in starts[:3])
    return f"; its batch: epoch {_whole(batch.get('epoch'))}, sequences from tokens {places}{more}"


def _whole(value: object) -> str:
    """A whole number of a record, grouped; a dash for anything else."""
    return f"{value:,}" if isinstance(value, int) else DASH


def _spikes(run: RunHealth, spikes: Sequence[Mapping[str, object]]) -> str:
    first, more = spikes[0], len(spikes) - 1
    times = ("", ", and once more")[more] if more < 2 else f", and {more} times more"
    loss, threshold = (short(as_number(first.get(key))) for key in ("loss", "threshold"))
    step = _whole(first.get("step"))
    return f"{run.name}: the loss jumped to {loss} at step {step}, over a threshold of {threshold}{times}."


def drawn(health: Health, look: Mapping[str, ArmStyle]) -> list[style.Picture]:
    """Every figure that the runs have data for."""
    pictures = []
    depths = _by_arm(health, lambda run: by_depth(run.depth))
    if depths:
        caption = f"Root mean square of the residual stream behind each block, at the end of training. {BANDS}"
        figure = lines(depths, look, "block", "rms of the residual stream")
        pictures.append(style.picture("activations", "Activations over depth", caption, figure, "half"))
    for name, title, axis, metric, caption in OVER_TOKENS:
        curves = _by_arm(health, partial(_over_training, metric))
        if curves:
            figure = lines(curves, look, "training tokens", axis)
            pictures.append(style.picture(name, title, caption, figure, "half"))
    return pictures + _plugged_in(health, look)


def _plugged_in(health: Health, look: Mapping[str, ArmStyle]) -> list[style.Picture]:
    """Diagnostics of plug-ins: over blocks at the end of training, else over tokens."""
    runs = [run for runs in health.values() for run in runs]
    pictures: list[style.Picture] = []
    for metric in dict.fromkeys(metric for run in runs for metric in (*run.by_block, *run.curves)):
        name = metric.removeprefix(DIAGNOSTICS)
        for curve_of, where, axis, suffix in (
            (_over_training, "over training", "training tokens", ""),
            (_over_blocks, "by block, at the end of training", "block", "-by-block"),
        ):
            curves = _by_arm(health, partial(curve_of, metric))
            if metric in OVER_TIME or not curves or len(pictures) == MOST_FIGURES:
                continue
            caption = f"The diagnostic {name} {where}. {BANDS}"
            figure = lines(curves, look, axis, name)
            pictures.append(style.picture(name.replace("/", "-") + suffix, name, caption, figure, "half"))
    return pictures


def _over_training(metric: str, run: RunHealth) -> Curve:
    return thinned(run.curves.get(metric, ((), ())), np.max if metric == GRADIENT else np.median)


def _over_blocks(metric: str, run: RunHealth) -> Curve:
    return by_depth(run.by_block.get(metric, ()))


def by_depth(values: Sequence[float]) -> Curve:
    """Values of blocks 0, 1, ... as a curve."""
    return [float(block) for block in range(len(values))], list(values)


def lines(curves: Sequence[Curves], look: Mapping[str, ArmStyle], x: str, y: str) -> Figure:
    """One line per arm, with its name at the end."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = style.panel(style.HALF, 2.9, x, y)
    for arm in curves:
        style.draw_curves(axes, arm, look[arm.arm])
    if x == "block":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.xaxis.set_major_formatter(style.thousands)
        axes.locator_params(axis="x", nbins=4)
    _scale(axes, [value for arm in curves for _, values in arm.points() for value in values])
    means = {arm.arm: style.stack(arm.healthy)[1] for arm in curves}
    ends = {arm: float(values.mean(0)[-1]) for arm, values in means.items() if values.size}
    style.label_ends(axes, ends, look, gap=0.075)
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) >= LOGARITHMIC_FROM * min(values):
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis, min(values), max(values), style.thousands)


def thinned(curve: Curve, of: Callable[[Any], Any] = np.median) -> Curve:
    """At most MOST_POINTS points: the median of each equal stretch, or `of` it, at its end."""
    x, y = finite(curve)
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return [float(x[part[-1]]) for part in parts], [float(of(y[part])) for part in parts]


def _by_arm(health: Health, curve_of: Callable[[RunHealth], Curve]) -> list[Curves]:
    """Arms that have something to draw."""
    by_arm = [
        Curves(arm, *([curve_of(run) for run in runs if run.ended is ended] for ended in (True, False)))
        for arm, runs in health.items()
    ]
    return [curves for curves in by_arm if curves.points()]
