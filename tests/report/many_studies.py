"""Any number of finished studies in one store, small enough to be made by the thousand: no curves, results only."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from made_up_study import IDENTITY, KEY, UNIGRAM, write

SIZES = {"nano": 842_496, "micro": 12_300_000, "gpt2-124m": 124_439_808}


def record(
    root: Path,
    ablation: str = "posenc",
    scale: str = "gpt2-124m",
    *,
    means: Mapping[str, float],
    slot: str = "position",
    seeds: int = 3,
    sd: float = 0.001,
    pool: str = "",
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """Write a finished study, whose first arm is the baseline; each arm is the component of `slot` that it is called.

    pool: a name that studies share whose baselines are the same runs.
    arms: arm -> what its entry has besides, such as `expected`.
    """
    name, noise = f"{ablation}@{scale}", random.Random(f"{ablation}{scale}")
    baseline = next(iter(means))
    entries = {}
    for arm, mean in means.items():
        owner = pool if pool and arm == baseline else name
        ids = {str(seed): run_id(owner, arm, seed) for seed in range(seeds)}
        for run in ids.values():
            if not (root / run).exists():
                write_result(root / run, noise.gauss(mean, sd))
        changes = {} if arm == baseline else {f"model.{slot}": arm}
        entries[arm] = {
            "changes": changes, "components": {slot: arm, "init": "gpt2"}, "runs": ids, "parameters": SIZES[scale],
            "non_embedding_parameters": SIZES[scale], "active_parameters": SIZES[scale], "flops_per_token": 1e6,
            "tokens": 1000, "expected": None, "control": False, "exploratory": None,
        } | dict((arms or {}).get(arm, {}))  # fmt: skip
    study = {
        "format": 2, "name": name, "ablation": ablation, "scale": scale, "baseline": baseline, "arms": entries,
        "question": f"What does {ablation} do?", "contrasts": [[arm, baseline] for arm in means if arm != baseline],
        "seeds": list(range(seeds)), "metric": "val/loss", "smallest_effect": 0.005, "alpha": 0.05, "bracketed": False,
        "screen": False, "floors": {"unigram": UNIGRAM},
        "evaluation": {"key": KEY, "tokens": 131072, "block_size": 128},
        "scope": {"preset": scale, "parameters": SIZES[scale], "tokens": 1000, "data": "shakespeare (bytes)",
                  "optimizer": "adamw, lr 0.004"},
        "caveat": None, "created": "2026-11-23T12:00:00+00:00", "hash": "5e" * 8, "reproduce": "gpt2lab run x.yaml",
    } | changed  # fmt: skip
    write(root / "studies" / f"{name}.json", study)
    return study


def run_id(owner: str, arm: str, seed: int) -> str:
    return hashlib.sha256(f"{owner}/{arm}/{seed}".encode()).hexdigest()[:16]


def write_result(folder: Path, final: float) -> None:
    """A finished run with one point of its curve."""
    write(folder / "run.json", {"id": folder.name, "identity": IDENTITY})
    write(folder / "metrics.jsonl", {"step": 1, "tokens": 1000, "seconds": 60.0, "metrics": {}})
    write(
        folder / "result.json", {"status": "finished", "reason": None, "tokens": 1000, "seconds": 60.0, "metrics": {}}
    )
    write(folder / "evaluations" / f"{KEY}.json", {"key": KEY, "metrics": {"val/loss": final}, "contexts": {}})
