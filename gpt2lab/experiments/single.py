"""A single run: one config and one seed, in the same store as those of ablations.

Runs are shared with ablations: neither trains a run that the other has finished. Single runs of one scale share a
record, `train@<preset>`, which is sent to MLflow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gpt2lab.basics.progress import Listener, RunProgress, ignore
from gpt2lab.basics.text import duration, memory, quantity
from gpt2lab.config import Config, load_config, preset_name, preset_names, read_overrides, resolve
from gpt2lab.config.source import YamlSource as ConfigSource
from gpt2lab.config.source import overlay
from gpt2lab.data.files import Progress as DataProgress
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import prepare
from gpt2lab.errors import ConfigError, Gpt2labError, LockHeld, NumericsFault, Preempted, Problem, RankLost
from gpt2lab.evaluation.tasks import fetch_documents
from gpt2lab.executors import Executor
from gpt2lab.executors.driver import Driver, TrackerFactory, executor_for
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments import command
from gpt2lab.identity import digest, settings
from gpt2lab.inspection.costs import Costs
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine, check_ranks, estimate_memory, probe
from gpt2lab.planning.plan import check_data
from gpt2lab.planning.record import single_record
from gpt2lab.planning.runs import (
    Run,
    is_finished,
    known_costs,
    make_run,
    repetition,
    tokens_left,
    tokens_of,
    unmeasured_lines,
)
from gpt2lab.records import StudyRecord
from gpt2lab.reuse.why import keep_sources
from gpt2lab.runner import Job, StopRequest
from gpt2lab.runner.job import job_for
from gpt2lab.runner.worker import work
from gpt2lab.schema import convert
from gpt2lab.store import Row, RunFolder, Store, file_lock
from gpt2lab.training.ranks import HINT

STUDY = "train"
CUSTOM = "custom"
"""Scale of configs that are made in Python."""

TICK_SECONDS = 0.5
NOT_IN_LABEL = "evaluation."
"""Prefix of overrides that are left out of a run's label, since they do not change the run."""

COMPARED = ("model", "data", "optim", "training")
"""Sections of a config that say what a run is."""

Watch = Callable[[Sequence[Mapping[str, Any]]], Iterable[str]]
"""Called with new rows of the journal; -> messages for the user."""


def beside_presets(config: Config) -> dict[str, Any]:
    """What a config sets otherwise than the nearest preset, by dotted key; `preset` names that."""

    def values(config: Config) -> dict[str, Any]:
        tree = config.tree()
        return {f"{section}.{key}": tree[section][key] for section in COMPARED for key in tree[section]}

    chosen = values(config)
    presets = {name: values(load_config(name)) for name in preset_names()}
    other = {
        name: {key: chosen.get(key) for key in {**preset, **chosen} if chosen.get(key) != preset.get(key)}
        for name, preset in presets.items()
    }
    nearest = min(other, key=lambda name: len(other[name]))
    return {"preset": nearest, **other[nearest]}


