"""One run, wired: the only file that knows all the parts. It is what a worker process executes.

A run is trained once. Whatever stops it, the same command continues from its last checkpoint to the same bits: batches,
rates and random numbers are functions of the step, and the journal is cut back to the checkpoint before going on.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.batches import Batches
from gpt2lab.data.prepared import Prepared, open_prepared
from gpt2lab.errors import DataFault, Gpt2labError, Preempted
from gpt2lab.evaluation import (
    EvaluationConfig,
    WindowLosses,
    evaluate_by_window,
    evaluation_key,
    validation_documents,
)
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.registry import load_plugin
from gpt2lab.store import RunFolder, Store, now, write_atomically
from gpt2lab.tracking.journal import Journal
from gpt2lab.training.checkpoints import load_latest, prune, save
from gpt2lab.training.loop import Diverged, steps
from gpt2lab.training.precision import choose_device, set_threads
from gpt2lab.training.state import TrainState

PARENT = "GPT2LAB_PARENT"
REPLAYED = 20
"""Steps at the end that can be trained again from a checkpoint of their own."""

SCREENS = (0.1, 0.25, 0.5, 0.75)
"""Shares of training at which the loss is taken too: reports say how early the order of arms shows."""

NOTHING_LEFT = 3
"""A worker's exit code when another process had finished the run before it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EVALUATION_TOKENS_AT_ONCE = {"cpu": 4_096}  # what fits into a core's cache is a quarter faster
GPU_EVALUATION_TOKENS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Job:
    """All that a worker needs, as plain data: it crosses a process border, or a cluster's queue, as JSON."""

    root: str
    run_id: str
    config: str
    identity: dict[str, Any]
    data: str
    flops_per_token: float
    threads: int
    plugins: tuple[str, ...] = ()
    replayable: bool = False
    """whether a checkpoint from shortly before the end is kept, so that `gpt2lab adopt` can replay the last steps"""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        return Job(**{**fields, "plugins": tuple(fields["plugins"])})


