"""`ablation`: what packing is worth: the runs of an ablation side by side, as `gpt2lab run` trains them, against one
after another with all cores each, and against nanoGPT's script.

All train the same number of runs and steps into temporary folders. Half of the runs one after another, and half of
nanoGPT's, come before the study and half after it, so that a machine that slows down or speeds up favours no side.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import options as o
from gpt2lab.basics.forks import ForkServer
from gpt2lab.basics.output import console_for
from gpt2lab.basics.progress import Listener, display
from gpt2lab.cli.options import Set
from gpt2lab.config import Config
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.executors.local import Start, start_process, started
from gpt2lab.experiments.ablation import Study, job_of
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.planning.plan import Plan
from gpt2lab.runner import Job
from gpt2lab.store import Store

PAIRS = 5
LOOK_SECONDS = 0.005
LITTLE = ("evaluation.tokens=128", "evaluation.context_tokens=128")
"""So that a worker's first step comes as soon as it can."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train all runs. `seconds`: from the first start to the last end; `training_seconds`: the sum over runs
    of what their own clocks say of training steps alone, None of nanoGPT's."""

    jobs: int
    threads: int
    seconds: float
    training_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What was measured. `nanogpt`: as many runs of its script, one after another. `start_up`: median seconds from
    asking for a worker to its first training step, in a process from scratch ("cold") and in a fork of one that has
    imported everything ("warm")."""

    ablation: str
    arms: tuple[str, ...]
    runs: int
    steps: int
    packed: Way
    serial: Way
    nanogpt: Way | None = None
    start_up: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times sooner all is done than one after another."""
        return self.serial.seconds / self.packed.seconds

    @property
    def nanogpt_ratio(self) -> float | None:
        """How many times sooner than by nanoGPT's script."""
        return self.nanogpt.seconds / self.packed.seconds if self.nanogpt else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "nanogpt_ratio": self.nanogpt_ratio}


def bench_ablation(
    file: str, *, scale: str | None, arms: Sequence[str] | None, seeds: int | None, steps: int | None,
    overrides: Sequence[str] = (), nanogpt: Path | None = None, on_event: Listener,
) -> Packing:  # fmt: skip
    """Train the ablation in each way. steps: of each run, in place of the preset's; nanogpt: a checkout of it. Raises
    Gpt2labError."""
    if nanogpt is not None and not (nanogpt / "train.py").is_file():
        hint = "--nanogpt FOLDER, where FOLDER is a checkout of nanoGPT"
        raise ConfigError("there is no such file", where=str(nanogpt / "train.py"), hint=hint)
    shorter = [*overrides]
    if steps is not None:
        shorter += [f"training.steps={steps}", f"optim.warmup_steps={min(steps, steps // 10 + 1)}"]

    def opened(folder: Path, jobs: int | None, *more: str) -> Study:
        asked = load_ablation(file, scale=scale, overrides=(*shorter, *more), arms=arms, seeds=seeds)
        return Study.prepare(asked, Store(folder), jobs=jobs)

    with tempfile.TemporaryDirectory(prefix="gpt2lab-bench-") as made:
        root = Path(made)
        study = opened(root / "packed", None)
        plan, store = study.plan(), study.store
        cores = plan.machine.jobs * plan.machine.threads
        alone = opened(root / "serial", 1, f"training.threads={cores}")
        one_plan, one_store = alone.plan(), alone.store
        jobs = [job_of(run, one_store, one_plan) for run in one_plan.runs()]
        tiny = opened(root / "tiny", None, "training.steps=2", "optim.warmup_steps=1", *LITTLE)
        cold, warm = start_ups(job_of(tiny.plan().runs()[0], tiny.store, tiny.plan()))
        half, config = len(jobs) // 2, plan.baseline.arm.config
        script = None
        if nanogpt is not None:
            script = partial(nanogpt_trained, nanogpt.resolve(), nanogpt_words(config, study.data, root), cores)
        scripts = sum(script() for _ in jobs[:half]) if script else 0.0
        serial = sum(map(trained, jobs[:half]))
        began = time.perf_counter()
        outcome = study.train(on_event=on_event)
        packed = time.perf_counter() - began
        if outcome.failed:
            raise failed(store, outcome.failed[0])
        serial += sum(map(trained, jobs[half:]))
        scripts += sum(script() for _ in jobs[half:]) if script else 0.0
        return Packing(
            ablation=f"{plan.ablation.name}@{plan.ablation.scale}",
            arms=tuple(plan.arms),
            runs=len(jobs),
            steps=config.training.steps,
            packed=way(plan, store, packed),
            serial=way(one_plan, one_store, serial),
            nanogpt=Way(jobs=1, threads=cores, seconds=round(scripts, 3)) if script else None,
            start_up={"cold": cold, "warm": warm},
        )


def way(plan: Plan, store: Store, seconds: float) -> Way:
    """A plan that was carried out in so many seconds."""
    results = [store.run(run.id).result() or {} for run in plan.runs()]
    return Way(
        jobs=plan.machine.jobs,
        threads=plan.machine.threads,
        seconds=round(seconds, 3),
        training_seconds=round(sum(result["seconds"] for result in results), 3),
    )


def trained(job: Job) -> float:
    """Train one run in a process of its own; -> seconds from its start to its end. Raises EnvironmentFault."""
    job.write()
    began = time.perf_counter()
    code = started(start_process, job).wait()
    seconds = time.perf_counter() - began
    if code:
        raise failed(Store(job.root), job.run_id)
    return seconds


