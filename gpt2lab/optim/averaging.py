"""Averages of the weights over the training, which are evaluated, saved and exported in place of the trained weights.

A component receives (params: Sequence[Param], steps: int), the parameters and the length of the training, and returns
an `Average`, or None to evaluate the trained weights. Training itself is not changed by an average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gpt2lab.components.base import Param
from gpt2lab.registry import SLOTS, Slot

averaging = Slot("optim.averaging", "which average of the weights is evaluated in their place", default="none")

AVERAGES = "averages"
"""The capability of an optimizer whose weights for evaluation are an average already."""
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Average(ABC):
    """An average of `weights` over the training. Subclasses define `update` and `mean`, and list their state.

    name: of the component, set by `build_averaging`; a checkpoint of another one does not fit.
    """

    name = ""

    def __init__(self, params: Sequence[Param]) -> None:
        self.weights: list[Tensor] = [param.tensor for param in params]

    @abstractmethod
    def update(self, step: int) -> None:
        """Include the weights after `step` steps; called once after every step that changed them."""

    @abstractmethod
    def mean(self) -> Sequence[Tensor] | None:
        """The average of every weight, in the order of `weights`; None before there is one."""

    def evaluated(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every weight with its average."""
        yield from zip(self.weights, self.mean() or self.weights, strict=True)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` continues from exactly."""

    @abstractmethod
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `tensors`, each on the device of its weight."""
        return [
            tensor.detach().to(weight.device, copy=True) for tensor, weight in zip(tensors, self.weights, strict=True)
        ]


class Running(Average):
    """average += share(n) (weight - average) after every step beyond `start_step`, where n counts those before.

    share: of the newest weights, 1 for n = 0.
    """

    def __init__(self, params: Sequence[Param], share: Callable[[int], float], start_step: int = 0) -> None:
        super().__init__(params)
        self.share, self.start_step = share, start_step
        self.count, self.average = 0, list[Tensor]()

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step <= self.start_step:
            return
        if self.count:
            torch._foreach_lerp_(self.average, self.weights, self.share(self.count))
        else:
            self.average = self.copies(self.weights)
        self.count += 1

    def mean(self) -> Sequence[Tensor] | None:
        return self.average if self.count else None

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "average": self.average}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.count = int(saved["count"])
        self.average = self.copies(saved["average"]) if self.count else []


class Latest(Average):
    """The mean of the weights at the last `most` multiples of `every_steps`."""

    def __init__(self, params: Sequence[Param], most: int, every_steps: int) -> None:
        super().__init__(params)
        self.every_steps = every_steps
        self.snapshots: deque[list[Tensor]] = deque(maxlen=most)

    def update(self, step: int) -> None:
        if step % self.every_steps == 0:
            self.snapshots.append(self.copies(self.weights))

    def mean(self) -> Sequence[Tensor] | None:
        return [torch.stack(same).mean(0) for same in zip(*self.snapshots, strict=True)] or None

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": list(self.snapshots)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.snapshots.clear()
        self.snapshots.extend(self.copies(snapshot) for snapshot in saved["snapshots"])


def one_average(optim: Any, options: Mapping[str, Any]) -> list[str]:
    """An optimizer that averages by itself leaves nothing to average."""
    if AVERAGES not in SLOTS["optimizer"][optim.optimizer.name].can:
        return []
    return [f"the optimizer {optim.optimizer.name} averages already (write averaging: none)"]


@averaging.register("none", source="GPT-2 (Radford et al. 2019)")
def none(params: Sequence[Param], steps: int) -> Average | None:
    """The trained weights are evaluated, or those that the optimizer has for evaluation."""
    return None


@averaging.register("ema", source="arXiv:2306.03241, section 3", check=one_average, examples=({"decay": 0.9},))
def ema(params: Sequence[Param], steps: int, *, decay: Decay = 0.999, warmup: bool = True) -> Average:
    """An exponential moving average over steps; it costs one copy of the weights.

    average = d average + (1 - d) weight   after every step, starting with the weights after the first

    decay:  d, near 1.
    warmup: use min(d, (1 + n) / (10 + n)) after n steps, as TensorFlow does, so that short trainings do not evaluate
            their beginning.
    """

    def share(count: int) -> float:
        return 1 - (min(decay, (1 + count) / (10 + count)) if warmup else decay)

    return Running(params, share)


@averaging.register("polyak", source="Polyak and Juditsky 1992; arXiv:1803.05407", check=one_average)
def polyak(params: Sequence[Param], steps: int, *, start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75) -> Average:
    """The plain mean of the weights after every step of the last part of training; it costs one copy of the weights.

    average = (n average + weight) / (n + 1)   after n steps beyond the start

    start: share of the training before the first weights that count. Earlier, the trained weights are evaluated.
    """
    return Running(params, lambda count: 1 / (count + 1), start_step=int(start * steps))


@averaging.register("lawa", source="arXiv:2306.03241; arXiv:2209.14981", check=one_average)
def lawa(
    params: Sequence[Param],
    steps: int,
    *,
    checkpoints: Annotated[int, Field(ge=1)] = 5,
    interval: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02,
) -> Average:
    """The mean of the latest few snapshots of the weights (latest weight averaging), each of which costs a copy.

    average = (w_s + w_(s-i) + ... + w_(s-(k-1)i)) / k   with s the last multiple of i steps

    checkpoints: k, fewer at the beginning. Before the first, the trained weights are evaluated.
    interval:    i as a share of the training, at least one step (the paper: a number of steps).
    """
    return Latest(params, checkpoints, max(1, round(interval * steps)))
