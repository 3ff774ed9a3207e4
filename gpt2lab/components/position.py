"""How a model represents the order of tokens: added to the input, rotating queries and keys, or as a bias on scores.

Shapes: B batch, T new tokens, S all tokens so far, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

position = Slot("model.position", "how the order of tokens is represented", default="learned", arity="per_layer")


class Position(nn.Module):
    """A scheme without effect; subclasses override one of the three methods. The model always calls all three.

    max_context: longest context in tokens that the scheme supports, None without limit.
    key:         distinguishes the schemes of a model in `ForwardContext.once`.
    """

    max_context: int | None = None
    key: str = ""

    def add(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Add positions to the embedded tokens.  (B, T, C) -> (B, T, C)"""
        return x

    def rotate(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Rotate queries or keys of the new tokens.  (B, H, T, D) -> (B, H, T, D)"""
        return x

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """The bias on attention scores.  (T,), (S,) -> (H, T, S) or None"""
        return None


class Learned(Position):
    """One trained vector per position. The table is called `weight`, which makes it wpe.weight in the model, as in
    GPT-2."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.max_context = builder.dims.block_size
        self.weight = builder.table(builder.dims.block_size, builder.dims.n_embd, "position")

    def add(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x + F.embedding(ctx.q_positions, self.weight)


class Sinusoidal(Position):
    """Fixed sines and cosines with wavelengths in geometric progression."""

    def __init__(self, n_embd: int, theta: float, amplitude: float) -> None:
        super().__init__()
        self.n_embd, self.theta, self.amplitude = n_embd, theta, amplitude

    def add(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        even = torch.arange(0, self.n_embd, 2, device=x.device)
        angles = ctx.q_positions[:, None] * self.theta ** (-even / self.n_embd)  # (T, C/2)
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (T, C): sin, cos, sin, cos ...
        return x + self.amplitude * waves[:, : self.n_embd]


class Rotary(Position):
    """Pairs of channels rotated by an angle proportional to position."""

    def __init__(self, theta: float, fraction: float) -> None:
        super().__init__()
        self.theta, self.fraction = theta, fraction

    def rotate(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        # the width is that of x, so that part of a head can be rotated as well
        rotated = 2 * round(x.shape[-1] * self.fraction / 2)
        cos, sin = ctx.once(f"rotary.{self.key}.{rotated}", lambda: self.tables(ctx.q_positions, rotated))
        first, second, rest = x.float().split([rotated // 2, rotated // 2, x.shape[-1] - rotated], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def tables(self, positions: Tensor, rotated: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position and pair of channels.  (T,) -> two of (T, rotated / 2)"""
        pair = torch.arange(0, rotated, 2, device=positions.device)
        angles = positions[:, None].float() * self.theta ** (-pair / rotated)
        return angles.cos(), angles.sin()


class Alibi(Position):
    """A penalty proportional to distance, with a slope per head."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None] - k_positions[None]).clamp(min=0)
        slopes = torch.tensor(alibi_slopes(self.n_head), device=distance.device)
        return -slopes[:, None, None] * distance


class T5Bias(Position):
    """A trained bias per head and bucket of distances, shared by all layers."""

    def __init__(self, builder: Builder, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.weight = builder.table(buckets, builder.dims.n_head, "position")

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
    larger ones.  int64 (...) -> int64 (...).  Source: arXiv:1910.10683, section 2.1 and its published code (causal)."""
    exact = buckets // 2
    far = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


@position.register("learned", source="GPT-2 (Radford et al. 2019)")
def learned(builder: Builder) -> Position:
    """A trained vector for each position, added to the token embedding; GPT-2's. Limited to block_size tokens.

    x_t = wte[token_t] + wpe[t]   with wpe (block_size, C)
    """
    return Learned(builder)


@position.register("sinusoidal", source="arXiv:1706.03762")
def sinusoidal(
    builder: Builder, *, theta: Annotated[float, Field(gt=1)] = 10000.0, amplitude: float = 0.02
) -> Position:
    """Fixed waves added to the token embedding; no parameters, any length.

    x_t = wte[token_t] + a [sin(t w_0), cos(t w_0), sin(t w_1), ...]   with w_i = theta^(-2i/C)
    theta:     ratio of the longest wavelength to the shortest.
    amplitude: a. The paper multiplies embeddings by sqrt(C) instead, for an equal initial size of both; GPT-2's
    embeddings have an initial sd of 0.02, and the waves are scaled to match it.
    """
    return Sinusoidal(builder.dims.n_embd, theta, amplitude)


def rotary_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """Rotation needs pairs of channels."""
    if dims.head_size % 2:
        return [f"rotary rotates pairs of channels, and a head has {dims.head_size} (n_embd / n_head): make it even"]
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
    builder: Builder,
    *,
    theta: Annotated[float, Field(gt=1)] = 10000.0,
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> Position:
    """Rotate pairs of query and key channels by an angle proportional to position, so that scores depend on distance.

    (q_i, q_j) -> (q_i cos - q_j sin, q_j cos + q_i sin)   at angle t theta^(-2i/D), the pair being i and i + D/2
    theta:    base of the wavelengths.
    fraction: share of each head's channels that is rotated; the others are unchanged.
    Channels are paired across halves (as in GPT-NeoX); the paper pairs neighbours, which differs by a permutation.
    """
    return Rotary(theta, fraction)


@position.register("alibi", source="arXiv:2108.12409", needs={"attention": "bias"})
def alibi(builder: Builder) -> Position:
    """Subtract from each score a multiple of the distance, with a fixed slope per head; no parameters, any length.

    score(t, s) - m_h (t - s)   with m_h = 2^(-8 h / H)
    """
    return Alibi(builder.dims.n_head)


def t5_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """Logarithmic buckets begin at half the number of buckets."""
    if options["max_distance"] <= options["buckets"] // 2:
        return [f"max_distance {options['max_distance']} must exceed half of buckets {options['buckets']}"]
    return []


@position.register("t5_bias", source="arXiv:1910.10683", needs={"attention": "bias"}, check=t5_limits)
def t5_bias(builder: Builder, *, buckets: Annotated[int, Field(ge=2)] = 32, max_distance: int = 128) -> Position:
    """Add to each score a trained number that depends on the head and on the bucket of the distance.

    score(t, s) + weight[bucket(t - s), h]   with weight (buckets, H), one table for all layers
    buckets:      number of buckets.
    max_distance: distance in tokens from which all share the last bucket.
    Distances up to buckets/2 have a bucket each, larger ones share logarithmic buckets up to max_distance.
    T5 has no factor 1/sqrt(D) on attention scores; here it is kept.
    """
    return T5Bias(builder, buckets, max_distance)


@position.register("none", source="arXiv:2203.16634")
def none(builder: Builder) -> Position:
    """No positions: only the causal mask distinguishes tokens."""
    return Position()