class StopRequest:
    """Set by a signal, or when the parent is gone; the run then finishes its step, saves and ends with Preempted."""

    def __init__(self) -> None:
        self.reason: str | None = None
        # told by the parent, because one that died while we started is no longer to be asked for
        self._parent = int(os.environ.get(PARENT, os.getppid()))

    def listen(self) -> None:
        """Take over the stop signals, and ask the kernel for one when the parent dies (where it offers that)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and os.getppid() != self._parent:
            self.reason = "the process that started it is gone"
        return self.reason is not None


def execute(job: Job, stop: StopRequest) -> bool:
    """Train the run if it is not finished, then evaluate it if this evaluation is not there yet; False if nothing was
    left to do.

    Raises LockHeld when another process is at it, Preempted when stopped, and what training raises; except for a
    divergence, which is a result.
    """
    set_threads(job.threads)
    for plugin in job.plugins:
        load_plugin(plugin)
    config = config_from_text(job.config)
    run = Store(job.root).run(job.run_id)
    with run.lock():
        key = evaluation_key(config.evaluation.spec(config.model.block_size))
        result = run.result()
        if result is not None and (result["status"] == "diverged" or run.evaluation(key) is not None):
            return False
        data = open_prepared(job.data)
        if data.fingerprint != job.identity["data"]:
            raise DataFault(
                f"the prepared data changed: fingerprint {data.fingerprint[:12]}, planned with "
                f"{str(job.identity['data'])[:12]}",
                where=str(data.path),
                hint="start the same command again",
            )
        run.clear_failure()
        run.write_config(job.config)
        if run.identity() is None:
            record = {"id": job.run_id, "seed": config.seed, "repeat": config.repeat}
            run.write_identity({**record, "identity": job.identity, "created": now()})
        Training(run, config, data, job, stop).finish()
        return True


class Training:
    """One run in progress: model, data and journal joined."""

    def __init__(self, run: RunFolder, config: Config, data: Prepared, job: Job, stop: StopRequest):
        self.run, self.config, self.data, self.job, self.stop = run, config, data, job, stop
        device = choose_device(config.training.device)
        model = build_model(config.model, seed=config.seed, device=device)
        self.model: GPT = model
        self.state = TrainState(model, build_optimizers(config.optim, model.params()))
        self.final: tuple[dict[str, Any], WindowLosses] | None = None
        self.loaded = load_latest(run.checkpoints, self.state)
        if self.loaded:
            print(self.loaded, flush=True)

    def finish(self) -> None:
        """Train to the end, evaluate, record the result."""
        ended = self.run.result()
        if ended is None:
            try:
                self.train()
            except Diverged as diverged:
                self.run.finish(self.result("diverged", str(diverged)))
                return
        evaluation, windows = self.final or self.evaluate()
        self.run.write_windows(windows.record(evaluation["key"]))
        self.run.write_evaluation(evaluation)
        if ended is None:
            self.run.finish(self.result("finished", None))
            prune(self.run.checkpoints, keep=1)

    def train(self) -> None:
        """Every step that is left, into the journal, with evaluations and checkpoints when they are due."""
        training, every = self.config.training, self.config.evaluation.every_steps
        screens = {max(1, round(share * training.steps)) for share in SCREENS}
        batches = Batches(
            self.data.train,
            self.config.model.block_size,
            training.batch_tokens // self.config.model.block_size,
            self.config.seed,
        )
        with Journal(self.run.metrics) as journal:
            journal.truncate_after(self.state.step if self.loaded else -1)
            if journal.last_step < 0:
                journal.append(self.row({"val/loss": self.validation_loss()}))
            for record in steps(self.state, batches, self.config.optim, training, seed=self.config.seed):
                last = record.step == training.steps
                metrics = dict(record.metrics)
                if last:
                    self.final = self.evaluate()
                    metrics["val/loss"] = self.final[0]["metrics"]["val/loss"]
                elif record.step % every == 0 or record.step in screens:
                    metrics["val/loss"] = self.validation_loss()
                if metrics:
                    journal.append(self.row(metrics))
                if self.job.replayable and record.step == training.steps - REPLAYED:
                    save(self.run.replay, self.state)  # first: who continues from this very step does not come by again
                if last or self.stop or record.step % training.checkpoint_every_steps == 0:
                    journal.sync()
                    save(self.run.checkpoints, self.state)
                    prune(self.run.checkpoints)
                if self.stop and not last:
                    raise Preempted(
                        f"stopped after step {record.step} ({self.stop.reason}), all saved",
                        where=self.run.id,
                        hint="the same command continues",
                    )

    def row(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """A line of the journal; `seconds` is the only field in which two equal runs differ."""
        state = self.state
        return {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 4),
            "metrics": dict(metrics),
        }

    def validation_loss(self) -> float:
        """The curve's value at this step: the fixed validation tokens, without other contexts."""
        plain = self.config.evaluation.model_copy(update={"contexts": ()})
        record, _ = evaluated(self.model, self.config, self.data, self.job.identity["device"], plain)
        return float(record["metrics"]["val/loss"])

    def evaluate(self) -> tuple[dict[str, Any], WindowLosses]:
        """The final evaluation's record, as the store keeps it, and the loss of each of its windows."""
        device, documents = self.job.identity["device"], validation_documents(self.data)
        return evaluated(self.model, self.config, self.data, device, self.config.evaluation, documents)

    def result(self, status: str, reason: str | None) -> dict[str, Any]:
        """What result.json says."""
        rows = self.run.rows()
        state = self.state
        return {
            "status": status,
            "reason": reason,
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
            "flops_per_token": self.job.flops_per_token,
            "peak_memory_bytes": peak_memory(),
            "metrics": {name: value for row in rows for name, value in row["metrics"].items()},
            "stack": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": self.job.identity["device"],
                "threads": self.job.threads,
            },
            "finished_at": now(),
        }


def evaluated(
    model: GPT, config: Config, data: Prepared, device: str, evaluation: EvaluationConfig,
    documents: NDArray[np.int64] | None = None,
) -> tuple[dict[str, Any], WindowLosses]:  # fmt: skip
    """One evaluation of a run's model: its record and the loss of each window; `documents`: see `by_document`."""
    block = config.model.block_size
    at_once = EVALUATION_TOKENS_AT_ONCE.get(device, GPU_EVALUATION_TOKENS_AT_ONCE)
    return evaluate_by_window(
        model,
        data.validation,
        evaluation,
        block_size=block,
        batch_sequences=config.training.micro_batch_sequences or max(1, at_once // block),
        byte_lengths=data.byte_lengths,
        documents=documents,
        precision=config.training.precision,
    )


def peak_memory() -> int:
    """Bytes at the peak: of the GPU's allocator where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def record_failure(job: Job, error: BaseException) -> None:
    """failure.json in one sentence and error.log in full, so that the ablation can go on and its report can say why."""
    folder = Store(job.root).run(job.run_id)
    rows = folder.rows() if folder.metrics.exists() else []
    step = rows[-1]["step"] if rows else 0
    reason = str(error) if isinstance(error, Gpt2labError) else f"{type(error).__name__}: {error}"
    write_atomically(folder.path / "error.log", "".join(traceback.format_exception(error)))
    folder.fail({"reason": reason, "phase": "training" if step else "start", "step": step, "at": now()})


def main() -> int:
    """A worker: one job from standard input, exit code as the error says. Standard output is the run's log."""
    stop = StopRequest()
    stop.listen()
    job = Job.from_json(sys.stdin.read())
    Path(job.root).mkdir(parents=True, exist_ok=True)
    try:
        return 0 if execute(job, stop) else NOTHING_LEFT
    except Gpt2labError as error:
        if error.code not in ("PREEMPTED", "LOCK"):
            record_failure(job, error)
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        record_failure(job, error)
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