@dataclass(frozen=True, kw_only=True)
class Single:
    """One run, planned for the ranks of a machine over prepared data."""

    label: str
    """name of the run within its scale: its overrides, or the scale's name"""
    changes: Mapping[str, Any]
    """what it sets otherwise than its preset, by dotted key"""
    scale: str
    run: Run
    costs: Costs
    machine: Machine
    data: Prepared
    store: Store
    profile: bool = False
    reproduce: str = ""
    """the command or call that repeats the run, for its record"""

    @classmethod
    def prepare(
        cls,
        source: str | Path | Config,
        store: Store,
        *,
        seed: int | None = None,
        overrides: Sequence[str] = (),
        plugins: Sequence[str | Path] = (),
        ranks: int = 1,
        local_ranks: int | None = None,
        progress: DataProgress | None = None,
        profile: bool = False,
    ) -> Single:
        """The run of a preset, file or config with `overrides`; its data is prepared. local_ranks: those on this
        machine, if not all are. Raises ConfigError."""
        if isinstance(source, Config):
            config, scale = resolve(overlay(ConfigSource(source.tree(), {}), read_overrides(overrides))), CUSTOM
            label, changes, reproduce = digest(settings(config))[:8], beside_presets(config), "gpt2lab.train(config)"
        else:
            config, scale = load_config(source, overrides, plugins=plugins), preset_name(source)
            set_here = [item for item in overrides if not item.startswith(NOT_IN_LABEL)]
            label, changes = " ".join(set_here) or scale, dict(item.partition("=")[::2] for item in set_here)
            reproduce = command("train", source, set=overrides, seed=seed, plugin=plugins)
        try:
            seed = config.seed if seed is None else convert(seed, Annotated[int, Field(ge=0)])
        except ValueError as error:
            raise ConfigError(str(error), where="seed", hint="a smaller one") from None
        check_ranks(config, ranks, local_ranks)
        arm = Arm(label, {}, config)
        data = prepare(config.data, progress=progress)
        fetch_documents(config.evaluation.tasks)
        check_data(arm, data, ranks)
        costs = known_costs(config)
        here = probe(store, config.training, costs.flops_per_token, 1, local_ranks or ranks)
        machine = replace(here, ranks=ranks)
        run = make_run(arm, seed, data, machine)
        return cls(
            label=label, changes=changes, scale=scale, run=run, costs=costs, machine=machine, data=data, store=store,
            profile=profile, reproduce=reproduce,
        )  # fmt: skip

    @property
    def folder(self) -> RunFolder:
        return self.store.run(self.run.id)

    @property
    def is_finished(self) -> bool:
        return is_finished(self.run, self.store)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the final evaluation; empty before it."""
        return (self.folder.evaluation(self.run.evaluation_key) or {}).get("metrics") or {}

    @property
    def seconds(self) -> float:
        """Estimated training time."""
        return self.costs.flops_per_token * tokens_left(self.run.config) / self.machine.run_speed

    @property
    def memory(self) -> int:
        """Estimated bytes of one rank."""
        return estimate_memory(self.run.config, self.costs, self.machine)

    def lines(self) -> list[str]:
        """The run and its costs, as sentences."""
        costs, machine, training = self.costs, self.machine, self.run.config.training
        ranks, many = machine.ranks, machine.ranks > 1
        tokens = tokens_of(self.run.config)
        share = f", {quantity(training.batch_tokens // ranks)} on each of {ranks} ranks" if many else ""
        threads = f", threads{' of each rank' if many else ''}: {machine.threads}" if machine.device == "cpu" else ""
        changes = f" with {self.label}" if self.label != self.scale else ""
        return [
            f"{self.scale}{changes}, seed {self.run.seed}: run {self.run.id}",
            f"{quantity(costs.parameters)} parameters, {quantity(tokens)} tokens in {training.steps:,} steps of "
            f"{quantity(training.batch_tokens)}{share}",
            f"{costs.flops_per_token / 1e6:,.1f} MFLOP/token, {costs.flops_per_token * tokens / 1e15:,.3g} PFLOP: "
            f"about {duration(self.seconds)} and {memory(self.memory)}{' a rank' if many else ''} on "
            f"{machine.device_name} ({machine.device}{threads}); speed from {machine.speed_from}",
            *repetition(tokens, self.data),
            *unmeasured_lines([self.run], self.store),
        ]

    def as_record(self) -> dict[str, Any]:
        """The same as plain data, with the result if finished."""
        return {
            "run": self.run.id,
            "path": str(self.folder.path),
            "preset": self.scale,
            "seed": self.run.seed,
            "ranks": self.machine.ranks,
            "parameters": self.costs.parameters,
            "flops_per_token": self.costs.flops_per_token,
            "tokens": tokens_of(self.run.config),
            "seconds": self.seconds,
            "memory_bytes": self.memory,
            "device": self.machine.device,
            "threads": self.machine.threads,
            "status": self.folder.status(),
            "result": self.folder.result(),
            "evaluation": self.metrics or None,
        }

    def result_lines(self) -> list[str]:
        """The result of a finished run, as sentences."""
        result, metrics = self.folder.result() or {}, self.metrics
        loss, bits, speed = metrics.get("val/loss"), metrics.get("val/bits_per_byte"), result.get("tokens_per_second")
        parts = [
            f"validation loss {loss:.4f} nats" if loss is not None else "no validation loss",
            f"{bits:.4f} bits per byte" if bits is not None else "",
            f"{speed:,.0f} tokens/s" if speed else "",
            f"MFU {result['mfu']:.1%}" if result.get("mfu") else "",
            f"{duration(result['seconds'])} of training" if result.get("seconds") else "",
        ]
        return [", ".join(filter(None, parts)), f"{self.folder.path} (gpt2lab show {self.run.id[:8]})"]

    def train(
        self,
        *,
        on_event: Listener = ignore,
        tracker: TrackerFactory | None = None,
        watch: Watch | None = None,
        executor: Executor | None = None,
    ) -> None:
        """Train the run in worker processes, one per rank.

        Raises Preempted when stopped, with everything saved; LockHeld; NumericsFault when it diverged; the error of its
        worker; RankLost.
        """
        if self.folder.status() == "running":
            holder = self.folder.holder()
            problem = f"in use by process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            raise LockHeld(problem, where=str(self.folder.path), hint="gpt2lab runs")
        executor = executor or executor_for(replace(self.machine, gpus=min(1, self.machine.gpus)))
        with self._driver(on_event, tracker, watch) as driver:
            ending = Scheduler(executor, driver.tick, lambda _: self.is_finished).run([self._job()])[self.run.id]
            driver.tick()
        if ending == "preempted":
            raise Preempted("stopped, everything saved", where=self.run.id, hint="the same command continues")
        if ending == "failed":
            raise error_of(self.folder.failure() or {}, self.folder)
        self.refuse_divergence()

    def train_as_rank(
        self,
        *,
        leads: bool,
        on_event: Listener = ignore,
        tracker: TrackerFactory | None = None,
        watch: Watch | None = None,
    ) -> int:
        """Train the run in this process, one of several that torchrun or the like has started; -> the exit code, errors
        having been printed. The first rank follows the run in a thread."""
        stop = StopRequest()
        stop.listen()
        job = self._job()
        if not leads:
            return work(job, stop)
        over = threading.Event()
        with self._driver(on_event, tracker, watch) as driver:

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

    def refuse_divergence(self) -> None:
        """Raises NumericsFault for a run that diverged: in a study that is a result, for a single run a failure."""
        result = self.folder.result() or {}
        if result.get("status") == "diverged":
            problem = str(result.get("reason") or "the loss is not finite").removeprefix("training: ")
            hint = "a lower optim.lr, or training.nonfinite=skip"
            raise NumericsFault(problem, where=str(self.folder.path), hint=hint)

    def _job(self) -> Job:
        job = job_for(
            self.run, self.store, self.data, flops_per_token=self.costs.flops_per_token, threads=self.machine.threads,
            replayable=True,
        )  # fmt: skip
        return replace(job, profile=self.profile)

    def _driver(self, on_event: Listener, tracker: TrackerFactory | None, watch: Watch | None) -> Driver:
        """Declares the run and follows it while it trains; `watch` is called with its new rows."""
        run = self.run
        progress = {run.id: RunProgress(self.label, str(run.seed), run.id, run.config.training.steps)}

        def on_rows(run_id: str, rows: list[Row]) -> None:
            for text in watch(rows) if watch and run_id == run.id else ():
                driver.say(text)

        driver = Driver(self.store, self._declare(), self.lines()[0], 1, on_event, tracker, on_rows, progress)
        return driver

    def _declare(self) -> StudyRecord:
        """Add the run to the record of its scale; -> a record with this run only, for the driver."""
        store = self.store
        record = single_record(
            STUDY, self.scale, self.label, self.changes, self.run, self.costs, self.data, self.machine,
            reproduce=self.reproduce,
        )  # fmt: skip
        with file_lock(store.folder("studies") / f".{record.name}.lock"):
            combined = record
            if record.name in store.studies():
                earlier = store.study(record.name)
                runs = earlier.arms[self.label].runs if self.label in earlier.arms else {}
                arm = record.arms[self.label]
                combined = record.with_(
                    arms={**earlier.arms, self.label: arm.with_(runs={**runs, **arm.runs})},
                    seeds=sorted({*earlier.seeds, self.run.seed}),
                    baseline=earlier.baseline,
                    created=earlier.created,
                )
            store.write_study(combined)
        keep_sources([self.run.config], store)
        return record


def error_of(failure: Mapping[str, object], folder: RunFolder) -> Gpt2labError:
    """The error that a failure.json records; RankLost with the log file for an unexpected one."""
    reason, hint = str(failure.get("reason")), failure.get("hint")
    error = Gpt2labError([Problem("", line) for line in reason.split("\n")], hint=None if hint is None else str(hint))
    code, exit_code = failure.get("code"), failure.get("exit_code")
    if failure.get("phase") == "worker":  # written by the process that watched it
        return RankLost(reason, hint=HINT)
    if not isinstance(code, str) or not isinstance(exit_code, int):
        rank, step, line = failure.get("rank", 0), failure.get("step", 0), reason.partition("\n")[0]
        logs = [path for name in ("error.log", "run.log") if (path := folder.path / name).exists()]
        what = f"rank {rank} raised {line} at step {step}" + "".join(f"; log: {path}" for path in logs[:1])
        return RankLost(
            what, hint=HINT if folder.saved_step() else "the log has the trace; the same command tries again"
        )
    error.code, error.exit_code = code, exit_code
    return error
