"""A search: settings that are tried for one arm. What it declares, and which runs a trial of it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpt2lab.costs import Costs
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.identity import digest
from gpt2lab.planning.arms import BRACKET_SEED, Arm
from gpt2lab.planning.designs import in_short
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import Run, known_costs, make_run, make_runs, tokens_of
from gpt2lab.planning.samplers import Pruner, Sampler, SearchSettings
from gpt2lab.planning.space import Dimension, Space, resolve_space, rounded, value_at

__all__ = ["TUNING_SEED", "Pruner", "Sampler", "Search", "SearchSettings", "check_search", "make_search"]

TUNING_SEED = BRACKET_SEED
"""The first seed of every trial: none of those that anything is judged by."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings that are tried for one arm, on this machine, over this data. `study`: what the search is called where
    its trials are kept; another name as soon as anything else would be tried or trained."""

    label: str
    arm: Arm
    space: Space
    settings: SearchSettings
    data: Prepared
    machine: Machine
    costs: Costs
    study: str

    def arm_at(self, settings: Mapping[str, Any]) -> Arm:
        """The arm with the settings of a trial. Raises ConfigError for a combination that cannot be."""
        if not settings:
            return self.arm
        told = ", ".join(f"{key}={value}" for key, value in settings.items())
        changed = self.arm.config.with_changes(_changes(self.space, self.arm, settings), f"trial {told}:")
        return replace(self.arm, config=changed)

    def runs_at(self, settings: Mapping[str, Any]) -> tuple[Run, ...]:
        """The runs of a trial, one per tuning seed. Raises ConfigError."""
        return make_runs(self.arm_at(settings), self.seeds, self.data, self.machine)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Tuning seeds."""
        first = self.arm.first_seed + TUNING_SEED
        return tuple(range(first, first + self.settings.seeds))

    @property
    def known_points(self) -> list[dict[str, Any]]:
        """What is tried first, complete, as parameters."""
        return [_known_point(written, self.space, self.settings, self.arm) for written in self.settings.enqueue]

    @property
    def trials(self) -> int:
        """Trials in all: those that were asked for, or all points of a grid where those are fewer."""
        if self.settings.sampler.name != "grid":
            return self.settings.trials
        return min(self.settings.trials, len(self.known_points) + self.space.grid_size())

    @property
    def tokens(self) -> int:
        """Training tokens of one run to its end."""
        return tokens_of(self.arm.config)


def check_search(settings: SearchSettings, arm: Arm) -> Space:
    """The space at an arm. Raises ConfigError with all that is wrong with it and with the known points."""
    space = resolve_space(settings.space, arm.config)
    vague = [d.name for d in space.dimensions if d.kind == "float" and d.points is None and d.step is None]
    if vague and settings.sampler.name == "grid":
        raise ConfigError([Problem(name, "a grid needs `points` or a `step`") for name in vague])
    if settings.sampler.name == "grid":
        space.grid_size()
    for written in settings.enqueue:
        point = space.settings(_known_point(written, space, settings, arm))
        arm.config.with_changes(_changes(space, arm, point), "enqueue:")
    return space


def make_search(name: str, label: str, arm: Arm, settings: SearchSettings, data: Prepared, machine: Machine) -> Search:
    """The search of one arm. `name`: of the sweep or ablation, at its scale. Raises ConfigError with all that is wrong
    with the space at this arm."""
    space = check_search(settings, arm)
    declared = {
        "space": [one.as_record() | {"values": list(one.values)} for one in space.dimensions],
        "sampler": settings.sampler.model_dump(),
        "pruner": settings.pruner.model_dump(),
        "seeds": settings.seeds,
        "metric": [settings.metric, settings.direction],
        "enqueue": [dict(point) for point in settings.enqueue],
        "run": make_run(arm, arm.first_seed + TUNING_SEED, data, machine).identity,
    }
    return Search(
        label=label, arm=arm, space=space, settings=settings, data=data, machine=machine,
        costs=known_costs(arm.config), study=f"{name}/{label}/{digest(declared)[:12]}",
    )  # fmt: skip


def _known_point(written: Mapping[str, Any], space: Space, settings: SearchSettings, arm: Arm) -> dict[str, Any]:
    """A point as its file writes it, complete and as parameters. Raises ConfigError."""
    problems = [Problem(key, "is no dimension of the space") for key in written if key not in settings.space]
    point: dict[str, Any] = {}
    for one in space.dimensions:
        if space.active(one, point):
            try:
                point[one.name] = _known_value(one, written.get(one.name), settings, value_at(arm.config, one.name))
            except ValueError as error:
                problems.append(Problem(one.name, str(error)))
    if problems:
        raise ConfigError([Problem(f"enqueue: {problem.where}", problem.what) for problem in problems])
    return point


def _known_value(one: Dimension, given: Any, settings: SearchSettings, own: Any) -> Any:
    """A dimension's value as a file writes it, or the config's own. Raises ValueError with a sentence."""
    if one.kind == "categorical":
        choice = _named(own) if given is None else in_short(given)
        if choice not in one.choices:
            raise ValueError(f"'{choice}' is none of its choices: {', '.join(one.choices)}")
        return choice
    try:
        number = 1.0 if given is None else float(given)
    except (TypeError, ValueError):
        raise ValueError(f"'{given}' is no number") from None
    if given is None or settings.space[one.name].relative:
        number *= own or 0.0
    value = round(number) if one.kind == "int" else rounded(number)
    if not one.low <= value <= one.high:
        raise ValueError(f"{value:g} lies outside {one.low:g} to {one.high:g}")
    return value


def _named(own: Any) -> str:
    """The config's own value as a choice is named."""
    return ", ".join(map(str, own)) if isinstance(own, tuple) else str(own)


def _changes(space: Space, arm: Arm, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a trial as changes to the arm's config, with what follows from them."""
    changes = space.changes(settings)
    return {**_equal_tokens(arm, changes), **changes}


def _equal_tokens(arm: Arm, changes: Mapping[str, Any]) -> dict[str, Any]:
    """With another batch the steps change, so that every trial trains on as many tokens; warm-up and evaluations stay
    where they were among them."""
    if "training.batch_tokens" not in changes or "training.steps" in changes:
        return {}
    config, batch = arm.config, int(changes["training.batch_tokens"])
    ratio = config.training.batch_tokens / batch
    steps = {
        "training.steps": config.training.steps,
        "optim.warmup_steps": config.optim.warmup_steps,
        "evaluation.every_steps": config.evaluation.every_steps,
        "training.checkpoint_every_steps": config.training.checkpoint_every_steps,
    }
    return {
        key: str(max(1, round(value * ratio)) if value else value)
        for key, value in steps.items()
        if value is not None and key not in changes
    }
