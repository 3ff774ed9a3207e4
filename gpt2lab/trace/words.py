"""What the tensors of a recorded pass are called and mean, from the code that made them.

A call is called by its module's path and its arguments by the names in its own signature; an operation is written as a
formula of those. Meanings are the first sentences of the components' docstrings and the roles of parameters, so a
component that nobody foresaw is told in its own words.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from gpt2lab.components.base import Role
from gpt2lab.registry import SLOTS, Choice
from gpt2lab.trace.passes import Built
from gpt2lab.trace.recording import Event, Value

LONG, LONGER = 30, 90  # characters that a name, and a formula within another, may have
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "true_divide": "/", "matmul": "@", "bmm": "@", "pow": "^"}
REVERSED = {"rsub": "-", "rdiv": "/", "rtruediv": "/", "rmul": "*", "radd": "+", "rpow": "^"}
PARTS = ("split", "chunk", "unbind", "tensor_split")
TURNED = ("transpose", "permute", "mT", "T", "movedim", "swapaxes")
SAME = ("float", "to", "type_as", "contiguous", "clone", "detach", "view", "reshape", "flatten", "unflatten", "expand",
        "unsqueeze", "squeeze", "transpose", "permute", "movedim", "swapaxes")  # fmt: skip
KINDS = {
    "embedding": "table {}, a row for each token",
    "position": "table {} for positions",
    "hidden": "matrix {}",
    "residual_out": "matrix {} that writes into the stream",
    "head": "matrix {} of the head",
    "router": "matrix {} that chooses experts",
}


class Words:
    """Names and meanings for the events of one pass."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.roles = {param.name: param for param in built.model.params()}
        self.paths = {id(module): name for name, module in built.model.named_modules()}

    # names ----------------------------------------------------------------------------------------------------------

    def say(self, value: Value, frame: Event, most: int = LONG) -> str:
        """What a value is called inside the call `frame`; in a formula of up to `most` characters."""
        if value in frame.formals:
            return frame.formals[value]
        if value.parameter:
            return self.below(value.parameter, frame)
        maker = seen_from(value, frame)
        if maker is None:
            return "constant"
        if maker.operation:
            return self.operation(maker, value, frame, most)
        return self.call(maker, frame, value)

    def call(self, call: Event, frame: Event, value: Value | None = None) -> str:
        """The name of a call, or of one of its results: a module's path, or method(what it was given)."""
        name = self.path(call, frame)
        which = call.made.index(value) if value is not None and value in call.made else 0
        if not call.method:
            return name if len(call.made) < 2 else f"{name}[{which}]"
        if call.given and not call.once:
            subject = call.given[which if which < len(call.given) else 0]
            if len(told := f"{name}({self.say(subject, call.parent or frame)})") <= LONG:
                return told
        return name if len(call.made) < 2 else f"{name}[{which}]"

    def path(self, call: Event, frame: Event) -> str:
        """A call's module path and method, as far as they are not clear from the frame."""
        if not call.method:
            return self.below(call.label, frame)
        own = self.paths.get(id(call.part))
        return f"{self.below(own, frame)}.{call.label}" if own else call.label

    def below(self, name: str, frame: Event) -> str:
        """A dotted name without the path of the module that `frame` is in."""
        here: Event | None = frame
        while here is not None and (here.method or not here.label):
            here = here.parent
        return name.removeprefix(f"{here.label}.") if here else name

    def operation(self, made_by: Event, value: Value, frame: Event, most: int = LONG) -> str:
        """An operation's result: its formula, or the operation's own name where that would be long."""
        if made_by.label in ("scores", "weights", "heads"):
            return made_by.label
        if made_by.watched:
            return "scores"
        formula = self.formula(made_by, value, frame, most)
        return formula if len(formula) <= most else made_by.label.strip("_")

    def formula(self, event: Event, value: Value, frame: Event, most: int = LONG) -> str:
        """What an operation computes, in terms of what it was given."""
        label = event.label.strip("_")
        given = [self.say(v, frame, most) for v in event.given]
        if label in PARTS:
            return self.part(event, value, given[0])
        if label == "getitem" and given:
            index = event.arguments[1]
            return f"{given[0]}[{index if isinstance(index, int) else '...'}]"
        if label in ("mT", "T") or (label == "transpose" and set(event.arguments[1:]) == {-1, -2}):
            return f"{given[0]}^T"
        if label in SAME and given:
            return given[0]
        if label in INFIX or label in REVERSED:
            sign = INFIX.get(label) or REVERSED[label]
            sides = [self.operand(a, frame, most, tight=sign not in "+-") for a in event.arguments[:2]]
            if len(sides) == 2:
                return f" {sign} ".join(reversed(sides) if label in REVERSED else sides)
        return f"{label}({', '.join(given)})"

    def operand(self, argument: Any, frame: Event, most: int, *, tight: bool) -> str:
        """One side of a sign, in brackets where they are needed."""
        if not isinstance(argument, Value):
            return f"{argument:.4g}" if isinstance(argument, (int, float)) else str(argument)
        text = self.say(argument, frame, most)
        return f"({text})" if tight and re.search(r" [-+] ", text) else text

    def part(self, event: Event, value: Value, whole: str) -> str:
        """One part of what was split: by the names of stacked matrices where their sizes agree."""
        weights = [w for e in makers_of(event.given[0]) for w in e.weights]
        for name in weights:
            rows = self.roles[name].role.rows
            if [n for _, n in rows] == [v.shape[-1] for v in event.made]:
                return rows[value.index][0]
        return f"{whole}[{value.index}]"

    # meanings -------------------------------------------------------------------------------------------------------

    def meaning(self, event: Event, frame: Event) -> str:
        """What an event's result is, in a sentence without a full stop; empty where its name says it all."""
        return self.of_operation(event, frame) if event.operation else self.of_call(event)

    def of_call(self, call: Event) -> str:
        """From the component's docstring, else from the matrices that it uses, else from its class."""
        choice = self.owner(call)
        if choice is not None:
            own = vars(type(call.part)).get(call.label) if call.method else None
            told = first_sentence(own.__doc__ or "") if own else ""
            if not told or "->" in told:
                told = first_sentence(SLOTS[choice.slot][choice.name].summary)
            told = f"{choice.name}: {told}"
            again = self.again(call)
            return f"{told}; {again}" if again else told
        return self.matrices(call) or ("" if call.method else first_sentence(inspect.getdoc(call.part) or ""))

    def owner(self, call: Event) -> Choice | None:
        """The component that a call belongs to. What is computed once for all layers belongs to a part of the caller
        in the slot of that name, else to the component whose method asked for it."""
        choice = self.built.choice(call.part)
        if choice or not call.once:
            return choice
        for inner in call.inside:
            if found_inside := self.built.choice(inner.part):
                return found_inside
        here = call.parent
        while here is not None:
            found = [self.built.choice(part) for part in vars(here.part).values()] if here.part is not None else []
            fits = [c for c in found if c and c.slot == call.label]
            if fits or (here.method and self.built.choice(here.part)):
                return fits[0] if fits else self.built.choice(here.part)
            here = here.parent
        return None

    def of_operation(self, event: Event, frame: Event) -> str:
        """A formula, and for attention what is particular about it."""
        if event.label == "scores" or event.watched:
            return self.of_scores(event, frame)
        if event.label == "weights":
            return "softmax of the scores over the last axis: shares that add up to 1"
        if event.label == "heads":
            return f"weights @ {self.say(event.given[1], frame)}: what each head has read"
        if event.view or event.label == "reshape":
            return self.of_view(event, frame)
        formula = self.formula(event, event.made[0], frame, LONGER)
        name = self.say(event.made[0], frame)
        owner = self.built.choice(frame.part)
        if owner and owner.slot == "residual" and event.label.strip("_") in ("add", "radd"):
            return "the residual stream" if formula == name else f"the residual stream: {formula}"
        told = [formula] if formula != name else []
        return ": ".join([*told, *filter(None, [self.matrices(event)])])

    def of_scores(self, event: Event, frame: Event) -> str:
        """q k^T with its factor, what is added, and the mask in its own words."""
        q, k, *others = event.given
        told = f"{self.say(q, frame)} @ {self.say(k, frame).removesuffix('^T')}^T"
        if event.label == "scores" and event.watched:
            width, scale = q.shape[-1], event.watched[2]
            told += f" / sqrt({width})" if abs(scale - width**-0.5) < 1e-9 else f" * {scale:.4g}"
            told += "".join(f" + {self.say(v, frame)}" for v in others[1:])
        here: Event | None = frame
        while here is not None and here.part is not None:
            for choice in filter(None, map(self.built.choice, vars(here.part).values())):
                if choice.slot == "mask":
                    return f"{told}; {choice.name} mask: {first_sentence(SLOTS['mask'][choice.name].summary)}"
            here = here.parent
        return told

    def of_view(self, event: Event, frame: Event) -> str:
        """How a view differs from what it looks at."""
        steps: list[str] = []
        while (event.view or event.label == "reshape") and event.given:
            label = event.label.strip("_")
            cut = label in PARTS or label in ("getitem", "narrow", "select")
            steps.append("a part" if cut else "axes swapped" if label in TURNED else "reshaped")
            value = event.given[0]
            before = seen_from(value, frame)
            if before is None or not before.operation or value in frame.formals:
                break
            event = before
        words = list(dict.fromkeys(reversed(steps)))
        source = self.say(event.given[0], frame) if event.view or event.label == "reshape" else event.label.strip("_")
        if "a part" in words:
            words.remove("a part")
            source = f"part of {source}"
        return ", ".join([source, *words])

    def matrices(self, event: Event) -> str:
        """The matrices that an event works with, by their roles."""
        names = list(dict.fromkeys(name for e in inner_operations(event) for name in e.weights))
        told = [self.matrix(name) for name in names if self.roles[name].role.kind != "vector"]
        vectors = len(names) > len(told)
        text = ", ".join(told) + (", and biases" if told and vectors else "")
        again = self.again(event)
        return f"{text}; {again}" if text and again else text

    def matrix(self, name: str) -> str:
        """One matrix with its shape and what is stacked in it."""
        param = self.roles[name]
        role: Role = param.role
        text = KINDS.get(role.kind, role.kind + " {}").format(tuple(param.tensor.shape))
        return text + (": " + ", ".join(f"{part} {n}" for part, n in role.rows) if role.rows else "")

    def again(self, event: Event) -> str:
        """Which matrices were counted before."""
        used = {name for e in inner_operations(event) for name in e.weights if not e.parameters}
        names = [name for name in sorted(used) if self.roles[name].role.kind != "vector"]
        return f"with {' and '.join(names)} again" if names else ""


def seen_from(value: Value, frame: Event) -> Event | None:
    """What made a value, as `frame` sees it: a call that is not looked into, or an operation."""
    event = value.maker
    while event is not None and event.parent is not None and not frame.within(event.parent):
        if value not in event.parent.made:
            break
        event = event.parent
    return event


def makers_of(value: Value) -> list[Event]:
    """The operation that made a value, behind views."""
    event = value.maker
    while event is not None and event.view and event.given:
        event = event.given[0].maker
    return [event] if event else []


def inner_operations(event: Event) -> list[Event]:
    """Every operation in an event."""
    return [event] if event.operation else [e for inner in event.inside for e in inner_operations(inner)]


def first_sentence(text: str) -> str:
    """Of a docstring, without shapes, the reference to GPT-2, markup and the full stop."""
    line = re.split(r"\s{2,}|\n\n|\.\s|\.$", " ".join(re.split(r"\n(?!\n)", text.partition("\n\n")[0])))[0]
    line = re.sub(r":\w+:`([^`]*)`", r"\1", line)
    return re.sub(r"; GPT-2's( \w+)?$", "", line).strip()


def is_module(event: Event) -> bool:
    """Whether an event is the call of a module."""
    return isinstance(event.part, nn.Module) and not event.method
