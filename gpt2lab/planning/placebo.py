"""Whether two assemblies of a model are written differently and compute the same.

Both get the same weights and the same batch, and their objectives and all gradients are compared. To take seconds at
any scale, heads are narrower and the vocabulary is smaller than written, and the whole context is read by a few layers
only. So an option that has no effect only at the written width is not recognised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from gpt2lab.model import GPT, ModelConfig
from gpt2lab.registry import SLOTS

HEAD_SIZES = (8, 16)
"""Two of them: with one, an option could happen to name its value."""
SHARES = (0.0, 0.01, 0.5, 1.0)
"""Shares of the training done, for parts with a warm-up."""
VOCABULARY = 512
"""Tokens, unless an option names a later one, such as a separator."""
SHORT = 64
"""Tokens that are read by all layers. Most differences show within them."""
SAMPLED = 1000
"""Numbers of each gradient that are kept, at least, where there are as many."""
TOLERANCE = 1e-5
"""Relative; kernels differ in the order of float32 sums."""


def same_function(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether models of both configs start from the same weights and get the same gradients in every step."""
    if (one.init, one.parametrization) != (other.init, other.parametrization) or layout(one) != layout(other):
        return False
    markers = tuple(sorted({*numbers(one), *numbers(other)}))
    few, size = shallow(one, other), HEAD_SIZES[0]
    screens = [(SHORT, few, size, 0.0), *((one.block_size, few, size, share) for share in SHARES[::2])]
    deep = [(SHORT, one.n_layer, size, share) for size in HEAD_SIZES for share in SHARES]
    for tokens, n_layer, size, share in (*screens, *deep):
        try:
            a, b = (gradients(shrunk(c, size, n_layer, markers), tokens, share, markers) for c in (one, other))
        except Exception:  # a component that does not work at this size: nothing is known
            return False
        if a.shape != b.shape or not (a - b).norm() <= TOLERANCE * a.norm():
            return False
    return True


def shallow(*configs: ModelConfig) -> int:
    """The fewest layers, two or more, that every pattern fills evenly."""
    patterns = [len(c) for config in configs for slot, c in config.choices().items() if SLOTS[slot].arity != "list"]
    once = math.lcm(*patterns)
    return min(configs[0].n_layer, once * math.ceil(2 / once))


@lru_cache(maxsize=64)
def layout(config: ModelConfig) -> tuple[tuple[tuple[int, ...], object], ...]:
    """Shape and role of every parameter, in order. Names may differ: they decide which random numbers are drawn."""
    with torch.device("meta"):
        model = GPT(config)
    return tuple((tuple(p.tensor.shape), p.role) for p in model.params())


def shrunk(config: ModelConfig, head_size: int, n_layer: int, markers: tuple[int, ...]) -> ModelConfig:
    """The same with heads of at most so many channels, so many layers, and a vocabulary that holds the markers."""
    n_embd = config.n_head * min(head_size, config.head_size)
    vocab_size = min(config.vocab_size, max(VOCABULARY, *markers, 0) + 1)
    return ModelConfig(**{**dict(config), "n_embd": n_embd, "n_layer": n_layer, "vocab_size": vocab_size})


@lru_cache(maxsize=64)
def gradients(config: ModelConfig, tokens: int, share: float, markers: tuple[int, ...]) -> Tensor:
    """The objective and a sample of its gradient for made-up weights and a made-up batch, in training mode.

    tokens: at most, in each sequence.  markers: those that occur in it, three times.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(config).train()
        with torch.no_grad():
            for param in model.params():  # large enough for every nonlinearity to matter
                drawn = torch.randn(param.tensor.shape)
                if param.tensor.ndim < 2:
                    param.tensor.add_(0.2 * drawn)
                else:
                    param.tensor.copy_(1.5 * drawn / param.tensor.shape[-1] ** 0.5)
        model.progress.set(share)
        length = min(tokens, config.block_size)
        rows = 2 if tokens == SHORT else 1  # two differ in parts that draw for every sequence
        batch = torch.randint(0, config.vocab_size, (rows, length + 1))
        for quarter in (1, 2, 3):
            part = batch[:, quarter * length // 4 :][:, : len(markers)]
            part.copy_(torch.tensor(markers, dtype=torch.int64)[: part.shape[1]].expand_as(part))
        objective, _ = model.objective(batch[:, :-1], batch[:, 1:])
        objective.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    some = [part.flatten()[:: max(1, part.numel() // SAMPLED)] for part in parts]
    return torch.cat([objective.detach().reshape(1), *some])


def numbers(config: ModelConfig) -> Iterator[int]:
    """Whole numbers among the options that may be tokens with a meaning, such as a separator."""
    for choices in config.choices().values():
        for choice in choices:
            for value in choice.options.values():
                if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < config.vocab_size:
                    yield value
