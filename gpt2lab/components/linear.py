"""The linear maps inside blocks, as `builder.linear` builds them.  (..., n_in) -> (..., n_out)

A component is built with (builder, n_in, n_out, bias). It has a `weight` (n_out, n_in), whose role the builder sets.
Embeddings, heads and routers are not affected, nor are the experts of a mixture, which are stacked in one tensor.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gpt2lab.components.base import Builder, Linear, Progress, Role, parameter
from gpt2lab.registry import Slot

linear = Slot("model.linear", "linear maps inside blocks", default="plain", arity="per_layer")

Warmup = Annotated[float, Field(ge=0, le=1)]
Bits = Annotated[int, Field(ge=2, le=16)]


@linear.register("plain", source="GPT-2 (Radford et al. 2019)")
def plain(builder: Builder, n_in: int, n_out: int, bias: bool) -> Linear:
    """A matrix product and a bias; GPT-2's.  (..., n_in) -> (..., n_out)

    x W^T + b
    """
    return Linear(n_in, n_out, bias=bias)


def straight_through(x: Tensor, rounded: Tensor, share: Tensor | float) -> Tensor:
    """x, moved by `share` of the way to its rounded value; the gradient is that of x.  Source: arXiv:1308.3432."""
    return x + share * (rounded - x).detach()


def rounded_to_bits(x: Tensor, bits: int) -> Tensor:
    """Every row rounded to a multiple of its largest absolute value over 2^(bits-1) - 1.  (..., n) -> (..., n)"""
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (x / unit).round() * unit
    return rounded


def ternary(weight: Tensor) -> Tensor:
    """-g, 0 or g, with g the mean absolute value of the matrix.  Source: arXiv:2402.17764, equations 1 to 3."""
    unit = weight.abs().mean().clamp(min=1e-5)
    rounded: Tensor = (weight / unit).round().clamp(-1, 1) * unit
    return rounded


class Quantized(Linear):
    """A linear map whose weight, and optionally its input, are rounded in the forward pass."""

    def __init__(
        self, n_in: int, n_out: int, bias: bool, bits: int | None, activation_bits: int | None, norm: bool,
        warmup: float, progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(n_in, n_out, bias=bias)
        self.bits, self.activation_bits, self.norm, self.warmup = bits, activation_bits, norm, warmup
        self.progress = progress

    def forward(self, x: Tensor) -> Tensor:
        share = (self.progress.value / self.warmup).clamp(max=1.0) if self.warmup else 1.0
        if self.norm:
            x = F.rms_norm(x, x.shape[-1:])
        if self.activation_bits is not None:
            x = straight_through(x, rounded_to_bits(x, self.activation_bits), share)
        weight = ternary(self.weight) if self.bits is None else rounded_to_bits(self.weight, self.bits)
        return F.linear(x, straight_through(self.weight, weight, share), self.bias)


@linear.register("bitnet", source="arXiv:2402.17764 (BitNet b1.58)", examples=({"warmup": 0.5},))
def bitnet(
    builder: Builder, n_in: int, n_out: int, bias: bool,
    *, activation_bits: Bits | None = None, norm: bool = True, warmup: Warmup = 0.0,
) -> Linear:  # fmt: skip
    """Weights of -g, 0 and g in forward passes, with straight-through gradients.  (..., n_in) -> (..., n_out)

    round(clip(W / g, -1, 1)) g x^ + b   with g = mean |W| and x^ = x / rms(x)
    activation_bits: round x^ of every token to so many bits; 8 in the paper. null keeps x^ exact: rounding amplifies
    differences in the last bits, such as those between a cached and a full pass.
    norm:   whether the input is divided by its root mean square, as in the paper's BitLinear.
    warmup: share of the training over which weights move from exact to rounded; the paper has none.
    The weight is rounded as a whole, stacked queries, keys and values together.
    """
    return Quantized(n_in, n_out, bias, None, activation_bits, norm, warmup, builder.progress)


@linear.register("quantized", source="arXiv:1712.05877 (quantization-aware training)", examples=({"bits": 4},))
def quantized(
    builder: Builder, n_in: int, n_out: int, bias: bool,
    *, bits: Bits = 8, activation_bits: Bits | None = None, warmup: Warmup = 0.0,
) -> Linear:  # fmt: skip
    """Weights rounded to `bits` in forward passes, with straight-through gradients.  (..., n_in) -> (..., n_out)

    round(W / u) u x + b   with u = max |row of W| / (2^(bits-1) - 1), symmetric, for every row
    bits:            of a weight, its sign included.
    activation_bits: round the input of every token likewise; null keeps it exact (see bitnet).
    warmup:          share of the training over which weights move from exact to rounded.
    The paper uses one unit for a whole matrix, and averages over batches for activations.
    """
    return Quantized(n_in, n_out, bias, bits, activation_bits, False, warmup, builder.progress)


class LowRank(Linear):
    """A linear map with a low-rank addition: a (rank, n_in), b (n_out, rank)."""

    def __init__(self, builder: Builder, n_in: int, n_out: int, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.factor = alpha / rank
        self.a = parameter(torch.empty(rank, n_in), Role("hidden", builder.layer))
        self.b = parameter(torch.empty(n_out, rank), Role("hidden", builder.layer, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.factor * F.linear(F.linear(x, self.a), self.b)


@linear.register("lora", source="arXiv:2106.09685")
def lora(
    builder: Builder, n_in: int, n_out: int, bias: bool,
    *, rank: Annotated[int, Field(ge=1)] = 8, alpha: Annotated[float, Field(gt=0)] = 8.0,
) -> Linear:  # fmt: skip
    """A matrix plus a product of two thin ones, to train those alone.  (..., n_in) -> (..., n_out)

    (W + (alpha / rank) b a) x + bias   with a (rank, n_in) and b (n_out, rank), which is initially zero
    rank:  of the product.
    alpha: factor that lets ranks share a rate.
    Freeze the rest by `optim.freeze: ["w*", "ln_f.*", "h.*.weight", "h.*.bias"]`, and start with trained weights by a
    branch with `take: weights`. The paper adds it to queries and values only, here every matrix in blocks has it; a is
    drawn by the init.
    """
    return LowRank(builder, n_in, n_out, bias, rank, alpha)


def rounded_to_float8(x: Tensor) -> Tensor:
    """x in eight bits with four of exponent and three of mantissa, scaled to use the whole range.  (n, m) -> (n, m)"""
    unit = x.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / unit).to(torch.float8_e4m3fn).to(x.dtype) * unit


class Float8(Linear):
    """A linear map whose weight is rounded to eight-bit floating point in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, straight_through(self.weight, rounded_to_float8(self.weight), 1.0), self.bias)


@linear.register("float8", source="arXiv:2209.05433; KellerJordan/modded-nanogpt, record of 2026-05-21")
def float8(builder: Builder, n_in: int, n_out: int, bias: bool) -> Linear:
    """Weights rounded to eight-bit floating point (E4M3) in forward passes, with straight-through gradients.

    float8(W / u) u x + b   with u = max |W| / 448, one for the matrix; stacked queries, keys and values together

    It shows what the rounding does to a training, and is not faster. Inputs and gradients stay as they are.
    """
    return Float8(n_in, n_out, bias=bias)
