"""`store`: what the commands cost in a store of many runs: one study with all of them, and a small one beside it.

One run of each study is trained; all others are copies of its files under their own names and with other losses, which
read like runs that were trained.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer

from benchmarks import options as o
from gpt2lab.errors import EnvironmentFault
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments.ablation import Study
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.runner import Job
from gpt2lab.store import RunFolder, Store, to_json
from gpt2lab.store.listing import LISTING

NOISE = 0.01
"""Standard deviation between seeds, and of the means of arms, in nats."""
ABLATION = """
ablation: {name}
question: Which learning rate?
base: nano
baseline: r1
arms:
{arms}
seeds: {seeds}
"""


@dataclass(frozen=True)
class Cost:
    """Of one command: seconds on a core, seconds until it ended, and the most memory it held, in bytes."""

    cpu: float
    wall: float
    memory: int


def shorter(steps: int) -> list[str]:
    """Settings of runs of so many steps."""
    return [f"training.steps={steps}", f"optim.warmup_steps={steps // 10}"]


def declared(folder: Path, name: str, arms: int, seeds: int, steps: int) -> None:
    """Declare a study and leave all files of its finished runs."""
    file = folder / f"{name}.yaml"
    rates = "\n".join(f"  r{arm}: {{optim.lr: {1e-3 * (1 + arm / 100):.6g}}}" for arm in range(2, arms + 1))
    file.write_text(ABLATION.format(name=name, arms=f"  r1: {{}}\n{rates}", seeds=seeds))
    study = Study.prepare(load_ablation(file, scale="nano", overrides=shorter(steps)), Store(folder / "runs"))
    with mock.patch("os.fsync", return_value=None):  # the machine's disk is not what is measured
        first, *others = study.declare()
        Scheduler(InlineExecutor()).run([first])
        original, dice = Store(first.root).run(first.run_id), random.Random(name)
        means = {arm: dice.gauss(0, NOISE) for arm in study.plan().arms}
        arm_of = {run.id: run.arm for run in study.plan().runs()}
        for job in others:
            copy(original, job, means[arm_of[job.run_id]] + dice.gauss(0, NOISE))


def copy(original: RunFolder, job: Job, shift: float) -> None:
    """All files of a finished run, as `job` would have left them, with losses that are larger by `shift`."""
    run, result = Store(job.root).run(job.run_id), original.result() or {}
    run.write_config(job.config)
    run.write_identity({**(original.identity() or {}), "id": run.id, "identity": job.identity})
    rows = [{**row, "metrics": shifted(row["metrics"], shift)} for row in original.rows()]
    run.metrics.write_text("".join(f"{to_json(row)}\n" for row in rows))
    for key in original.evaluation_keys():
        windows, parts, evaluation = original.windows(key), original.parts(key), original.evaluation(key)
        if windows:
            run.write_windows({**windows, "losses": [loss + shift for loss in windows["losses"]]})
        if parts:
            run.write_parts(parts)
        if evaluation:
            run.write_evaluation({**evaluation, "metrics": shifted(evaluation["metrics"], shift)})
    run.finish({**result, "metrics": shifted(result["metrics"], shift)})


def shifted(metrics: Mapping[str, Any], shift: float) -> dict[str, Any]:
    return {name: value + shift if name.endswith("/loss") else value for name, value in metrics.items()}


MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run([sys.executable, "-m", "gpt2lab", *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, time.perf_counter() - began, used.ru_maxrss * 1024]))
sys.exit(code)
"""
"""A small process starts the command: the most memory that a process held counts as its child's, too."""


def cost(*words: str) -> Cost:
    """Of a command in a process of its own. Raises EnvironmentFault where it fails."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EnvironmentFault(f"gpt2lab {' '.join(words)} failed", where="benchmarks store")
    return Cost(*json.loads(done.stdout))


def store(
    arms: Annotated[int, typer.Option(help="Of the large study.", min=2)] = 100,
    seeds: Annotated[int, typer.Option(help="Of each of its arms.", min=2, max=100)] = 100,
    steps: Annotated[int, typer.Option(help="Of each run.", min=10)] = 100,
    folder: Annotated[Path | None, typer.Option(help="Keep the store here; one that is there is used again.")] = None,
) -> None:
    """Time the commands in a store of many runs: a study of arms x seeds of them, and one of 3 x 3."""
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt2lab-bench-")))
        root = place / "runs"
        if not root.exists():
            place.mkdir(exist_ok=True)
            declared(place, "large", arms, seeds, steps)
            declared(place, "small", 3, 3, steps + 10)  # other runs
        (root / LISTING).unlink(missing_ok=True)
        at, out = ("--runs", str(root)), ("--out", str(place / "reports"))
        further = ("--scale", "nano", "--dry-run", *(word for s in shorter(2 * steps) for word in ("--set", s)))
        table = o.table_of("", "CPU s", "wall s", "memory MB")
        for name, words in {
            "status": ("status", *at),
            f"plan of {arms * seeds:,} further runs": ("run", str(place / "large.yaml"), *further, *at),
            "runs, the first time": ("runs", *at),
            "runs": ("runs", *at),
            "report of 3 x 3 runs": ("report", "small@nano", *at, *out),
            f"report of {arms} x {seeds} runs": ("report", "large@nano", *at, *out),
        }.items():
            used = cost(*words)
            table.add_row(name, f"{used.cpu:.1f}", f"{used.wall:.1f}", f"{used.memory / 1e6:.0f}")
        o.show(table)
