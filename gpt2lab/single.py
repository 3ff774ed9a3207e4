"""One run by itself: one config and one seed, through the plan, store and records of ablations.

So an ablation that needs the same run finds it finished, and a run that an ablation trained is not trained again. All
that were trained so at one scale share a record, `train@<preset>`, which is what MLflow is brought up to date from.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2lab.config import Config, load_config, preset_name
from gpt2lab.data.files import Progress
from gpt2lab.data.shards import prepare
from gpt2lab.display import Display, RunView, duration
from gpt2lab.errors import ConfigError, LockHeld, NumericsFault, Problem
from gpt2lab.evaluation.tasks import fetch_documents as fetch
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ranks import RanksExecutor, error_of
from gpt2lab.planning.ablation import LoadedAblation
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.machine import estimate_memory
from gpt2lab.planning.plan import ArmPlan, Plan, make_plan
from gpt2lab.planning.record import study_record
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.reuse.why import keep_sources
from gpt2lab.runner import Job, StopRequest
from gpt2lab.runner.main import work
from gpt2lab.store import RunFolder, Store, file_lock
from gpt2lab.study import job_of
from gpt2lab.text import memory, quantity
from gpt2lab.tracking import Tracker as Mirror
from gpt2lab.tracking.follower import Follower
from gpt2lab.training.precision import choose_device

STUDY = "train"
TICK_SECONDS = 0.5
UNSEEN = "evaluation."
"""Overrides that a run's name need not tell: they make no other run."""
Watch = Callable[[Sequence[Mapping[str, Any]]], Iterable[str]]
"""Looks at new rows of the journal; -> what a person should know about them."""


