"""How the trainings went, as tables and sentences: numbers by arm, what broke off or jumped, where the time went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from gpt2lab.health import GRADIENT, LOGITS, PHASES, SCORES, Health, RunHealth, as_number, mean
from gpt2lab.report.across import duration
from gpt2lab.report.tables import Cell, Column, Row, Summary, Table
from gpt2lab.text import DASH, MINUS, number, plural

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


def table(health: Health, arms: Mapping[str, Summary]) -> Table | None:
    """One row per arm; None when no run left anything."""
    if not any(_left_something(run) for runs in health.values() for run in runs):
        return None
    columns = (
        Column("Arm"), Column("Gradient norm", "number"), Column("Attention logit", "number"),
        Column("Logit rms", "number"), Column("Activation rms", "number"), Column("Update ratio", "words"),
        Column("Spikes", "number"), Column("Skipped steps", "number"), Column("Diverged", "number"),
    )  # fmt: skip
    rows = []
    for name, arm in arms.items():
        runs = health[name]
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
    return Table(columns, rows)


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


def time_table(health: Health, arms: Mapping[str, Summary]) -> Table | None:
    """Where the time of an arm's runs went, in shares; None when no run says."""
    if not any(run.time for runs in health.values() for run in runs):
        return None
    columns = (Column("Arm"), Column("Per run", "number"), *(Column(phase.capitalize(), "number") for phase in PHASES))
    rows = []
    for name, arm in arms.items():
        times = [run.time for run in health[name] if run.time and all(map(math.isfinite, run.time.values()))]
        totals = [sum(time.values()) for time in times]
        cells = [Cell(duration(statistics.median(totals)))] if totals else [Cell(DASH)]
        for phase in PHASES:
            share = sum(time[phase] for time in times) / sum(totals) if sum(totals) else None
            cells.append(Cell(DASH if share is None else f"{100 * share:.1f} %"))
        rows.append(Row((Cell(name), *cells), arm.look, arm.look == 0))
    return Table(columns, rows)


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
