"""One run by itself: one config and one seed, in the same store as those of ablations.

So an ablation that needs the same run finds it finished, and a run that an ablation trained is not trained again. All
that were trained so at one scale share a record, `train@<preset>`, which is what MLflow is brought up to date from.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2lab.config import Config, load_config, preset_name, read_overrides, resolve
from gpt2lab.config.source import Source as ConfigSource
from gpt2lab.config.source import lay
from gpt2lab.costs import Costs
from gpt2lab.data.files import Progress as DataProgress
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import prepare
from gpt2lab.errors import ConfigError, Gpt2labError, LockHeld, NumericsFault, Preempted, Problem, RankLost
from gpt2lab.evaluation.tasks import fetch_documents
from gpt2lab.events import Listener, RunProgress, ignore
from gpt2lab.executors import Executor
from gpt2lab.executors.driver import Driver, TrackerFactory, executor_for
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.identity import digest, settings
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine, estimate_memory, probe
from gpt2lab.planning.plan import check_data
from gpt2lab.planning.record import single_record
from gpt2lab.planning.runs import Run, is_finished, known_costs, make_run, tokens_left, tokens_of
from gpt2lab.records import StudyRecord
from gpt2lab.reuse.why import keep_sources
from gpt2lab.runner import Job, StopRequest
from gpt2lab.runner.job import job_for
from gpt2lab.runner.worker import work
from gpt2lab.store import Row, RunFolder, Store, file_lock
from gpt2lab.text import duration, memory, quantity
from gpt2lab.training.precision import choose_device
from gpt2lab.training.ranks import HINT

STUDY = "train"
CUSTOM = "custom"
"""Scale of configs that are made in Python."""

TICK_SECONDS = 0.5
UNSEEN = "evaluation."
"""Overrides that a run's name leaves out: they make no other run."""

Watch = Callable[[Sequence[Mapping[str, Any]]], Iterable[str]]
"""Looks at new rows of the journal; -> messages for the user."""


