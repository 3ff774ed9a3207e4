"""From a recorded pass to rows: one for each tensor that matters, in the order in which they come about.

A tensor matters if work was done for it, if it goes into another part, or if it is what a part hands on. What lies in
between (casts, products element by element) is told in the formula of what it leads to, and costs are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpt2lab.model import ModelConfig
from gpt2lab.trace.passes import walk
from gpt2lab.trace.recording import Event, Value
from gpt2lab.trace.words import Words, is_module


@dataclass(frozen=True)
class Row:
    """One tensor, or the heading of a part that is shown in detail (then without a shape).

    level: how deep it is nested.  depth: of the block call, None outside blocks.  once: made for all layers at once.
    letters: the shape in letters where they are known.  parameters: counted where they are first used.
    forward, backward: FLOP of the whole pass.
    """

    name: str
    meaning: str
    shape: tuple[int, ...] | None
    letters: tuple[str, ...] | None = None
    level: int = 0
    depth: int | None = None
    once: bool = False
    parameters: int = 0
    forward: int = 0
    backward: int = 0


class Rows:
    """Makes the rows of one pass. twins: the same events of a pass of another size, in the same order."""

    def __init__(self, words: Words, root: Event, other: Event | None, config: ModelConfig) -> None:
        self.words, self.root, self.config = words, root, config
        self.twins: dict[Event, Event] = {}
        if other is not None:
            pairs = list(zip(walk(root), walk(other), strict=False))
            if all(a.label == b.label and len(a.made) == len(b.made) for a, b in pairs):
                self.twins = dict(pairs)
        self.known: dict[Value, bool] = {}

    def all(self) -> list[Row]:
        """Every row, the inputs first."""
        tokens = self.root.given[0]
        first = self.row("tokens", "what is read; the targets are the same, one further", tokens, self.root, 0)
        rows = [first, *self.inside(self.root, 0)]
        return [
            *rows[:-1],
            replace(
                rows[-1], name="loss", meaning=f"what training minimises: {' + '.join(map(str, self.config.objective))}"
            ),
        ]

    def inside(self, frame: Event, level: int) -> list[Row]:
        """The rows of what happens in a call; costs of operations without a row go to the next that has one."""
        rows: list[Row] = []
        left = (0, 0, 0)
        for event in frame.inside:
            if not event.operation:
                made = self.of_call(event, frame, level)
            elif self.matters(event, frame):
                made = [self.of_operation(event, value, frame, level) for value in shown_of(event, self, frame)]
                made[0] = with_costs(made[0], costs_of(event))
            else:
                left = add(left, costs_of(event))
                continue
            if made and event.operation:
                made[0], left = with_costs(made[0], left), (0, 0, 0)
            rows += made
        if any(left) and rows:
            rows[-1] = with_costs(rows[-1], left)
        return rows

    def of_call(self, call: Event, frame: Event, level: int) -> list[Row]:
        """One row for a call that does no work of its own; else a heading and the rows inside it."""
        if not any(e.operation for e in walk(call)):
            return []
        hoisted = [] if call.once else [row for e in once_in(call) for row in self.of_call(e, frame, level)]
        if self.simple(call):
            costs = [costs_of(e) for e in walk(call) if e.operation and (call.once or not e.once)]
            rows = [
                self.row(self.words.call(call, frame, v), self.words.of_call(call), v, call, level) for v in call.made
            ]
            if not rows:
                return hoisted
            return [*hoisted, with_costs(rows[0], total(costs)), *rows[1:]]
        within = self.inside(call, level + 1)
        name, meaning = self.words.call(call, frame), self.words.of_call(call)
        if len(within) == 1 and call.made and within[0].shape == call.made[0].shape:
            return [replace(within[0], name=name, meaning=meaning or within[0].meaning, level=level)]
        return [Row(name, meaning, None, level=level, depth=call.depth, once=call.once), *within]

    def simple(self, call: Event) -> bool:
        """Whether nothing inside needs a row of its own."""
        events = [e for e in walk(call) if e is not call and (call.once or not e.once)]
        if len([e for e in events if e.operation]) == 1 and len(call.made) == 1:
            return True
        return not any(e.forward or (is_module(e) and any(x.operation for x in walk(e))) for e in events)

    def matters(self, event: Event, frame: Event) -> bool:
        """Whether one of an operation's results has a row."""
        return any(self.shown(value, frame) for value in event.made)

    def shown(self, value: Value, frame: Event) -> bool:
        """Whether a value that an operation of `frame` made has a row."""
        if value not in self.known:
            self.known[value] = self._shown(value, frame)
        return self.known[value]

    def _shown(self, value: Value, frame: Event) -> bool:
        event = value.maker
        assert event is not None
        if event.forward or event.label == "weights":
            return True
        if not value.tensor.is_floating_point():
            return False
        if event.view and not self.looks_new(value, frame):
            return False
        return value in frame.made or any(
            not user.operation or user.forward > 0 or not user.within(frame) for user in value.users
        )

    def looks_new(self, value: Value, frame: Event) -> bool:
        """Whether a view shows more than a parameter, or a tensor with a row and its axes swapped."""
        before = value
        while before.maker is not None and before.maker.view and before.maker.given:
            before = before.maker.given[0]
            if before.maker is not None and before.maker.parent is frame and self.shown(before, frame):
                break
        return before.parameter is None and sorted(before.shape) != sorted(value.shape)

    def of_operation(self, event: Event, value: Value, frame: Event, level: int) -> Row:
        """The row of one result, without costs."""
        return self.row(self.words.say(value, frame), self.words.meaning(event, frame), value, event, level)

    def row(self, name: str, meaning: str, value: Value, event: Event, level: int) -> Row:
        """The row of a value."""
        return Row(name, meaning, value.shape, self.letters(value, event), level, event.depth, event.once)

    def letters(self, value: Value, event: Event) -> tuple[str, ...] | None:
        """The shape in letters: B and T by how it grows with them, the others by their size where only one fits."""
        twin = self.twins.get(event)
        places = event.made if value in event.made else event.given
        if twin is None or value not in places:
            return None
        other = (twin.made if value in event.made else twin.given)[places.index(value)]
        sizes = zip(value.shape, other.shape, strict=True)
        return tuple(self.letter(a, b, inside=event.depth is not None) for a, b in sizes)

    def letter(self, here: int, there: int, *, inside: bool) -> str:
        """One dimension, from its size in both passes; inside blocks nothing has the size of the vocabulary, outside
        nothing that of heads."""
        (B, T), (B2, T2) = self.root.given[0].shape, self.twins[self.root].given[0].shape
        if here != there:
            fits = [s for s, a, b in (("B", B, B2), ("T", T, T2), ("n", B * T, B2 * T2)) if (a, b) == (here, there)]
        else:
            possible = {k: v for k, v in letters(self.config).items() if k == "C" or (k != "V") == inside}
            fits = [letter for letter, size in possible.items() if size == here]
        return fits[0] if len(fits) == 1 else str(here)


