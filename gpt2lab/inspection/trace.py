"""Traces one training step of a model: every tensor with its shape, meaning, parameters and FLOPs.

The actual code runs on torch's meta device, forward and backward. A torch function mode intercepts every operation, the
Python stack gives the component it runs in, and torch's FlopCounterMode counts FLOPs.

for row in trace(ModelConfig()).rows:
    print(row.name, row.shape, row.parameters, row.forward)
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.basics.text import plural
from gpt2lab.components.base import Param
from gpt2lab.components.context import ForwardContext
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.registry import SLOTS, Choice, Slot

SIGNS = {"add": "+", "radd": "+", "mul": "*", "rmul": "*", "matmul": "@"}
SAME_NAME = ("reshape", "float", "to", "contiguous", "repeat_interleave", "dropout")  # besides views
PURPOSE = {"residual_out": " that writes into the stream", "router": " that chooses experts"}
LONGEST_NAME = 30
LARGEST = 1 << 56  # most elements of one tensor whose bytes torch can count
FEWEST_REPEATS = 3  # equal parts, such as experts, from which on only the first is shown


@dataclass(frozen=True)
class TraceRow:
    """One tensor, or the heading of a part whose tensors follow (then without a shape).

    level: how deep it is nested.  depth: index of the block call, None outside blocks.  once: it serves all layers.
    letters: the shape in letters where they are known.  parameters: counted where they are first used.
    forward, backward: FLOPs of the whole batch.
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