def nanogpt_words(config: Config, data: Prepared, root: Path) -> list[str]:
    """Arguments of nanoGPT's train.py for a model of the same sizes, trained on as many tokens of the same text, which
    are written below root. Each of its evaluations scores as many tokens as ours before the end, half of them training
    text; our last one scores more. Raises ConfigError."""
    model, training, evaluation = config.model, config.training, config.evaluation
    batch, left = divmod(training.batch_tokens, model.block_size)
    if left or data.vocab_size > 1 << 16:
        raise ConfigError("needs whole sequences in a step and tokens of 16 bits", where="--nanogpt")
    for file, tokens in (("train.bin", data.train), ("val.bin", data.validation)):
        tokens[:].astype(np.uint16).tofile(root / file)
    (root / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": model.vocab_size}))
    curve = evaluation.curve_tokens or evaluation.tokens
    scored = len(data.validation) if curve == "all" else curve
    given = {
        "dataset": root, "out_dir": root / "nanogpt", "device": "cpu", "compile": False, "bias": model.bias,
        "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd, "block_size": model.block_size,
        "batch_size": batch, "gradient_accumulation_steps": 1, "max_iters": training.steps,
        "lr_decay_iters": training.steps, "warmup_iters": config.optim.warmup_steps, "learning_rate": config.optim.lr,
        "eval_interval": evaluation.every_steps or training.steps,
        "eval_iters": max(1, scored // training.batch_tokens // 2),
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def nanogpt_trained(checkout: Path, words: Sequence[str], threads: int) -> float:
    """Train once by nanoGPT's script; -> seconds from its start to its end. Raises EnvironmentFault."""
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentFault(f"train.py failed: {reason}", where=f"--nanogpt {checkout}")
    return time.perf_counter() - began


def start_ups(job: Job) -> tuple[float, float]:
    """Median seconds until the first training step, of processes from scratch and of forks, in turns."""
    server, times = ForkServer(), dict[str, list[float]](cold=[], warm=[])
    try:
        first_step(server.start, replace(job, root=f"{job.root}-first"))  # the server imports torch
        for pair in range(PAIRS):
            for name, start in (("cold", start_process), ("warm", server.start)):
                times[name].append(first_step(start, replace(job, root=f"{job.root}-{name}-{pair}")))
    finally:
        server.close()
    return statistics.median(times["cold"]), statistics.median(times["warm"])


def first_step(start: Start, job: Job) -> float:
    """Seconds from asking for a worker until it begins its first training step. Waits for its end too."""
    folder = Store(job.root).run(job.run_id)
    job.write()
    began = time.perf_counter()
    process = started(start, job)
    seconds = None
    while process.poll() is None:
        rows = folder.rows() if seconds is None else []
        if len(rows) > 1:
            seconds = time.perf_counter() - began - float(rows[1]["seconds"])
        time.sleep(LOOK_SECONDS)
    if process.wait() or seconds is None:
        raise failed(Store(job.root), job.run_id)
    return seconds


def failed(store: Store, run_id: str) -> EnvironmentFault:
    """Nothing is measured when a run does not get to its end."""
    run = store.run(run_id)
    log = run.path / "run.log"
    said = log.read_text().strip().splitlines() if log.exists() else []
    reason = (run.failure() or {}).get("reason") or (said[-1] if said else "it was stopped")
    return EnvironmentFault(f"a run did not get to its end: {reason}", where="benchmarks ablation")


def show_packing(found: Packing) -> None:
    """A table of the ways, and what it shows in sentences."""
    table = o.table_of("", "side by side", "threads each", "seconds", "of training", "such studies per hour")
    ways = {"packed": found.packed, "one after another": found.serial, "nanoGPT's script": found.nanogpt}
    for name, way in ways.items():
        if way is not None:
            training = "" if way.training_seconds is None else f"{way.training_seconds:.1f}"
            table.add_row(
                name, str(way.jobs), str(way.threads), f"{way.seconds:.1f}", training, f"{3600 / way.seconds:.1f}"
            )
    cold, warm = found.start_up["cold"], found.start_up["warm"]
    than = "" if found.nanogpt_ratio is None else f", {found.nanogpt_ratio:.2f} times as fast as by nanoGPT's script"
    said = (
        f"{found.ablation}: {found.runs} runs of {found.steps} steps are done {found.ratio:.2f} times as fast packed"
        f" as one after another{than}\n"
        f"a worker begins its first step after {warm:.2f} s, in a process from scratch after {cold:.2f} s"
    )
    o.show(table, said)


def ablation(
    file: Annotated[str, typer.Argument(help="An ablation's YAML file.", metavar="FILE")] = "ablations/posenc.yaml",
    scale: Annotated[str, typer.Option("--scale", "-s", help="Preset to run at.")] = "nano",
    arms: Annotated[str, typer.Option("--arms", help="Only these arms, separated by commas.")] = "learned,rotary,none",
    seeds: Annotated[int | None, typer.Option("--seeds", "-n", help="Seeds per arm.", min=1)] = None,
    steps_: Annotated[
        int | None, typer.Option("--steps", help="Steps of each run, in place of the preset's.", min=2)
    ] = None,
    set_: Set = None,
    nanogpt: Annotated[Path | None, typer.Option("--nanogpt", help="A checkout of nanoGPT.")] = None,
    json_: o.Json = False,
) -> None:
    """Time an ablation packed as `gpt2lab run` packs it against its runs one after another with all cores each.

    With --nanogpt also against as many runs of nanoGPT's train.py of the baseline's sizes, in float32, one after
    another. Nothing is kept and nothing goes to MLflow.
    """
    with display(console_for(to_stderr=True)) as listener:
        found = bench_ablation(
            file,
            scale=scale,
            arms=[name.strip() for name in arms.split(",") if name.strip()],
            seeds=seeds,
            steps=steps_,
            overrides=set_ or (),
            nanogpt=nanogpt,
            on_event=listener,
        )
    if json_:
        print(json.dumps(found.to_json()))
    else:
        show_packing(found)
