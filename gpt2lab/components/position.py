"""How a model represents the order of tokens: added to the input, rotating queries and keys, or as a bias on scores.

Shapes: B batch, T new tokens, S all tokens so far, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

Which = Literal["q", "k"]
Scaling = Literal["linear", "ntk", "yarn"]


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

    def rotate(self, x: Tensor, ctx: ForwardContext, which: Which) -> Tensor:
        """Rotate queries ("q") or keys ("k") of the new tokens.  (B, H, T, D) -> (B, H, T, D)

        H and D are those of x: an attention may rotate part of a head, or a key that all heads share.
        """
        return x

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """The bias on attention scores.  (T,), (S,) -> (H, T, S) or None"""
        return None


position = Slot(
    "model.position", "how the order of tokens is represented", default="learned", arity="per_layer", base=Position
)


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
    """Pairs of channels rotated by an angle proportional to position.

    stretch: its wavelengths are changed for a longer context.
    decay:   queries shrink and keys grow with position, over this many tokens (xPos).
    """

    def __init__(
        self, theta: float, fraction: float = 1.0, *, stretch: Stretch | None = None, decay: float | None = None
    ) -> None:
        super().__init__()
        self.theta, self.fraction, self.stretch, self.decay = theta, fraction, stretch, decay
        if decay is not None:
            self.max_context = int(64 * decay)  # keys of the fastest pair get (7/2)^64 there, near the end of float32

    def rotate(self, x: Tensor, ctx: ForwardContext, which: Which) -> Tensor:
        # the width is that of x, so that part of a head can be rotated as well
        rotated = 2 * min(round(x.shape[-1] * self.fraction / 2), x.shape[-1] // 2)
        key = f"rotary.{self.key}.{rotated}" + ("" if self.decay is None else f".{which}")
        cos, sin = ctx.once(key, lambda: self.tables(ctx.q_positions, rotated, which))
        first, second, rest = x.float().split([rotated // 2, rotated // 2, x.shape[-1] - rotated], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def tables(self, positions: Tensor, rotated: int, which: Which) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position and pair of channels, and their size.  (T,) -> two of (T, rotated / 2)"""
        pair = torch.arange(0, rotated, 2, device=positions.device)
        speeds, size = self.theta ** (-pair / rotated), 1.0
        if self.stretch is not None:
            speeds, size = self.stretch.speeds(speeds, self.theta), self.stretch.size
        angles = positions[:, None].float() * speeds
        if self.decay is None:
            return angles.cos() * size, angles.sin() * size
        base = (pair / rotated + 0.4) / 1.4
        factors = base ** (positions[:, None].float() / (self.decay if which == "q" else -self.decay))
        return angles.cos() * factors, angles.sin() * factors


@dataclass(frozen=True)
class Stretch:
    """Rotations for contexts `factor` times as long as `trained` tokens."""

    kind: Scaling
    factor: float
    trained: float

    @property
    def size(self) -> float:
        """The factor on rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    def speeds(self, speeds: Tensor, theta: float) -> Tensor:
        """Radians per token of each pair, from theta^(-2i/D).  (D/2,) -> (D/2,)"""
        pairs = len(speeds)
        if self.kind == "linear":
            return speeds / self.factor
        index = torch.arange(pairs, device=speeds.device)
        if self.kind == "ntk":  # theta * factor^(D/(D-2)): the slowest pair as in `linear`, the fastest as it was
            return speeds * self.factor ** (-index / max(pairs - 1, 1))
        # the index of the pair that turns so many times in `trained` tokens
        turning = (pairs * math.log(self.trained / (2 * math.pi * turns)) / math.log(theta) for turns in (32, 1))
        low, high = next(turning), next(turning)
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
        slow = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        return speeds * (1 - slow + slow / self.factor)


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


class Kerple(Position):
    """A penalty that grows with the logarithm of distance, with two trained numbers per head."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.weight, self.growth = (nn.Parameter(torch.ones(n_head)) for _ in range(2))

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None] - k_positions[None]).clamp(min=0)
        weight, growth = (x.clamp(min=0.01)[:, None, None] for x in (self.weight, self.growth))
        return -weight * torch.log1p(growth * distance)