def unconcerned(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Finds nothing remarkable."""
    return ()


@dataclass(frozen=True)
class Single:
    """One run, planned for `ranks` processes."""

    plan: Plan
    ranks: int
    store: Store
    profile: bool = False

    @property
    def arm(self) -> ArmPlan:
        return self.plan.baseline

    @property
    def run(self) -> Run:
        return self.arm.runs[0]

    @property
    def job(self) -> Job:
        """The run as a worker receives it."""
        return replace(job_of(self.run, self.store, self.plan), profile=self.profile)

    @property
    def folder(self) -> RunFolder:
        return self.store.run(self.run.id)

    @property
    def is_finished(self) -> bool:
        return is_finished(self.run, self.store)

    @property
    def seconds(self) -> float:
        """Estimated training time."""
        return self.arm.seconds / self.ranks

    @property
    def memory(self) -> int:
        """Estimated bytes of one rank."""
        training = self.run.config.training
        own = training.model_copy(update={"batch_tokens": training.batch_tokens // self.ranks})
        return estimate_memory(self.run.config.model_copy(update={"training": own}), self.arm.costs)


def plan_one(
    preset: str | Path,
    store: Store,
    *,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    ranks: int = 1,
    local_ranks: int | None = None,
    progress: Progress | None = None,
    profile: bool = False,
) -> Single:
    """The run of a preset or file with `overrides`; its data is prepared. `local_ranks`: those on this machine, if not
    all are. Raises ConfigError."""
    config, name = load_config(preset, overrides, plugins=plugins), preset_name(preset)
    check_ranks(config, ranks, local_ranks or ranks)
    label = " ".join(item for item in overrides if not item.startswith(UNSEEN)) or name
    study = LoadedAblation(
        name=STUDY,
        question=f"What does {name} reach?",
        scale=name,
        baseline=label,
        arms={label: Arm(label, {}, config)},
        seeds=(config.seed if seed is None else seed,),
        contrasts=(),
        smallest_effect=config.scale.smallest_effect,
        alpha=0.05,
        screen=False,
        design="one run",
    )
    data = prepare(config.data, progress=progress)
    fetch(config.evaluation.tasks)
    return Single(make_plan(study, data, store, jobs=local_ranks or ranks), ranks, store, profile)


def check_ranks(config: Config, ranks: int, local: int) -> None:
    """Raises ConfigError when a batch cannot be shared by `ranks`, or this machine has no room for `local` of them."""
    problems = config.training.problems(config.model.block_size, ranks)
    hint = f"--set training.batch_tokens={problems[0].what.rpartition(' ')[2]}" if problems else None
    if local > 1:
        device, threads = choose_device(config.training.device).type, config.training.threads or 1
        room = {"cpu": cores() // threads, "cuda": torch.cuda.device_count(), "mps": 1}[device]
        if local > room:
            own = f"{cores()} cores, and each rank takes {threads}" if device == "cpu" else f"{room} of device {device}"
            problems.append(Problem("--nproc", f"{local} ranks; this machine has {own}"))
            hint = f"--nproc {max(1, room)}"
    if problems:
        raise ConfigError(problems, hint=hint)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lines(one: Single) -> list[str]:
    """What the run is and what it costs, in sentences."""
    config, costs, machine = one.run.config, one.arm.costs, one.plan.machine
    training, many = config.training, one.ranks > 1
    share = f", {quantity(training.batch_tokens // one.ranks)} on each of {one.ranks} ranks" if many else ""
    flops = costs.flops_per_token * one.arm.tokens
    threads = f", threads{' of each rank' if many else ''}: {machine.threads}" if machine.device == "cpu" else ""
    changes = f" with {one.arm.arm.name}" if one.arm.arm.name != one.plan.ablation.scale else ""
    return [
        f"{one.plan.ablation.scale}{changes}, seed {one.run.seed}: run {one.run.id}",
        f"{quantity(costs.parameters)} parameters, {quantity(one.arm.tokens)} tokens in {training.steps:,} steps of "
        f"{quantity(training.batch_tokens)}{share}",
        f"{costs.flops_per_token / 1e6:,.1f} MFLOP/token, {flops / 1e15:,.3g} PFLOP: about {duration(one.seconds)} and "
        f"{memory(one.memory)}{' a rank' if many else ''} on {machine.device_name} ({machine.device}{threads}); "
        f"speed from {machine.speed_from}",
    ]


def as_record(one: Single) -> dict[str, Any]:
    """The same as plain data, with the result once there is one."""
    result = one.folder.result()
    evaluation = one.folder.evaluation(one.run.evaluation_key) or {}
    return {
        "run": one.run.id,
        "path": str(one.folder.path),
        "preset": one.plan.ablation.scale,
        "seed": one.run.seed,
        "ranks": one.ranks,
        "parameters": one.arm.costs.parameters,
        "flops_per_token": one.arm.costs.flops_per_token,
        "tokens": one.arm.tokens,
        "seconds": one.seconds,
        "memory_bytes": one.memory,
        "device": one.plan.machine.device,
        "threads": one.plan.machine.threads,
        "status": one.folder.status(),
        "result": result,
        "evaluation": evaluation.get("metrics"),
    }


def result_lines(one: Single) -> list[str]:
    """How a finished run ended."""
    result = one.folder.result() or {}
    metrics = (one.folder.evaluation(one.run.evaluation_key) or {}).get("metrics", {})
    loss = metrics.get("val/loss")
    speed = result.get("tokens_per_second")
    parts = [
        f"validation loss {loss:.4f} nats" if loss is not None else "no validation loss",
        f"{metrics['val/bits_per_byte']:.4f} bits per byte" if metrics.get("val/bits_per_byte") is not None else "",
        f"{speed:,.0f} tokens/s" if speed else "",
        f"MFU {result['mfu']:.1%}" if result.get("mfu") else "",
        f"{duration(result['seconds'])} of training" if result.get("seconds") else "",
    ]
    return [", ".join(part for part in parts if part), f"{one.folder.path} (gpt2lab show {one.run.id[:8]})"]


def declare(one: Single, reproduce: str) -> dict[str, Any]:
    """Put the run into the record of all that were trained so at its scale; -> that record, with this run alone."""
    record = study_record(one.plan, reproduce=reproduce) | {"earlier": []}
    label, seed = one.arm.arm.name, str(one.run.seed)
    with file_lock(one.store.root / "studies" / f".{record['name']}.lock"):
        whole = dict(record)
        if record["name"] in one.store.studies():
            before = one.store.study(record["name"])
            runs = {**before["arms"].get(label, {}).get("runs", {}), seed: one.run.id}
            whole["arms"] = {**before["arms"], label: {**record["arms"][label], "runs": runs}}
            whole["seeds"] = sorted({*before["seeds"], one.run.seed})
            whole |= {key: before[key] for key in ("baseline", "created")}
        one.store.write_study(whole)
    keep_sources([one.run.config], one.store)
    return record


@contextlib.contextmanager
def followed(
    one: Single, record: dict[str, Any], display: Display, mirror: Callable[[], Mirror] | None, watch: Watch
) -> Iterator[Callable[[], None]]:
    """Follow the run while inside; what is yielded is to be called several times a second."""
    view = RunView(one.arm.arm.name, str(one.run.seed), one.run.id, one.run.config.training.steps)
    with display:
        follower = Follower(one.store, record, mirror, display.say)

        def tick() -> None:
            for news in follower.poll():
                view.take(news.rows)
                for text in watch(news.rows):
                    display.say(text)
            status = one.folder.status()
            view.status = "waiting" if status in ("absent", "partial") else status
            display.show([view])

        try:
            tick()
            yield tick
            tick()
        finally:
            follower.close(timeout=30.0)


def train(
    one: Single, display: Display, reproduce: str, mirror: Callable[[], Mirror] | None, watch: Watch = unconcerned
) -> None:
    """Train the run in processes of its own, as many as it has ranks.

    Raises Preempted when stopped, with everything saved; LockHeld; NumericsFault when it diverged; what its worker
    raised; RankLost.
    """
    refuse_if_held(one)
    with followed(one, declare(one, reproduce), display, mirror, watch) as tick:
        job = one.job
        if one.ranks > 1:
            RanksExecutor(one.ranks, tick).run(job)
        else:
            gpus = 1 if one.plan.machine.device == "cuda" else 0
            endings = LocalExecutor(1, tick, gpus, lambda run_id: one.is_finished).run([job])
            if endings[job.run_id] == "failed":
                raise error_of(one.folder.failure() or {}, one.folder)
    refuse_divergence(one)


def train_as_rank(
    one: Single, leads: bool, display: Display, reproduce: str, mirror: Callable[[], Mirror] | None,
    watch: Watch = unconcerned,
) -> int:  # fmt: skip
    """Train the run in this process, one of several that torchrun or the like has started; -> the exit code, with all
    said that is to be said. The first one follows the run in a thread."""
    stop = StopRequest()
    stop.listen()
    job = one.job
    if not leads:
        return work(job, stop)
    over = threading.Event()
    with followed(one, declare(one, reproduce), display, mirror, watch) as tick:

        def follow() -> None:
            while not over.wait(TICK_SECONDS):
                tick()

        thread = threading.Thread(target=follow, name="gpt2lab-progress", daemon=True)
        thread.start()
        try:
            code = work(job, stop)
        finally:
            over.set()
            thread.join()
    return code


def refuse_if_held(one: Single) -> None:
    """Raises LockHeld, naming who is at work on the run."""
    if one.folder.status() == "running":
        who = one.folder.holder()
        what = f"in use by process {who.get('pid')} on {who.get('host')}, since {who.get('since')}"
        raise LockHeld(what, where=str(one.folder.path), hint="gpt2lab runs")


def refuse_divergence(one: Single) -> None:
    """Raises NumericsFault for a run that diverged: beside others that is a result, by itself it is a failure."""
    result = one.folder.result() or {}
    if result.get("status") == "diverged":
        what = str(result.get("reason") or "the loss is not finite").removeprefix("training: ")
        raise NumericsFault(what, where=str(one.folder.path), hint="a lower optim.lr, or training.nonfinite=skip")