@dataclass(frozen=True, kw_only=True)
class Single:
    """One run, planned for `ranks` processes on one machine over prepared data."""

    label: str
    """what the run is called within its scale: its overrides, or the scale's name"""
    scale: str
    run: Run
    costs: Costs
    machine: Machine
    data: Prepared
    store: Store
    ranks: int = 1
    profile: bool = False

    @property
    def name(self) -> str:
        """Of the record that it stands in."""
        return f"{STUDY}@{self.scale}"

    @property
    def job(self) -> Job:
        """The run as a worker receives it."""
        job = job_for(
            self.run, self.store, self.data,
            flops_per_token=self.costs.flops_per_token, threads=self.machine.threads, replayable=True,
        )  # fmt: skip
        return replace(job, profile=self.profile)

    @property
    def folder(self) -> RunFolder:
        return self.store.run(self.run.id)

    @property
    def is_finished(self) -> bool:
        return is_finished(self.run, self.store)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return tokens_of(self.run.config)

    @property
    def seconds(self) -> float:
        """Estimated training time."""
        return self.costs.flops_per_token * tokens_left(self.run.config) / self.machine.speed / self.ranks

    @property
    def memory(self) -> int:
        """Estimated bytes of one rank."""
        training = self.run.config.training
        share = training.model_copy(update={"batch_tokens": training.batch_tokens // self.ranks})
        config = self.run.config.model_copy(update={"training": share})
        return estimate_memory(config, self.costs, self.machine.device)


def plan_single(
    source: str | Path | Config,
    store: Store,
    *,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    ranks: int = 1,
    local_ranks: int | None = None,
    machine: Machine | None = None,
    progress: DataProgress | None = None,
    profile: bool = False,
) -> Single:
    """The run of a preset, file or config with `overrides`; its data is prepared. `local_ranks`: those on this machine,
    if not all are. Raises ConfigError."""
    if isinstance(source, Config):
        config, scale = resolve(lay(ConfigSource(source.tree(), {}), read_overrides(overrides))), CUSTOM
        label = digest(settings(config))[:8]
    else:
        config, scale = load_config(source, overrides, plugins=plugins), preset_name(source)
        label = " ".join(item for item in overrides if not item.startswith(UNSEEN)) or scale
    check_ranks(config, ranks, local_ranks or ranks)
    arm = Arm(label, {}, config)
    data = prepare(config.data, progress=progress)
    fetch_documents(config.evaluation.tasks)
    check_data(arm, data)
    costs = known_costs(config)
    machine = machine or probe(store, config.training, costs.flops_per_token, local_ranks or ranks)
    run = make_run(arm, config.seed if seed is None else seed, data, machine)
    return Single(
        label=label, scale=scale, run=run, costs=costs, machine=machine, data=data, store=store, ranks=ranks,
        profile=profile,
    )  # fmt: skip


def check_ranks(config: Config, ranks: int, local: int) -> None:
    """Raises ConfigError when a batch cannot be shared by `ranks`, or this machine has no room for `local` of them."""
    problems = config.training.problems(config.model.block_size, ranks)
    hint = f"--set training.batch_tokens={problems[0].what.rpartition(' ')[2]}" if problems else None
    if local > 1:
        device, threads = choose_device(config.training.device).type, config.training.threads or 1
        room = {"cpu": cores() // threads, "cuda": torch.cuda.device_count(), "mps": 1}[device]
        if local > room:
            has = f"{cores()} cores, and each rank takes {threads}" if device == "cpu" else f"{room} of device {device}"
            problems.append(Problem("--nproc", f"{local} ranks; this machine has {has}"))
            hint = f"--nproc {max(1, room)}"
    if problems:
        raise ConfigError(problems, hint=hint)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lines(single: Single) -> list[str]:
    """What the run is and what it costs, in sentences."""
    config, costs, machine = single.run.config, single.costs, single.machine
    training, many = config.training, single.ranks > 1
    share = f", {quantity(training.batch_tokens // single.ranks)} on each of {single.ranks} ranks" if many else ""
    flops = costs.flops_per_token * single.tokens
    threads = f", threads{' of each rank' if many else ''}: {machine.threads}" if machine.device == "cpu" else ""
    changes = f" with {single.label}" if single.label != single.scale else ""
    return [
        f"{single.scale}{changes}, seed {single.run.seed}: run {single.run.id}",
        f"{quantity(costs.parameters)} parameters, {quantity(single.tokens)} tokens in {training.steps:,} steps of "
        f"{quantity(training.batch_tokens)}{share}",
        f"{costs.flops_per_token / 1e6:,.1f} MFLOP/token, {flops / 1e15:,.3g} PFLOP: about {duration(single.seconds)} "
        f"and {memory(single.memory)}{' a rank' if many else ''} on {machine.device_name} ({machine.device}{threads}); "
        f"speed from {machine.speed_from}",
    ]


def as_record(single: Single) -> dict[str, Any]:
    """The same as plain data, with the result once there is one."""
    evaluation = single.folder.evaluation(single.run.evaluation_key) or {}
    return {
        "run": single.run.id,
        "path": str(single.folder.path),
        "preset": single.scale,
        "seed": single.run.seed,
        "ranks": single.ranks,
        "parameters": single.costs.parameters,
        "flops_per_token": single.costs.flops_per_token,
        "tokens": single.tokens,
        "seconds": single.seconds,
        "memory_bytes": single.memory,
        "device": single.machine.device,
        "threads": single.machine.threads,
        "status": single.folder.status(),
        "result": single.folder.result(),
        "evaluation": evaluation.get("metrics"),
    }


def result_lines(single: Single) -> list[str]:
    """How a finished run ended."""
    result = single.folder.result() or {}
    metrics = (single.folder.evaluation(single.run.evaluation_key) or {}).get("metrics", {})
    loss = metrics.get("val/loss")
    speed = result.get("tokens_per_second")
    parts = [
        f"validation loss {loss:.4f} nats" if loss is not None else "no validation loss",
        f"{metrics['val/bits_per_byte']:.4f} bits per byte" if metrics.get("val/bits_per_byte") is not None else "",
        f"{speed:,.0f} tokens/s" if speed else "",
        f"MFU {result['mfu']:.1%}" if result.get("mfu") else "",
        f"{duration(result['seconds'])} of training" if result.get("seconds") else "",
    ]
    return [", ".join(part for part in parts if part), f"{single.folder.path} (gpt2lab show {single.run.id[:8]})"]


def declare(single: Single, reproduce: str) -> StudyRecord:
    """Put the run into the record of all that were trained so at its scale; -> a record with this run alone, to
    follow."""
    record = single_record(
        STUDY, single.scale, single.label, single.run, single.costs, single.data, single.machine, reproduce=reproduce
    )
    store = single.store
    with file_lock(store.root / "studies" / f".{record.name}.lock"):
        whole = record
        if record.name in store.studies():
            before = store.study(record.name)
            runs = before.arms[single.label].runs if single.label in before.arms else {}
            arm = record.arms[single.label]
            whole = record.with_(
                arms={**before.arms, single.label: arm.with_(runs={**runs, **arm.runs})},
                seeds=sorted({*before.seeds, single.run.seed}),
                baseline=before.baseline,
                created=before.created,
            )
        store.write_study(whole)
    keep_sources([single.run.config], store)
    return record


def driver_of(
    single: Single, record: StudyRecord, on_event: Listener, tracker: TrackerFactory | None, watch: Watch | None
) -> Driver:
    """Follows the run while it trains; `watch` is asked for messages about its new rows."""
    run = single.run
    progress = {run.id: RunProgress(single.label, str(run.seed), run.id, run.config.training.steps)}

    def on_rows(run_id: str, rows: list[Row]) -> None:
        if watch and run_id == run.id:
            for text in watch(rows):
                driver.say(text)

    driver = Driver(single.store, record, lines(single)[0], 1, on_event, tracker, on_rows, progress)
    return driver


def train_single(
    single: Single,
    *,
    reproduce: str,
    on_event: Listener = ignore,
    tracker: TrackerFactory | None = None,
    watch: Watch | None = None,
    executor: Executor | None = None,
) -> None:
    """Train the run in processes of its own, as many as it has ranks.

    Raises Preempted when stopped, with everything saved; LockHeld; NumericsFault when it diverged; what its worker
    raised; RankLost.
    """
    refuse_if_held(single)
    machine = replace(single.machine, jobs=1, gpus=min(1, single.machine.gpus))
    with driver_of(single, declare(single, reproduce), on_event, tracker, watch) as driver:
        scheduler = Scheduler(
            executor or executor_for(machine, single.ranks), driver.tick, lambda _: single.is_finished
        )
        endings = scheduler.run([single.job])
        driver.tick()
    if endings[single.run.id] == "preempted":
        raise Preempted("stopped, everything saved", where=single.run.id, hint="the same command continues")
    if endings[single.run.id] == "failed":
        raise error_of(single.folder.failure() or {}, single.folder)
    refuse_divergence(single)


def train_as_rank(
    single: Single,
    *,
    leads: bool,
    reproduce: str,
    on_event: Listener = ignore,
    tracker: TrackerFactory | None = None,
    watch: Watch | None = None,
) -> int:
    """Train the run in this process, one of several that torchrun or the like has started; -> the exit code, with all
    said that is to be said. The first one follows the run in a thread."""
    stop = StopRequest()
    stop.listen()
    job = single.job
    if not leads:
        return work(job, stop)
    over = threading.Event()
    with driver_of(single, declare(single, reproduce), on_event, tracker, watch) as driver:

        def follow() -> None:
            while not over.wait(TICK_SECONDS):
                driver.tick()

        thread = threading.Thread(target=follow, name="gpt2lab-progress", daemon=True)
        thread.start()
        try:
            code = work(job, stop)
        finally:
            over.set()
            thread.join()
        driver.tick()
    return code


def error_of(failure: Mapping[str, object], folder: RunFolder) -> Gpt2labError:
    """The error that a failure.json records; for one that is none of ours, RankLost with where to read about it."""
    reason, hint = str(failure.get("reason")), failure.get("hint")
    error = Gpt2labError([Problem("", line) for line in reason.split("\n")], hint=None if hint is None else str(hint))
    code, exit_code = failure.get("code"), failure.get("exit_code")
    if failure.get("phase") == "worker":  # it could not say itself why it ended
        return RankLost(reason, hint=HINT)
    if not isinstance(code, str) or not isinstance(exit_code, int):
        rank, step = failure.get("rank", 0), failure.get("step", 0)
        what = f"rank {rank} raised {reason} at step {step}; log: {folder.path / 'error.log'}"
        return RankLost(what, hint=HINT)
    error.code, error.exit_code = code, exit_code
    return error


def refuse_if_held(single: Single) -> None:
    """Raises LockHeld, naming the process that is at work on the run."""
    if single.folder.status() == "running":
        holder = single.folder.holder()
        what = f"in use by process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        raise LockHeld(what, where=str(single.folder.path), hint="gpt2lab runs")


def refuse_divergence(single: Single) -> None:
    """Raises NumericsFault for a run that diverged: beside others that is a result, by itself it is a failure."""
    result = single.folder.result() or {}
    if result.get("status") == "diverged":
        what = str(result.get("reason") or "the loss is not finite").removeprefix("training: ")
        raise NumericsFault(what, where=str(single.folder.path), hint="a lower optim.lr, or training.nonfinite=skip")