@dataclass(frozen=True)
class Trace:
    """One pass of the training objective, forward and backward. rows: in the order in which tensors are computed."""

    config: ModelConfig
    batch: int
    tokens: int
    rows: tuple[TraceRow, ...]

    @property
    def parameters(self) -> int:
        """Of the model, each once."""
        return sum(row.parameters for row in self.rows)

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(row.forward for row in self.rows)

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass."""
        return sum(row.backward for row in self.rows)

    def per_token(self, flops: int) -> float:
        """FLOPs of the whole batch as FLOPs per token."""
        return flops / (self.batch * self.tokens)

    @property
    def letters(self) -> dict[str, int]:
        """Values of the letters of shapes."""
        return {"B": self.batch, "T": self.tokens, "n": self.batch * self.tokens, **size_letters(self.config)}

    def as_record(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "letters": self.letters,
            "rows": [asdict(row) for row in self.rows],
            "parameters": self.parameters,
            "flops_forward": self.forward,
            "flops_backward": self.backward,
            "flops_per_token": self.per_token(self.forward + self.backward),
        }


def trace(config: ModelConfig, *, batch: int = 1, tokens: int | None = None) -> Trace:
    """Run the training objective of this model once on `batch` sequences of `tokens` tokens (None: block_size).

    Raises ConfigError beyond what the positions can express, or for tensors too large to count.
    """
    tokens = config.block_size if tokens is None else tokens
    if batch * tokens * max(config.n_head * tokens, config.vocab_size, 4 * config.n_embd) > LARGEST:
        raise ConfigError(
            f"{batch} x {tokens} tokens make tensors too large to count", hint="smaller --batch, --tokens"
        )
    model, choices = build(config)
    rows = Recorder(model, choices).record(batch, tokens)
    # B and T are identified by comparison with a pass of another size
    other_tokens = tokens - 1 or (2 if model.max_context is None or model.max_context > 1 else None)
    if other_tokens:
        sizes = {
            "B": (batch, batch + 1),
            "T": (tokens, other_tokens),
            "n": (batch * tokens, (batch + 1) * other_tokens),
        }
        resized = Recorder(model, choices).record(batch + 1, other_tokens)
        if [row.name for row in rows] == [row.name for row in resized]:
            rows = [lettered(row, twin, sizes, config) for row, twin in zip(rows, resized, strict=True)]
    return Trace(config, batch, tokens, tuple(rows))


def size_letters(config: ModelConfig) -> dict[str, int]:
    """Sizes of the model by the letters that the documents use."""
    C, F = config.n_embd, round(config.mlp_ratio * config.n_embd)
    return {"C": C, "H": config.n_head, "D": config.head_size, "F": F, "3C": 3 * C, "V": config.vocab_size}


def lettered(row: TraceRow, twin: TraceRow, sizes: Mapping[str, tuple[int, int]], config: ModelConfig) -> TraceRow:
    """The row with its shape in letters; a dimension that matches no letter, or several, stays a number. V is
    considered outside blocks only, sizes of heads inside only."""
    if row.shape is None or twin.shape is None or len(row.shape) != len(twin.shape):
        return row
    candidates = dict(sizes)
    for letter, size in size_letters(config).items():
        if letter == "C" or (letter != "V") == (row.depth is not None):
            candidates[letter] = (size, size)
    letters = []
    for dims in zip(row.shape, twin.shape, strict=True):
        fits = [letter for letter, pair in candidates.items() if pair == dims]
        letters.append(fits[0] if len(fits) == 1 else str(dims[0]))
    return replace(row, letters=tuple(letters))


# recording ------------------------------------------------------------------------------------------------------------

Choices = dict[int, tuple[Any, Choice]]
"""id of a part -> (the part, kept alive so that its id stays unique; its choice)."""


def build(config: ModelConfig) -> tuple[GPT, Choices]:
    """The model on the meta device, and the choice of each part. Slot.build is patched temporarily: a hook inside it
    would be training code, and change the id of every run."""
    choices: Choices = {}
    original = Slot.build

    @functools.wraps(original)
    def noted(slot: Slot, choice: Choice, *args: Any) -> Any:
        part = original(slot, choice, *args)
        if part is not None:  # a branch that is switched off
            choices[id(part)] = (part, choice)
        return part

    setattr(Slot, "build", noted)  # noqa: B010 - the type checker allows no assignment to a method
    try:
        with torch.device("meta"):
            model = GPT(config)
    finally:
        setattr(Slot, "build", original)  # noqa: B010
    return model.train(config.dropout > 0), choices


@dataclass(eq=False)
class Node:
    """An operation, or the call of a part with the nodes inside it.

    part: the called object, None for operations.  path: of the module that it runs in.  results: that are used outside.
    frame: of the Python stack, which a call has.  weights: parameters that an operation used.
    """

    name: str
    part: Any = None
    path: str = ""
    parent: Node | None = None
    depth: int | None = None
    once: bool = False
    is_module: bool = False
    frame: FrameType | None = None
    results: list[Tensor] = field(default_factory=list)
    inside: list[Node] = field(default_factory=list)
    weights: list[Param] = field(default_factory=list)
    parameters: int = 0
    forward: int = 0
    backward: int = 0

    def walk(self) -> Iterator[Node]:
        """The node and everything inside it."""
        yield self
        for node in self.inside:
            yield from node.walk()

    def outward(self) -> Iterator[Node]:
        """The node and all calls around it."""
        yield self
        if self.parent is not None:
            yield from self.parent.outward()


class Recorder(TorchFunctionMode):
    """Records one pass as a tree of Nodes, and turns it into rows. Results are kept alive, so that their ids stay
    unique."""

    def __init__(self, model: GPT, choices: Choices) -> None:
        super().__init__()
        self.model, self.choices = model, choices
        self.root = Node("", model, is_module=True)
        self.calls: dict[FrameType, Node] = {}
        self.maker: dict[int, Node] = {}  # tensor id -> the operation that made it
        self.names: dict[int, str] = {}  # tensor id -> its name in the call that made it
        self.views: dict[int, Tensor] = {}  # id of a view -> its base tensor
        self.shown: set[int] = set()  # ids of operations' results that have a row
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.params = {id(param.tensor): param for param in model.params()}
        self.unused = {param.name: param.tensor.numel() for param in self.params.values()}
        self.counter, self.flops = FlopCounterMode(display=False), 0

    def record(self, batch: int, tokens: int) -> list[TraceRow]:
        """Rows of one pass over (batch, tokens), forward and backward: the tokens first, the loss last."""
        with self.counter, torch.device("meta"):
            inputs, targets = (torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2))
            with self:
                loss, _ = self.model.objective(inputs, targets)
            self.show(loss)
            loss.backward()
        self.model.zero_grad()
        # the rest is from custom backward functions
        self.maker[id(loss)].backward += self.new_flops() - sum(node.backward for node in self.root.walk())
        *rows, last = self.inner_rows(self.root, 0)
        first = TraceRow("tokens", "what is read; the targets are the same, one further", (batch, tokens))
        objective = " + ".join(map(str, self.model.config.objective))
        rows = [first, *rows, replace(last, name="loss", meaning=f"what training minimises: {objective}")]
        if self.unused:
            text = f"parameters without a part in this pass: {', '.join(self.unused)}"
            rows.append(TraceRow("not used", text, None, parameters=sum(self.unused.values())))
        return rows

    # operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = list(tensors((args, kwargs or {})))
        results = [x for x in tensors(out) if not any(x is y for y in operands)]
        if results:
            label, call, flops = getattr(func, "__name__", "").strip("_"), self.current_call(), self.new_flops()
            if label == "scaled_dot_product_attention":
                self.fused_attention(call, operands, results, flops)
            else:
                node = self.add(label, call, operands, results, flops)
                self.names.update(zip(map(id, results), self.result_names(node, call, args, operands), strict=True))
        return out

    def fused_attention(self, call: Node, operands: list[Tensor], results: list[Tensor], flops: int) -> None:
        """Record the three steps of the fused kernel."""
        q, k, v, *bias = operands
        grad = any(x.requires_grad for x in (q, k, *bias))
        shape = (*q.shape[:-1], k.shape[-2])
        scores, weights = (torch.empty(shape, device="meta", requires_grad=grad) for _ in range(2))
        for_scores = flops * q.shape[-1] // (q.shape[-1] + v.shape[-1])
        self.add("scores", call, [q, k, *bias], [scores], for_scores)
        self.add("weights", call, [scores], [weights])
        self.add("heads", call, [weights, v], results, flops - for_scores)

    def new_flops(self) -> int:
        """FLOPs since the last call of this."""
        before, self.flops = self.flops, self.counter.get_total_flops()
        return self.flops - before

    def add(self, label: str, call: Node, operands: list[Tensor], results: list[Tensor], flops: int = 0) -> Node:
        """Append an operation to a call. In the backward pass, a product is repeated for each factor with a
        gradient."""
        node = Node(label, None, call.path, call, call.depth, call.once, results=results, forward=flops)
        node.backward = flops * sum(x.requires_grad for x in operands[:2])
        call.inside.append(node)
        for x in operands:
            self.use(x, call, shown=flops > 0 or label == "repeat_interleave")
        sources = [self.views.get(id(x), x) for x in operands]
        for x in results:
            self.maker[id(x)], self.names[id(x)] = node, label
            if flops or label in ("weights", "cross_entropy"):
                self.show(x)
            elif x._base is not None and x.numel() <= sources[0].numel():
                self.views[id(x)] = sources[0]
        if id(results[0]) not in self.views:
            node.weights = [self.params[id(x)] for x in sources if id(x) in self.params]
            node.parameters = sum(self.unused.pop(param.name, 0) for param in node.weights)
        return node

    def use(self, x: Tensor, call: Node, *, shown: bool) -> None:
        """Record that an operation of `call` uses x, so that the calls around its maker returned it. x gets a row if
        `shown`, or if another call uses it."""
        maker = self.maker.get(id(x))
        if maker is None or not x.is_floating_point():
            return
        for returned in self.between(maker, call):
            if not any(x is result for result in returned.results):
                returned.results.append(x)
        if shown or maker.parent is not call:
            self.show(x)

    def show(self, x: Tensor) -> None:
        """Give a row to an operation's result; for a transposed view, to its base."""
        source = self.views.get(id(x), x)
        if id(source) not in self.params:
            self.shown.add(id(source) if sorted(source.shape) == sorted(x.shape) else id(x))

    # calls

    def current_call(self) -> Node:
        """The current call, from the Python stack."""
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_locals.get("self") is not self.model:
            frames.append(frame)
            frame = frame.f_back
        call = self.root
        for frame in reversed(frames):
            call = self.calls.get(frame) or self.new_call(frame, call) or call
        return call

    def new_call(self, frame: FrameType, parent: Node) -> Node | None:
        """The call of a module, of another method of a component, or of Step.once; None for other frames."""
        variables, method = frame.f_locals, frame.f_code.co_name
        part, is_module, once = variables.get("self"), method == "forward", False
        step = next((x for x in variables.values() if isinstance(x, ForwardContext)), None)
        path = self.paths.get(id(part), "")
        if part is step and method == "once":  # by the part of that name, the position scheme or the caller
            name, once = re.split(r"\W", variables["key"])[0], True
            part = getattr(parent.part, name, step and step.position if name == "bias" else parent.part)
        elif is_module and isinstance(part, nn.Module):
            name = below(path, parent.path)
        elif path and method.isidentifier() and not frame.f_globals["__name__"].startswith("torch."):
            name = below(f"{path}.{method}", parent.path)
            operands = [self.name_of(x, parent) for x in tensors([variables[v] for v in arguments(frame)])]
            if method == "weights" and self.slot_of(part) == "scores":
                name = method  # as those of the fused kernel
            elif operands and len(name) + len(operands[0]) <= LONGEST_NAME:
                name = f"{name}({operands[0]})"
        else:
            return None
        depth = step.depth if step and self.slot_of(part) in ("residual", "stack") else parent.depth
        path = path if is_module else parent.path
        # results shared by all layers are placed before the call, within a module, that uses them first
        outer = next(call for call in parent.outward() if call.is_module or not once)
        node = Node(name, part, path, outer, depth, once or parent.once, is_module, frame)
        outer.inside.insert(len(outer.inside) - (outer is not parent), node)
        self.calls[frame] = node
        return node

    def between(self, node: Node, call: Node) -> list[Node]:
        """The calls around an operation that do not surround `call` too, the innermost first."""
        around = set(call.outward())
        return [outer for outer in node.outward() if outer is not node and outer not in around]

    # names

    def result_names(self, node: Node, call: Node, args: tuple[Any, ...], operands: list[Tensor]) -> list[str]:
        """Names of an operation's results: its matrix, a short formula, or the operation's name."""
        label, results = node.name, node.results
        source = self.name_of(operands[0], call) if operands else label
        if label in ("split", "chunk"):
            product = self.maker.get(id(operands[0]))
            for rows in [w.role.rows for w in product.weights] if product else []:
                if [height for _, height in rows] == [x.shape[-1] for x in results]:
                    return [part for part, _ in rows]
            return [f"{source}[{i}]" for i in range(len(results))]
        name = label
        if self.slot_of(call.part) == "attention" and label in ("softmax", "matmul"):
            name = "weights" if label == "softmax" else "heads" if source == "weights" else "scores"
        elif node.forward and node.weights:
            name = below(node.weights[0].name, node.path)
        elif id(results[0]) in self.views or label in SAME_NAME:
            name = source
        elif label in SIGNS and len(args) == 2:
            sides = [self.name_of(a, call) if isinstance(a, Tensor) else f"{a:.4g}" for a in args]
            name = f" {SIGNS[label]} ".join(sides)
        return [name if len(name) <= LONGEST_NAME else label] * len(results)

    def name_of(self, x: Tensor, call: Node) -> str:
        """The name of a tensor in `call`: of a parameter, its own result, its argument, or the call that returned
        it."""
        if id(x) in self.params:
            return below(self.params[id(x)].name, call.path)
        maker = self.maker.get(id(x))
        if maker is not None and maker.parent is call:
            return self.names[id(x)]
        for name in arguments(call.frame):
            if call.frame and call.frame.f_locals[name] is x:
                return name
        returned = self.between(maker, call)[::-1] if maker else []
        names = [node.name for node in [*filter(lambda node: node.once, returned), *returned]]
        return names[0] if names else self.names.get(id(x), "constant")

    # rows

    def inner_rows(self, call: Node, level: int) -> list[TraceRow]:
        """Rows inside a call; costs of operations without a row are added to the next row."""
        rows: list[TraceRow] = []
        waiting: list[Node] = []
        for node in call.inside:
            if node.part is not None:
                rows += self.call_rows(node, level)
                continue
            waiting.append(node)
            new = [self.row(node, x, self.names[id(x)], level) for x in node.results if id(x) in self.shown]
            if new:
                rows += [with_costs(new[0], waiting), *new[1:]]
                waiting = []
        if waiting and rows:
            rows[-1] = with_costs(rows[-1], waiting)
        return rows

    def call_rows(self, call: Node, level: int) -> list[TraceRow]:
        """A row for each result of a simple call; else a heading and the rows inside."""
        nodes = list(call.walk())
        if all(node.part is not None for node in nodes):
            return []
        inner = self.inner_rows(call, level + 1)
        plain = not any(node.forward or (node.is_module and node.inside) for node in nodes[1:])
        if call.results and (plain or len(inner) == len(call.results) == 1):
            rows = [self.row(call, x, name, level) for x, name in zip(call.results, call_names(call), strict=True)]
            return [with_costs(rows[0], nodes), *rows[1:]]
        return [TraceRow(call.name, self.meaning(call), None, level=level, depth=call.depth, once=call.once), *inner]

    def row(self, node: Node, x: Tensor, name: str, level: int) -> TraceRow:
        """The row of one result, without costs."""
        source = self.views.get(id(x))
        if node.part is None and source is not None and node.parent is not None:
            source_name = self.name_of(source, node.parent)
            meaning = f"part of {source_name}" if source.numel() > x.numel() else f"{source_name}, reshaped"
        else:
            meaning = self.meaning(node, name)
        return TraceRow(name, meaning, tuple(x.shape), level=level, depth=node.depth, once=node.once)

    def meaning(self, node: Node, name: str = "") -> str:
        """The description of a result: the summary of its component, a step of attention, or its matrices."""
        weights = {w.name: w for inner in node.walk() for w in inner.weights if w.role.kind != "vector"}
        matrices = ", ".join(map(matrix, weights.values()))
        caller = node.parent.part if node.parent else None
        if id(node.part) in self.choices and (node.part is not caller or node.once):
            text = self.summary(node.part)
        elif node.part is not None:
            text = (matrices or type(node.part).__name__) if node.is_module else ""
        elif node.name in ("reshape", "repeat_interleave"):
            text = f"{name}, {'reshaped' if node.name == 'reshape' else 'repeated'}"
        elif name == "scores":
            mask = self.summary(getattr(caller, "mask", None))
            text = "query @ key^T, scaled" + (f"; mask {mask}" if mask else "")
        elif name in ("weights", "heads"):
            text = "softmax of scores over the last axis" if name == "weights" else "weights @ value"
        elif self.slot_of(caller) == "residual" and node.name in SIGNS:
            text = "the residual stream"
        else:
            text = matrices
        again = weights and not any(inner.parameters for inner in node.walk())
        return f"{text}; {next(iter(weights))} again" if again else text

    def slot_of(self, part: Any) -> str | None:
        """The slot that built a part, if one did."""
        return self.choices[id(part)][1].slot if id(part) in self.choices else None

    def summary(self, part: Any) -> str:
        """Name and first sentence of a part's component, without shapes and remarks on GPT-2; or an empty text."""
        if id(part) not in self.choices:
            return ""
        choice = self.choices[id(part)][1]
        sentence = re.split(r"\s{2,}|\.\s|\.$", SLOTS[choice.slot][choice.name].summary)[0]
        return f"{choice.name}: " + re.sub(r"; GPT-2's( \w+)?$", "", sentence).strip()


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, Mapping)):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(item)


