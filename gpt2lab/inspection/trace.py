"""Traces one training step of a model: its modules and products with shapes, meanings, parameters and FLOPs.

The actual code runs on torch's meta device, forward and backward. Hooks tell which module runs, a torch function mode
intercepts every operation, and torch's FlopCounterMode counts FLOPs.

for row in trace(ModelConfig()).rows:
    print(row.name, row.shape, row.parameters, row.forward)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.basics.text import plural
from gpt2lab.components.base import Param
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.registry import SLOTS, Choice, Slot

PURPOSE = {"residual_out": " that writes into the stream", "router": " that chooses experts"}
LARGEST = 1 << 56  # most elements of one tensor whose bytes torch can count


@dataclass(frozen=True)
class TraceRow:
    """One tensor, or the heading of a part whose tensors follow (then without a shape).

    level: how deep it is nested.  depth: index of the block call, None outside blocks.
    letters: the shape in letters where they are known.  parameters: counted where they are first used.
    forward, backward: FLOPs of the whole batch.
    """

    name: str
    meaning: str
    shape: tuple[int, ...] | None
    letters: tuple[str, ...] | None = None
    level: int = 0
    depth: int | None = None
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
    """An operation, or the call of a module with what is inside it. shape: of its result.  weights: parameters that an
    operation used; `parameters` counts those that nothing used before.  shown: whether an operation has a row."""

    name: str
    meaning: str = ""
    module: nn.Module | None = None
    path: str = ""
    depth: int | None = None
    shape: tuple[int, ...] = ()
    inside: list[Node] = field(default_factory=list)
    weights: list[Param] = field(default_factory=list)
    parameters: int = 0
    forward: int = 0
    backward: int = 0
    shown: bool = False

    def walk(self) -> Iterator[Node]:
        """The node and everything inside it."""
        yield self
        for node in self.inside:
            yield from node.walk()


class Recorder(TorchFunctionMode):
    """Records one pass as a tree of Nodes, and turns it into rows. Operands are kept alive, so that their ids stay
    unique."""

    def __init__(self, model: GPT, choices: Choices) -> None:
        super().__init__()
        self.model, self.choices = model, choices
        self.calls = [Node("", module=model)]  # the root, and the calls that have begun and not ended
        self.blocks = 0
        self.params = {id(param.tensor): param for param in model.params()}
        self.unused = {param.name: param.tensor.numel() for param in self.params.values()}
        self.counter, self.flops = FlopCounterMode(display=False), 0
        self.last = self.calls[0]

    def record(self, batch: int, tokens: int) -> list[TraceRow]:
        """Rows of one pass over (batch, tokens), forward and backward: the tokens first, the loss last."""
        root, hooks = self.calls[0], []
        for path, module in self.model.named_modules():
            if path and not (isinstance(module, nn.Dropout) and not module.p):
                hooks.append(module.register_forward_pre_hook(functools.partial(self.enter, path)))
                hooks.append(module.register_forward_hook(self.leave))
        try:
            with self.counter, torch.device("meta"):
                inputs, targets = (torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2))
                with self:
                    loss, _ = self.model.objective(inputs, targets)
                self.last.forward += self.new_flops()
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        self.model.zero_grad()
        # the rest is from custom backward functions
        self.last.backward += self.new_flops() - sum(node.backward for node in root.walk())
        first = TraceRow("tokens", "what is read; the targets are the same, one further", (batch, tokens))
        rows, waiting = self.inner_rows(root, 0)
        objective = " + ".join(map(str, self.model.config.objective))
        loss_row = TraceRow("loss", f"what training minimises: {objective}", ())
        rows = [first, *rows, with_costs(loss_row, waiting)]
        if self.unused:
            text = f"parameters without a part in this pass: {', '.join(self.unused)}"
            rows.append(TraceRow("not used", text, None, parameters=sum(self.unused.values())))
        return rows

    # calls of modules

    def enter(self, path: str, module: nn.Module, _: Any) -> None:
        """A module is called."""
        outer = self.calls[-1]
        node = Node(path.removeprefix(f"{outer.path}."), module=module, path=path, depth=outer.depth)
        if self.slot_of(module) == "residual":
            node.depth, self.blocks = self.blocks, self.blocks + 1
        self.put(node, path)
        self.calls.append(node)

    def leave(self, _: nn.Module, __: Any, out: Any) -> None:
        """It returns; FLOPs that no torch function showed are its own."""
        node = self.calls.pop()
        node.forward += self.new_flops()
        node.shape = next((tuple(x.shape) for x in tensors(out)), ())

    # operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operands, results = list(tensors((args, kwargs or {}))), list(tensors(out))
        if results:
            label, flops = getattr(func, "__name__", "").strip("_"), self.new_flops()
            if label == "scaled_dot_product_attention":
                self.fused_attention(operands, results[0], flops)
            else:
                self.add(label, operands, results[0], flops)
        return out

    def fused_attention(self, operands: list[Tensor], heads: Tensor, flops: int) -> None:
        """What the fused kernel reads, and its three steps."""
        q, k, v, *bias = operands
        for name, x in zip(("query", "key", "value"), (q, k, v), strict=True):
            self.add(name, [], x, shown=True)
        scores = torch.empty((*q.shape[:-1], k.shape[-2]), device="meta", requires_grad=q.requires_grad)
        for_scores = flops * q.shape[-1] // (q.shape[-1] + v.shape[-1])
        self.add("scores", [q, k, *bias], scores, for_scores)
        self.add("weights", [scores], scores, shown=True)
        self.add("heads", [scores, v], heads, flops - for_scores)

    def new_flops(self) -> int:
        """FLOPs since the last call of this."""
        before, self.flops = self.flops, self.counter.get_total_flops()
        return self.flops - before

    def add(self, label: str, operands: list[Tensor], result: Tensor, flops: int = 0, *, shown: bool = False) -> None:
        """Append an operation to the present call. In the backward pass, a product is repeated for each factor with a
        gradient."""
        call = self.calls[-1]
        if id(result._base) in self.params:  # counted where it is used
            return
        sources = [x if x._base is None else x._base for x in operands]
        weights = [self.params[id(x)] for x in sources if id(x) in self.params]
        if self.slot_of(call.module) == "attention" and label in ("softmax", "matmul"):  # written out
            known = {node.name for node in call.inside}
            label, shown = ("weights" if label == "softmax" else "heads" if "weights" in known else "scores"), True
        node = Node(label, depth=call.depth, shape=tuple(result.shape), weights=weights, forward=flops)
        node.parameters = sum(self.unused.pop(param.name, 0) for param in weights)
        node.backward = flops * sum(x.requires_grad for x in operands[:2])
        node.meaning = self.step_of_attention(call, label)
        if weights and not node.meaning:
            name = weights[0].name
            owner = name.rpartition(".")[0]
            is_own = owner == call.path or not owner.startswith(call.path)
            node.name = name.removeprefix(f"{call.path}.") if is_own else owner.removeprefix(f"{call.path}.")
            node.meaning = ("" if is_own else self.summary(self.model.get_submodule(owner))) or matrices([node])
        has_matrix = node.parameters > 0 and any(param.role.kind != "vector" for param in weights)
        node.shown = shown or flops > 0 or has_matrix
        self.put(node, weights[0].name if node.parameters else "")
        if node.shown:
            self.last = node

    def put(self, node: Node, path: str) -> None:
        """Append a node to the present call; what positions compute for all blocks, before the first of them."""
        root, call = self.calls[0], self.calls[-1]
        if path.startswith("wpe") and call is not root and not call.path.startswith("wpe"):
            node.depth = None
            root.inside.insert(len(root.inside) - 1, node)
        else:
            call.inside.append(node)

    def step_of_attention(self, call: Node, label: str) -> str:
        """What a step of attention does."""
        parts = {"position": self.model.wpe, "mask": getattr(call.module, "mask", None)}
        texts = [f"; {name} {text}" for name, part in parts.items() if (text := self.summary(part))]
        return {
            "scores": f"query @ key^T, scaled{''.join(texts)}",
            "weights": "softmax of scores over the last axis",
            "heads": "weights @ value",
        }.get(label, "")

    # rows

    def inner_rows(self, call: Node, level: int) -> tuple[list[TraceRow], list[Node]]:
        """Rows inside a call, and the operations behind the last of them. Costs of operations without a row are added
        to the next row."""
        rows: list[TraceRow] = []
        waiting: list[Node] = []
        for node in call.inside:
            waiting.append(node)
            if node.module is not None:
                first, *rest = self.call_rows(node, level)
                rows += [with_costs(first, waiting[:-1]), *rest]
            elif node.shown:
                row = TraceRow(node.name, node.meaning, node.shape, level=level, depth=node.depth)
                rows.append(with_costs(row, waiting))
            else:
                continue
            waiting = []
        return rows, waiting

    def call_rows(self, call: Node, level: int) -> list[TraceRow]:
        """A row for a module without others inside; else a heading and the rows inside."""
        inner, waiting = self.inner_rows(call, level + 1)
        meaning = self.summary(call.module) or matrices(call.walk()) or type(call.module).__name__
        used = [node for node in call.walk() if node.weights]
        if used and not any(node.parameters for node in used):
            meaning += f"; {used[0].weights[0].name} again"
        simple = not any(node.module for node in call.inside) and not any(node.name == "query" for node in call.inside)
        if simple or not inner:
            return [with_costs(TraceRow(call.name, meaning, call.shape, level=level, depth=call.depth), call.walk())]
        own = Node(call.name, forward=call.forward)  # beside what is inside
        if self.slot_of(call.module) == "residual":
            inner.append(TraceRow("x", "the residual stream behind it", call.shape, level=level + 1, depth=call.depth))
        return [with_costs(TraceRow(call.name, meaning, None, level=level, depth=call.depth), [own, *waiting]), *inner]

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


def matrices(nodes: Iterable[Node]) -> str:
    """The matrices that operations used, each with its shape and stacked parts."""
    texts = {}
    for param in (param for node in nodes for param in node.weights if param.role.kind != "vector"):
        rows = ", ".join(f"{name} {height}" for name, height in param.role.rows)
        purpose = PURPOSE.get(param.role.kind, "") + (f": {rows}" if rows else "")
        texts[param.name] = f"matrix {tuple(param.tensor.shape)}{purpose}"
    return ", ".join(texts.values())


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
            out += [*hidden_blocks(hidden, kinds), *block]
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


def signature(rows: Iterable[TraceRow]) -> tuple[object, ...]:
    """Key of equal groups of rows: ignores layer numbers and where weights were counted."""

    def normalised(text: str) -> str:
        return re.sub(r"\d+", "#", re.sub(r"; \S+ again$", "", text))

    return tuple(
        (row.level, normalised(row.name), row.shape, normalised(row.meaning), row.forward, row.backward) for row in rows
    )
