"""Normalisation over channels.  (..., C) -> (..., C)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.registry import Slot

norm = Slot("model.norm", "how activations are normalised", default="layernorm", arity="per_layer")


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