def arguments(frame: FrameType | None) -> list[str]:
    """Names of a call's arguments that are still set, without self."""
    names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount] if frame else ()
    return [name for name in names if frame and name in frame.f_locals]


def below(name: str, path: str) -> str:
    """A dotted name relative to the module at `path`."""
    return name.removeprefix(f"{path}.") if path else name


def call_names(call: Node) -> list[str]:
    """The call's name, with an index where it has several results."""
    return [call.name] if len(call.results) == 1 else [f"{call.name}[{i}]" for i in range(len(call.results))]


def matrix(param: Param) -> str:
    """A matrix with its shape and stacked parts."""
    rows = ", ".join(f"{name} {height}" for name, height in param.role.rows)
    return f"matrix {tuple(param.tensor.shape)}{PURPOSE.get(param.role.kind, '')}" + (f": {rows}" if rows else "")


def with_costs(row: TraceRow, added: Iterable[TraceRow | Node]) -> TraceRow:
    """The row with the costs of others added."""
    items = [row, *added]
    parameters = sum(item.parameters for item in items)
    forward, backward = sum(item.forward for item in items), sum(item.backward for item in items)
    return replace(row, parameters=parameters, forward=forward, backward=backward)


# folding --------------------------------------------------------------------------------------------------------------


def folded(rows: Sequence[TraceRow], *, layer: int | None = None, all_layers: bool = False) -> list[TraceRow]:
    """Rows with one block of each kind in detail; the others are combined in one row with their costs.

    layer: show this block in detail and no other.  all_layers: show every block.
    """
    out: list[TraceRow] = []
    kinds: dict[object, int] = {}  # signature of a block -> the first block with it
    hidden: list[list[TraceRow]] = []
    for depth, group in groupby(rows, key=lambda row: row.depth):
        block = list(group)
        kind = signature(block)
        if depth is None or all_layers or depth == layer or (layer is None and kind not in kinds):
            out += [*hidden_blocks(hidden, kinds), *without_repeats(block)]
            hidden = []
            if depth is not None and layer is None:
                kinds.setdefault(kind, depth)
        else:
            hidden.append(block)
    return out


