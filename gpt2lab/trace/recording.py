"""What one pass through a model does, operation by operation, recorded while the real code runs without data.

Nothing is declared by the components: a torch function mode sees every operation with its tensors, hooks see every call
of a module, the methods by which components meet are wrapped, and torch counts the work. The way back is counted too:
every node of the gradient's graph belongs to the operation that made it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.model import GPT


@dataclass(eq=False)
class Value:
    """One tensor of the pass. maker: the operation that made it, None for what was there before.  index: which of the
    operation's results it is.  users: the events that it was given to.  parameter: its name, if it is one."""

    tensor: Tensor
    maker: Event | None = None
    index: int = 0
    users: list[Event] = field(default_factory=list)
    parameter: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)


@dataclass(eq=False)
class Event:
    """An operation, or a call with events inside.

    label:    an operation's name in torch, a call's method or the module's path.
    part:     the module or component that was called, None for operations.
    given, made: what went in and came out.  arguments: of an operation, as written, tensors as Values.
    formals:  Value -> what a call's own code calls it.
    view:     whether an operation only looks at the same numbers in another shape.
    once:     whether it serves all layers.  depth: of the block call, None outside blocks.
    forward, backward: FLOP of an operation itself.  parameters: counted where they are first used.
    """

    label: str
    part: Any = None
    given: list[Value] = field(default_factory=list)
    made: list[Value] = field(default_factory=list)
    arguments: tuple[Any, ...] = ()
    formals: dict[Value, str] = field(default_factory=dict)
    parent: Event | None = None
    inside: list[Event] = field(default_factory=list)
    method: bool = False
    view: bool = False
    once: bool = False
    depth: int | None = None
    forward: int = 0
    backward: int = 0
    parameters: int = 0
    weights: list[str] = field(default_factory=list)
    watched: tuple[Value, Value, float] | None = None

    @property
    def operation(self) -> bool:
        """Whether it is no call."""
        return self.part is None

    def within(self, other: Event | None) -> bool:
        """Whether it is `other` or lies inside it; everything lies inside None."""
        here: Event | None = self
        while here is not other and here is not None:
            here = here.parent
        return here is other


