"""A small study on disk, written as its workers would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2lab.store import RunFolder, Store

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
        self.store.write_study(self.record)

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
