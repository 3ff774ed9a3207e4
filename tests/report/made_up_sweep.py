"""Sweep records made up in the shape that sweeps write them, with losses as nano has them: a bowl in the logarithm of
the rate, steeper above it, a cliff where training diverges, and noise between trials."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2lab.records import SweepRecord
from gpt2lab.reports.read import SweepRead, read_record
from gpt2lab.store import Store

STEPS, BATCH_TOKENS, EVERY = 440, 1024, 44
TOKENS = STEPS * BATCH_TOKENS
LR: dict[str, Any] = {
    "name": "optim.lr", "kind": "float", "low": 2e-4, "high": 0.2, "log": True, "step": None, "choices": None,
    "when": None,
}  # fmt: skip
WD = LR | {"name": "optim.optimizer.weight_decay", "low": 0.001, "high": 1.0}
BATCH = LR | {"name": "training.batch_tokens", "kind": "int", "low": 512, "high": 4096}
NORM: dict[str, Any] = {
    "name": "model.norm", "kind": "categorical", "low": None, "high": None, "log": False, "step": None,
    "choices": ["layernorm", "rmsnorm"], "when": None,
}  # fmt: skip
SEED = "100"


def loss_at(settings: Mapping[str, Any], optimum: float, cliff: float) -> float:
    """The final loss without noise; NaN beyond the cliff."""
    lr = settings.get("optim.lr", optimum)
    if lr > cliff:
        return math.nan
    x = math.log(lr / optimum)
    decay = math.log(settings.get(WD["name"], 0.1) / 0.1)
    batch = math.log(settings.get(BATCH["name"], 1024) / 1024)
    bowl = 2.02 + (0.075 if x < 0 else 0.11) * x * x + 0.004 * decay * decay + 0.02 * batch * batch
    return bowl - (0.02 if settings.get(NORM["name"]) == "rmsnorm" else 0.0)


def curve_to(final: float, until: int) -> list[list[float]]:
    """What pruning sees: [step, tokens, loss] at every evaluation up to a step."""
    return [
        [step, step * BATCH_TOKENS, final + (5.55 - final) * math.exp(-5 * step / STEPS)]
        for step in range(EVERY, until + 1, EVERY)
    ]


def draw(space: Sequence[Mapping[str, Any]], random_: random.Random) -> dict[str, Any]:
    """A point of the space."""
    point: dict[str, Any] = {}
    for one in space:
        if one["kind"] == "categorical":
            point[one["name"]] = random_.choice(one["choices"])
            continue
        u = random_.random()
        value = (
            one["low"] * (one["high"] / one["low"]) ** u if one["log"] else one["low"] + u * (one["high"] - one["low"])
        )
        point[one["name"]] = round(value) if one["kind"] == "int" else float(f"{value:.4g}")
    return point


def run_id(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def trial(slot: int, settings: Mapping[str, Any], final: float, *, outcome: str = "finished", until: int = STEPS,
          label: str = "lr", **changed: Any) -> dict[str, Any]:  # fmt: skip
    """One slot. `final` is where its curve goes to; `until`: the step at which it ended."""
    done = outcome == "finished"
    curve = curve_to(final, until) if outcome in ("finished", "pruned", "diverged", "running") else []
    reasons = {"diverged": f"nan loss at step {until}", "failed": "out of memory", "pruned": "worse than the median"}
    return {
        "slot": slot, "number": slot, "outcome": outcome, "reason": reasons.get(outcome), "settings": dict(settings),
        "value": final if done else None, "values": {SEED: final} if done else {}, "curve": curve,
        "stopped_at": until if outcome in ("pruned", "diverged") else None,
        "runs": {} if outcome == "waiting" else {SEED: run_id(label, slot)},
        "tokens": 0 if outcome == "waiting" else until * BATCH_TOKENS, "found": False, "enqueued": slot == 0,
        "retries": 0, "worker": "host:1", "started": "2026-11-23T12:00:00+00:00", "ended": "2026-11-23T12:01:00+00:00",
    } | changed  # fmt: skip


def search(label: str = "lr", *, space: Sequence[Mapping[str, Any]] = (LR,), trials: int = 24, optimum: float = 0.006,
           cliff: float = 0.06, prune: bool = True, parameters: int = 842_496,
           **changed: Any) -> dict[str, Any]:  # fmt: skip
    """A search that has done all of its trials, by a median rule at half of training."""
    noise = random.Random(f"{label}{len(space)}{optimum}")
    made: list[dict[str, Any]] = []
    for slot in range(trials):
        settings = {LR["name"]: 0.004} if slot == 0 and space == (LR,) else draw(space, noise)
        exact = loss_at(settings, optimum, cliff)
        if math.isnan(exact):
            made.append(trial(slot, settings, 4.1, outcome="diverged", until=88, label=label))
            continue
        final = exact + noise.gauss(0, 0.008)
        seen = sorted(one["value"] for one in made if one["value"] is not None)
        hopeless = prune and len(seen) >= 5 and final > seen[len(seen) // 2] + 0.05
        made.append(trial(slot, settings, final, outcome="pruned" if hopeless else "finished",
                          until=220 if hopeless else STEPS, label=label))  # fmt: skip
    done = [one for one in made if one["outcome"] == "finished"]
    best = min(done, key=lambda one: one["value"], default=None)
    config = None if best is None else {"extends": "nano", **best["settings"]}
    importance = None
    if len(space) > 1:
        share = {LR["name"]: 0.71, BATCH["name"]: 0.16, WD["name"]: 0.05, NORM["name"]: 0.08}
        importance = {"method": "ped-anova", "values": {one["name"]: share.get(one["name"], 0.01) for one in space}}
    return {
        "study": f"{label}-5e5e", "changes": {}, "base": {"optim.lr": 0.004}, "seeds": [100], "slots": trials,
        "parameters": parameters,
        "non_embedding_parameters": parameters - 49_152, "flops_per_token": 6.2 * parameters, "tokens": TOKENS,
        "steps": STEPS, "components": {"norm": "layernorm", "init": "gpt2"}, "optimizer": "adamw",
        "space": [dict(one) for one in space], "importance": importance, "best_config": config,
        "trials": made,
    } | changed  # fmt: skip


def sweep(
    searches: Mapping[str, Mapping[str, Any]] | None = None, *, name: str = "lr@nano", **changed: Any
) -> dict[str, Any]:
    """A record of a sweep; keywords change it."""
    searches = searches or {"lr": search()}
    kind, _, scale = name.partition("@")
    first = next(iter(searches.values()))
    return {
        "format": 1, "name": name, "sweep": kind, "scale": scale, "part_of": None,
        "question": "Which learning rate reaches the lowest validation loss?",
        "reproduce": f"gpt2lab sweep sweeps/{kind}.yaml --scale {scale}", "created": "2026-11-23T12:00:00+00:00",
        "updated": "2026-11-23T13:00:00+00:00", "hash": "5e" * 8, "metric": "val/loss", "direction": "minimize",
        "trials": max(len(one["trials"]) for one in searches.values()),
        "sampler": {"name": "tpe", "seed": 0, "startup": None},
        "pruner": {"name": "median", "startup_trials": 4, "warmup": 0.25, "reduction": 3},
        "max_failures": 5, "time_budget": None, "stopped": None, "smallest_effect": 0.05,
        "floors": {"unigram": 3.33, "bigram": 2.53}, "noise": None,
        "evaluation": {"key": "e0" * 8, "tokens": 32768, "context_tokens": 8192, "block_size": 128},
        "storage": "sqlite:////data/runs/sweeps/optuna.db",
        "scope": {"preset": scale, "parameters": first["parameters"], "tokens": first["tokens"],
                  "data": "shakespeare (bytes)", "optimizer": "adamw, lr 0.004"},
        "caveat": "early training: sign only", "searches": {label: dict(one) for label, one in searches.items()},
        "stack": {"torch": "2.13.0", "device": "cpu", "device_name": "a processor", "python": "3.11.9",
                  "platform": "Linux-x86_64", "git_commit": "0123abc"},
    } | changed  # fmt: skip


def read(record: Mapping[str, Any], root: Path = Path()) -> SweepRead:
    """What pages are made from."""
    return read_record(SweepRecord.read(record, "made up"), Store(root))


def keep(root: Path, record: Mapping[str, Any]) -> Path:
    """Write the record where a store has it."""
    path = root / "sweeps" / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, allow_nan=False))
    return path


def wide(trials: int = 40) -> dict[str, Any]:
    """A record over four dimensions, one of them by name."""
    return sweep({"mixed": search("mixed", space=(LR, WD, BATCH, NORM), trials=trials)}, name="mixed@nano")


def hopeless() -> dict[str, Any]:
    """A record in which every trial diverged: the space is far too high."""
    high = LR | {"low": 0.5, "high": 50.0}
    return sweep({"lr": search(space=(high,), trials=8)})


def variants() -> dict[str, Any]:
    """A record of two searches."""
    return sweep(
        {
            "standard": search("standard", trials=16, changes={"model.init": "gpt2"}),
            "mup": search("mup", trials=16, optimum=0.012, changes={"model.init": "mup"}),
        },
        name="width@nano",
    )


def ladder(root: Path) -> list[str]:
    """Keep one sweep at three sizes, the best rate of which falls with the square root of the size; -> their names."""
    names = []
    for scale, parameters in (("nano", 842_496), ("micro", 3_369_984), ("mini", 13_479_936)):
        best = 0.006 * math.sqrt(842_496 / parameters)
        record = sweep(
            {"lr": search("lr", optimum=best, cliff=10 * best, parameters=parameters, prune=False)}, name=f"lr@{scale}"
        )
        keep(root, record)
        names.append(record["name"])
    return names
