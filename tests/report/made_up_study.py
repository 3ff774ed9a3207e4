"""A runs folder made up in the shapes that the trainer writes, with the losses that nano really reaches."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2lab.records import StudyRecord

UNIGRAM, BIGRAM = 3.33, 2.53
STEPS, BATCH_TOKENS, EVERY = 800, 1024, 40
MEANS = {"learned": 2.15, "rotary": 1.89, "none": 2.20}
KEY = "e0" * 8
IDENTITY = {"core": "c0de", "data": "da7a", "torch": "2.13.0", "device": "cpu"}


def run_id(arm: str, seed: int) -> str:
    return hashlib.sha256(f"{arm}/{seed}".encode()).hexdigest()[:16]


def write(path: Path, record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def typed(record: Mapping[str, Any]) -> StudyRecord:
    """A record as the store reads it."""
    return StudyRecord.read(record, "made up")


def declare(
    root: Path, means: Mapping[str, float] = MEANS, seeds: int = 3, baseline: str = "learned", **record: Any
) -> dict[str, Any]:
    """Write a finished study and return its record; keywords change the record."""
    noise = random.Random(7)
    arms = {}
    for arm, mean in means.items():
        ids = {str(seed): run_id(arm, seed) for seed in range(seeds)}
        arms[arm] = _arm(arm, ids, arm == baseline)
        for run in ids.values():
            write_run(root / run, mean + noise.gauss(0, 0.012), arm != "learned", noise)
    study = {
        "format": 1, "name": "posenc@nano", "ablation": "posenc", "scale": "nano", "baseline": baseline, "arms": arms,
        "question": "Which position encoding reaches the lowest validation loss at equal tokens?",
        "contrasts": [[arm, baseline] for arm in means if arm != baseline], "seeds": list(range(seeds)),
        "metric": "val/loss", "smallest_effect": 0.05, "alpha": 0.05, "equalise": "tokens", "bracketed": False,
        "screen": False, "floors": {"unigram": UNIGRAM, "bigram": BIGRAM},
        "evaluation": {"key": KEY, "tokens": 131072, "contexts": [0.5, 1, 2, 4], "block_size": 128},
        "scope": {"preset": "nano", "parameters": 842496, "tokens": STEPS * BATCH_TOKENS,
                  "data": "shakespeare (bytes)", "optimizer": "adamw, lr 0.004"},
        "caveat": "early training: sign only", "created": "2026-11-23T12:00:00+00:00", "hash": "5e" * 8,
        "stack": {"torch": "2.13.0", "device": "cpu", "device_name": "a processor", "python": "3.11.9",
                  "platform": "Linux-x86_64", "git_commit": "0123abc"},
        "reproduce": "gpt2lab run ablations/posenc.yaml --scale nano",
    } | record  # fmt: skip
    write(root / "studies" / f"{study['name']}.json", study)
    return study


def _arm(arm: str, ids: Mapping[str, str], baseline: bool) -> dict[str, Any]:
    return {
        "changes": {} if baseline else {"model.position": arm}, "components": {"position": arm, "norm": "layernorm"},
        "runs": ids, "parameters": 842496 if baseline else 826112, "non_embedding_parameters": 793344,
        "active_parameters": 842496 if baseline else 826112, "flops_per_token": 5.2e6, "tokens": STEPS * BATCH_TOKENS,
        "expected": "better; EleutherAI: −0.05 at 125M" if arm == "rotary" else None, "control": False,
        "exploratory": None,
    }  # fmt: skip


def write_run(folder: Path, final: float, extends: bool, noise: random.Random) -> None:
    """One finished run: curve, result and final evaluation."""
    rows = []
    for step in range(0, STEPS + 1, 10):
        loss = final + (5.55 - final) * math.exp(-6 * step / STEPS) + noise.gauss(0, 0.004)
        metrics = {"train/loss": loss + noise.gauss(0, 0.1)} if step else {}
        if step % EVERY == 0:
            metrics["val/loss"] = loss if step < STEPS else final
        rows.append({"step": step, "tokens": step * BATCH_TOKENS, "seconds": step / 18, "metrics": metrics})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = noise.uniform(17500, 19500)
    write(folder / "run.json", {"id": folder.name, "identity": IDENTITY})
    write(folder / "result.json", {
        "status": "finished", "reason": None, "steps": STEPS, "tokens": STEPS * BATCH_TOKENS, "seconds": 44.0,
        "tokens_per_second": speed, "peak_memory_bytes": 412_000_000, "metrics": {"val/loss": final}, "stack": {},
        "finished_at": "2026-11-23T12:10:00+00:00",
    })  # fmt: skip
    own = 0.05 * (1000 * final % 1)  # longer contexts have a noise of their own
    beyond = {"2": final + 0.06 + own, "4": final + 0.31 + own} if extends else {"2": None, "4": None}
    write(folder / "evaluations" / f"{KEY}.json", {
        "key": KEY, "spec": {"tokens": 131072, "contexts": [0.5, 1, 2, 4], "block_size": 128},
        "metrics": {"val/loss": final, "val/bits_per_byte": final / math.log(2)},
        "contexts": {"0.5": final + 0.07, "1": final, **beyond}, "targets": 131072,
    })  # fmt: skip
