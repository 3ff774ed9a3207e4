"""One run from its first step, or its last checkpoint, to its result.

A run is trained once. Whatever stops it, the same command continues from its last checkpoint to the same bits: batches,
rates and random numbers are functions of the step, and the journal is cut back to the checkpoint before going on.

Several ranks may train one run together: then the first holds the lock and writes, and all train and evaluate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpt2lab.basics.faults import point
from gpt2lab.basics.signals import StopRequest
from gpt2lab.config import Config
from gpt2lab.data.curricula import batches_of, optim_of
from gpt2lab.data.files import data_home
from gpt2lab.data.prepared import Prepared, open_verified
from gpt2lab.errors import DataFault, EnvironmentFault, LockHeld, Preempted, command
from gpt2lab.evaluation.validation import evaluation_key
from gpt2lab.evaluation.windows import Parts, WindowLosses, divisions, validation_documents
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_averaging, build_optimizers
from gpt2lab.pretrained.origin import start_from_weights
from gpt2lab.runner.arrival import config_of
from gpt2lab.runner.job import REPLAYED, Job
from gpt2lab.runner.measured import (
    account,
    encoded_tasks,
    evaluated,
    health,
    is_due,
    on_tasks,
    point_of_curve,
    validation_loss,
)
from gpt2lab.schema import flatten
from gpt2lab.store import RunFolder, Store, now, read_json
from gpt2lab.tracking.journal import Journal
from gpt2lab.training.checkpoints import (
    MANIFEST,
    Loaded,
    best_step,
    checkpoints,
    load_latest,
    prune,
    save,
    start_from,
    weights_from,
)
from gpt2lab.training.clock import Clock
from gpt2lab.training.compiling import compiled
from gpt2lab.training.diagnostics import Diagnostic, observes_updates
from gpt2lab.training.diagnostics import build as build_diagnostics
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.guard import Diverged
from gpt2lab.training.loop import StepRecord, set_progress, steps
from gpt2lab.training.precision import choose_device, loss_scaler, set_arithmetic, set_threads
from gpt2lab.training.ranks import RankPosition, report_position, require_equal
from gpt2lab.training.state import TrainState

TRACE = "trace.json"
NOT_TRACED, WARM_UP, TRACED = 5, 2, 3  # steps: the first ones are not like the others


def execute(job: Job, stop: StopRequest, world: World = ALONE) -> bool:
    """Train the run if it is not finished, then evaluate it if this evaluation is not there yet; False if nothing was
    left to do. Every rank of `world` must call it, with the same job.

    Raises ConfigError when ranks differ in what they were given, LockHeld when another process is at it, Preempted when
    stopped, and what training raises; except for a divergence, which is a result.
    """
    set_threads(job.threads)
    config = config_of(job)
    require_equal(world, plan_of(job, config))
    run = Store(job.root).run(job.run_id)
    with held(run, world):
        key = evaluation_key(config.evaluation.spec(config.model.block_size))
        result = run.result()
        if result is not None and (result["status"] == "diverged" or run.evaluation(key) is not None):
            return False
        data = open_verified(job.data)
        if data.fingerprint != job.identity["data"]:
            raise DataFault(
                f"the prepared data changed: fingerprint {data.fingerprint[:12]}, planned with "
                f"{str(job.identity['data'])[:12]}",
                where=str(data.path),
                hint="start the same command again",
            )
        if world.rank == 0:
            run.clear_failure()
            run.write_config(job.config)
            if run.identity() is None:
                record = {"id": job.run_id, "seed": config.seed, "repeat": config.repeat}
                run.write_identity({**record, "identity": job.identity, "created": now()})
        Training(run, config, data, job, stop, world).finish()
        return True


def plan_of(job: Job, config: Config) -> dict[str, Any]:
    """What all ranks must have alike, or gradients of different trainings would be averaged in silence: every setting
    by its key, and what the run's identity holds beside them (data, code, torch)."""
    identity = {key: value for key, value in job.identity.items() if key != "settings"}
    return {**flatten(config.tree()), **flatten(identity), "torch here": torch.__version__, "run id": job.run_id}


