"""Make an arm equal to the baseline on an axis, by turning one declared knob, to within one per cent.

Layer: plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.errors import ConfigError

WITHIN = 0.01
DEFAULT_KNOB = {"parameters": "mlp_width", "flops": "tokens", "wall_clock": "tokens"}
KEYS = {"mlp_width": "model.mlp_ratio", "depth": "model.n_layer", "tokens": "training.steps"}
CostsOf = Callable[[Config], Costs]


@dataclass(frozen=True)
class Adjustment:
    """What was changed in one arm to reach equality. Units: parameters, FLOPs of a whole run, or seconds."""

    key: str
    before: float
    after: float
    axis: str
    target: float
    reached: float

    def __str__(self) -> str:
        off = 100 * (self.reached / self.target - 1)
        name = self.key.rpartition(".")[2]
        return (
            f"{name} {self.before:g} -> {self.after:g}: {self.reached:,.0f} {self.axis}, the baseline has "
            f"{self.target:,.0f} ({off:+.2f} %)"
        )


def equalise(
    config: Config,
    baseline: Config,
    *,
    axis: str,
    knob: str,
    costs_of: CostsOf,
    tokens_per_second: tuple[float, float] | None = None,
) -> tuple[Config, Adjustment | None]:
    """The config with its knob turned so that it equals the baseline on `axis`; None where it does already.

    tokens_per_second: of the arm and the baseline, for wall clock. Raises ConfigError when 1 % is out of reach.
    """

    def measure(one: Config, speed: int) -> float:
        tokens = one.training.steps * one.training.batch_tokens
        if axis == "wall_clock":
            assert tokens_per_second
            return tokens / tokens_per_second[speed]
        found = costs_of(one)
        return float(found.parameters) if axis == "parameters" else found.flops_per_token * tokens

    target, key = measure(baseline, 1), KEYS[knob]
    section, _, name = key.partition(".")
    before = getattr(getattr(config, section), name)
    if abs(measure(config, 0) / target - 1) <= WITHIN / 10:
        return config, None

    def at(value: float) -> Config:
        text: Any = repr(value) if knob == "mlp_width" else str(round(value))
        return config.with_changes({key: text}, f"equal {axis}")

    low, high = before / 16, before * 16
    if knob != "mlp_width":
        low = max(1.0, low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(at(middle), 0) < target else (low, middle)
    step = 1 / config.model.n_embd if knob == "mlp_width" else 1
    near = [round(high / step) * step + k * step for k in range(-8, 9)]
    best = min((at(value) for value in near if value > 0), key=lambda one: abs(measure(one, 0) / target - 1))
    after, reached = getattr(getattr(best, section), name), measure(best, 0)
    if abs(reached / target - 1) > WITHIN:
        raise ConfigError(
            f"{axis} cannot be made equal to within 1 % by {knob}: nearest {reached:,.0f} for {target:,.0f}"
        )
    return best, Adjustment(key, before, after, axis, target, reached)
