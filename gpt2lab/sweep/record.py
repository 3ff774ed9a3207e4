"""The record of a sweep: what was declared, and every trial as far as it has come, as plain data.

It is made from the storage anew each time, so any worker may write it, and all that read it (pages, `tune:`, MLflow)
need neither Optuna nor the storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.data.prepared import Prepared
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import digest
from gpt2lab.planning.ablation import TUNING_SEED
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.noise import Floor
from gpt2lab.planning.record import components_of, scope_of, stack_of
from gpt2lab.planning.space import SearchSettings, value_at
from gpt2lab.planning.tuning import Search
from gpt2lab.store import Store, file_lock, now

FORMAT = 1
LOCK_PATIENCE_SECONDS = 60.0


def head(
    *, sweep: str, scale: str, question: str, settings: SearchSettings, config: Config, costs: Costs, data: Prepared,
    machine: Machine, floor: Floor | None, smallest_effect: float, reproduce: str, part_of: str | None = None,
    time_budget: float | None = None, audit_pruning: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """All of a record but its searches. `config`: any of those that are searched, for what they share. `part_of`: the
    study whose arms are tuned. The hash is that of what was declared."""
    spec = config.evaluation.spec(config.model.block_size)
    pruner = settings.pruner.model_dump()
    declared: dict[str, Any] = {
        "format": FORMAT,
        "name": f"{sweep}@{scale}",
        "sweep": sweep,
        "scale": scale,
        "question": question,
        "part_of": part_of,
        "metric": settings.metric,
        "direction": settings.direction,
        "trials": settings.trials,
        "seeds": list(range(TUNING_SEED, TUNING_SEED + settings.seeds)),
        "sampler": settings.sampler.model_dump(),
        "pruner": None if pruner["name"] == "none" else pruner,
        "audit_pruning": audit_pruning,
        "max_failures": settings.max_failures,
        "time_budget": time_budget,
        "smallest_effect": smallest_effect,
        "evaluation": {"key": evaluation_key(spec), **spec},
    }
    known = {
        "floors": data.floors,
        "noise": floor.as_record() if floor else None,
        "scope": scope_of(config, scale, costs).plain(),
        "caveat": config.scale.caveat,
        "reproduce": reproduce,
        "stack": stack_of(machine),
        "stopped": None,
    }
    return {**declared, **known, "hash": digest({**declared, "trials": 0})}


def search_entry(
    search: Search, trials: list[dict[str, Any]], importance: dict[str, Any] | None, best: Mapping[str, Any] | None,
    scale: str,
) -> dict[str, Any]:  # fmt: skip
    """One search with its trials. `best`: the one that won so far, whose config is kept ready to run."""
    config, space = search.arm.config, search.space
    return {
        "study": search.study,
        "changes": dict(search.arm.changes),
        "base": {dimension.name: _plain(value_at(config, dimension.name)) for dimension in space.dimensions},
        "seeds": list(search.seeds),
        "slots": search.trials,
        "parameters": search.costs.parameters,
        "non_embedding_parameters": search.costs.non_embedding_parameters,
        "flops_per_token": search.costs.flops_per_token,
        "tokens": search.tokens,
        "steps": config.training.steps,
        "components": components_of(config),
        "optimizer": config.optim.optimizer.name,
        "space": [dimension.as_record() for dimension in space.dimensions],
        "importance": importance,
        "best_config": search.arm_at(best["settings"]).config.over_preset(scale) if best else None,
        "trials": trials,
    }


def write_record(record: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Write it as the sweep's record; a sweep keeps the date on which it was declared first."""
    with file_lock(store.root / "sweeps" / f".{record['name']}.lock", LOCK_PATIENCE_SECONDS):
        before = store.sweep(record["name"]) if record["name"] in store.sweeps() else {}
        created = before.get("created") if before.get("hash") == record["hash"] else None
        whole = {**record, "created": created or now(), "updated": now()}
        store.write_sweep(whole)
    return whole


def _plain(value: Any) -> Any:
    """A config's value as JSON has it."""
    if isinstance(value, (int, float, str)) or value is None:
        return value
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