def start_of(run: RunFolder, loaded: Loaded | None) -> dict[str, Any]:
    """The checkpoint that was loaded, with the sum of its manifest; all ranks must have that alike, too."""
    if loaded is None:
        return {"checkpoint": "none"}
    manifest = read_json(run.checkpoints / f"step_{loaded.step:06d}" / MANIFEST) or {}
    return {"checkpoint": f"step {loaded.step}, {str(manifest.get('sha256'))[:12]}"}


def refuse_another_device(device: torch.device, job: Job) -> None:
    """Raises EnvironmentFault where this process finds another type of device than the run's identity says: it would
    train another run under that name."""
    planned = job.identity.get("device", device.type)
    if planned != device.type:
        raise EnvironmentFault(
            f"planned on {planned}, but this process finds {device.type} alone",
            where="training.device",
            hint="nvidia-smi, and CUDA_VISIBLE_DEVICES; then the same command",
        )


@contextlib.contextmanager
def held(run: RunFolder, world: World) -> Iterator[None]:
    """The run's lock, held by the first rank for all. Raises LockHeld on every rank."""
    with contextlib.ExitStack() as stack:
        refused: LockHeld | None = None
        if world.rank == 0:
            try:
                stack.enter_context(run.lock())
            except LockHeld as error:
                refused = error
        for refusal in world.gather(refused):
            if refusal is not None:
                raise refusal
        yield


