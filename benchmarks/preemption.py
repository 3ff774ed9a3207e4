"""`preemption`: a week on preemptible GPUs, simulated: which share of their time is lost, by the interval of saving.

Each GPU is taken away after an exponentially distributed time, and given back when its run was requeued. Time that a
run holds a GPU is lost in starting, in saving, and in training that was not saved. With a notice that is longer than a
save, as USR1 or SIGTERM give it, nothing that was trained is lost. What a GPU's absence costs is not counted.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

GPUS, WEEK = 64, 7 * 86_400.0
MEANS = (1.0, 4.0, 12.0)
"""Hours until a GPU is taken away, on average."""
INTERVALS = tuple(30.0 * 2 ** (k / 2) for k in range(18))
"""Seconds of training between two saves."""


@dataclass(frozen=True)
class Times:
    """Seconds. start: from a worker's start to its first step, a checkpoint's loading included; save: of a checkpoint,
    while which nothing is trained; requeue: until a preempted run has a GPU again."""

    start: float
    save: float
    requeue: float


def lost(interval: float, mean: float, times: Times, *, notice: bool = False, seed: int = 0) -> float:
    """Share of the time on GPUs in which nothing was trained that is kept. interval, mean: in seconds."""
    dice, held, kept = random.Random(seed), 0.0, 0.0
    for _ in range(GPUS):
        clock = 0.0
        while clock < WEEK:
            life = min(dice.expovariate(1 / mean), WEEK - clock)
            training = max(0.0, life - times.start)
            saves = math.floor(training / (interval + times.save))
            at_end = max(0.0, training - saves * (interval + times.save))  # since the last save
            kept += saves * interval + (max(0.0, min(at_end, interval) - times.save) if notice else 0.0)
            held += life
            clock += life + times.requeue
    return 1 - kept / held


def best(mean: float, times: Times) -> float:
    """The interval with the least loss without a notice, to first order: sqrt(2 x save x mean).  Source: J. W. Young,
    A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974."""
    return math.sqrt(2 * times.save * mean)


def preemption(
    start: Annotated[float, typer.Option(help="Seconds from a worker's start to its first step.")] = 8.9,
    save: Annotated[float, typer.Option(help="Seconds of a save.")] = 22.5,
    requeue: Annotated[float, typer.Option(help="Seconds until a preempted run trains again.")] = 120.0,
    figure: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
) -> None:
    """Simulate a week on 64 preemptible GPUs. docs/cluster.md says where the default times are from."""
    times = Times(start, save, requeue)
    for hours in MEANS:
        mean = 3600 * hours
        curve = {interval: lost(interval, mean, times) for interval in INTERVALS}
        least = min(curve, key=curve.__getitem__)
        at_notice = lost(best(mean, times), mean, times, notice=True)
        print(
            f"taken away every {hours:g} h: least {curve[least]:.1%} at {least:.0f} s, "
            f"{lost(best(mean, times), mean, times):.1%} at Young's {best(mean, times):.0f} s, {at_notice:.1%} there "
            f"with a notice; {curve[INTERVALS[0]]:.1%} at {INTERVALS[0]:.0f} s"
        )
    if figure:
        draw(times, figure)


def draw(times: Times, path: Path) -> None:
    """Loss by interval, a line for each mean, dashed with a notice."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawing.add_subplot()
    for number, hours in enumerate(MEANS):
        for notice in (False, True):
            values = [100 * lost(interval, 3600 * hours, times, notice=notice) for interval in INTERVALS]
            label = None if notice else f"taken away every {hours:g} h"
            axes.plot(INTERVALS, values, f"C{number}{'--' if notice else '-'}", label=label)
        axes.axvline(best(3600 * hours, times), color=f"C{number}", linewidth=0.6, alpha=0.6)
    axes.set(xscale="log", xlabel="seconds of training between two saves", ylabel="time lost (%)", ylim=(0, 60))
    axes.legend(title="solid: without a notice, dashed: with", frameon=False)
    drawing.savefig(path, dpi=110)
