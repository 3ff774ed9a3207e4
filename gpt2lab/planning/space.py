"""Search spaces: as a file declares them, and their dimensions resolved at one config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import scipy
from pydantic import BeforeValidator, Field, field_validator

from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.basics.text import in_short
from gpt2lab.config import Config
from gpt2lab.config.fitting import Complaint
from gpt2lab.config.source import Key
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.registry import Choice
from gpt2lab.schema import ABSENT, Settings

DIGITS = 4
"""Significant digits of real-valued settings, as in 0.002135."""
MOST_OF_A_GRID = 10_000
MOST_TRIALS = 10_000
RATE = "optim.lr"

Kind = Literal["float", "int", "categorical"]
Drawn = Literal["random", "grid", "qmc"]
"""Samplers that do not use results: their points depend on space, seed and index only."""


class DimensionSettings(Settings):
    """One dimension as a file writes it: `{low, high}` for numbers, `{choices}` or a plain list for the rest."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Whether values are spread evenly over the logarithm: for rates, widths and the like."""
    relative: bool = False
    """Whether low and high are multiples of the config's own value."""
    step: float | None = Field(None, gt=0)
    """Distance between values."""
    points: int | None = Field(None, ge=2)
    """Of a grid: how many values from low to high."""
    choices: tuple[Any, ...] | None = None
    """The values to choose from."""
    when: dict[str, str] = Field(default_factory=dict)
    """Other dimension -> the value at which alone this one has an effect."""

    def problems(self) -> Iterator[str]:
        """Problems that do not depend on other dimensions or on a config."""
        if self.choices is not None:
            numbers = (self.low, self.high, self.step, self.points)
            if numbers != (None,) * 4 or self.log or self.relative:
                yield "either `choices`, or `low` and `high`"
            elif len(self.choices) < 2:
                yield "at least two choices are expected"
        elif self.low is None or self.high is None:
            yield "`low` and `high` are expected, or a list of choices"
        elif self.low >= self.high:
            yield f"low ({self.low:g}) must be less than high ({self.high:g})"
        elif self.log and self.low <= 0:
            yield "`log: true` needs low above 0"
        elif self.log and self.step is not None:
            yield "either `log: true` or a `step`"
        elif self.relative and self.low <= 0:
            yield "multiples must be greater than 0"

    def around(self, centre: float) -> DimensionSettings:
        """The same range around another multiple."""
        if self.low is None or self.high is None:
            return self
        return self.model_copy(update={"low": self.low * centre, "high": self.high * centre})


class Sampler(Settings):
    """How points of the space are chosen."""

    name: Literal["tpe", "random", "grid", "qmc"] = "tpe"
    """tpe learns from earlier trials (Bergstra et al. 2011); random, grid and qmc (Sobol's points) do not."""
    seed: int = Field(0, ge=0)
    """Seed of the sampler."""
    startup: int | None = Field(None, ge=1)
    """Trials that tpe draws at random before it learns; null is a third of all, at most 10."""


class Pruner(Settings):
    """When a trial is stopped before its end."""

    name: Literal["none", "median", "successive_halving", "hyperband"] = "none"
    """none; median stops what is worse than the median of earlier trials at the same point; the others keep the better
    share at every rung (Li et al. 2018)."""
    startup_trials: int = Field(4, ge=1)
    """Finished trials before any is stopped (median)."""
    warmup: float = Field(0.25, ge=0, lt=1)
    """Share of training before which no trial is stopped (median); the smallest rung of the others."""
    reduction: int = Field(3, ge=2)
    """One in how many is kept at each rung (successive_halving, hyperband)."""
    keep_checkpoints: bool = False
    """Whether a stopped trial can be continued later."""


