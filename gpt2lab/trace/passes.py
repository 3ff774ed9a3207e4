"""Run a model once without data, forward and if wanted back, with a recorder looking on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.components.scores import Scores
from gpt2lab.components.step import Step
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.registry import Choice, Slot
from gpt2lab.trace.recording import Counting, Event, Recorder, tensors

MEETING = {
    "position": ("add", "rotate", "bias"),
    "scores": ("prepare", "finish"),
    "stack": ("before", "after", "value"),
    "embedding": ("unembed",),
    "residual": ("open", "close"),
    "objective": ("rows",),
}
"""Methods by which the model and its components call one another, by slot; the others are called as modules."""


@dataclass(frozen=True)
class Built:
    """A model without data. made_by: id of a part -> (the part, kept so that the id stays its own; its choice)."""

    model: GPT
    made_by: Mapping[int, tuple[Any, Choice]]

    def choice(self, part: Any) -> Choice | None:
        """What was chosen where this part was built; None for parts that no slot built."""
        found = self.made_by.get(id(part))
        return found[1] if found else None


@contextmanager
def makers() -> Iterator[dict[int, tuple[Any, Choice]]]:
    """While it lasts, whatever a slot builds is noted.

    Slot.build is replaced for that time: a note made there would be part of the code that trains, and change the id of
    every run.
    """
    found: dict[int, tuple[Any, Choice]] = {}
    original = Slot.build

    @functools.wraps(original)
    def build(slot: Slot, choice: Choice, *args: Any) -> Any:
        part = original(slot, choice, *args)
        found[id(part)] = (part, choice)
        return part

    setattr(Slot, "build", build)  # noqa: B010 - the type checker allows no assignment to a method
    try:
        yield found
    finally:
        setattr(Slot, "build", original)  # noqa: B010


def build(config: ModelConfig) -> Built:
    """The model on torch's meta device. Dropout is at work only where there is any."""
    with makers() as found, torch.device("meta"):
        model = GPT(config)
    return Built(model.train(config.dropout > 0), found)


class Watcher:
    """Sits at the Step of the pass; `attend` shows it queries and keys before it calls a kernel."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def stream(self, depth: int, x: Tensor) -> None:
        """Nothing to note: the stream is the block's result."""

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """The next product of matrices forms scores."""
        self.recorder.pending = (self.recorder.value(q), self.recorder.value(k), scale)


def run(built: Built, batch: int, tokens: int, *, back: bool) -> Recorder:
    """One pass of the training objective over (batch, tokens).  back: also the way back.

    Raises ConfigError beyond what the positions can express.
    """
    recorder = Recorder(built.model)
    counter = FlopCounterMode(display=False)
    with attached(recorder, built), counter, Counting(counter, recorder.counted), torch.device("meta"):
        inputs = torch.zeros(batch, tokens, dtype=torch.int64)
        targets = torch.zeros(batch, tokens, dtype=torch.int64)
        root = recorder.root
        root.formals = {recorder.value(inputs): "tokens", recorder.value(targets): "targets"}
        root.given = list(root.formals)
        with recorder:
            loss, _ = built.model.objective(inputs, targets)
        root.made = [recorder.value(loss)]
        if back:
            recorder.returning = True
            loss.backward()
            built.model.zero_grad()
    return recorder


@contextmanager
def attached(recorder: Recorder, built: Built) -> Iterator[None]:
    """Hooks on every module and wrappers around the methods where components meet, for one pass."""
    model, hooks, replaced = built.model, [], []

    def replace(part: Any, name: str, by: Callable[..., Any]) -> None:
        replaced.append((part, name))
        setattr(part, name, by)

    for name, module in model.named_modules():
        if module is not model:
            hooks += hook(recorder, name, module)
    for part, choice in built.made_by.values():
        for name in set(MEETING.get(choice.slot, ())) & set(dir(type(part))):
            replace(part, name, recorder.call(getattr(part, name), part, name))
    last: Any = model.h[-1]
    closing = last.close

    def close(x: Tensor) -> Any:
        recorder.depth = None
        return closing(x)

    replace(last, "close", close)
    step = model.step
    replace(model, "step", lambda *args, **kwargs: prepared(recorder, step(*args, **kwargs)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for part, name in reversed(replaced):
            vars(part).pop(name, None)


def hook(recorder: Recorder, name: str, module: nn.Module) -> list[Any]:
    """Record every call of a module."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.enter(name, module, module.forward, args, kwargs, method=False)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        recorder.leave(out)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def prepared(recorder: Recorder, step: Step) -> Step:
    """A Step that tells the recorder of depth, of attention, and of what is computed once for all layers."""
    changed: Any = step
    enter, once = step.enter, step.once
    step.watch = Watcher(recorder)

    def entering(depth: int, position: Any) -> None:
        recorder.depth = depth
        enter(depth, position)

    def computing(key: str, make: Callable[[], Any]) -> Any:
        return once(key, recorder.call(make, step, re.split(r"\W", key)[0], once=True))

    changed.enter, changed.once = entering, computing
    changed.shift = recorder.call(step.shift, step, "shift")
    return step


def total(recorder: Recorder) -> tuple[int, int, int]:
    """Parameters that the pass used, FLOP forward, FLOP back."""
    events = list(walk(recorder.root))
    return sum(e.parameters for e in events), sum(e.forward for e in events), sum(e.backward for e in events)


def walk(event: Event) -> Iterator[Event]:
    """An event and all inside it, in the order of the pass."""
    yield event
    for inner in event.inside:
        yield from walk(inner)


__all__ = ["Built", "build", "run", "tensors", "total", "walk"]
