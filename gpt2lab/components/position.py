"""How a model knows the order of tokens: by adding to the input, by rotating queries and keys, or by biasing scores.

Shapes: B batch, T new tokens, S all tokens so far, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Dims, Site
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

position = Slot("model.position", "how the order of tokens is known", default="learned", arity="per_layer")


class Position(nn.Module):
    """A scheme that does nothing; others override one of the three. The model calls all three, whatever was chosen.

    max_context: longest context in tokens that the scheme can express, None without limit.
    key:         tells schemes of one model apart when their tables are shared between layers.
    """

    max_context: int | None = None
    key: str = ""

    def add(self, x: Tensor, step: Step) -> Tensor:
        """The embedded tokens with positions added.  (B, T, C) -> (B, T, C)"""
        return x

    def rotate(self, x: Tensor, step: Step) -> Tensor:
        """Queries or keys of the new tokens with positions turned into them.  (B, H, T, D) -> (B, H, T, D)"""
        return x

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """What is added to attention scores.  (T,), (S,) -> (H, T, S) or None"""
        return None


class Learned(Position):
    """One trained vector per position. Its table is `weight`, so that the model's is called wpe.weight as in GPT-2."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.max_context = site.dims.block_size
        self.weight = site.table(site.dims.block_size, site.dims.n_embd, "position")

    def add(self, x: Tensor, step: Step) -> Tensor:
        return x + F.embedding(step.q_positions, self.weight)


class Sinusoidal(Position):
    """Fixed sines and cosines of geometrically spaced wavelengths."""

    def __init__(self, n_embd: int, theta: float, amplitude: float) -> None:
        super().__init__()
        self.n_embd, self.theta, self.amplitude = n_embd, theta, amplitude

    def add(self, x: Tensor, step: Step) -> Tensor:
        even = torch.arange(0, self.n_embd, 2, device=x.device)
        angles = step.q_positions[:, None] * self.theta ** (-even / self.n_embd)  # (T, C/2)
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (T, C): sin, cos, sin, cos ...
        return x + self.amplitude * waves[:, : self.n_embd]