class Fire(Position):
    """A trained function of the logarithm of distance, relative to that of the position."""

    def __init__(self, builder: Builder, width: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.slope = nn.Parameter(torch.ones(width))
        self.offset = nn.Parameter(-torch.arange(width) / width)
        self.out = builder.linear(width, builder.dims.n_head, bias=False)
        self.c = nn.Parameter(torch.tensor(0.1))
        self.share = nn.Parameter(torch.tensor(1.0))

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None] - k_positions[None]).clamp(min=0)
        longest = torch.maximum(q_positions[:, None].float(), (self.share * self.threshold).abs())
        near = torch.log1p((self.c * distance).abs()) / torch.log1p((self.c * longest).abs())  # (T, S), 0 to 1
        hidden = torch.relu(near[..., None] * self.slope + self.offset)  # (T, S, width)
        bias: Tensor = self.out(hidden)
        return bias.permute(2, 0, 1)


class DynamicBias(Position):
    """A small network of the distance, with one output per head."""

    def __init__(self, builder: Builder, width: int, log: bool) -> None:
        super().__init__()
        self.log = log
        self.c_fc = builder.linear(1, width)
        self.out = builder.linear(width, builder.dims.n_head, bias=False)

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        longest = int(k_positions.shape[0])
        distance = torch.arange(longest, device=k_positions.device, dtype=self.c_fc.weight.dtype)[:, None]
        table: Tensor = self.out(F.silu(self.c_fc(distance.log1p() if self.log else distance / 100)))  # (S, H)
        return table[(q_positions[:, None] - k_positions[None]).clamp(min=0)].permute(2, 0, 1)


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
    """Rotation needs pairs of channels; `scaling` and `factor` belong together."""
    if dims.head_size % 2:
        return [f"rotary rotates pairs of channels, and a head has {dims.head_size} (n_embd / n_head): make it even"]
    if round(dims.head_size * options.get("fraction", 1.0) / 2) < 1:
        return [f"fraction {options['fraction']} leaves no pair of a head's {dims.head_size} channels to rotate"]
    scaling, factor = options.get("scaling"), options.get("factor")
    if (scaling is None) != (factor is None):
        return [f"rotary has {'scaling' if factor is None else 'factor'} only: set both, or neither"]
    if scaling is None and options.get("trained") is not None:
        return ["rotary has trained without scaling: set both, or neither"]
    return []


@position.register(
    "rotary",
    source="arXiv:2104.09864; linear 2306.15595; ntk and yarn 2309.00071",
    needs={"attention": "rotate"},
    check=rotary_limits,
    examples=({"theta": 1000.0}, {"fraction": 0.5}, {"scaling": "yarn", "factor": 4.0}),
)
def rotary(
    builder: Builder,
    *,
    theta: Annotated[float, Field(gt=1)] = 10000.0,
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
    scaling: Scaling | None = None,
    factor: Annotated[float, Field(ge=1)] | None = None,
    trained: Annotated[int, Field(ge=1)] | None = None,
) -> Position:
    """Rotate pairs of query and key channels by an angle proportional to position, so that scores depend on distance.

    (q_i, q_j) -> (q_i cos - q_j sin, q_j cos + q_i sin)   at angle t w_i,  w_i = theta^(-2i/D), the pair i and i + D/2
    theta:    base of the wavelengths.
    fraction: share of each head's channels that is rotated; the others are unchanged.
    scaling:  how wavelengths are stretched when a trained model gets a longer context. linear: w_i / factor. ntk: from
    no stretching of the fastest pair to `factor` for the slowest, by theta factor^(D/(D-2)). yarn: w_i for pairs that
    turn 32 times or more within `trained` tokens, w_i / factor for those that turn less than once, a mix in between;
    queries and keys are multiplied by 0.1 ln(factor) + 1.
    factor:   the longer context divided by the trained one.
    trained:  context in tokens before scaling, for yarn; null is block_size / factor.
    Channels are paired across halves (as in GPT-NeoX); the paper pairs neighbours, which differs by a permutation. The
    mix of yarn is linear in the index of the pair, as in its code; in the paper, in the number of turns.
    """
    stretch = None
    if scaling is not None and factor is not None:
        stretch = Stretch(scaling, factor, trained or builder.dims.block_size / factor)
    return Rotary(theta, fraction, stretch=stretch)


