"""Training length of arms, and equal parameters, FLOPs or wall clock: one declared setting (the knob) of each arm is
adjusted until the quantity equals the baseline's to within 1 %."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpt2lab.config import Config
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.identity import digest, settings
from gpt2lab.inspection.costs import parameters
from gpt2lab.planning.ablation import Arm, LoadedAblation
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.probes import recorded
from gpt2lab.planning.runs import known_costs, tokens_of
from gpt2lab.registry import SLOTS
from gpt2lab.store import Store

WITHIN = 0.01
KNOBS = {"parameters": ("mlp_width", "depth"), "flops": ("tokens", "mlp_width", "depth"), "wall_clock": ("tokens",)}
"""Axis -> what may be adjusted to make it equal, the default first."""
NAMES = {"mlp_width": "MLP width (mlp_ratio x n_embd)", "depth": "n_layer", "tokens": "steps"}
UNITS = {"parameters": "parameters", "flops": "FLOP", "wall_clock": "s"}
MOST = {"mlp_width": 8, "depth": 4, "tokens": 64}
"""The largest multiple of a knob's own value."""
FINE_WIDTH = 8  # multiples of 8 suit tensor cores

Measure = Callable[[Config], float]
"""The quantity of a training on the axis: parameters, FLOP of the whole run, or its seconds."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """The change of one arm's setting, and the quantity before and after, in the axis's unit."""

    axis: str
    what: str
    """the setting with its old and new value"""
    before: float
    after: float
    target: float
    """the baseline's"""

    def __str__(self) -> str:
        return f"{self.what}: {_amount(self.before)} -> {_against(self.after, self.axis, self.target)}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= value < 1e12 else f"{value:.4g}"


def _against(value: float, axis: str, target: float, at: str = "") -> str:
    """`847,296 parameters, the baseline has 842,496 (+0.57 %)`."""
    off = f"{100 * (value / target - 1):+.2f} %"
    return f"{_amount(value)} {UNITS[axis]}{at}, the baseline has {_amount(target)} ({off})"


def with_steps(config: Config, steps: int, source: str) -> Config:
    """The same recipe over another number of steps: warm-up keeps its share of the run, the schedule ends with it."""
    share = config.optim.warmup_steps / config.training.steps
    changes = {"training.steps": str(steps), "optim.warmup_steps": str(round(share * steps))}
    return config.with_changes(changes, source)


def equalise(
    config: Config, target: float, *, axis: str, knob: str, measure: Measure
) -> tuple[Config, Adjustment | None]:
    """The config with its knob adjusted until `measure` is within 1 % of `target`; unchanged, with None, where it is.

    `measure` must not fall as the knob rises. Raises ConfigError when 1 % cannot be reached, with a knob that can.
    """
    before = measure(config)
    if _equal(before, target):
        return config, None
    adjusted = _nearest(config, target, knob, measure)
    after = measure(adjusted)
    if _equal(after, target):
        problem = f"{NAMES[knob]} {_value(config, knob)} -> {_value(adjusted, knob)}"
        return adjusted, Adjustment(axis=axis, what=problem, before=before, after=after, target=target)
    reached = _against(after, axis, target, f" at {NAMES[knob]} {_value(adjusted, knob)}")
    problem = f"{knob} cannot make {axis} equal to within 1 %: the nearest is {reached}"
    for other_knob in KNOBS[axis]:
        if other_knob != knob and _equal(measure(_nearest(config, target, other_knob, measure)), target):
            raise ConfigError(
                f"{problem}; `by: {other_knob}` would do", hint=f"equalise: {{axis: {axis}, by: {other_knob}}}"
            )
    raise ConfigError(f"{problem}; no other knob would do")


def _equal(value: float, target: float) -> bool:
    return abs(value / target - 1) <= WITHIN


def _nearest(config: Config, target: float, knob: str, measure: Measure) -> Config:
    """The config nearest to the target, on the coarsest grid of the knob's values that comes within 1 %."""
    best = config
    for grid in _grids(config, knob):
        first = bisect.bisect_left(grid, target, key=lambda value: measure(_with_value(config, knob, value)))
        neighbours = [_with_value(config, knob, value) for value in grid[max(0, first - 1) : first + 1]]
        best = min(neighbours, key=lambda candidate: abs(measure(candidate) - target))
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
        period = math.lcm(*patterns)  # a pattern of components fills the layers evenly
        yield [layers for layers in range(period, most + 1, period) if _fits(config, layers)]
    else:
        yield range(1, most + 1)


def _fits(config: Config, layers: int) -> bool:
    """Whether the chosen components work at this depth."""
    try:
        _with_value(config, "depth", layers)
    except ConfigError:
        return False
    return True


