"""Cases of contract tests: one component in a tiny canonical GPT-2."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2lab.components.context import Cache
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.registry import SLOTS, Choice, Component

VOCABULARY, CONTEXT, LAYERS, HEADS, HEAD_SIZE = 97, 16, 2, 4, 8
LARGE_ENOUGH = 64  # rows in a batch that reaches every expert of any router at init


@dataclass(frozen=True)
class Case:
    """One component with one set of options."""

    slot: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.slot}={self.name}" + "".join(f",{k}={v}" for k, v in self.options.items())

    def choice(self) -> Choice:
        """The component with all of its options."""
        return SLOTS[self.slot].read({"name": self.name, **self.options})

    def config(self, *, n_head: int = HEADS, n_layer: int = LAYERS, **changes: Any) -> ModelConfig:
        """A tiny canonical GPT-2 with this component in its slot."""
        sizes = {"n_head": n_head, "n_layer": n_layer, "n_embd": n_head * HEAD_SIZE, "block_size": CONTEXT}
        choices = {self.slot: placed(self.choice())} | self.neighbours()
        return ModelConfig(**{**sizes, "vocab_size": VOCABULARY, **choices, **changes})

    def neighbours(self) -> dict[str, str]:
        """For every slot whose default lacks what this component needs from it, the first component that offers it."""
        needs = SLOTS[self.slot][self.name].needs.items()
        able = {slot: [c.name for c in SLOTS[slot] if word in c.can] for slot, word in needs if slot in MODEL_SLOTS}
        return {slot: names[0] for slot, names in able.items() if names and SLOTS[slot].default not in names}

    def model(self, *, seed: int = 0, **changes: Any) -> GPT:
        """The tiny model, in evaluation mode."""
        return build_model(self.config(**changes), seed=seed).eval()


def placed(choice: Choice) -> Any:
    """A choice in the form of its slot: in lists of parts, after the canonical first part if needed."""
    slot, written = SLOTS[choice.slot], choice.full()
    if slot.arity != "list":
        return written
    starts = {"embedding": "table"}.get(slot.name)
    alone = choice.name in slot.default or (starts and starts in slot[choice.name].can)
    return [written] if alone else [*slot.default, written]


def variants(component: Component) -> list[Case]:
    """The component with its defaults, with every boolean option flipped, and with each of its examples."""
    flips = [{n: not v} for n, v in component.defaults().items() if isinstance(v, bool)]
    return [Case(component.slot, component.name, o) for o in [{}, *flips, *map(dict, component.examples)]]


def cases(components: Iterable[Component]) -> list[Case]:
    """All variants of all components."""
    return [case for component in components for case in variants(component)]


def batch(seed: int = 1, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens and their successors.  -> (B, T), (B, T)"""
    tokens = torch.randint(0, VOCABULARY, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def disturbed(model: GPT) -> GPT:
    """The same model with N(0, 0.02) added to every parameter, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def nudged(model: GPT) -> GPT:
    """A copy whose weights differ by their last bit: how far its results are off is what rounding amounts to."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1 + 2**-23 * torch.randn(weight.shape, generator=generator).sign())
    return twin


def modes(model: GPT) -> Iterator[tuple[str, GPT]]:
    """The model in evaluation, and then in the middle of a training, each with words for messages."""
    yield "", model.eval()
    model.progress.set(0.3)
    yield " while training", model.train()


def seeded(model: GPT, tokens: Tensor, **options: Any) -> Tensor:
    """Logits, with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        logits: Tensor = model(tokens, **options)
    return logits


def compared(model: GPT, first: Tensor, second: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits of two texts from the same state of the model, which a pass may change while training, and with the same
    random numbers."""
    twin = copy.deepcopy(model) if model.training else model
    return seeded(model, first, **options), seeded(twin, second, **options)


@torch.no_grad()
def in_pieces(model: GPT, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of a text that is read in pieces of `sizes` tokens, with a cache, and the rest token by token."""
    cache, rest = Cache(), [1] * (tokens.shape[1] - sum(sizes))
    return torch.cat([model(piece, cache=cache) for piece in tokens.split([*sizes, *rest], 1)], 1)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()
