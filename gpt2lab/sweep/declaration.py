"""What a sweep declares: its file, and the part of its record that is known before the first trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from gpt2lab.basics.text import seconds_of
from gpt2lab.config import Config, fill_slots
from gpt2lab.config.fitting import Located, check, error_of, located
from gpt2lab.config.source import YamlSource
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError
from gpt2lab.identity import digest
from gpt2lab.inspection.costs import Costs
from gpt2lab.planning.ablation import TUNING_SEED, Arm, base_of, read_source, resolve_arm, scale_name, smallest_effect
from gpt2lab.planning.declaration import Effect, Evaluate, FileName, Named, Sentence, Written, changes_at, variant_name
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.noise import Floor
from gpt2lab.planning.plan import check_data
from gpt2lab.planning.record import conditions, final_evaluation, scope_of
from gpt2lab.planning.space import SearchSettings, check_search, space_complaint
from gpt2lab.planning.tuning import Search, make_search
from gpt2lab.records import SWEEP_FORMAT, SweepRecord


class Sweep(SearchSettings):
    """A search for settings, as its file declares it."""

    sweep: FileName
    """Its name, also of its files."""
    question: Sentence
    """What it asks, in a sentence."""
    base: str
    """Preset or file whose settings are searched; `--scale` replaces it."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Changes to the base that every trial has, by dotted key."""
    variants: Named = Field(default_factory=dict)
    """Name -> changes: each is searched by itself, with the same settings, and all are shown beside each other."""
    scales: tuple[str, ...] | None = None
    """Presets or files at which it is run one after another, to see how the optimum moves with size."""
    evaluate: Evaluate = Field(default_factory=Evaluate)
    time_budget: str | None = None
    """No trial is begun after that time, as 90m or 6h."""
    smallest_effect: dict[str, Effect] | Effect | None = None
    """Difference in nats below which two settings are as good; null is the scale's own."""

    @field_validator("time_budget")
    @classmethod
    def _a_time(cls, text: str | None) -> str | None:
        if text is not None:
            seconds_of(text)
        return text


@dataclass(frozen=True, kw_only=True)
class LoadedSweep:
    """A sweep at one scale, checked as a whole. `arms`: label -> the config that is searched."""

    declared: Sweep
    name: str
    scale: str
    arms: dict[str, Arm]
    smallest_effect: float

    def searches(self, data: Prepared, machine: Machine) -> dict[str, Search]:
        """One search per arm. Raises ConfigError when the data cannot serve it."""
        for arm in self.arms.values():
            check_data(arm, data)
        settings = self.declared
        return {label: make_search(self.name, label, arm, settings, data, machine) for label, arm in self.arms.items()}


def load_sweep(
    source: str | Path | Mapping[str, Any],
    *,
    name: str | None = None,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    replaced: Mapping[str, Any] | None = None,
    plugins: Sequence[str | Path] = (),
) -> LoadedSweep:
    """The sweep of a YAML file, or of the mapping that one would hold.

    name:      in the place of the file's own, for a variant with a record and page of its own.
    scale:     preset or file in the place of the file's `base`.
    overrides: `key=value` for every trial.
    replaced:  settings in the place of the file's own, such as {"trials": 8}.
    Raises ConfigError with everything that is wrong in the file, in the overrides and in the space at any arm.
    """
    fill_slots(plugins)
    file, folder = read_source(source)
    declared, complaints = check(
        Sweep, file, stand_ins={"sweep": "unnamed", "question": "?", "base": "nano", "space": {}}
    )
    problems = [located(file, complaint) for complaint in complaints]
    if declared is None:
        raise error_of(problems)
    declared = declared.model_copy(update={**(replaced or {}), **({"sweep": variant_name(name)} if name else {})})
    try:
        base = base_of(declared.base, file, folder, scale, overrides)
    except ConfigError as error:
        raise error_of(problems, more=error.problems, hint=error.hint) from error
    problems += [located(base.source, complaint) for complaint in base.complaints]
    space_is_sound = "space" not in {keys[0] for complaint in complaints for keys in complaint.keys}
    arms: dict[str, Arm] = {}
    for label, written in _written(declared).items():
        arm, arm_problems = resolve_arm(written, file, base, is_baseline=True, expected=None)
        problems += arm_problems
        if arm is not None and not arm_problems and not base.complaints:
            arms[label] = arm
            problems += _space_problems(file, declared, arm) if space_is_sound else ()
    label_of_scale, name_problems = scale_name(scale or declared.base)
    problems += name_problems
    if problems:
        raise error_of(problems)
    effect = smallest_effect(declared.smallest_effect, label_of_scale, next(iter(arms.values())).config)
    name = f"{declared.sweep}@{label_of_scale}"
    return LoadedSweep(declared=declared, name=name, scale=label_of_scale, arms=arms, smallest_effect=effect)


def _written(declared: Sweep) -> dict[str, Written]:
    """What is searched: each variant, or the base itself under the sweep's name."""
    common = changes_at(("changes",), declared.changes)
    if not declared.variants:
        return {declared.sweep: Written(declared.sweep, common, ("sweep",))}
    keys = {name: ("variants", name) for name in declared.variants}
    return {
        name: Written(name, (*common, *changes_at(keys[name], changes)), keys[name])
        for name, changes in declared.variants.items()
    }


def _space_problems(source: YamlSource, declared: Sweep, arm: Arm) -> Iterator[Located]:
    """What is wrong with the space at an arm, at the lines of the dimensions."""
    try:
        check_search(declared, arm.config)
    except ConfigError as error:
        yield from (located(source, space_complaint(problem, declared.space)) for problem in error.problems)


def sweep_record(
    *, sweep: str, scale: str, question: str, settings: SearchSettings, config: Config, costs: Costs, data: Prepared,
    machine: Machine, floor: Floor | None, smallest_effect: float, reproduce: str, part_of: str | None = None,
    time_budget: float | None = None,
) -> SweepRecord:  # fmt: skip
    """The record of a sweep without its searches. `config`: any of those that are searched, for what they share.
    `part_of`: the study whose arms are tuned."""
    declared: dict[str, Any] = {
        "format": SWEEP_FORMAT,
        "name": f"{sweep}@{scale}",
        "sweep": sweep,
        "scale": scale,
        "question": question,
        "part_of": part_of,
        "metric": settings.metric,
        "direction": settings.direction,
        "trials": 0,
        "seeds": list(range(TUNING_SEED, TUNING_SEED + settings.seeds)),
        "sampler": settings.sampler.model_dump(),
        "pruner": None if settings.pruner.name == "none" else settings.pruner.model_dump(),
        "max_failures": settings.max_failures,
        "time_budget": time_budget,
        "smallest_effect": smallest_effect,
        "evaluation": final_evaluation(config),
    }
    known = conditions(config, scope_of(config, scale, costs), data, machine, reproduce, floor)
    hash_ = digest({**declared, "audit_pruning": False})  # a former setting; without it, all hashes would change
    return SweepRecord(**declared | known | {"trials": settings.trials, "hash": hash_, "searches": {}})
