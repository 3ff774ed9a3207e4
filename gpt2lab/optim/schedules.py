"""Learning-rate schedules: pure functions of the step, so that resuming needs no state.

A component receives (steps: int, warmup_steps: int) and returns multiplier(step) in [0, 1], where `step` counts the
steps already taken: 0 for the first. The warm-up is the same for every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from gpt2lab.registry import Slot

schedule = Slot("optim.schedule", "how the learning rate changes after the warm-up", default="cosine")

Multiplier = Callable[[int], float]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def after_warmup(steps: int, warmup_steps: int, decay: Callable[[float], float]) -> Multiplier:
    """Linear warm-up, then `decay(progress)`, where progress is 0 at the end of the warm-up and 1 at step `steps`.

    The first step has 1 / warmup_steps of the peak rate, not 0, because a step at rate 0 would be wasted.
    """

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return decay(min(progress, 1.0))

    return multiplier


@schedule.register("cosine", source="arXiv:1608.03983; to a tenth as in GPT-3, arXiv:2005.14165")
def cosine(steps: int, warmup_steps: int, *, final_fraction: Fraction = 0.1) -> Multiplier:
    """Half a cosine from the peak to `final_fraction` of it.

    multiplier = f + (1 - f) (1 + cos(pi progress)) / 2

    final_fraction: f, the final rate relative to the peak.
    """

    def decay(progress: float) -> float:
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return after_warmup(steps, warmup_steps, decay)


@schedule.register("linear", source="arXiv:2502.15938")
def linear(steps: int, warmup_steps: int, *, final_fraction: Fraction = 0.0) -> Multiplier:
    """A straight line from the peak to `final_fraction` of it; by default to zero, as the source recommends.

    multiplier = 1 - (1 - f) progress

    final_fraction: f, the final rate relative to the peak.
    """
    return after_warmup(steps, warmup_steps, lambda progress: 1.0 - (1.0 - final_fraction) * progress)


@schedule.register("constant", source="arXiv:2405.18392 (its baseline without cool-down)")
def constant(steps: int, warmup_steps: int) -> Multiplier:
    """The peak rate until the end.

    multiplier = 1
    """
    return after_warmup(steps, warmup_steps, lambda progress: 1.0)


@schedule.register("wsd", source="arXiv:2405.18392; arXiv:2404.06395", examples=({"shape": "linear"},))
def wsd(
    steps: int,
    warmup_steps: int,
    *,
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2,
    shape: Literal["sqrt", "linear"] = "sqrt",
    final_fraction: Fraction = 0.0,
) -> Multiplier:
    """Warm-up, stable, decay (a trapezoid): the peak rate, then down in the last part of training.

    multiplier = 1 - (1 - f) s(x)   with x from 0 to 1 over the decay, and s(x) = sqrt(x) or x

    decay_fraction: length of the decay as a share of all steps, warm-up included; it begins after the warm-up.
    shape:          sqrt falls steeply at first and was best in the source; linear makes a trapezoid.
    final_fraction: f, the final rate relative to the peak.
    """
    decay_steps = max(1, min(round(decay_fraction * steps), steps - warmup_steps))

    def decay(progress: float) -> float:
        left = round((1.0 - progress) * (steps - warmup_steps))  # steps to the end
        x = max(0.0, 1.0 - left / decay_steps)
        return 1.0 - (1.0 - final_fraction) * (math.sqrt(x) if shape == "sqrt" else x)

    return after_warmup(steps, warmup_steps, decay)


@schedule.register("inverse_sqrt", source="arXiv:1706.03762, section 5.3")
def inverse_sqrt(steps: int, warmup_steps: int) -> Multiplier:
    """Fall with the square root of the step after the warm-up; it does not depend on the length of the training.

    multiplier = sqrt(w / s)   after s steps, with w the steps of warm-up, at least 1

    As in the paper, except that the peak is `optim.lr` instead of a value derived from width and warm-up.
    """
    start = max(1, warmup_steps)

    def decay(progress: float) -> float:
        return math.sqrt(start / max(start, warmup_steps + progress * (steps - warmup_steps)))

    return after_warmup(steps, warmup_steps, decay)


@schedule.register("exponential", source="arXiv:1908.06477, section 3; torch.optim.lr_scheduler.ExponentialLR")
def exponential(
    steps: int, warmup_steps: int, *, final_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
) -> Multiplier:
    """Fall by the same factor with every step, to `final_fraction` of the peak.

    multiplier = f ^ progress

    final_fraction: f, the final rate relative to the peak.
    """
    return after_warmup(steps, warmup_steps, lambda progress: final_fraction**progress)


@schedule.register("stairs", source="arXiv:1512.03385 (step decay); arXiv:2401.02954 (DeepSeek LLM)")
def stairs(
    steps: int,
    warmup_steps: int,
    *,
    at: tuple[Fraction, ...] = (0.8, 0.9),
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.316,
) -> Multiplier:
    """The peak rate, multiplied by a factor at some points of the training.

    multiplier = factor ^ n   after n of the points

    at:     the points, as shares of what follows the warm-up.
    factor: the default, 1/sqrt(10), and its points are those of the DeepSeek LLM.
    """
    return after_warmup(steps, warmup_steps, lambda progress: factor ** sum(progress >= point for point in at))