def hidden_blocks(blocks: Sequence[Sequence[TraceRow]], kinds: Mapping[object, int]) -> list[TraceRow]:
    """Blocks that are not shown, as one row. kinds: signatures of shown blocks, with their index."""
    if not blocks:
        return []
    first, last = blocks[0][0].depth, blocks[-1][0].depth
    meaning = f"block {first}" if first == last else f"blocks {first} to {last}"
    like = sorted({kinds[kind] for kind in map(signature, blocks) if kind in kinds})
    if like:
        name = f"{len(blocks)} more like block {' and '.join(map(str, like))}"
    else:
        name, meaning = plural(len(blocks), "block"), f"{meaning}, not shown"
    rows = [row for block in blocks for row in block]
    if not any(row.parameters for row in rows):
        meaning += ", with weights that were counted before"
    return [with_costs(TraceRow(name, meaning, None, depth=first), rows)]


def without_repeats(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows with repeated neighbours, such as experts, shown once; at every level, each with its inner rows."""
    groups: list[list[TraceRow]] = []
    for row in rows:
        if groups and row.level > rows[0].level:
            groups[-1].append(row)
        else:
            groups.append([row])
    out: list[TraceRow] = []
    for kind, neighbours in groupby(groups, key=signature):
        alike = list(neighbours)
        folds = bool(kind) and len(alike) >= FEWEST_REPEATS
        for head, *inside in alike[:1] if folds else alike:
            out += [head, *without_repeats(inside)]
        if folds:
            row = TraceRow(f"{len(alike) - 1} more like this", "", None, level=head.level, depth=head.depth)
            out.append(with_costs(row, [row for group in alike[1:] for row in group]))
    return out


def signature(rows: Iterable[TraceRow]) -> tuple[object, ...]:
    """Key of equal groups of rows: ignores layer numbers, where weights were counted, and shared rows."""

    def normalised(text: str) -> str:
        return re.sub(r"\d+", "#", re.sub(r"; \S+ again$", "", text))

    return tuple(
        (row.level, normalised(row.name), row.shape, normalised(row.meaning), row.forward, row.backward)
        for row in rows
        if not row.once
    )
