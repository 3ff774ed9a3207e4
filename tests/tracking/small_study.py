"""A small study and a small sweep on disk, written as their workers would write them, and two looks at trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2lab.records import StudyRecord, SweepRecord
from gpt2lab.store import RunFolder, Status, Store
from gpt2lab.tracking import MetricPoint, TrackedRun
from gpt2lab.tracking.mlflow import MlflowTracker

CREATED = "2026-01-02T03:04:05+00:00"


def row(step: int, seconds: float | None = None, **metrics: float) -> dict[str, Any]:
    metrics = metrics or {"train/loss": 5.0 - step / 10, "val/loss": 5.0 - step / 20}
    return {"step": step, "tokens": 64 * step, "seconds": step / 8 if seconds is None else seconds, "metrics": metrics}


class Lab:
    """A store with one study of two arms and two seeds; runs are written as a worker would write them."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "runs")
        ids = {arm: {str(s): f"{index:08x}{s:08x}" for s in (0, 1)} for index, arm in enumerate(("learned", "rotary"))}
        self.record: dict[str, Any] = {
            "name": "posenc@nano",
            "scale": "nano",
            "question": "Which position encoding?",
            "baseline": "learned",
            "arms": {arm: {"components": {"position": arm}, "runs": runs} for arm, runs in ids.items()},
            "evaluation": {"key": "val-1"},
            "stack": {"git_commit": "c0ffee"},
            "reproduce": "gpt2lab run ablations/posenc.yaml --scale nano",
            "created": CREATED,
            "hash": "abc",
        }
        self.declare()

    def declare(self) -> None:
        """Write the record as it is now."""
        rest = {"ablation": "posenc", "contrasts": [], "seeds": [0, 1], "smallest_effect": 0.05, "alpha": 0.05}
        self.store.write_study(StudyRecord.read(rest | self.record, "a test"))

    def run(self, arm: str = "learned", seed: int = 0) -> RunFolder:
        return self.store.run(self.record["arms"][arm]["runs"][str(seed)])

    def begin(self, run: RunFolder) -> RunFolder:
        run.write_identity({"id": run.id, "seed": 0, "repeat": 0, "created": CREATED})
        run.write_config("model: {n_layer: 4, norm: layernorm}\noptim: {lr: 4e-3}\nseed: 0\n")
        return run

    def write(self, run: RunFolder, rows: list[dict[str, Any]]) -> None:
        with run.metrics.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in rows)

    def finish(self, run: RunFolder, status: str = "finished", **more: Any) -> None:
        result = {
            "status": status,
            "reason": None,
            "steps": len(run.rows()) - 1,
            "tokens_per_second": 900.0,
            "mfu": 0.4,
        }
        run.finish({**result, "peak_memory_bytes": 7, "finished_at": "2026-01-02T04:00:00+00:00", **more})

    def train(self, run: RunFolder, steps: int = 4) -> RunFolder:
        self.begin(run)
        self.write(run, [row(step) for step in range(steps + 1)])
        self.finish(run)
        return run

    def train_all(self) -> None:
        for arm in self.record["arms"]:
            for seed in (0, 1):
                self.train(self.run(arm, seed))


def trial(slot: int, outcome: str = "finished", *, seeds: Sequence[int] = (100,), begun: bool = True,
          **settings: Any) -> dict[str, Any]:  # fmt: skip
    """One trial of a sweep's record; its runs have ids that tell slot and seed."""
    runs = {str(seed): f"{slot:08x}{seed:08x}" for seed in seeds} if begun else {}
    return {"slot": slot, "outcome": outcome, "settings": settings or {"optim.lr": 1e-3 * (slot + 1)}, "runs": runs,
            "stopped_at": 2 if outcome == "pruned" else None}  # fmt: skip


def sweep_record(*trials: dict[str, Any], name: str = "lr@nano", slots: int = 4, storage: str | None = None,
                 **more: Any) -> SweepRecord:  # fmt: skip
    """The record of a sweep with one search, as far as tracking reads it. more: other searches, by label."""
    entry = {"seeds": [100], "slots": slots, "components": {"norm": "layernorm", "optimizer": "adamw"}}
    searches = {"lr": {**entry, "trials": list(trials)}, **{label: {**entry, **one} for label, one in more.items()}}
    record = {
        "name": name,
        "sweep": "lr",
        "scale": "nano",
        "question": "Which rate?",
        "trials": slots,
        "evaluation": {"key": "val-1"},
        "stack": {"git_commit": "c0ffee"},
        "reproduce": "gpt2lab sweep sweeps/lr.yaml --scale nano",
        "created": CREATED,
        "hash": "abc",
        "storage": storage or "sqlite:////data/runs/sweeps/optuna.db",
        "searches": searches,
    }
    return SweepRecord.read(record, "a test")


class Recorder:
    """A tracker in memory; `trouble` is called before each call, and after storing, and may raise or hang."""

    shown_uri, experiment_id = "http://tracker", "1"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.points: dict[str, list[MetricPoint]] = {}
        self.statuses: dict[str, Status] = {}
        self.trouble: Callable[[str], None] = lambda call: None
        self.tags: dict[str, dict[str, str]] = {}

    def open_study(self, study: Mapping[str, Any]) -> TrackedRun:
        self.trouble("open_study")
        return TrackedRun("parent")

    def open_run(self, study: Mapping[str, Any], parent: TrackedRun, arm: str, seed: str, run: RunFolder) -> TrackedRun:
        self.trouble(f"open {arm} {seed}")
        tokens = [point.values["tokens"] for point in self.points.setdefault(run.id, []) if "tokens" in point.values]
        return TrackedRun(run.id, max(tokens, default=-1.0), dict(self.tags.get(run.id, {})))

    def log(self, run: TrackedRun, points: Sequence[MetricPoint]) -> None:
        self.trouble("log")
        self.points[run.id] += points
        self.trouble("logged")

    def update(self, run: TrackedRun, status: Status, tags: Mapping[str, str], ended: str | None) -> None:
        self.statuses[run.id] = status
        self.tags.setdefault(run.id, {}).update(tags)

    def log_report(self, study: Mapping[str, Any], folder: Path) -> None:
        raise NotImplementedError

    def steps(self, run: RunFolder) -> list[int]:
        return [point.step for point in self.points.get(run.id, []) if "tokens" in point.values]


class Look:
    """What is in MLflow, read with its own client."""

    def __init__(self, sink: MlflowTracker) -> None:
        self.client: Any = sink._connect()
        self.experiment = sink.experiment_id

    def parents(self) -> list[Any]:
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def children(self, run: RunFolder | None = None) -> list[Any]:
        found = [other for other in self.runs() if "mlflow.parentRunId" in other.data.tags]
        return [c for c in found if run is None or c.data.tags["gpt2lab.run_id"] == run.id]

    def runs(self) -> list[Any]:
        return list(self.client.search_runs([self.experiment]))

    def points(self, run: RunFolder, metric: str = "train/loss") -> list[Any]:
        (child,) = self.children(run)
        return list(self.client.get_metric_history(child.info.run_id, metric))

    def steps(self, run: RunFolder, metric: str = "train/loss") -> list[int]:
        return [point.step for point in self.points(run, metric)]
