"""How long arms are trained: tokens per parameter, other budgets, and what makes arms equal in more than tokens.

Layer: plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpt2lab.ablation import LoadedAblation
from gpt2lab.arms import Arm
from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.equalise import DEFAULT_KNOB, Adjustment, equalise
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.machine import Machine
from gpt2lab.store import Store
from gpt2lab.throughput import recorded

CostsOf = Callable[[Config], Costs]


def with_steps(config: Config, steps: int, source: str) -> Config:
    """The same recipe over another number of steps: warm-up keeps its share of the run, the schedule ends with it."""
    share = config.optim.warmup_steps / config.training.steps
    changes = {"training.steps": str(steps), "optim.warmup_steps": str(round(share * steps))}
    return config.with_changes(changes, source)


def at_budget(arm: Arm, multiple: float) -> Arm:
    """The arm trained `multiple` times as long, on a schedule of its own."""
    steps = max(1, round(arm.config.training.steps * multiple))
    return replace(arm, config=with_steps(arm.config, steps, f"arm {arm.name} at {multiple:g} of the tokens"))


def with_tokens(ablation: LoadedAblation, costs_of: CostsOf) -> LoadedAblation:
    """Every arm trained for the declared tokens per parameter of the baseline, if any were declared."""
    wanted = ablation.tokens_per_parameter
    if wanted is None:
        return ablation
    config = ablation.arms[ablation.baseline].config
    steps = max(1, round(wanted * costs_of(config).parameters / config.training.batch_tokens))
    return replace(
        ablation,
        arms={
            name: replace(arm, config=with_steps(arm.config, steps, f"arm {name} at {wanted:g} tokens per parameter"))
            for name, arm in ablation.arms.items()
        },
    )


def equal_arms(
    ablation: LoadedAblation, costs_of: CostsOf, store: Store, machine: Machine
) -> tuple[dict[str, Arm], dict[str, Adjustment]]:
    """The arms made equal on the declared axis, and what was changed in them. Raises ConfigError with all that fail."""
    arms = dict(ablation.arms)
    if ablation.axis == "tokens":
        return arms, {}
    baseline, knob = arms[ablation.baseline].config, ablation.knob or DEFAULT_KNOB[ablation.axis]
    speeds = dict.fromkeys(arms, 0.0)
    if ablation.axis == "wall_clock":
        speeds = recorded(store.root, {name: arm.config for name, arm in arms.items()}, machine)
    found, problems = {}, []
    for name, arm in arms.items():
        pair = (speeds[name], speeds[ablation.baseline]) if ablation.axis == "wall_clock" else None
        try:
            config, adjustment = equalise(
                arm.config, baseline, axis=ablation.axis, knob=knob, costs_of=costs_of, tokens_per_second=pair
            )
        except ConfigError as error:
            problems += [Problem(f"arm {name}", problem.what) for problem in error.problems]
            continue
        arms[name] = replace(arm, config=config)
        if adjustment is not None:
            found[name] = adjustment
    if problems:
        raise ConfigError(problems, hint="another `equalise: {axis: ..., by: ...}`")
    return arms, found
