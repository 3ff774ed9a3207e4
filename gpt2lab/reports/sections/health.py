"""How the trainings of a study went, as their journals and results tell: gradients, activations, scores, logits,
updates, jumps of the loss, skipped steps, and where the time went. Description only: no word is decided here.

Older runs lack some of it or all, and what is missing is `None` or empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gpt2lab.errors import DataFault
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.style import Curve, Curves, Look, finite
from gpt2lab.reports.tables import Cell, Row, Table, columns
from gpt2lab.results import StudyRun
from gpt2lab.store import Row as JournalRow
from gpt2lab.text import DASH, MINUS, clean, number, plural, quantity, time_taken

GRADIENT, SCORES, LOGITS = "train/grad_norm", "diag/attention_logit_max", "diag/logit_rms"
ACTIVATIONS, MOVED = "diag/activation_rms", "diag/update_ratio"  # by block call, and by group of weights
OVER_TIME = (GRADIENT, SCORES, LOGITS)
PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "other")

NOTE = (
    "Means over the runs that finished, at the end of training; up to: the largest value of any run. Gradient norm: "
    "before clipping, the median over the last tenth of the steps. Attention logit: the largest score before the "
    "softmax. Activation rms: of the residual stream behind the first and the last block. Update ratio: rms of the "
    "last step's update over rms of the weights. A spike is a training loss more than 6 standard deviations above the "
    "mean of up to 128 losses before it. None of this decides a verdict."
)
NOTHING = "Nothing was recorded: these runs were trained before a training's health was measured, or have not begun."
MOST_TOLD = 12
"""Runs with something to tell; more are counted."""

MOST_POINTS = 60
"""Of a curve that has one per step; more could not be told apart on the page."""

LOGARITHMIC_FROM = 10.0
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""

OVER_TOKENS = (
    ("gradient", "Gradient norm", "gradient norm before clipping", GRADIENT,
     f"Before clipping; of longer trainings the median over each of {MOST_POINTS} equal stretches."),
    ("scores", "Largest attention logit", "largest score before the softmax", SCORES,
     "Over all layers, heads and pairs of tokens that may see each other, on the same few windows of validation text."),
    ("logits", "Logit rms", "rms of the output logits", LOGITS,
     "Root mean square of the scores over the vocabulary, on the same windows."),
)  # fmt: skip
BANDS = "Lines, bands and crosses as in the figure of the validation loss."


@section(order=160, title="Training health")
def training_health(read: StudyRead) -> Section:
    found = read.once(health)
    shown = any(_left_something(run) for runs in found.values() for run in runs)
    return Section(
        title=f"Training health{headline(found)}",
        table=table(read) if shown else None,
        note=NOTE if shown else NOTHING,
        points=points(found) if shown else (),
        figures=drawn(found, read.looks),
        folded=True,
    )


@section(order=60, title="Where the time went")
def where_the_time_went(read: StudyRead) -> Section | None:
    found = read.once(health)
    if not any(run.time for runs in found.values() for run in runs):
        return None
    return Section(table=_time_table(read), note=time_note(found), folded=True)


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """One run. `depth`: rms of the residual stream behind each block call, and `moved`: update ratio by group of
    weights ("" for all), both of the last row that has them."""

    run: StudyRun
    curves: Mapping[str, Curve] = field(default_factory=dict)
    depth: Sequence[float] = ()
    moved: Mapping[str, float] = field(default_factory=dict)

    def last(self, metric: str) -> float | None:
        """The last value of a metric over time."""
        values = self.curves.get(metric, ([], []))[1]
        return values[-1] if values else None

    def largest(self, metric: str) -> float | None:
        """Its largest finite value."""
        return max((v for v in self.curves.get(metric, ([], []))[1] if math.isfinite(v)), default=None)

    @property
    def watched(self) -> bool:
        """Whether the inside of the model was measured."""
        return bool(self.depth) or any(self.curves.get(metric, ((),))[0] for metric in (SCORES, LOGITS))

    @property
    def skipped(self) -> int | None:
        """Steps that were not taken because their numbers were not finite."""
        return _whole_or_none(self.run.result.get("skipped_steps"))

    @property
    def spikes(self) -> list[Mapping[str, Any]] | None:
        """Losses that jumped: step, loss, threshold."""
        found = self.run.result.get("spikes")
        return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else None

    @property
    def divergence(self) -> Mapping[str, Any]:
        """Where it broke off: step, lr, loss, grad_norm, batch; empty when it did not."""
        found = self.run.result.get("divergence")
        return found if isinstance(found, Mapping) else {}

    @property
    def time(self) -> dict[str, float]:
        """Seconds by phase; empty when the run did not say."""
        found = self.run.result.get("time")
        return {phase: as_number(found.get(phase, 0)) for phase in PHASES} if isinstance(found, Mapping) else {}

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the model's FLOPs took."""
        value = as_number(self.run.result.get("mfu"))
        return value if math.isfinite(value) else None

    @property
    def peak(self) -> str:
        """That peak in words, empty where none is known."""
        flops, words = as_number(self.run.result.get("peak_flops")), self.run.result.get("peak_from")
        return f"{quantity(flops, 'FLOP/s')} ({clean(words or 'source not recorded')})" if math.isfinite(flops) else ""

    @property
    def notes(self) -> list[str]:
        """What the reader should know about its machine."""
        found = self.run.result.get("notes")
        return [clean(note) for note in found] if isinstance(found, list) else []


