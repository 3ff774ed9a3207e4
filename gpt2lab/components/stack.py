"""Parts that connect layers with each other: an ordered list, empty in GPT-2.

Shapes: B batch, T tokens, C channels, H heads, D channels per head, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Slot

stack = Slot("model.stack", "connections between layers", default=[], arity="list")


class CrossLayer(nn.Module):
    """A part without effect; subclasses override what they need. `depth` counts block calls from 0."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.n_layer = builder.dims.n_layer

    def weights_from(self, layer: int) -> int:
        """The layer whose weights `layer` uses."""
        return layer

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the stream in front of the block at `depth`.  (B, T, C) -> (B, T, C)"""
        return x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the stream behind the block at `depth`.  (B, T, C) -> (B, T, C)"""
        return x

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the attention values of the block at `depth`.  (B, H, T, D) -> (B, H, T, D)"""
        return v


def several_layers(dims: Dims, options: dict[str, Any]) -> list[str]:
    """At least two layers are needed."""
    return ["it connects layers, and there is only one: raise model.n_layer"] if dims.n_layer < 2 else []


@stack.register("value_residual", source="arXiv:2410.17897", needs={"attention": "value"}, check=several_layers)
class ValueResidual(CrossLayer):
    """Mix the first layer's attention values into every later layer's.  v (B, H, T, D) -> (B, H, T, D)

    v_l + m_l (v_0 - v_l)   for layers l >= 1, with m_l trained from the initial value `mix`, or fixed

    mix:     initial share of the first layer's values.
    trained: whether m_l is trained, one number for each layer.
    """

    def __init__(self, builder: Builder, *, mix: float = 0.5, trained: bool = True) -> None:
        super().__init__(builder)
        initial = torch.full((self.n_layer - 1,), mix)
        if trained:
            self.mix = nn.Parameter(initial)
        else:
            self.register_buffer("mix", initial, persistent=False)

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        if depth == 0:
            ctx.carry["value_residual"] = v
            return v
        first: Tensor = ctx.carry["value_residual"]
        if first.shape[1] != v.shape[1]:
            raise ConfigError(
                f"value_residual mixes values of equal heads; the first layer has {first.shape[1]} and layer {depth} "
                f"has {v.shape[1]}",
                where="model.attention",
                hint="the same number of key/value heads in all layers",
            )
        return v + self.mix[depth - 1] * (first - v)


@stack.register("unet", source="KellerJordan/modded-nanogpt, record of 2024-11-10 (U-net)", check=several_layers)
class Unet(CrossLayer):
    """Add the output of each early layer to the input of its mirror image.  x (B, T, C) -> (B, T, C)

    layer L-1-i receives x + w_i out_i   for i < L/2 (rounded down), with trained w_i that start at 1
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.pairs = self.n_layer // 2
        self.weight = nn.Parameter(torch.ones(self.pairs))

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        mirror = self.n_layer - 1 - depth
        return x + self.weight[mirror] * ctx.carry[f"unet.{mirror}"] if mirror < self.pairs else x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if depth < self.pairs:
            ctx.carry[f"unet.{depth}"] = x
        return x


@stack.register("shared_layers", source="arXiv:1909.11942")
class SharedLayers(CrossLayer):
    """Use the first layer's weights in every layer, as ALBERT does.

    block_l = block_0   for all l; depth and compute stay, parameters of one layer remain.
    """

    def weights_from(self, layer: int) -> int:
        return 0