class Rotary(Position):
    """Pairs of channels turned by an angle that grows with position."""

    def __init__(self, theta: float, fraction: float) -> None:
        super().__init__()
        self.theta, self.fraction = theta, fraction

    def rotate(self, x: Tensor, step: Step) -> Tensor:
        # the width is read from x, so that a slice of a head or half a head can be turned as well
        turned = 2 * round(x.shape[-1] * self.fraction / 2)
        cos, sin = step.once(f"rotary.{self.key}.{turned}", lambda: self.tables(step.q_positions, turned))
        first, second, rest = x.float().split([turned // 2, turned // 2, x.shape[-1] - turned], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def tables(self, positions: Tensor, turned: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position and pair of channels.  (T,) -> two of (T, turned / 2)"""
        pair = torch.arange(0, turned, 2, device=positions.device)
        angles = positions[:, None].float() * self.theta ** (-pair / turned)
        return angles.cos(), angles.sin()


class Alibi(Position):
    """A penalty on distance, linear, with a slope per head."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None] - k_positions[None]).clamp(min=0)
        slopes = torch.tensor(alibi_slopes(self.n_head), device=distance.device)
        return -slopes[:, None, None] * distance


class T5Bias(Position):
    """A trained bias per head and bucket of distance, shared by all layers."""

    def __init__(self, site: Site, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = site.table(buckets, site.dims.n_head, "position")

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None] - k_positions[None]).clamp(min=0)
        return self.weight[t5_bucket(distance, self.buckets, self.max_distance)].permute(2, 0, 1)


def alibi_slopes(n_head: int) -> list[float]:
    """Slope of each head's linear distance penalty; for a number of heads that is no power of two, the slopes of the
    power below it, then every other slope of the power above it.  -> H floats.  Source: arXiv:2108.12409, section 3."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(n_head))
    return geometric(power) + geometric(2 * power)[::2][: n_head - power]


def t5_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance back: one each for the first half, then logarithmic up to max_distance, then one for all
    beyond.  int64 (...) -> int64 (...).  Source: arXiv:1910.10683, section 2.1 and its published code (causal case)."""
    exact = buckets // 2
    far = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


@position.register("learned", source="GPT-2 (Radford et al. 2019)")
def learned(site: Site) -> Position:
    """A trained vector for each position, added to the token embedding; GPT-2's. It ends at block_size tokens.

    x_t = wte[token_t] + wpe[t]   with wpe (block_size, C)
    """
    return Learned(site)


@position.register("sinusoidal", source="arXiv:1706.03762")
def sinusoidal(site: Site, *, theta: Annotated[float, Field(gt=1)] = 10000.0, amplitude: float = 0.02) -> Position:
    """Fixed waves added to the token embedding; no parameters, any length.

    x_t = wte[token_t] + a [sin(t w_0), cos(t w_0), sin(t w_1), ...]   with w_i = theta^(-2i/C)
    theta:     ratio of the longest wavelength to the shortest.
    amplitude: a. The paper multiplies embeddings by sqrt(C) instead, so that both start equally large; GPT-2 draws
    embeddings with sd 0.02, and we shrink the waves to match.
    """
    return Sinusoidal(site.dims.n_embd, theta, amplitude)


def rotary_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """Rotation turns pairs of channels."""
    if dims.head_size % 2:
        return [f"rotary turns pairs of channels, and a head has {dims.head_size} (n_embd / n_head): make it even"]
    if round(dims.head_size * options["fraction"] / 2) < 1:
        return [f"fraction {options['fraction']} leaves no pair of a head's {dims.head_size} channels to rotate"]
    return []


@position.register(
    "rotary",
    source="arXiv:2104.09864",
    needs={"attention": "rotate"},
    check=rotary_limits,
    examples=({"theta": 1000.0}, {"fraction": 0.5}),
)
def rotary(
    site: Site, *, theta: Annotated[float, Field(gt=1)] = 10000.0, fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
) -> Position:
    """Turn pairs of query and key channels by an angle proportional to position, so that scores depend on distance.

    (q_i, q_j) -> (q_i cos - q_j sin, q_j cos + q_i sin)   at angle t theta^(-2i/D), the pair being i and i + D/2
    theta:    base of the wavelengths.
    fraction: share of each head's channels that is turned; the rest carries no position.
    Channels are paired across halves (as in GPT-NeoX); the paper pairs neighbours, which differs by a permutation.
    """
    return Rotary(theta, fraction)


@position.register("alibi", source="arXiv:2108.12409", needs={"attention": "bias"})
def alibi(site: Site) -> Position:
    """Subtract from each score a multiple of the distance, with a fixed slope per head; no parameters, any length.

    score(t, s) - m_h (t - s)   with m_h = 2^(-8 h / H)
    """
    return Alibi(site.dims.n_head)


def t5_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """The logarithmic buckets need room."""
    if options["max_distance"] <= options["buckets"] // 2:
        return [f"max_distance {options['max_distance']} must exceed half of buckets {options['buckets']}"]
    return []


@position.register("t5_bias", source="arXiv:1910.10683", needs={"attention": "bias"}, check=t5_limits)
def t5_bias(site: Site, *, buckets: Annotated[int, Field(ge=2)] = 32, max_distance: int = 128) -> Position:
    """Add to each score a trained number that depends on the head and on the bucket of the distance.

    score(t, s) + weight[bucket(t - s), h]   with weight (buckets, H), one table for all layers
    buckets:      how many there are.
    max_distance: where the last bucket begins, in tokens.
    Distances up to buckets/2 have a bucket each, larger ones share logarithmic buckets up to max_distance.
    T5 leaves out the 1/sqrt(D) of attention scores; we keep it.
    """
    return T5Bias(site, buckets, max_distance)


@position.register("none", source="arXiv:2203.16634")
def none(site: Site) -> Position:
    """No positions at all: the causal mask alone tells tokens apart."""
    return Position()
