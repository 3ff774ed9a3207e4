"""How long arms are trained: tokens per parameter, other budgets, and what makes arms equal in more than tokens.

Layer: plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.identity import digest, settings
from gpt2lab.planning.ablation import LoadedAblation
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.equalise import KNOBS, Adjustment, Measure, equalise, with_steps
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import tokens_of
from gpt2lab.planning.throughput import recorded
from gpt2lab.store import Store

CostsOf = Callable[[Config], Costs]


def at_budget(arm: Arm, multiple: float) -> Arm:
    """The arm trained `multiple` times as long, on a schedule of its own."""
    steps = max(1, round(arm.config.training.steps * multiple))
    return replace(arm, config=with_steps(arm.config, steps, f"arm {arm.name} at {multiple:g} of the tokens"))


def with_tokens(ablation: LoadedAblation, costs_of: CostsOf) -> LoadedAblation:
    """The baseline trained for the declared tokens per parameter, if any were declared, and arms as much longer or
    shorter: those with as many tokens as the baseline keep as many, whatever their batches."""
    wanted = ablation.tokens_per_parameter
    if wanted is None:
        return ablation
    baseline = ablation.arms[ablation.baseline].config
    unit = math.lcm(*(arm.config.training.batch_tokens for arm in ablation.arms.values()))
    tokens = unit * max(1, round(wanted * costs_of(baseline).parameters / unit))
    multiple = tokens / tokens_of(baseline)
    return replace(ablation, arms={name: at_budget(arm, multiple) for name, arm in ablation.arms.items()})


def equal_arms(
    ablation: LoadedAblation, costs_of: CostsOf, store: Store, machine: Machine
) -> tuple[dict[str, Arm], dict[str, Adjustment]]:
    """The arms made equal to the baseline, which stays as it is, on the declared axis, and what was changed in them.

    Raises ConfigError with every arm that cannot be made equal.
    """
    arms, axis = dict(ablation.arms), ablation.axis
    if axis == "tokens":
        return arms, {}
    knob, measures = ablation.knob or KNOBS[axis][0], _measures(ablation, costs_of, store, machine)
    target = measures[ablation.baseline](arms[ablation.baseline].config)
    found: dict[str, Adjustment] = {}
    refused: dict[str, ConfigError] = {}
    for name, arm in arms.items():
        if name == ablation.baseline:
            continue
        try:
            config, adjustment = equalise(arm.config, target, axis=axis, knob=knob, measure=measures[name])
        except ConfigError as error:
            refused[name] = error
            continue
        if adjustment is not None:
            arms[name], found[name] = replace(arm, config=config), adjustment
    if refused:
        problems = [Problem(f"arm {name}", p.what) for name, error in refused.items() for p in error.problems]
        raise ConfigError(problems, hint=_way_out(refused, ablation))
    undone = [Problem(f"arm {name}", what) for name, what in _undone(arms, found, ablation.baseline)]
    if undone:
        raise ConfigError(undone, hint="another knob (`equalise: {axis: ..., by: ...}`), or leave the arm out")
    return arms, found


def _measures(ablation: LoadedAblation, costs_of: CostsOf, store: Store, machine: Machine) -> dict[str, Measure]:
    """What each arm's training has of the axis, as a function of its config."""

    def parameters(config: Config) -> float:
        return float(costs_of(config).parameters)

    def flops(config: Config) -> float:
        return costs_of(config).flops_per_token * tokens_of(config)

    def seconds_at(speed: float) -> Measure:
        return lambda config: tokens_of(config) / speed

    if ablation.axis != "wall_clock":
        return dict.fromkeys(ablation.arms, parameters if ablation.axis == "parameters" else flops)
    speeds = recorded(store.root, {name: arm.config for name, arm in ablation.arms.items()}, machine)
    return {name: seconds_at(speed) for name, speed in speeds.items()}


def _way_out(refused: Mapping[str, ConfigError], ablation: LoadedAblation) -> str:
    """A knob that would do for all that were refused, else the arms that can stay."""
    hints = {error.hint for error in refused.values()}
    rest = [name for name in ablation.arms if name not in refused]
    common = hints.pop() if len(hints) == 1 else None
    return common or (f"--arms {','.join(rest)}" if len(rest) > 1 else "equalise: tokens")


def _undone(arms: Mapping[str, Arm], found: Mapping[str, Adjustment], baseline: str) -> Iterator[tuple[str, str]]:
    """Adjusted arms that are now the same training as another: the knob turned back what they were to change."""
    seen = {digest(settings(arms[baseline].config)): baseline}
    for name, arm in arms.items():
        if name == baseline or arm.control:
            continue
        twin = seen.setdefault(digest(settings(arm.config)), name)
        if twin != name and (name in found or twin in found):
            adjustment = found.get(name) or found[twin]
            yield name, f"made equal ({adjustment.what}), it is the same training as arm '{twin}'"