class SearchSettings(Settings):
    """A search as a file declares it; sweeps and the `tune:` of an ablation share it."""

    space: dict[str, DimensionSettings]
    """Dotted key -> its range or choices."""
    trials: int = Field(16, ge=1, le=MOST_TRIALS)
    """Number of trials in all, over all invocations and workers."""
    sampler: Sampler = Field(default_factory=Sampler)
    pruner: Pruner = Field(default_factory=Pruner)
    seeds: int = Field(1, ge=1, le=20)
    """Runs per trial; its value is their mean. They are 100, 101, ..., which no verdict uses."""
    metric: str = LOSS
    """The objective, a metric of the final evaluation: val/loss, val/bits_per_byte or another."""
    direction: Literal["minimize", "maximize"] = "minimize"
    enqueue: tuple[dict[str, Any], ...] = ()
    """Known good points that are tried first; settings that they leave out are those of the config. Multiples, where
    the dimension is relative."""
    max_failures: int = Field(5, ge=0)
    """Trials that may fail (divergence is no failure) before the search ends."""

    @field_validator("space", mode="before")
    @classmethod
    def _choices_alone(cls, space: Any) -> Any:
        """`model.position: [learned, rotary]` means `{choices: [learned, rotary]}`."""
        if not isinstance(space, Mapping):
            return space
        return {key: {"choices": value} if isinstance(value, list) else value for key, value in space.items()}

    @field_validator("sampler", "pruner", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: Any) -> Any:
        """`sampler: tpe` means `{name: tpe}`."""
        if value is None or (isinstance(value, str) and value in ABSENT):
            return {}
        if not isinstance(value, str):
            return value
        names = get_args((Sampler if info.field_name == "sampler" else Pruner).model_fields["name"].annotation)
        if value not in names:
            raise ValueError(unknown(str(info.field_name), value, names))
        return {"name": value}


def _multiple(value: Any) -> Any:
    """`0.5x` is half of the config's own value."""
    if isinstance(value, str) and not value.endswith("x"):
        raise ValueError("a multiple of the arm's own value is expected, such as 0.5x")
    return value.removesuffix("x") if isinstance(value, str) else value


def bracket(multiples: tuple[float, ...]) -> tuple[float, ...]:
    """Multiples of a rate, sorted. Raises ValueError for fewer than three, repeated ones, or without 1."""
    if len(multiples) < 3 or len(set(multiples)) < len(multiples) or 1.0 not in multiples:
        raise ValueError("at least three different multiples are expected, 1 among them")
    return tuple(sorted(multiples))


