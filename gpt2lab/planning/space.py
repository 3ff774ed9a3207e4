"""What a search may try: the dimensions of its space, resolved at one arm's config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from scipy.stats import qmc

from gpt2lab.config import Config
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.planning.designs import in_short
from gpt2lab.registry import Choice
from gpt2lab.schema import ABSENT, Settings

DIGITS = 4
"""Significant digits of a real number that is tried: nobody can tell more apart, and 0.002135 can be read and typed."""
MOST_OF_A_GRID = 10_000

Kind = Literal["float", "int", "categorical"]
Drawn = Literal["random", "grid", "qmc"]
"""Samplers that need no results: their points follow from space, seed and slot alone."""


class DimensionSettings(Settings):
    """One dimension as a file writes it: `{low, high}` for numbers, `{choices}` or a plain list for the rest."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Whether the logarithm is what is even: for rates, widths and the like."""
    relative: bool = False
    """Whether low and high are multiples of the config's own value."""
    step: float | None = Field(None, gt=0)
    """Distance of the values that are tried."""
    points: int | None = Field(None, ge=2)
    """Of a grid: how many values from low to high."""
    choices: tuple[Any, ...] | None = None
    """What there is to choose from."""
    when: dict[str, str] = Field(default_factory=dict)
    """Other dimension -> its value, without which this one means nothing."""

    def problems(self) -> Iterator[str]:
        """What is wrong with it by itself."""
        numbers = [name for name in ("low", "high", "step", "points") if getattr(self, name) is not None]
        if self.choices is not None:
            if numbers or self.log or self.relative:
                yield "either `choices`, or `low` and `high`"
            elif len(self.choices) < 2:
                yield "at least two choices are expected"
            return
        if self.low is None or self.high is None:
            yield "`low` and `high` are expected, or a list of choices"
        elif self.low >= self.high:
            yield f"low ({self.low:g}) must be less than high ({self.high:g})"
        elif self.log and self.low <= 0:
            yield "`log: true` needs low above 0"
        elif self.log and self.step is not None:
            yield "either `log: true` or a `step`"
        elif self.relative and self.low <= 0:
            yield "multiples must be greater than 0"


