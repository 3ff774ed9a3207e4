"""Normalisation over channels.  (..., C) -> (..., C)"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.registry import Slot

norm = Slot("model.norm", "how activations are normalised", default="layernorm", arity="per_layer", base=nn.Module)


class LayerNorm(nn.Module):
    """Normalise to mean 0 and variance 1 over channels, then apply a gain and an optional bias."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Normalise to a root mean square of 1 over channels, then apply an optional gain."""

    def __init__(self, width: int, eps: float, scale: bool) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


class DynamicTanh(nn.Module):
    """tanh with a trained factor in front, then a gain and a bias."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class DynamicErf(nn.Module):
    """erf of a trained linear function, then a gain and a bias."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha, self.shift = nn.Parameter(torch.tensor(alpha)), nn.Parameter(torch.zeros(()))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


class PartialRMSNorm(nn.Module):
    """Divide by the root mean square of the first channels, then apply a gain."""

    def __init__(self, width: int, eps: float, seen: int) -> None:
        super().__init__()
        self.eps, self.seen = eps, seen
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x[..., : self.seen].float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight


class ScaleNorm(nn.Module):
    """Scale to a trained length."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.length = nn.Parameter(torch.tensor(width**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.length * F.normalize(x.float(), dim=-1, eps=self.eps).to(x.dtype)


@norm.register("layernorm", source="arXiv:1607.06450")
def layernorm(builder: Builder, *, eps: float = 1e-5, bias: bool | None = None) -> nn.Module:
    """Subtract the mean over channels and divide by the standard deviation; GPT-2's norm.  (..., C) -> (..., C)

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
    eps:  prevents division by zero.
    bias: whether there is a bias; null follows `model.bias`.
    """
    return LayerNorm(builder.width or builder.dims.n_embd, eps, builder.dims.bias if bias is None else bias)


@norm.register("rmsnorm", source="arXiv:1910.07467")
def rmsnorm(builder: Builder, *, eps: float = 1e-5, scale: bool = True) -> nn.Module:
    """Divide by the root mean square over channels, without mean or bias.  (..., C) -> (..., C)

    y = x / sqrt(mean(x^2) + eps) * weight.
    eps:   prevents division by zero.
    scale: whether there is a weight.
    """
    return RMSNorm(builder.width or builder.dims.n_embd, eps, scale)


@norm.register("dyt", source="arXiv:2503.10622")
def dyt(builder: Builder, *, alpha: Annotated[float, Field(gt=0)] = 1.0) -> nn.Module:
    """A tanh in place of a norm: no statistics over channels.  (..., C) -> (..., C)

    y = tanh(a x) * weight + bias   with a trained number a
    alpha: a at the beginning. The paper has 0.5, and for language models a value by width and place, 1 for narrow ones.
    There it also has a trained factor after the embedding.
    """
    return DynamicTanh(builder.width or builder.dims.n_embd, alpha)


@norm.register("derf", source="arXiv:2512.10938")
def derf(builder: Builder, *, alpha: Annotated[float, Field(gt=0)] = 1.0) -> nn.Module:
    """The error function in place of a norm: no statistics over channels.  (..., C) -> (..., C)

    y = erf(a x + s) * weight + bias   with trained numbers a and s
    alpha: a at the beginning; s is 0. The paper has 0.5; see dyt for language models.
    """
    return DynamicErf(builder.width or builder.dims.n_embd, alpha)


@norm.register("partial_rmsnorm", source="arXiv:1910.07467, section 3.2 (pRMSNorm)")
def partial_rmsnorm(
    builder: Builder, *, fraction: Annotated[float, Field(gt=0, le=1)] = 0.125, eps: float = 1e-5
) -> nn.Module:
    """RMSNorm whose statistic is that of the first channels only.  (..., C) -> (..., C)

    y = x / sqrt(mean(x_1^2 ... x_k^2) + eps) * weight
    fraction: k / C, but at least 8 channels: of fewer, the statistic may be near zero. The paper has 1/16.
    eps:      prevents division by zero.
    """
    width = builder.width or builder.dims.n_embd
    return PartialRMSNorm(width, eps, min(width, max(8, round(fraction * width))))


@norm.register("scale_norm", source="arXiv:1910.05895")
def scale_norm(builder: Builder, *, eps: float = 1e-5) -> nn.Module:
    """Scale to one trained length, a single parameter in place of a gain per channel.  (..., C) -> (..., C)

    y = g x / max(|x|, eps)   with g = sqrt(C) at the beginning
    eps: prevents division by zero.
    """
    return ScaleNorm(builder.width or builder.dims.n_embd, eps)


@norm.register("none", source="arXiv:1901.09321 (training without norms)")
def none(builder: Builder) -> nn.Module:
    """No norm: the input is returned as it is.  (..., C) -> (..., C)

    y = x;  the source makes up for it by its init and by trained scalars, which are not part of this component
    """
    return nn.Identity()