class Tune(SearchSettings):
    """How every arm of an ablation is tuned before it is evaluated on new seeds."""

    space: dict[str, DimensionSettings] = Field(default_factory=dict)
    """Dotted key -> its range or choices in a search."""
    grid: dict[str, tuple[Annotated[float, BeforeValidator(_multiple), Field(gt=0)], ...]] = Field(
        default_factory=dict, exclude=True  # records declare it as `lr_bracket`
    )  # fmt: skip
    """Instead of `space`: multiples of each arm's learning rate, such as {optim.lr: [0.5x, 1x, 2x]}, one run each. The
    grid is widened while the best lies at its edge."""
    centre: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = Field(default_factory=dict)
    """Arm -> dotted key -> the multiple of its own value at the centre of its relative space; 1 by default. For arms
    that are known to need a very different rate."""

    @field_validator("grid")
    @classmethod
    def _of_the_rate(cls, grid: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        if grid.keys() - {RATE}:
            raise ValueError(f"a grid has multiples of {RATE} alone; search other settings by `space`")
        return {key: bracket(multiples) for key, multiples in grid.items()}

    @property
    def multiples(self) -> tuple[float, ...]:
        """Multiples of the grid; empty where a space is searched."""
        return self.grid.get(RATE, ())

    @property
    def keys(self) -> tuple[str, ...]:
        """Dotted keys of the tuned settings."""
        return (*self.grid, *self.space)

    @property
    def runs_per_arm(self) -> int:
        """Tuning runs of one arm, if a grid is not widened."""
        return len(self.multiples) or self.trials * self.seeds

    def of(self, arm: str) -> SearchSettings:
        """The search of one arm: the space and the known points moved to its centre."""
        centre = {key: multiple for key, multiple in self.centre.get(arm, {}).items() if key in self.space}
        if not centre:
            return self
        space = {key: dimension.around(centre.get(key, 1.0)) for key, dimension in self.space.items()}
        enqueue = tuple(
            {**centre, **{key: _times(value, centre.get(key)) for key, value in point.items()}}
            for point in self.enqueue
        )
        return self.model_copy(update={"space": space, "enqueue": enqueue})


def _times(value: Any, multiple: float | None) -> Any:
    """A known point's value at another centre; values that are no numbers are rejected later."""
    try:
        return value if multiple is None else float(value) * multiple
    except (TypeError, ValueError):
        return value


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension at one arm. `choices` are names; a config is given the element of `values` at the same index."""

    name: str
    kind: Kind
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    step: float | None = None
    points: int | None = None
    choices: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    when: Mapping[str, str]

    def at(self, u: float) -> Any:
        """The value at fraction `u` in [0, 1) of the range from low to high, or of the choices."""
        if self.kind == "categorical":
            return self.choices[int(u * len(self.choices))]
        if self.kind == "int":
            if self.log:  # every integer covers the range from 0.5 below to 0.5 above it
                low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
                return min(max(round(math.exp(low + u * (high - low))), int(self.low)), int(self.high))
            step = int(self.step or 1)
            return int(self.low) + step * int(u * (int(self.high - self.low) // step + 1))
        if self.step is not None:
            return rounded(self.low + self.step * int(u * (math.floor((self.high - self.low) / self.step + 1e-9) + 1)))
        return self._between(u)

    def grid(self) -> tuple[Any, ...]:
        """Every value of a grid. A real number needs `points` or a `step`."""
        if self.kind == "categorical":
            return self.choices
        if self.points is not None:
            ends = [self._between(i / (self.points - 1)) for i in range(self.points)]
            return tuple(dict.fromkeys(round(value) if self.kind == "int" else value for value in ends))
        count = math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1
        values = (self.low + (self.step or 1) * i for i in range(min(count, MOST_OF_A_GRID + 1)))
        return tuple(int(value) if self.kind == "int" else rounded(value) for value in values)

    def _between(self, u: float) -> float:
        if self.log:
            return rounded(math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low))))
        return rounded(self.low + u * (self.high - self.low))

    def as_record(self) -> dict[str, Any]:
        """As plain data."""
        low, high = (self.low, self.high) if self.kind != "categorical" else (None, None)
        return {
            "name": self.name, "kind": self.kind, "low": low, "high": high, "log": self.log, "step": self.step,
            "choices": list(self.choices) or None, "when": dict(self.when) or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Dimensions in an order in which each comes after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    def active(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        """Whether a dimension has an effect given these parameters."""
        return all(str(params.get(key)) == value for key, value in dimension.when.items())

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of sampled parameters: rounded, without inactive dimensions."""
        settings: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.name in params and self.active(dimension, settings):
                value = params[dimension.name]
                settings[dimension.name] = rounded(value) if dimension.kind == "float" else value
        return settings

    def changes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as changes to a config, by dotted key."""
        return {
            dimension.name: dimension.values[dimension.choices.index(settings[dimension.name])]
            if dimension.kind == "categorical"
            else repr(settings[dimension.name])
            for dimension in self.dimensions
            if dimension.name in settings
        }

    def grid_size(self) -> int:
        """Number of points of its grid."""
        return len(self._grid())

    def points(self, sampler: Drawn, seed: int, count: int) -> list[dict[str, Any]]:
        """The first `count` points of a sampler that does not use results; at most all points of a grid. The first
        points do not depend on `count`."""
        if sampler == "grid":
            return self._grid()[:count]
        d = len(self.dimensions)
        if sampler == "qmc":
            power = max(1, math.ceil(math.log2(max(count, 2))))
            units = scipy.stats.qmc.Sobol(d, scramble=True, rng=np.random.default_rng(seed)).random_base2(power)[:count]
        else:
            units = np.stack([np.random.default_rng((seed, index)).random(d) for index in range(count)])
        return [
            self.settings({dimension.name: dimension.at(u) for dimension, u in zip(self.dimensions, row, strict=True)})
            for row in units.tolist()
        ]

    def _grid(self) -> list[dict[str, Any]]:
        """Every combination once; those that differ only in an inactive dimension count as one."""
        sides = [dimension.grid() for dimension in self.dimensions]
        if math.prod(map(len, sides)) > MOST_OF_A_GRID:
            raise ConfigError(f"a grid of {math.prod(map(len, sides)):,} points: at most {MOST_OF_A_GRID:,}")
        names = [dimension.name for dimension in self.dimensions]
        points = (self.settings(dict(zip(names, values, strict=True))) for values in itertools.product(*sides))
        return list({repr(sorted(point.items())): point for point in points}.values())


def rounded(value: float) -> float:
    """Rounded to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def value_at(config: Config, key: str) -> Any:
    """A config's value at a dotted key: a setting, or a component's option. None where there is none."""
    value: Any = config
    for step in key.split("."):
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        value = value.options.get(step) if isinstance(value, Choice) else getattr(value, step, None)
        if value is None:
            return None
    return value


def plain_at(config: Config, key: str) -> Any:
    """The same as JSON has it, components in short."""
    value = value_at(config, key)
    if isinstance(value, (int, float, str)) or value is None:
        return value
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def resolve_space(written: Mapping[str, DimensionSettings], config: Config) -> Space:
    """The space at one config. Raises ConfigError with every invalid dimension; `where` is its key."""
    if not written:
        raise ConfigError("nothing to try: at least one dimension is expected")
    problems = [Problem(key, what) for key, dimension in written.items() for what in dimension.problems()]
    problems += [Problem(key, what) for key in written for what in _condition_problems(key, written)]
    wrong = {problem.where for problem in problems}
    dimensions: list[Dimension] = []
    sound = {key: dimension for key, dimension in written.items() if not wrong & {key, *dimension.when}}
    for key in _in_order(sound):
        try:
            chosen = {
                condition: next(choice for choice in written[condition].choices or () if in_short(choice) == value)
                for condition, value in written[key].when.items()
            }
            where_active = config.with_changes(chosen, "space") if chosen else config
            dimensions.append(_dimension(key, written[key], where_active))
        except ConfigError as error:
            problems += [Problem(key, problem.what) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Space(tuple(dimensions))


def _condition_problems(key: str, written: Mapping[str, DimensionSettings]) -> Iterator[str]:
    for condition, value in written[key].when.items():
        if condition not in written or condition == key:
            yield f"when: {unknown('dimension', condition, [name for name in written if name != key])}"
        elif written[condition].choices is None:
            yield f"when: '{condition}' has no choices"
        elif value not in (names := [in_short(choice) for choice in written[condition].choices or ()]):
            yield f"when: {unknown('choice', value, names)}"


def _in_order(written: Mapping[str, DimensionSettings]) -> list[str]:
    """Keys, each after those that it depends on. Raises ConfigError for a circle."""
    ordered: list[str] = []
    while rest := [key for key in written if key not in ordered]:
        free = [key for key in rest if set(written[key].when) <= set(ordered)]
        if not free:
            raise ConfigError([Problem(key, "when: it depends on itself by way of others") for key in rest])
        ordered += free
    return ordered


def _dimension(key: str, written: DimensionSettings, config: Config) -> Dimension:
    """One dimension; checks that the config is valid at each end or choice."""
    if written.choices is not None:
        names = tuple(in_short(choice) for choice in written.choices)
        if len(set(names)) < len(names):
            raise ConfigError("the same choice twice")
        _try(config, key, written.choices)
        return Dimension(name=key, kind="categorical", choices=names, values=written.choices, when=written.when)
    assert written.low is not None and written.high is not None
    low, high, value = written.low, written.high, value_at(config, key)
    if written.relative:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"`relative` needs a number of the config's own, which has {value if value else 'none'}")
        low, high = value * low, value * high
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and written.step is not None and written.step != int(written.step):
        raise ConfigError(f"a whole number is expected for the step, not {written.step:g}")
    low, high = (round(low), round(high)) if whole else (rounded(low), rounded(high))
    _try(config, key, [repr(low), repr(high)])
    return Dimension(
        name=key, kind="int" if whole else "float", low=low, high=high, log=written.log, step=written.step,
        points=written.points, when=written.when,
    )  # fmt: skip


def _try(config: Config, key: str, values: Sequence[Any]) -> None:
    """Raises ConfigError with every value that is invalid at `key` of the config."""
    problems: list[Problem] = []
    for value in values:
        if value is not None and not (isinstance(value, str) and value in ABSENT):
            try:
                config.with_changes({key: value}, "space")
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def check_search(settings: SearchSettings, config: Config) -> Space:
    """The space at a config. Raises ConfigError with all problems of the space and of the known points."""
    space = resolve_space(settings.space, config)
    if settings.sampler.name == "grid":
        vague = [d.name for d in space.dimensions if d.kind == "float" and d.points is None and d.step is None]
        if vague:
            raise ConfigError([Problem(name, "a grid needs `points` or a `step`") for name in vague])
        space.grid_size()
    for point in known_points(settings, space, config):
        config.with_changes(changes_of(space, config, space.settings(point)), "enqueue:")
    return space


def space_complaint(problem: Problem, space: Container[str], section: Key = ()) -> Complaint:
    """A problem that `check_search` raises, at its key in the file. section: the key of what holds the space."""
    if problem.where.startswith("enqueue"):
        point = problem.where.removeprefix("enqueue").lstrip(": ")
        return Complaint(f"{point}: {problem.what}", ((*section, "enqueue"),))
    dimension = (problem.where,) if problem.where in space else ()
    return Complaint(problem.what, ((*section, "space", *dimension),))


def known_points(settings: SearchSettings, space: Space, config: Config) -> list[dict[str, Any]]:
    """The points that are tried first, completed, as parameters. Raises ConfigError."""
    return [_known_point(written, settings, space, config) for written in settings.enqueue]


def _known_point(
    written: Mapping[str, Any], settings: SearchSettings, space: Space, config: Config
) -> dict[str, Any]:  # fmt: skip
    problems = [
        Problem(f"enqueue: {key}", "is no dimension of the space") for key in written if key not in settings.space
    ]
    point: dict[str, Any] = {}
    for dimension in space.dimensions:
        if space.active(dimension, point):
            try:
                relative, value = settings.space[dimension.name].relative, plain_at(config, dimension.name)
                point[dimension.name] = _known_value(dimension, written.get(dimension.name), relative, value)
            except ValueError as error:
                problems.append(Problem(f"enqueue: {dimension.name}", str(error)))
    if problems:
        raise ConfigError(problems)
    return point


def _known_value(dimension: Dimension, raw: Any, relative: bool, value_of_config: Any) -> Any:
    """A dimension's value as a file writes it, or that of the config. Raises ValueError with a message for the user."""
    if dimension.kind == "categorical":
        choice = str(value_of_config) if raw is None else in_short(raw)
        if choice not in dimension.choices:
            raise ValueError(f"'{choice}' is none of its choices: {', '.join(dimension.choices)}")
        return choice
    try:
        number = 1.0 if raw is None else float(raw)
    except (TypeError, ValueError):
        raise ValueError(f"'{raw}' is no number") from None
    if raw is None or relative:
        number *= value_of_config or 0.0
    value = round(number) if dimension.kind == "int" else rounded(number)
    if not dimension.low <= value <= dimension.high:
        raise ValueError(f"{value:g} is outside {dimension.low:g} to {dimension.high:g}")
    return value


BATCH = "training.batch_tokens"
WITH_BATCH = ("training.steps", "optim.warmup_steps", "evaluation.every_steps", "training.checkpoint_every_steps")
"""Numbers of steps that scale with the batch, so that every trial trains on the same number of tokens."""


def changes_of(space: Space, config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a trial as changes to a config; with another batch size, numbers of steps keep their tokens."""
    changes = space.changes(settings)
    if BATCH not in changes or "training.steps" in changes:
        return changes
    ratio = config.training.batch_tokens / int(changes[BATCH])
    steps = {key: value_at(config, key) for key in WITH_BATCH if key not in changes}
    scaled = {
        key: max(1, round(value * ratio)) if value else value for key, value in steps.items() if value is not None
    }
    return {**{key: str(value) for key, value in scaled.items()}, **changes}
