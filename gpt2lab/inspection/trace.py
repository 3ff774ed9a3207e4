"""Traces one forward pass of a model's training: its modules with shapes, components, parameters and FLOPs.

The actual code runs on torch's meta device. Hooks tell which modules run, and torch's FlopCounterMode counts FLOPs.

for row in trace(ModelConfig()).rows:
    print(row.name, row.shape, row.parameters, row.forward)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.components.base import Param
from gpt2lab.errors import ConfigError
from gpt2lab.inspection.costs import costs
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.registry import SLOTS, Choice, Slot

LARGEST = 1 << 56  # most elements of one tensor whose bytes torch can count
SCORES = "scores"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TraceRow:
    """One module, or the scores inside an attention.

    path: of the module.  shape: of its result; None where others follow that are inside it.
    letters: the shape in letters where they are known.  parameters: its own, not those of modules inside.
    forward: FLOPs of the whole batch, without those of modules inside; of all calls where there are several.
    """

    path: str
    meaning: str
    shape: Shape | None
    letters: tuple[str, ...] | None = None
    parameters: int = 0
    forward: int = 0
    calls: int = 1

    @property
    def level(self) -> int:
        """How deep it is nested; blocks are at the top."""
        return max(0, self.path.count(".") - self.path.startswith("h."))

    @property
    def name(self) -> str:
        """The last part of the path; of a block, the whole."""
        return self.path if self.level == 0 else self.path.rpartition(".")[2]

    @property
    def block(self) -> int | None:
        """Index of its block; None outside blocks."""
        return int(self.path.split(".")[1]) if self.path.startswith("h.") else None


@dataclass(frozen=True)
class Trace:
    """One pass of the training objective. rows: in the order in which modules are called first."""

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

    def per_token(self, flops: int) -> float:
        """FLOPs of the whole batch as FLOPs per token."""
        return flops / (self.batch * self.tokens)

    @property
    def letters(self) -> dict[str, int]:
        """Values of the letters of shapes."""
        return {"B": self.batch, "T": self.tokens, "n": self.batch * self.tokens, **size_letters(self.config)}

    def as_record(self) -> dict[str, Any]:
        """Plain data. flops_per_token: of training, at the full context."""
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "letters": self.letters,
            "rows": [asdict(row) for row in self.rows],
            "parameters": self.parameters,
            "flops_forward": self.forward,
            "flops_per_token": costs(self.config).flops_per_token,
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
    rows = record(model, choices, batch, tokens)
    # B and T are recognised by a pass whose B, T and B T differ from all other sizes
    fixed = set(size_letters(config).values())
    others = next(
        ((b, t) for t in range(tokens, 0, -1) for b in range(2, 12) if len({b, t, b * t, *fixed}) == 3 + len(fixed)),
        None,
    )
    if others:
        letters = {others[0]: "B", others[1]: "T", others[0] * others[1]: "n"}
        resized = {row.path: row.shape for row in record(model, choices, *others)}
        rows = [lettered(row, resized.get(row.path), letters, config) for row in rows]
    return Trace(config, batch, tokens, tuple(rows))


def size_letters(config: ModelConfig) -> dict[str, int]:
    """Sizes of the model by the letters that the documents use."""
    C, F = config.n_embd, round(config.mlp_ratio * config.n_embd)
    return {"C": C, "H": config.n_head, "D": config.head_size, "F": F, "3C": 3 * C, "V": config.vocab_size}


def lettered(row: TraceRow, resized: Shape | None, letters: Mapping[int, str], config: ModelConfig) -> TraceRow:
    """The row with its shape in letters; a dimension that matches no letter, or several, stays a number. V is
    considered outside blocks only, sizes of heads inside only."""
    if row.shape is None or resized is None or len(row.shape) != len(resized):
        return row
    sizes = [
        (letter, size)
        for letter, size in size_letters(config).items()
        if letter == "C" or (letter != "V") == (row.block is not None)
    ]
    texts = []
    for size, other in zip(row.shape, resized, strict=True):
        fits = [letters[other]] if other in letters else [letter for letter, value in sizes if value == other]
        texts.append(fits[0] if len(fits) == 1 else str(size))
    return replace(row, letters=tuple(texts))


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


class Recorder(TorchFunctionMode):
    """The calls of modules in one pass. shapes: path -> shape of the result, of the scores of an attention too."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.counter = FlopCounterMode(display=False)
        self.shapes: dict[str, Shape] = {}
        self.calls: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        """own FLOPs of each module"""
        self._open, self._counted = [""], 0
        self._hooks = []
        for path, module in model.named_modules():
            if path and not (isinstance(module, nn.Dropout) and not module.p):
                self._hooks += [
                    module.register_forward_pre_hook(functools.partial(self._enter, path)),
                    module.register_forward_hook(self._leave),
                ]

    def _account(self) -> None:
        """Give the FLOPs since the last call of this to the module at work."""
        total, path = self.counter.get_total_flops(), self._open[-1]
        self.flops[path] = self.flops.get(path, 0) + total - self._counted
        self._counted = total

    def _enter(self, path: str, module: nn.Module, _: Any) -> None:
        self._account()
        self._open.append(path)
        self.shapes.setdefault(path, ())
        self.calls[path] = self.calls.get(path, 0) + 1

    def _leave(self, module: nn.Module, _: Any, out: Any) -> None:
        self._account()
        self.shapes[self._open.pop()] = next((tuple(x.shape) for x in tensors(out)), ())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            q, k = args[:2]
            self.shapes[f"{self._open[-1]}.{SCORES}"] = (*q.shape[:-1], k.shape[-2])
        return func(*args, **(kwargs or {}))

    def run(self, model: GPT, batch: int, tokens: int) -> None:
        """One pass over (batch, tokens)."""
        try:
            with self.counter, torch.device("meta"):
                inputs, targets = (torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2))
                with self:
                    model.objective(inputs, targets)
                self._account()
        finally:
            for hook in self._hooks:
                hook.remove()