class SpaceSettings(Settings):
    """Anything with a space."""

    space: dict[str, DimensionSettings]
    """Dotted key -> what may be tried for it."""

    @field_validator("space", mode="before")
    @classmethod
    def _choices_alone(cls, space: Any) -> Any:
        """`model.position: [learned, rotary]` means `{choices: [learned, rotary]}`."""
        if not isinstance(space, Mapping):
            return space
        return {key: {"choices": one} if isinstance(one, list) else one for key, one in space.items()}


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension at one arm. `choices`: their names, in whose place `values` is what a config is given."""

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
        """The value at `u` in [0, 1) of the way from low to high, or through the choices."""
        if self.kind == "categorical":
            return self.choices[int(u * len(self.choices))]
        if self.kind == "int":
            if self.log:  # every whole number owns from half below to half above
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
            return tuple(dict.fromkeys(round(one) if self.kind == "int" else one for one in ends))
        count = math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1
        values = (self.low + (self.step or 1) * i for i in range(min(count, MOST_OF_A_GRID + 1)))
        return tuple(int(value) if self.kind == "int" else rounded(value) for value in values)

    def _between(self, u: float) -> float:
        if self.log:
            return rounded(math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low))))
        return rounded(self.low + u * (self.high - self.low))

    def as_record(self) -> dict[str, Any]:
        """As plain data."""
        numeric = self.kind != "categorical"
        return {
            "name": self.name,
            "kind": self.kind,
            "low": self.low if numeric else None,
            "high": self.high if numeric else None,
            "log": self.log,
            "step": self.step,
            "choices": list(self.choices) or None,
            "when": dict(self.when) or None,
        }


@dataclass(frozen=True)
class Space:
    """Dimensions in an order in which each comes after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    def active(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        """Whether a dimension means something beside these parameters."""
        return all(str(params.get(other)) == value for other, value in dimension.when.items())

    @property
    def conditional(self) -> bool:
        """Whether any dimension depends on another."""
        return any(dimension.when for dimension in self.dimensions)

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What is trained for parameters that were drawn: rounded, without what means nothing beside the others."""
        kept: dict[str, Any] = {}
        for one in self.dimensions:
            if one.name in params and self.active(one, kept):
                value = params[one.name]
                kept[one.name] = rounded(value) if one.kind == "float" else value
        return kept

    def changes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as changes to a config, by dotted key."""
        known = {one.name: one for one in self.dimensions}
        return {name: self._written(known[name], value) for name, value in settings.items()}

    def _written(self, dimension: Dimension, value: Any) -> Any:
        if dimension.kind == "categorical":
            return dimension.values[dimension.choices.index(value)]
        return repr(value)

    def grid_size(self) -> int:
        """How many points its grid has."""
        return len(self._grid())

    def points(self, sampler: Drawn, seed: int, count: int) -> list[dict[str, Any]]:
        """The first `count` points of a sampler that needs no results; as many as there are, for a grid. More points
        are always the same ones with others behind them."""
        if sampler == "grid":
            return self._grid()[:count]
        d = len(self.dimensions)
        if sampler == "qmc":
            power = max(1, math.ceil(math.log2(max(count, 2))))
            units = qmc.Sobol(d, scramble=True, rng=np.random.default_rng(seed)).random_base2(power)[:count]
        else:
            units = np.stack([np.random.default_rng((seed, index)).random(d) for index in range(count)])
        return [self.settings(self._at(row)) for row in units.tolist()]

    def _at(self, units: Sequence[float]) -> dict[str, Any]:
        return {one.name: one.at(u) for one, u in zip(self.dimensions, units, strict=True)}

    def _grid(self) -> list[dict[str, Any]]:
        """Every combination once; those that differ in a meaningless dimension only are one."""
        sides = [one.grid() for one in self.dimensions]
        if math.prod(map(len, sides)) > MOST_OF_A_GRID:
            raise ConfigError(f"a grid of {math.prod(map(len, sides)):,} points: at most {MOST_OF_A_GRID:,}")
        names = [one.name for one in self.dimensions]
        every = (self.settings(dict(zip(names, values, strict=True))) for values in itertools.product(*sides))
        return list({repr(sorted(one.items())): one for one in every}.values())


def rounded(value: float) -> float:
    """To the digits that are tried."""
    return float(f"{value:.{DIGITS}g}")


def value_at(config: Config, key: str) -> Any:
    """What a config has at a dotted key: a setting, or a component's option. None where there is no such thing."""
    value: Any = config
    for step in key.split("."):
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        value = value.options.get(step) if isinstance(value, Choice) else getattr(value, step, None)
        if value is None:
            return None
    return value


def resolve_space(written: Mapping[str, DimensionSettings], config: Config) -> Space:
    """The space at one config. Raises ConfigError with every dimension that cannot be; `where` is its key."""
    problems = [Problem(key, what) for key, one in written.items() for what in one.problems()]
    problems += [Problem(key, what) for key, one in written.items() for what in _condition_problems(one, key, written)]
    if not written:
        problems = [Problem("", "nothing to try: at least one dimension is expected")]
    wrong = {problem.where for problem in problems}
    made: list[Dimension] = []
    for key in _in_order({key: one for key, one in written.items() if not wrong & {key, *one.when}}):
        try:
            made.append(_dimension(key, written[key], _where_it_means_something(written, key, config)))
        except ConfigError as error:
            problems += [Problem(key, problem.what) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Space(tuple(made))


def _condition_problems(one: DimensionSettings, key: str, written: Mapping[str, DimensionSettings]) -> Iterator[str]:
    for other, value in one.when.items():
        if other not in written or other == key:
            yield f"when: {unknown('dimension', other, [name for name in written if name != key])}"
        elif written[other].choices is None:
            yield f"when: '{other}' has no choices"
        elif value not in (names := [in_short(choice) for choice in written[other].choices or ()]):
            yield f"when: {unknown('choice', value, names)}"


def _in_order(written: Mapping[str, DimensionSettings]) -> list[str]:
    """Keys, each behind those that it depends on. Raises ConfigError for a circle."""
    ordered: list[str] = []
    left = list(written)
    while left:
        free = [key for key in left if set(written[key].when) <= set(ordered)]
        if not free:
            raise ConfigError([Problem(key, "when: it depends on itself by way of others") for key in left])
        ordered += free
        left = [key for key in left if key not in free]
    return ordered


def _where_it_means_something(written: Mapping[str, DimensionSettings], key: str, config: Config) -> Config:
    """The config with the choices without which a dimension means nothing. Raises ConfigError."""
    chosen: dict[str, Any] = {}
    for other, value in written[key].when.items():
        choices = written[other].choices or ()
        chosen[other] = next(choice for choice in choices if in_short(choice) == value)
    return config.with_changes(chosen, "space") if chosen else config


def _dimension(key: str, written: DimensionSettings, config: Config) -> Dimension:
    """One dimension, each end or choice of which makes a config."""
    if written.choices is not None:
        names = tuple(in_short(choice) for choice in written.choices)
        if len(set(names)) < len(names):
            raise ConfigError("the same choice twice")
        made = Dimension(name=key, kind="categorical", choices=names, values=written.choices, when=written.when)
        _try(config, key, made.values)
        return made
    assert written.low is not None and written.high is not None
    own = value_at(config, key)
    low, high = written.low, written.high
    if written.relative:
        if isinstance(own, bool) or not isinstance(own, (int, float)) or not own > 0:
            raise ConfigError(f"`relative` needs a number of the config's own, which has {own if own else 'none'}")
        low, high = own * low, own * high
    whole = isinstance(own, int) and not isinstance(own, bool)
    if whole:
        low, high = round(low), round(high)
        if written.step is not None and written.step != int(written.step):
            raise ConfigError(f"a whole number is expected for the step, not {written.step:g}")
    else:
        low, high = rounded(low), rounded(high)
    made = Dimension(
        name=key, kind="int" if whole else "float", low=low, high=high, log=written.log, step=written.step,
        points=written.points, when=written.when,
    )  # fmt: skip
    _try(config, key, [repr(end) for end in (low, high)])
    return made


def _try(config: Config, key: str, values: Sequence[Any]) -> None:
    """Raises ConfigError with every value that does not fit at `key`, where everything else is the config's own."""
    problems: list[Problem] = []
    for value in values:
        if value is None or (isinstance(value, str) and value in ABSENT):
            continue
        try:
            config.with_changes({key: value}, "space")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