@position.register("xpos", source="arXiv:2212.10554", needs={"attention": "rotate"}, check=rotary_limits)
def xpos(
    builder: Builder,
    *,
    theta: Annotated[float, Field(gt=1)] = 10000.0,
    decay: Annotated[float, Field(gt=0)] = 512.0,
) -> Position:
    """Rotary with scores that decay with distance, faster for fast pairs: queries shrink by position, keys grow.

    q_t z_i^(t/decay),  k_s z_i^(-s/decay)   after rotation, with z_i = (2i/D + 0.4) / 1.4 for pair i
    theta: base of the wavelengths.
    decay: in tokens; the context is limited to 64 decay, within the range of float32.
    The paper counts positions from the middle of the context, which changes no score. Channels are paired as in rotary.
    """
    return Rotary(theta, decay=decay)


@position.register("alibi", source="arXiv:2108.12409", needs={"attention": "bias"})
def alibi(builder: Builder) -> Position:
    """Subtract from each score a multiple of the distance, with a fixed slope per head; no parameters, any length.

    score(t, s) - m_h (t - s)   with m_h = 2^(-8 h / H) if H is a power of two; else see alibi_slopes
    """
    return Alibi(builder.dims.n_head)


@position.register("kerple", source="arXiv:2205.09921 (its logarithmic kernel)", needs={"attention": "bias"})
def kerple(builder: Builder) -> Position:
    """Subtract from each score a trained multiple of the logarithm of the distance.

    score(t, s) - a_h ln(1 + b_h (t - s))   with a and b (H,), at least 0.01, one pair for all layers
    a and b start at 1, where the paper draws them at random.
    """
    return Kerple(builder.dims.n_head)


@position.register("fire", source="arXiv:2310.04418", needs={"attention": "bias"})
def fire(
    builder: Builder, *, width: Annotated[int, Field(ge=1)] = 32, threshold: Annotated[float, Field(gt=0)] = 512.0
) -> Position:
    """Add to each score a trained function of the distance, relative to the position of the query.

    score(t, s) + f_h(ln(1 + |c| (t - s)) / ln(1 + |c| max(t, L)))   with f an MLP from 1 to H, c and L trained
    width:     of the hidden layer of f.
    threshold: L at the start, in tokens.
    One f for all layers, without a last bias, which softmax cancels. Its hidden layer starts with the kinks of relu
    evenly spaced in [0, 1), where the paper draws it at random.
    """
    return Fire(builder, width, threshold)


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


@position.register(
    "dynamic_bias", source="arXiv:2111.09883 (Swin V2), as in x-transformers", needs={"attention": "bias"}
)
def dynamic_bias(builder: Builder, *, width: Annotated[int, Field(ge=1)] = 32, log: bool = True) -> Position:
    """Add to each score a trained function of the distance, a network with one hidden layer.

    score(t, s) + f_h(ln(1 + t - s))   with f = W_2 silu(W_1 u + b_1), one for all layers

    width: of the hidden layer.
    log:   whether f sees the logarithm of the distance, or a hundredth of the distance.
    """
    return DynamicBias(builder, width, log)


@position.register("none", source="arXiv:2203.16634")
def none(builder: Builder) -> Position:
    """No positions: only the causal mask distinguishes tokens."""
    return Position()