class Counting(TorchDispatchMode):
    """Adds the FLOPs that `counter` counts to whatever `to` names; goes around it, so that it sees each operation."""

    def __init__(self, counter: FlopCounterMode, to: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter, self.to = counter, to

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        self.to(str(func), self.counter.get_total_flops() - before)
        return out


class Recorder(TorchFunctionMode):
    """Sees every torch function. `root.inside` is the pass, once it has been run."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.root = Event("", part=model)
        self.stack = [self.root]
        self.depth: int | None = None
        self.values: dict[int, Value] = {}
        self.nodes: dict[Any, Event] = {}
        self.returning, self.current = False, self.root  # on the way back, through the nodes of which event
        self.work: list[tuple[str, int]] = []  # what torch does inside the function at hand
        self.left = {name: p.numel() for name, p in model.named_parameters()}
        self.looked_at: set[tuple[str, int, tuple[int, ...]]] = set()
        self.pending: tuple[Value, Value, float] | None = None  # an attention kernel that is about to be called
        for name, parameter in model.named_parameters():
            self.values[id(parameter)] = Value(parameter, parameter=name)

    # values ---------------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; it is kept, so that no later one has its id."""
        return self.values.setdefault(id(tensor), Value(tensor))

    def count_parameter(self, event: Event, value: Value) -> None:
        """Count a parameter, or the part of it that is looked at, where it is first used."""
        base = self.values.get(id(value.tensor._base))
        name = value.parameter or (base.parameter if base else None)
        if name is None:
            return
        tensor = value.tensor
        if name not in event.weights:
            event.weights.append(name)
        look = (name, int(tensor.storage_offset()), tuple(tensor.shape))
        if look not in self.looked_at:
            self.looked_at.add(look)
            fresh = min(tensor.numel(), self.left[name])
            self.left[name] -= fresh
            event.parameters += fresh

    # operations -----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.work = []
        out = func(*args, **(kwargs or {}))
        inputs = list(tensors((args, kwargs or {})))
        results = [x for x in tensors(out) if not any(x is y for y in inputs)]
        if results:
            self.operation(name_of(func), args, kwargs or {}, inputs, results)
        return out

    def operation(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Record one; an attention kernel as the three steps that it stands for."""
        known = [x for x in inputs if id(x) in self.values]
        written = as_values((*args, *kwargs.values()), self.value)
        event = Event(name, given=[self.value(x) for x in inputs], arguments=written)
        event.view = bool(known) and not any(flops for _, flops in self.work) and all(
            x._base is not None and any(x._base is y or x._base is y._base for y in known) for x in results
        )  # fmt: skip
        steps = self.attention_steps(event, results) if name == "scaled_dot_product_attention" else []
        if not steps:
            event.made = [self.made(x, event, i) for i, x in enumerate(results)]
            event.forward = sum(flops for _, flops in self.work)
            self.add(event)
            steps = [event]
        if name in ("matmul", "__matmul__", "bmm") and self.pending:
            event.watched, self.pending = self.pending, None
        for x in results:
            self.claim(steps, x)

    def made(self, tensor: Tensor, maker: Event, index: int) -> Value:
        found = self.values[id(tensor)] = Value(tensor, maker, index)
        return found

    def add(self, event: Event) -> None:
        """Put an event where the program is, and tell its values of it."""
        event.parent, event.depth = self.stack[-1], self.depth
        event.once = any(frame.once for frame in self.stack)
        self.stack[-1].inside.append(event)
        for value in event.given:
            value.users.append(event)
            if event.operation and not event.view:
                self.count_parameter(event, value)

    def attention_steps(self, kernel: Event, results: Sequence[Tensor]) -> list[Event]:
        """Scores, weights and the heads' answers of a fused kernel, if torch computes it by these steps here."""
        names = [name for name, flops in self.work if flops or "softmax" in name]
        if len(names) != 3 or "softmax" not in names[1]:
            return []
        q, k, v, *others = (value for value in kernel.given)
        work = [flops for name, flops in self.work if flops or "softmax" in name]
        map_of = torch.empty((*q.shape[:-1], k.shape[-2]), device="meta")
        scores = Event("scores", given=[q, k, *others], watched=self.pending, forward=work[0])
        scores.made = [self.made(map_of, scores, 0)]
        odds = torch.empty_like(map_of)
        weights = Event("weights", given=scores.made, forward=work[1])
        weights.made = [self.made(odds, weights, 0)]
        heads = Event("heads", given=[*weights.made, v], forward=work[2])
        heads.made = [self.made(results[0], heads, 0)]
        self.pending = None
        for event in (scores, weights, heads):
            self.add(event)
        return [scores, weights, heads]

    # the way back ---------------------------------------------------------------------------------------------------

    def claim(self, steps: Sequence[Event], result: Tensor) -> None:
        """The nodes of the gradient's graph that lie between `result` and what is known belong to `steps`: all to the
        only one, or to three by which side of the softmax they are on."""
        open_ = [(result.grad_fn, len(steps) - 1)]
        while open_:
            node, which = open_.pop()
            if node is None or node in self.nodes:
                continue
            if len(steps) == 3 and "Softmax" in node.name():
                which = 1
            self.nodes[node] = steps[which]
            node.register_prehook(functools.partial(self._enter_node, steps[which]))
            after = 0 if len(steps) == 3 and which == 1 else which
            open_ += [(other, after) for other, _ in node.next_functions]

    def _enter_node(self, event: Event, _: Any) -> None:
        self.current = event

    # calls ----------------------------------------------------------------------------------------------------------

    def enter(self, label: str, part: Any, call: Callable[..., Any], args: Any, kwargs: Any, *, method: bool) -> None:
        """A call begins."""
        given = [self.value(x) for x in tensors((args, kwargs))]
        event = Event(label, part=part, given=given, method=method)
        self.add(event)
        names = inspect.signature(call).bind(*args, **kwargs).arguments
        event.formals = {self.value(x): name for name, x in names.items() if isinstance(x, Tensor)}
        self.stack.append(event)

    def leave(self, out: Any) -> None:
        """The call that began last ends."""
        event = self.stack.pop()
        event.made = [self.value(x) for x in tensors(out)]

    def call(self, original: Callable[..., Any], part: Any, label: str, *, once: bool = False) -> Callable[..., Any]:
        """`original`, a method of `part`, recorded whenever it is called."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.enter(label, part, original, args, kwargs, method=True)
            self.stack[-1].once |= once
            out = original(*args, **kwargs)
            self.leave(out)
            return out

        return recorded

    def counted(self, name: str, flops: int) -> None:
        """What torch did inside a function, or on the way back."""
        if self.returning:
            self.current.backward += flops
        else:
            self.work.append((name, flops))


def name_of(func: Any) -> str:
    """A torch function as people call it; properties by their own name."""
    name: str = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, Mapping):
        yield from tensors(list(tree.values()))


def as_values(tree: Any, value: Callable[[Tensor], Value]) -> Any:
    """The same nesting with Values in place of tensors."""
    if isinstance(tree, Tensor):
        return value(tree)
    if isinstance(tree, (tuple, list)):
        return tuple(as_values(item, value) for item in tree)
    return tree