Health = Mapping[str, Sequence[RunHealth]]
"""arm -> its runs, those that left nothing included."""


def health(read: StudyRead) -> dict[str, list[RunHealth]]:
    """Of every run that the study declares, by arm."""
    found: dict[str, list[RunHealth]] = {arm: [] for arm in read.study.arms}
    for run in read.runs:
        try:
            rows = read.store.run(run.id).rows() if run.status != "absent" else []
        except DataFault:  # told where its curve is missing
            rows = []
        found[run.arm].append(of_run(run, rows))
    return found


def of_run(run: StudyRun, rows: Sequence[JournalRow]) -> RunHealth:
    """What the rows of one journal hold."""
    curves = {}
    for metric in OVER_TIME:
        points = [(float(row["tokens"]), as_number(row["metrics"][metric])) for row in rows if metric in row["metrics"]]
        curves[metric] = ([tokens for tokens, _ in points], [value for _, value in points])
    depth = _last_below(ACTIVATIONS, rows)
    return RunHealth(
        run=run,
        curves=curves,
        depth=[depth[key] for key in sorted((key for key in depth if key.isdecimal()), key=int)],
        moved=_last_below(MOVED, rows),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Over the values that are there and finite; None when none is."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def as_number(value: object) -> float:
    """A number of a record, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _last_below(name: str, rows: Sequence[JournalRow]) -> dict[str, float]:
    """What follows `name` and a slash -> value, in the last row that has any; "" for `name` itself."""
    for row in reversed(rows):
        found = {
            key.removeprefix(name).removeprefix("/"): as_number(value)
            for key, value in row["metrics"].items()
            if key == name or key.startswith(f"{name}/")
        }
        if found:
            return found
    return {}


def _whole_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def table(read: StudyRead) -> Table:
    """One row per arm."""
    titles = columns("Arm", "Gradient norm:number", "Attention logit:number", "Logit rms:number",
                     "Activation rms:number", "Update ratio:words", "Spikes:number", "Skipped steps:number",
                     "Diverged:number")  # fmt: skip
    rows = []
    for name, arm in read.arms.items():
        runs = read.once(health)[name]
        ended = [run for run in runs if run.run.status in ("finished", "unevaluated")] or runs
        cells = (
            _over_time(runs, mean(map(_late_gradient, ended)), GRADIENT),
            *(_over_time(runs, mean(run.last(metric) for run in ended), metric) for metric in (SCORES, LOGITS)),
            _depth(ended),
            _moved(ended),
            _count(runs, lambda run: None if run.spikes is None else len(run.spikes)),
            _count(runs, lambda run: run.skipped),
            _count(runs, lambda run: int(run.run.status == "diverged") if run.run.result else None),
        )
        rows.append(Row((Cell(name), *cells), arm.look, arm.look == 0))
    return Table(titles, rows)


def points(health: Health) -> list[str]:
    """What broke off, what jumped, and what was not measured, in sentences."""
    everything = [run for runs in health.values() for run in runs]
    told = [_divergence(run) for run in everything if run.divergence]
    told += [_spikes(run, run.spikes) for run in everything if run.spikes]
    if len(told) > MOST_TOLD:
        told = [
            *told[:MOST_TOLD],
            f"And {len(told) - MOST_TOLD} more of that kind; every run's result.json has its own.",
        ]
    lacking = {arm: sum(bool(r.run.result) and not r.watched for r in runs) for arm, runs in health.items()}
    listed = ", ".join(f"{arm} ({count} of {len(health[arm])} runs)" for arm, count in lacking.items() if count)
    return [*told, f"Without measurements of activations, scores and logits: {listed}."] if listed else told


def headline(health: Health) -> str:
    """What somebody should know before opening the section: ` (2 spikes, 1 run diverged)`, or nothing."""
    everything = [run for runs in health.values() for run in runs]
    spikes = sum(len(run.spikes or ()) for run in everything)
    skipped = sum(run.skipped or 0 for run in everything)
    diverged = sum(run.run.status == "diverged" for run in everything)
    parts = [plural(spikes, "spike")] if spikes else []
    parts += [f"{plural(skipped, 'skipped step')}"] if skipped else []
    parts += [f"{plural(diverged, 'run')} diverged"] if diverged else []
    return f" ({', '.join(parts)})" if parts else ""


def deviations(health: Health) -> list[str]:
    """What results note about their machine, and steps that were not taken: neither was planned."""
    arms: dict[str, list[str]] = {}
    for arm, runs in health.items():
        for note in dict.fromkeys(note for run in runs for note in run.notes):
            arms.setdefault(note, []).append(arm)
    told = [f"{'All arms' if len(own) == len(health) else ', '.join(own)}: {note}." for note, own in arms.items()]
    skipped = {arm: sum(run.skipped or 0 for run in runs) for arm, runs in health.items()}
    listed = ", ".join(f"{count} in {arm}" for arm, count in skipped.items() if count)
    return [*told, f"Steps skipped because their numbers were not finite: {listed}."] if listed else told


def _time_table(read: StudyRead) -> Table:
    """Where the time of an arm's runs went, in shares."""
    titles = columns("Arm", "Per run:number", *(f"{phase.capitalize()}:number" for phase in PHASES))
    rows = []
    for name, arm in read.arms.items():
        times = [run.time for run in read.once(health)[name] if run.time and all(map(math.isfinite, run.time.values()))]
        totals = [sum(time.values()) for time in times]
        cells = [Cell(time_taken(statistics.median(totals)))] if totals else [Cell(DASH)]
        for phase in PHASES:
            share = sum(time[phase] for time in times) / sum(totals) if sum(totals) else None
            cells.append(Cell(DASH if share is None else f"{100 * share:.1f} %"))
        rows.append(Row((Cell(name), *cells), arm.look, arm.look == 0))
    return Table(titles, rows)


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


def _left_something(run: RunHealth) -> bool:
    recorded = run.spikes is not None or run.skipped is not None or bool(run.divergence)
    return run.watched or recorded or run.last(GRADIENT) is not None


def _late_gradient(run: RunHealth) -> float | None:
    values = [value for value in run.curves.get(GRADIENT, ([], []))[1] if math.isfinite(value)]
    return statistics.median(values[-max(1, len(values) // 10) :]) if values else None


def _over_time(runs: Sequence[RunHealth], late: float | None, metric: str) -> Cell:
    tops = [top for run in runs if (top := run.largest(metric)) is not None]
    return Cell(short(late), f"up to {short(max(tops))}" if tops else "")


def _depth(runs: Sequence[RunHealth]) -> Cell:
    first, last = (mean(run.depth[i] for run in runs if run.depth) for i in (0, -1))
    return Cell(DASH) if first is None and last is None else Cell(f"{short(first)} to {short(last)}")


def _moved(runs: Sequence[RunHealth]) -> Cell:
    groups = dict.fromkeys(group for run in runs for group in run.moved if group)
    parts = [f"{group} {short(mean(run.moved.get(group) for run in runs), 2)}" for group in groups]
    return Cell(short(mean(run.moved.get("") for run in runs)), ", ".join(parts))


def _count(runs: Sequence[RunHealth], of: Callable[[RunHealth], int | None]) -> Cell:
    counts = [count for run in runs if (count := of(run)) is not None]
    within = sum(count > 0 for count in counts)
    return Cell(str(sum(counts)) if counts else DASH, f"in {within} of {plural(len(counts), 'run')}" if within else "")


def _divergence(run: RunHealth) -> str:
    found = run.divergence
    lr, loss, norm = (as_number(found.get(key)) for key in ("lr", "loss", "grad_norm"))
    return (
        f"{run.run.arm}, seed {run.run.seed}, diverged at step {_step(found)}: rate {short(lr)}, loss {short(loss)}, "
        f"gradient norm {short(norm)}{_batch(found.get('batch'))}."
    )


def _batch(batch: object) -> str:
    """Which text it was, where the record says so."""
    starts = batch.get("first_tokens") if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(starts, list) or not starts:
        return ""
    more = f" and {len(starts) - 3} more" if len(starts) > 3 else ""
    places = ", ".join(_whole(start) for start in starts[:3])
    return f"; its batch: epoch {_whole(batch.get('epoch'))}, sequences from tokens {places}{more}"


def _whole(value: object) -> str:
    """A whole number of a record, grouped; a dash for anything else."""
    return f"{value:,}" if isinstance(value, int) else DASH


def _spikes(run: RunHealth, spikes: Sequence[Mapping[str, object]] | None) -> str:
    first, *others = spikes or [{}]
    more = f", and {len(others)} times more" if others[1:] else ", and once more" if others else ""
    loss, threshold = (short(as_number(first.get(key))) for key in ("loss", "threshold"))
    return (
        f"{run.run.arm}, seed {run.run.seed}: the loss jumped to {loss} at step {_step(first)}, over a threshold of "
        f"{threshold}{more}."
    )


def _step(record: Mapping[str, object]) -> str:
    return _whole(record.get("step"))


def drawn(health: Health, look: Mapping[str, Look]) -> list[style.Picture]:
    """Every figure that the runs have data for."""
    pictures = []
    depths = _by_arm(health, lambda run: (list(map(float, range(len(run.depth)))), list(run.depth)))
    if depths:
        caption = f"Root mean square of the residual stream behind each block, at the end of training. {BANDS}"
        figure = lines(depths, look, "block", "rms of the residual stream")
        pictures.append(style.picture("activations", "Activations over depth", caption, figure, "half"))
    for name, title, axis, metric, caption in OVER_TOKENS:
        curves = _by_arm(health, partial(_thinned_curve, metric))
        if curves:
            figure = lines(curves, look, "training tokens", axis)
            pictures.append(style.picture(name, title, caption, figure, "half"))
    return pictures


def lines(curves: Sequence[Curves], look: Mapping[str, Look], x: str, y: str) -> Figure:
    """One line per arm, with its name at the end."""
    figure, axes = style.panel(style.HALF, 2.9)
    for arm in curves:
        style.draw_curves(axes, arm, look[arm.arm])
    if x == "block":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.xaxis.set_major_formatter(style.thousands)
        axes.locator_params(axis="x", nbins=4)
    _scale(axes, [value for arm in curves for _, values in arm.points() for value in values])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    means = {arm.arm: style.stack(arm.healthy)[1] for arm in curves}
    style.label_ends(
        axes, {arm: float(values.mean(0)[-1]) for arm, values in means.items() if values.size}, look, gap=0.075
    )
    return figure


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: the median of each equal stretch, at its end."""
    x, y = finite(curve)
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return [float(x[part[-1]]) for part in parts], [float(np.median(y[part])) for part in parts]


def _thinned_curve(metric: str, run: RunHealth) -> Curve:
    return thinned(run.curves.get(metric, ([], [])))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if not values or min(values) <= 0 or max(values) < LOGARITHMIC_FROM * min(values):
        return
    axes.set_yscale("log")
    between = (1.0, 2.0, 5.0) if max(values) < 1000 * min(values) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_major_formatter(style.thousands)
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
