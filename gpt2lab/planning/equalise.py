"""Make an arm equal to the baseline on an axis, by turning one declared knob, to within one per cent.

Layer: plan.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpt2lab.config import Config
from gpt2lab.errors import ConfigError
from gpt2lab.registry import SLOTS

WITHIN = 0.01
KNOBS = {"parameters": ("mlp_width", "depth"), "flops": ("tokens", "mlp_width", "depth"), "wall_clock": ("tokens",)}
"""Axis -> what may be turned to make it equal, the default first."""
UNITS = {"parameters": "parameters", "flops": "FLOP", "wall_clock": "s"}
MOST = {"mlp_width": 8, "depth": 4, "tokens": 64}
"""How many times its value a knob may be turned up to."""
FINE_WIDTH = 8  # multiples of 8 suit tensor cores

Measure = Callable[[Config], float]
"""What a training has of the axis: parameters, FLOP of the whole run, or seconds of it."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What was changed in one arm, and what that did to the axis, in the axis's unit."""

    axis: str
    what: str
    """the setting with its old and new value"""
    before: float
    after: float
    target: float
    """the baseline's"""

    def __str__(self) -> str:
        return (
            f"{self.what}: {_amount(self.before)} -> {_amount(self.after)} {UNITS[self.axis]}, the baseline has "
            f"{_amount(self.target)} ({_off(self.after, self.target)})"
        )


def _amount(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= value < 1e12 else f"{value:.4g}"


def _off(value: float, target: float) -> str:
    return f"{100 * (value / target - 1):+.2f} %"


def with_steps(config: Config, steps: int, source: str) -> Config:
    """The same recipe over another number of steps: warm-up keeps its share of the run, the schedule ends with it."""
    share = config.optim.warmup_steps / config.training.steps
    changes = {"training.steps": str(steps), "optim.warmup_steps": str(round(share * steps))}
    return config.with_changes(changes, source)


def equalise(
    config: Config, target: float, *, axis: str, knob: str, measure: Measure
) -> tuple[Config, Adjustment | None]:
    """The config with its knob turned until `measure` is `target` to within 1 %; itself and None where it is already.

    `measure` must not fall as the knob is turned up. Raises ConfigError when 1 % is out of reach, with what is not.
    """
    before = measure(config)
    if _equal(before, target):
        return config, None
    found = _nearest(config, target, knob, measure)
    after = measure(found)
    if not _equal(after, target):
        raise _out_of_reach(config, found, target, axis, knob, measure)
    what = f"{_named(config, knob)} -> {_named(found, knob).rpartition(' ')[2]}"
    return found, Adjustment(axis=axis, what=what, before=before, after=after, target=target)


def _equal(value: float, target: float) -> bool:
    return abs(value / target - 1) <= WITHIN


def _nearest(config: Config, target: float, knob: str, measure: Measure) -> Config:
    """The config as near to the target as the knob brings it, on the coarsest grid of its values that will do."""
    best = config
    for grid in _grids(config, knob):
        first = bisect.bisect_left(grid, target, key=lambda value: measure(_turned(config, knob, value)))
        beside = [_turned(config, knob, value) for value in grid[max(0, first - 1) : first + 1]]
        best = min(beside, key=lambda one: abs(measure(one) - target))
        if _equal(measure(best), target):
            break
    return best


def _grids(config: Config, knob: str) -> Iterator[Sequence[int]]:
    """Values that the knob may take, rising."""
    most = MOST[knob] * _value(config, knob)
    if knob == "mlp_width":
        yield range(FINE_WIDTH, most + 1, FINE_WIDTH)
    if knob == "depth":
        patterns = [len(c) for slot, c in config.model.choices().items() if SLOTS[slot].arity == "per_layer"]
        every = math.lcm(*patterns)  # a pattern of components fills the layers evenly
        yield [layers for layers in range(every, most + 1, every) if _fits(config, layers)]
    else:
        yield range(1, most + 1)


def _fits(config: Config, layers: int) -> bool:
    """Whether the chosen components work at this depth."""
    try:
        _turned(config, "depth", layers)
    except ConfigError:
        return False
    return True


def _value(config: Config, knob: str) -> int:
    """Where the knob stands: width before what a gated MLP takes off it, layers, or steps."""
    model = config.model
    if knob == "mlp_width":
        return max(1, round(model.mlp_ratio * model.n_embd))
    return model.n_layer if knob == "depth" else config.training.steps


def _turned(config: Config, knob: str, value: int) -> Config:
    if knob == "tokens":
        return with_steps(config, value, "equalise")
    key, text = (
        ("model.mlp_ratio", repr(value / config.model.n_embd)) if knob == "mlp_width" else ("model.n_layer", str(value))
    )
    return config.with_changes({key: text}, "equalise")


def _named(config: Config, knob: str) -> str:
    """`mlp_ratio x n_embd 512`, `n_layer 4`, `steps 440`."""
    name = {"mlp_width": "MLP width (mlp_ratio x n_embd)", "depth": "n_layer", "tokens": "steps"}[knob]
    return f"{name} {_value(config, knob)}"


def _out_of_reach(
    config: Config, nearest: Config, target: float, axis: str, knob: str, measure: Measure
) -> ConfigError:
    """How near the knob came, and which other one would do."""
    reached = measure(nearest)
    what = (
        f"{knob} cannot make {axis} equal to within 1 %: the nearest is {_amount(reached)} {UNITS[axis]} at "
        f"{_named(nearest, knob)}, the baseline has {_amount(target)} ({_off(reached, target)})"
    )
    for other in KNOBS[axis]:
        if other != knob and _equal(measure(_nearest(config, target, other, measure)), target):
            return ConfigError(f"{what}; `by: {other}` would do", hint=f"equalise: {{axis: {axis}, by: {other}}}")
    return ConfigError(f"{what}; no other knob would do")