@contextlib.contextmanager
def profiled(folder: Path) -> Iterator[profile]:
    """Trace steps 8 to 10 of what happens inside into `folder`/trace.json, for chrome://tracing or
    https://ui.perfetto.dev."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def export(traced: profile) -> None:
        traced.export_chrome_trace(str(folder / TRACE))
        print(f"traced {TRACED} steps into {folder / TRACE}", flush=True)

    plan = schedule(skip_first=NOT_TRACED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=export, record_shapes=True) as profiler:
        yield profiler


class Training:
    """One run in progress: model, data and journal joined."""

    def __init__(
        self, run: RunFolder, config: Config, data: Prepared, job: Job, stop: StopRequest, world: World = ALONE
    ):
        self.run, self.config, self.data, self.job, self.stop, self.world = run, config, data, job, stop, world
        self.device = choose_device(config.training.device, world.local_rank)
        refuse_another_device(self.device, job)
        set_arithmetic(config.training.precision, self.device, config.training.deterministic)
        self.clock = Clock(self.device)
        model = build_model(config.model, seed=config.seed, device=self.device)
        fit = None
        if config.from_weights and not any(checkpoints(run.checkpoints)):
            fit = start_from_weights(str(config.branch), model, strict=config.branch_takes == "all")
            self.log(f"starting from the weights of {config.branch}: {fit}")
        if job.identity.get("compiled"):
            compiled(model, data_home() / "compiled")
        self.model: GPT = model
        optimizers = build_optimizers(config.optim, model.params())
        self.state = TrainState(
            model,
            optimizers,
            scaler=loss_scaler(config.training.precision, self.device),
            averaging=build_averaging(config.optim, model.params(), config.training.steps),
        )
        self.batches = batches_of(config, data, world=world.size)
        self.tasks = encoded_tasks(config, data)
        self.final: tuple[dict[str, Any], WindowLosses, Parts] | None = None
        report_position(lambda: RankPosition(self.state.step, self.clock.phase, self.clock.entered))
        self.loaded = load_latest(run.checkpoints, self.state)
        self.start: dict[str, Any] | None = asdict(fit) if fit else None
        if self.loaded:
            self.start = self.loaded.extra.get("start")
        if self.loaded is None and config.branch and not config.from_weights:
            trunk = Store(job.root).run(config.branch.partition("@")[0])
            step = int(config.branch.partition("@")[2])
            self.log(f"branching from run {trunk.id} at step {step}")
            if config.branch_takes == "all":
                start_from(trunk.checkpoints, step, self.state)
            else:
                fit = weights_from(trunk.checkpoints, step, self.state)
                self.start = asdict(fit)
                self.log(str(fit))
        set_progress(model, self.state.step, config.training)
        require_equal(world, start_of(run, self.loaded))
        if self.loaded:
            self.clock.resume(self.loaded.extra.get("time", {}))
            self.log(str(self.loaded))
            before = self.loaded.extra.get("ranks", world.size)
            if before != world.size:
                self.log(f"saved by {before} ranks, continued by {world.size}: the same batches, but bits may differ")

    @property
    def is_first(self) -> bool:
        """Whether this rank writes for all."""
        return self.world.rank == 0

    def log(self, text: str) -> None:
        """A line of the run's log."""
        if self.is_first:
            print(text, flush=True)

    def finish(self) -> None:
        """Train to the end, evaluate, record the result."""
        before = self.run.result()
        if before is None:
            try:
                self.train()
            except Diverged as diverged:
                if self.is_first:
                    self.run.finish(self.result("diverged", str(diverged), diverged))
                return
        evaluation, windows, parts = self.final or self.evaluate()
        if not self.is_first:
            return
        self.run.write_windows(windows.record(evaluation["key"]))
        self.run.write_parts(parts.record(evaluation["key"]))
        self.run.write_evaluation(evaluation)
        if before is None:
            self.prune(keep=1)  # before the result: a finished run is not opened again
            point("result")
            self.run.finish(self.result("finished", None))

    def train(self) -> None:
        """Every step that is left, into the journal, with evaluations and checkpoints when they are due."""
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(Journal(self.run.metrics)) if self.is_first else None
            if journal:
                journal.truncate_after(self.state.step if self.loaded else -1)
                self.require_rows()
            if self.loaded is None:
                first = self.curve()
                if journal:
                    journal.append(self.row(first))
            profiler = stack.enter_context(profiled(self.run.path)) if self.is_first and self.job.profile else None
            for record in self.steps():
                if profiler:
                    profiler.step()
                metrics = record.metrics | self.measured(record.step)
                if journal and metrics:
                    journal.append(self.row(metrics))
                self.save_if_due(record, journal)
                if record.stop and record.step < self.config.training.steps:
                    raise Preempted(
                        f"stopped after step {record.step} ({self.stop.reason or 'asked by another rank'}), all saved",
                        where=self.run.id,
                        hint="the same command continues",
                    )

    def require_rows(self) -> None:
        """Raises DataFault where a checkpoint is there and the journal before it is not: the run could end, but
        without its curve."""
        rows, step = self.run.rows(), self.loaded.step if self.loaded else None
        last = step and step - step % self.config.training.log_every_steps
        if step and not (rows and rows[0]["step"] == self.config.first_step and rows[-1]["step"] >= (last or 0)):
            raise DataFault(
                f"the rows up to step {step} are gone, of which there is a checkpoint",
                where=str(self.run.metrics),
                hint=command("mv", self.run.path, f"{self.run.path}.damaged") + "; the same command trains it again",
            )

    def steps(self) -> Iterator[StepRecord]:
        """The loop over what is left."""
        return steps(
            self.state,
            self.batches,
            optim_of(self.config, self.batches),
            self.config.training,
            seed=self.config.seed,
            world=self.world,
            stop=lambda: bool(self.stop),
            diagnostics=self.update_diagnostics,
            clock=self.clock,
        )

    def update_diagnostics(self, step: int) -> list[Diagnostic]:
        """Those that observe the update of `step`: none between evaluations."""
        built = build_diagnostics(self.config.evaluation.diagnostics) if is_due(step, self.config) else []
        return [part for part in built if observes_updates(part)]

    def measured(self, step: int) -> dict[str, float]:
        """What is measured after `step`: nothing, a point of the curve, or the final evaluation."""
        if step < self.config.training.steps:
            return self.curve() if is_due(step, self.config) else {}
        with self.clock("evaluation"):
            self.final = self.evaluate()
            loss = {"val/loss": self.final[0]["metrics"]["val/loss"]} | self.raw_loss(is_last=True)
            with self.state.evaluated():
                diagnostics = health(self.model, self.config, self.data)
                return loss | diagnostics | on_tasks(self.tasks, self.model, self.config, self.world)

    def save_if_due(self, record: StepRecord, journal: Journal | None) -> None:
        """Save what is to be saved after a step."""
        training, step = self.config.training, record.step
        if not self.is_first or journal is None:
            return
        with self.clock("saving"):
            if self.job.replayable and step == training.steps - REPLAYED:
                # first, because a run that continues from this step does not save it again
                save(self.run.replay, self.state)
            every = (training.checkpoint_every_steps, training.milestone_every_steps)
            if step == training.steps or record.stop or any(n and step % n == 0 for n in every):
                journal.sync()
                save(self.run.checkpoints, self.state, extra=self.provenance())
                self.prune(training.keep_checkpoints)

    def provenance(self) -> dict[str, Any]:
        """Where a checkpoint comes from, as stored in it."""
        time = self.clock.split()
        origin = {"run": self.run.id, "config": self.job.config, "identity": self.job.identity}
        start = {"start": self.start} if self.start else {}
        return {**origin, **start, "ranks": self.world.size, "time": time}

    def prune(self, keep: int) -> None:
        """Delete the checkpoints that the config does not keep."""
        training, best = self.config.training, None
        if training.keep_best:
            losses = {row["step"]: row["metrics"].get("val/loss") for row in self.run.rows()}
            best = best_step(self.run.checkpoints, {step: loss for step, loss in losses.items() if loss is not None})
        prune(self.run.checkpoints, keep=keep, best=best, milestone_every_steps=training.milestone_every_steps)

    def row(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """A line of the journal; `seconds` is the only field in which two equal runs differ."""
        progress = {"step": self.state.step, "tokens": self.state.tokens, "seconds": round(self.state.seconds, 4)}
        return {**progress, "metrics": dict(metrics)}

    def curve(self) -> dict[str, float]:
        """The curve's values at this step."""
        point("evaluation")
        with self.clock("evaluation"):
            raw = self.raw_loss()
            with self.state.evaluated():
                curve = point_of_curve(self.model, self.config, self.data, self.device.type, self.world)
                return curve | raw | on_tasks(self.tasks, self.model, self.config, self.world)

    def raw_loss(self, *, is_last: bool = False) -> dict[str, float]:
        """The loss of the weights in training, where others are evaluated."""
        if not self.state.has_average:
            return {}
        device = self.device.type
        loss = validation_loss(self.model, self.config, self.data, device, self.world, is_last=is_last)
        return {"val/raw_loss": loss}

    def evaluate(self) -> tuple[dict[str, Any], WindowLosses, Parts]:
        """The final evaluation's record, as the store keeps it, the loss of each of its windows, and what it is by
        position, token frequency and work."""
        point("evaluation")
        config, data, parts = self.config, self.data, Parts(divisions(self.data, self.config.model.block_size))
        documents = validation_documents(data)
        with self.state.evaluated():
            record, windows = evaluated(
                self.model, config, data, self.device.type, config.evaluation, documents, self.world, parts
            )
        return record, windows, parts

    def result(self, status: str, reason: str | None, diverged: Diverged | None = None) -> dict[str, Any]:
        """The content of result.json."""
        rows = self.run.rows()
        cost = account(self.state, self.config, self.job, self.device, self.clock.split(), self.world.size)
        values: dict[str, Any] = {"metrics": {name: x for row in rows for name, x in row["metrics"].items()}}
        if diverged is None:
            values["evaluation"] = evaluation_key(self.config.evaluation.spec(self.config.model.block_size))
        else:
            where = {"step": diverged.step, "lr": diverged.lr, "loss": diverged.loss, "grad_norm": diverged.grad_norm}
            values["divergence"] = {**where, "batch": self.batches.where(diverged.step - 1)}
        if self.start:
            values["start"] = self.start
        return {"status": status, "reason": reason, **cost, **values, "finished_at": now()}