def _value(config: Config, knob: str) -> int:
    """The knob's value: MLP width (before a gated MLP reduces it), layers, or steps."""
    model = config.model
    if knob == "mlp_width":
        return max(1, round(model.mlp_ratio * model.n_embd))
    return model.n_layer if knob == "depth" else config.training.steps


def _with_value(config: Config, knob: str, value: int) -> Config:
    if knob == "tokens":
        return with_steps(config, value, "equalise")
    if knob == "depth":
        return config.with_changes({"model.n_layer": str(value)}, "equalise")
    return config.with_changes({"model.mlp_ratio": repr(value / config.model.n_embd)}, "equalise")


def at_budget(arm: Arm, multiple: float) -> Arm:
    """The arm trained `multiple` times as long, with the schedule over that length."""
    steps = max(1, round(arm.config.training.steps * multiple))
    return replace(arm, config=with_steps(arm.config, steps, f"arm {arm.name} at {multiple:g} of the tokens"))


def with_tokens(ablation: LoadedAblation) -> LoadedAblation:
    """The ablation with the baseline trained for the declared tokens per parameter, if any, and all arms scaled by the
    same factor; equal numbers of tokens stay equal, whatever the batch sizes."""
    per_parameter = ablation.tokens_per_parameter
    if per_parameter is None:
        return ablation
    baseline = ablation.arms[ablation.baseline].config
    unit = math.lcm(*(arm.config.training.batch_tokens for arm in ablation.arms.values()))
    tokens = unit * max(1, round(per_parameter * known_costs(baseline).parameters / unit))
    multiple = tokens / tokens_of(baseline)
    return replace(ablation, arms={name: at_budget(arm, multiple) for name, arm in ablation.arms.items()})


def equal_arms(
    ablation: LoadedAblation, store: Store, machine: Machine
) -> tuple[dict[str, Arm], dict[str, Adjustment]]:
    """The arms made equal to the unchanged baseline on the declared axis, and their adjustments.

    Raises ConfigError with every arm that cannot be made equal.
    """
    arms, axis = dict(ablation.arms), ablation.axis
    if axis == "tokens":
        return arms, {}
    knob, measures = ablation.knob or KNOBS[axis][0], _measures(ablation, store, machine)
    target = measures[ablation.baseline](arms[ablation.baseline].config)
    adjusted: dict[str, Adjustment] = {}
    refused: dict[str, ConfigError] = {}
    for name, arm in arms.items():
        if name != ablation.baseline:
            try:
                config, adjustment = equalise(arm.config, target, axis=axis, knob=knob, measure=measures[name])
                if adjustment is not None:
                    arms[name], adjusted[name] = replace(arm, config=config), adjustment
            except ConfigError as error:
                refused[name] = error
    if refused:
        problems = [Problem(f"arm {name}", p.what) for name, error in refused.items() for p in error.problems]
        hints, rest = {error.hint for error in refused.values()}, [name for name in arms if name not in refused]
        common = hints.pop() if len(hints) == 1 else None  # a knob that would do for all of them
        raise ConfigError(
            problems, hint=common or (f"--arms {','.join(rest)}" if len(rest) > 1 else "equalise: tokens")
        )
    undone = [Problem(f"arm {name}", what) for name, what in _undone(arms, adjusted, ablation.baseline)]
    if undone:
        raise ConfigError(undone, hint="another knob (`equalise: {axis: ..., by: ...}`), or leave the arm out")
    return arms, adjusted


def _measures(ablation: LoadedAblation, store: Store, machine: Machine) -> dict[str, Measure]:
    """Arm -> the quantity on the axis, as a function of its config."""
    if ablation.axis == "parameters":  # of each candidate, without the work of counting FLOP
        return dict.fromkeys(ablation.arms, lambda config: float(parameters(config.model)))
    if ablation.axis == "flops":
        return dict.fromkeys(ablation.arms, lambda config: known_costs(config).flops_per_token * tokens_of(config))

    def seconds_at(speed: float) -> Measure:
        return lambda config: tokens_of(config) / speed

    speeds = recorded(store.root, {name: arm.config for name, arm in ablation.arms.items()}, machine)
    return {name: seconds_at(speed) for name, speed in speeds.items()}


def _undone(arms: Mapping[str, Arm], adjusted: Mapping[str, Adjustment], baseline: str) -> Iterator[tuple[str, str]]:
    """Adjusted arms that are now the same training as another: the knob reverted their change."""
    first_arms = {digest(settings(arms[baseline].config)): baseline}
    for name, arm in arms.items():
        if name == baseline or arm.control:
            continue
        twin = first_arms.setdefault(digest(settings(arm.config)), name)
        adjustment = adjusted.get(name) or adjusted.get(twin)
        if twin != name and adjustment:
            yield name, f"made equal ({adjustment.what}), it is the same training as arm '{twin}'"
