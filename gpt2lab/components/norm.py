"""Normalisation over channels.  (..., C) -> (..., C)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.base import Site
from gpt2lab.registry import Slot

norm = Slot("model.norm", "how activations are normalised", default="layernorm", arity="per_layer")


class LayerNorm(nn.Module):
    """Mean and variance over channels to 0 and 1, then a gain and, if wanted, a bias."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square over channels to 1, then a gain if wanted."""

    def __init__(self, width: int, eps: float, scale: bool) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


@norm.register("layernorm", source="arXiv:1607.06450")
def layernorm(site: Site, *, eps: float = 1e-5, bias: bool | None = None) -> nn.Module:
    """Subtract the mean over channels and divide by the standard deviation; GPT-2's norm.  (..., C) -> (..., C)

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
    eps:  keeps the division finite.
    bias: whether there is one; null follows `model.bias`.
    """
    return LayerNorm(site.width or site.dims.n_embd, eps, site.dims.bias if bias is None else bias)


@norm.register("rmsnorm", source="arXiv:1910.07467")
def rmsnorm(site: Site, *, eps: float = 1e-5, scale: bool = True) -> nn.Module:
    """Divide by the root mean square over channels; no mean is subtracted, no bias added.  (..., C) -> (..., C)

    y = x / sqrt(mean(x^2) + eps) * weight.
    eps:   keeps the division finite.
    scale: whether there is a weight.
    """
    return RMSNorm(site.width or site.dims.n_embd, eps, scale)