def letters(config: ModelConfig) -> dict[str, int]:
    """Sizes of the model by the letters that its documents use; F only where it has a size of its own."""
    C, F = config.n_embd, round(config.mlp_ratio * config.n_embd)
    return {"C": C, "H": config.n_head, "D": config.head_size, "F": F, "3C": 3 * C, "V": config.vocab_size}


def shown_of(event: Event, rows: Rows, frame: Event) -> list[Value]:
    """Those results of an operation that have a row."""
    return [value for value in event.made if rows.shown(value, frame)]


def once_in(call: Event) -> Iterator[Event]:
    """Calls inside `call` whose results serve all layers, outermost only."""
    for event in call.inside:
        if not event.operation:
            if event.once:
                yield event
            else:
                yield from once_in(event)


Costs = tuple[int, int, int]


def costs_of(event: Event) -> Costs:
    """Parameters, FLOP forward and FLOP back of an operation itself."""
    return event.parameters, event.forward, event.backward


def add(a: Costs, b: Costs) -> Costs:
    """Element by element."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def total(costs: Sequence[Costs]) -> Costs:
    """Summed up."""
    return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def with_costs(row: Row, costs: Costs) -> Row:
    """The row with more on it."""
    parameters, forward, backward = add((row.parameters, row.forward, row.backward), costs)
    return replace(row, parameters=parameters, forward=forward, backward=backward)


__all__ = ["Row", "Rows", "letters"]