def record(model: GPT, choices: Choices, batch: int, tokens: int) -> list[TraceRow]:
    """Rows of one pass over (batch, tokens): the tokens first, the loss last."""
    recorder = Recorder(model)
    recorder.run(model, batch, tokens)
    owned: dict[str, list[Param]] = {}  # by the innermost module that is called, or the outermost one
    for param in model.params():
        parts = param.name.split(".")
        paths = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        owned.setdefault(next((path for path in paths if path in recorder.calls), paths[-1]), []).append(param)
    rows = [TraceRow("tokens", "what is read; the targets are these tokens shifted by one", (batch, tokens))]
    for path in owned.keys() - recorder.calls.keys():  # read by others, as a table of positions
        count = sum(param.tensor.numel() for param in owned[path])
        rows.append(TraceRow(path, summary(model.get_submodule(path), choices), None, parameters=count))
    inside = {path.rpartition(".")[0] for path in recorder.shapes}
    for path, shape in recorder.shapes.items():
        row = TraceRow(
            path, "", None if path in inside else shape, calls=recorder.calls.get(path, 1),
            parameters=sum(param.tensor.numel() for param in owned.get(path, ())),
            forward=recorder.flops.get(path, 0),
        )  # fmt: skip
        if path.rpartition(".")[2] == SCORES and path not in recorder.calls:
            row = replace(row, meaning="softmax(query @ key^T, scaled) @ value; FLOPs are those of its attention")
        else:
            part = model.get_submodule(path)
            row = replace(row, meaning=summary(part, choices) or matrices(owned.get(path, ())) or type(part).__name__)
        rows.append(row)
    objective = " + ".join(map(str, model.config.objective))
    meaning = f"what training minimises: {objective}"
    return [*rows, TraceRow("loss", meaning, (), forward=recorder.flops.get("", 0))]


def summary(part: Any, choices: Choices) -> str:
    """Name and first sentence of a part's component, without shapes and remarks on GPT-2; or an empty text."""
    if id(part) not in choices:
        return ""
    choice = choices[id(part)][1]
    sentence = re.split(r"\s{2,}|\.\s|\.$", SLOTS[choice.slot][choice.name].summary)[0]
    return f"{choice.name}: " + re.sub(r"; GPT-2's( \w+)?$", "", sentence).strip()


def matrices(params: Sequence[Param]) -> str:
    """The matrices among parameters, each with its shape, role and stacked parts."""
    texts = []
    for param in params:
        if param.role.kind != "vector":
            rows = ", ".join(f"{name} {height}" for name, height in param.role.rows)
            texts.append(f"{param.role.kind} {tuple(param.tensor.shape)}{f': {rows}' if rows else ''}")
    return ", ".join(texts)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, Mapping)):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(item)


# folding --------------------------------------------------------------------------------------------------------------


def folded(rows: Sequence[TraceRow], *, layer: int | None = None, all_layers: bool = False) -> list[TraceRow]:
    """Rows with one block of each kind in detail; others that follow each other are one row with their costs.

    layer: show this block in detail and no other.  all_layers: show every block.
    """
    shown: list[TraceRow] = []
    hidden: list[TraceRow] = []
    kinds: set[object] = set()
    for block, group in groupby(rows, key=lambda row: row.block):
        of_block = list(group)
        kind = tuple(replace(row, path=row.path.partition(f".{block}")[2]) for row in of_block)
        if block is None or all_layers or block == layer or (layer is None and kind not in kinds):
            shown += [*_together(hidden), *of_block]
            hidden = []
            kinds.add(kind)
        else:
            hidden += of_block
    return [*shown, *_together(hidden)]


def _together(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Blocks that are not shown, as one row."""
    if not rows:
        return []
    first, last = rows[0].block, rows[-1].block
    name = f"block {first}" if first == last else f"blocks {first} to {last}"
    parameters, forward = sum(row.parameters for row in rows), sum(row.forward for row in rows)
    return [TraceRow(name, "like those shown, or left out", None, parameters=parameters, forward=forward)]
