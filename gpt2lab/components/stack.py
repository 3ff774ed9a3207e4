"""What reaches across layers: an ordered list of parts, empty in GPT-2, whose effects add up.

Shapes: B batch, T tokens, C channels, H heads, D channels per head, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2lab.components.base import Dims, Site
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

stack = Slot("model.stack", "what reaches across layers", default=[], arity="list")


class Across(nn.Module):
    """A part that does nothing; others override what they need. `depth` counts block calls from 0."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.n_layer = site.dims.n_layer

    def weights_of(self, layer: int) -> int:
        """Which layer's weights this layer uses."""
        return layer

    def before(self, depth: int, x: Tensor, step: Step) -> Tensor:
        """The stream as the block at `depth` receives it.  (B, T, C) -> (B, T, C)"""
        return x

    def after(self, depth: int, x: Tensor, step: Step) -> Tensor:
        """The stream as the block at `depth` hands it on.  (B, T, C) -> (B, T, C)"""
        return x

    def value(self, depth: int, v: Tensor, step: Step) -> Tensor:
        """The attention values of the block at `depth`.  (B, H, T, D) -> (B, H, T, D)"""
        return v


def several_layers(dims: Dims, options: dict[str, Any]) -> list[str]:
    """What joins layers needs two."""
    return ["it joins layers, and there is only one: raise model.n_layer"] if dims.n_layer < 2 else []


@stack.register("value_residual", source="arXiv:2410.17897", needs={"attention": "value"}, check=several_layers)
class ValueResidual(Across):
    """Mix the first layer's attention values into every later layer's.  v (B, H, T, D) -> (B, H, T, D)

    v_l + m_l (v_0 - v_l)   for layers l >= 1, with m_l trained from `mix` on, or fixed

    mix:     share of the first layer's values at the start.
    trained: whether m_l is trained, one number for each layer.
    """

    def __init__(self, site: Site, *, mix: float = 0.5, trained: bool = True) -> None:
        super().__init__(site)
        start = torch.full((self.n_layer - 1,), mix)
        if trained:
            self.mix = nn.Parameter(start)
        else:
            self.register_buffer("mix", start, persistent=False)

    def value(self, depth: int, v: Tensor, step: Step) -> Tensor:
        if depth == 0:
            step.carry["value_residual"] = v
            return v
        first: Tensor = step.carry["value_residual"]
        return v + self.mix[depth - 1] * (first - v)


@stack.register("unet", source="KellerJordan/modded-nanogpt, record of 2024-11-10 (U-net)", check=several_layers)
class Unet(Across):
    """Add the output of each early layer to the input of its mirror image.  x (B, T, C) -> (B, T, C)

    layer L-1-i receives x + w_i out_i   for i < L/2 (rounded down), with trained w_i that start at 1
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.pairs = self.n_layer // 2
        self.weight = nn.Parameter(torch.ones(self.pairs))

    def before(self, depth: int, x: Tensor, step: Step) -> Tensor:
        mirror = self.n_layer - 1 - depth
        return x + self.weight[mirror] * step.carry[f"unet.{mirror}"] if mirror < self.pairs else x

    def after(self, depth: int, x: Tensor, step: Step) -> Tensor:
        if depth < self.pairs:
            step.carry[f"unet.{depth}"] = x
        return x


@stack.register("shared_layers", source="arXiv:1909.11942")
class SharedLayers(Across):
    """Use the first layer's weights in every layer, as ALBERT does.

    block_l = block_0   for all l; depth and compute stay, parameters of one layer remain.
    """

    def weights_of(self, layer: int) -> int:
        return 0
