"""One sweep at one scale: its searches over prepared data on one machine, and its trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.basics.text import duration, plural, quantity
from gpt2lab.data.files import Progress as DataProgress
from gpt2lab.data.shards import prepare
from gpt2lab.evaluation.tasks import fetch_documents
from gpt2lab.experiments import budget_seconds, call, command, only_scale
from gpt2lab.planning.ablation import scales_of
from gpt2lab.planning.machine import Machine, check_ranks, probe
from gpt2lab.planning.noise import find_floor
from gpt2lab.planning.runs import known_costs, repetition
from gpt2lab.planning.tuning import Search
from gpt2lab.records import SearchRecord, SweepRecord, replacing
from gpt2lab.store import Store
from gpt2lab.sweep.declaration import LoadedSweep, load_sweep, sweep_record


@dataclass(frozen=True)
class SweepPlan:
    """A prepared sweep. `record`: without its searches."""

    loaded: LoadedSweep
    store: Store
    machine: Machine
    searches: Mapping[str, Search]
    record: SweepRecord

    @classmethod
    def prepare(
        cls,
        source: str | Path | Mapping[str, Any],
        store: Store,
        *,
        name: str | None = None,
        scale: str | None = None,
        trials: int | None = None,
        overrides: Sequence[str] = (),
        plugins: Sequence[str | Path] = (),
        budget: str | None = None,
        jobs: int | None = None,
        ranks: int = 1,
        progress: DataProgress | None = None,
        machine: Machine | None = None,
        machine_like: Callable[[Machine], Machine] = lambda machine: machine,
    ) -> SweepPlan:
        """Load a sweep, prepare its data, and describe this machine unless another one is given, where runs will
        execute. machine_like: changes to the machine, as in the number of runs at a time. The others as for
        `run_sweep`. Raises ConfigError, DataFault, EnvironmentFault."""
        loaded = load_sweep(
            source, name=name, scale=scale or only_scale(scales_of(source)), overrides=overrides,
            replaced={"trials": trials} if trials else {}, plugins=plugins,
        )  # fmt: skip
        arguments: dict[str, Any] = {"name": name, "scale": scale, "trials": trials}
        if isinstance(source, Mapping):
            reproduce = call("run_sweep", source, **arguments, overrides=overrides, plugins=plugins)
        else:
            reproduce = command("sweep", source, **arguments, set=overrides, plugin=plugins)
        seconds = budget_seconds(budget or loaded.declared.time_budget)
        config, declared = next(iter(loaded.arms.values())).config, loaded.declared
        for arm in loaded.arms.values():
            check_ranks(arm.config, ranks, 1 if machine else ranks)
        data = prepare(config.data, progress=progress)
        fetch_documents({name for arm in loaded.arms.values() for name in arm.config.evaluation.tasks})
        costs = known_costs(config)
        machine = machine_like(
            machine.with_ranks(ranks) if machine else probe(store, config.training, costs.flops_per_token, jobs, ranks)
        )
        record = sweep_record(
            sweep=declared.sweep, scale=loaded.scale, question=declared.question, settings=declared, config=config,
            costs=costs, data=data, machine=machine,
            floor=find_floor(store, loaded.scale, config, data, machine, costs)[0],
            smallest_effect=loaded.smallest_effect, reproduce=reproduce, time_budget=seconds,
        )  # fmt: skip
        return cls(loaded, store, machine, loaded.searches(data, machine), record)

    @property
    def seconds(self) -> float:
        """Of training all trials here, at most; no longer than the time budget."""
        flops = sum(map(_flops, self.searches.values()))
        return min(flops / self.machine.run_speed / self.machine.jobs, self.record.time_budget or math.inf)

    def as_record(self) -> dict[str, Any]:
        """Search -> its size and cost as plain data."""
        return {
            label: {
                "trials": search.trials,
                "seeds": list(search.seeds),
                "tokens": search.tokens,
                "flops": _flops(search),
                "space": [dimension.as_record() for dimension in search.space.dimensions],
            }
            for label, search in self.searches.items()
        }

    def lines(self) -> list[str]:
        """The searches and their largest cost, as sentences."""
        lines = []
        for label, search in self.searches.items():
            runs = search.trials * search.settings.seeds
            cost = _flops(search)
            named = f"{label}: " if len(self.searches) > 1 else ""
            per_trial = f" of {search.settings.seeds} runs" if search.settings.seeds > 1 else ""
            lines.append(
                f"{named}{plural(search.trials, 'trial')}{per_trial}, {quantity(search.tokens * runs)} tokens, "
                f"{cost / 1e15:,.3g} PFLOP; " + ", ".join(map(dimension_text, search.space.dimensions))
            )
        where = f"{self.machine.device_name} ({self.machine.device}), {self.machine.at_a_time}"
        search = max(self.searches.values(), key=lambda search: search.tokens)
        lines += repetition(search.tokens, search.data)
        lines.append(f"at most {duration(self.seconds)} on {where}; speed from {self.machine.speed_from}")
        empty = {label: SearchRecord(study=search.study, trials=[]) for label, search in self.searches.items()}
        name = self.store.replaced_by(self.record.with_(searches=empty))
        return [*lines, replacing(self.record.name, name)] if name else lines


def dimension_text(dimension: Any) -> str:
    """A short description of a dimension."""
    condition = f" ({', '.join(f'{key} = {value}' for key, value in dimension.when.items())})" if dimension.when else ""
    if dimension.kind == "categorical":
        return f"{dimension.name}{condition}: {' | '.join(dimension.choices)}"
    log = " (log)" if dimension.log else ""
    return f"{dimension.name}{condition} from {dimension.low:g} to {dimension.high:g}{log}"


def _flops(search: Search) -> float:
    """Of all trials of a search, if none is pruned."""
    return search.costs.flops_per_token * search.tokens * search.trials * search.settings.seeds
