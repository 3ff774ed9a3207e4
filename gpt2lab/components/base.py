"""What components are built with: the model's sizes, a builder for the parts inside them, and roles of parameters.

A factory receives a `Builder` and returns a module; modules receive a `ForwardContext` (context.py) in a forward pass.
No component names another one: it asks the builder for whatever was chosen for a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from gpt2lab.registry import SLOTS, Choice
from gpt2lab.schema import Settings


class Dims(Settings):
    """The sizes of a GPT-2; the defaults are the 124M model."""

    n_layer: int = Field(12, ge=1)
    """Transformer blocks."""
    n_head: int = Field(12, ge=1)
    """Attention heads in each block."""
    n_embd: int = Field(768, ge=1)
    """Channels of the residual stream."""
    block_size: int = Field(1024, ge=1)
    """Context length in tokens."""
    vocab_size: int = Field(50257, ge=2)
    """Rows of the token embedding."""
    bias: bool = True
    """Whether linear layers and LayerNorms have biases."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability: after the embedding, on attention weights, and at the end of each branch."""
    mlp_ratio: float = Field(4.0, gt=0.0)
    """Hidden width of an MLP divided by n_embd."""

    @property
    def head_size(self) -> int:
        """Channels per head."""
        return self.n_embd // self.n_head


Kind = Literal["embedding", "position", "hidden", "residual_out", "head", "router", "vector"]


@dataclass(frozen=True)
class Role:
    """What a parameter is for. Init, weight decay, Muon and muP use this instead of names.

    kind:   `embedding`, `position` (tables looked up), `hidden` (a matrix inside a block), `residual_out` (the last
            matrix of a branch, which writes into the stream), `head`, `router`, or `vector` (gains, biases, scalars).
    layer:  index of its block, None outside blocks.
    gain:   factor on the standard deviation at init; None leaves it to the init (GPT-2: 1/sqrt(2 L) for residual_out).
    rows:   names and heights of matrices stacked in one tensor, such as query, key and value in c_attn.
    active: fraction used for one token (below 1 for experts).
    """

    kind: Kind
    layer: int | None = None
    gain: float | None = None
    rows: tuple[tuple[str, int], ...] = ()
    active: float = 1.0


@dataclass(frozen=True)
class Param:
    """A parameter with its dotted name and role, as optimizers and inits receive it.

    rate: factor on its learning rate, applied by `decay_groups` and `build_optimizers`.
    """

    name: str
    tensor: nn.Parameter
    role: Role
    rate: float = 1.0


def parameter(tensor: torch.Tensor, role: Role) -> nn.Parameter:
    """`tensor` as a parameter with a role. Parameters without one count as vectors if they have fewer than two
    dimensions."""
    made = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    made.role = role  # type: ignore[attr-defined]
    return made


def params(model: nn.Module) -> list[Param]:
    """Every parameter of `model` once, in order of construction, with its role.

    Raises ValueError for a matrix without a role.
    """
    listed = []
    for name, tensor in model.named_parameters():
        role = getattr(tensor, "role", Role("vector") if tensor.ndim < 2 else None)
        if role is None:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has no role: wrap it as parameter(tensor, Role('hidden', ...))"
            )
        listed.append(Param(name, tensor, role))
    return listed


class Linear(nn.Linear):
    """torch's Linear without initial weights: the `init` slot draws them, so they are not drawn twice."""

    def reset_parameters(self) -> None:
        """Zero the bias; the weight is uninitialised memory until the model is initialised."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Progress(nn.Module):
    """The share of the training that is done, from 0 to 1, as a tensor on the model's device, so that compiled code
    need not change with it. It is 1 outside training. All parts of a model share one."""

    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()), persistent=False)

    def set(self, share: float) -> None:
        """Write the share."""
        with torch.no_grad():
            self.value.fill_(share)


@dataclass(frozen=True)
class Builder:
    """Builds the parts of a model at one place in it.

    dims:    the model's sizes.
    choices: slot name -> the pattern of choices, repeated over the layers.
    layer:   index of the block, None outside blocks.
    width:   channels of the input of a norm, where it is not n_embd; of queries and keys, where they are not head_size.
    gain:    init gain of the matrices built here (see Role), set by residual schemes that define one.
    progress: share of the training done, for parts that do not receive a ForwardContext; `ctx.progress` for others.
    """

    dims: Dims
    choices: Mapping[str, tuple[Choice, ...]]
    layer: int | None = None
    width: int | None = None
    gain: float | None = None
    progress: Progress = field(default_factory=Progress)

    def at(self, **changes: Any) -> Builder:
        """The same builder with some fields changed."""
        return replace(self, **changes)

    def choice(self, slot: str) -> Choice:
        """The choice for `slot` in this layer."""
        pattern = self.choices[slot]
        return pattern[(self.layer or 0) % len(pattern)]

    def build(self, slot: str) -> Any:
        """Build the component chosen for `slot` in this layer."""
        return SLOTS[slot].build(self.choice(slot), self)

    def build_all(self, slot: str) -> list[Any]:
        """Build every part of a slot that holds an ordered list."""
        return [SLOTS[slot].build(choice, self) for choice in self.choices[slot]]

    def linear(
        self, n_in: int, n_out: int, kind: Kind = "hidden", *, rows: Mapping[str, int] | None = None, bias: bool = True
    ) -> Linear:
        """A linear map (..., n_in) -> (..., n_out) whose weight (n_out, n_in) has a role; with a bias if the model has
        biases. In blocks it is the component chosen for the slot `linear`, except for routers and heads."""
        bias = bias and self.dims.bias
        if self.layer is None or kind not in ("hidden", "residual_out") or "linear" not in self.choices:
            layer = Linear(n_in, n_out, bias=bias)
        else:
            choice = self.choice("linear")
            layer = SLOTS["linear"][choice.name].factory(self, n_in, n_out, bias, **choice.options)
        parameter(layer.weight, Role(kind, self.layer, self.gain, tuple((rows or {}).items())))
        return layer

    def table(self, n_rows: int, n_columns: int, kind: Kind) -> nn.Parameter:
        """A lookup table (n_rows, n_columns) with a role."""
        return parameter(torch.empty(n_rows, n_columns), Role(kind, self.layer, self.gain))


def own_method(part: object, name: str) -> Any:
    """The method `name` of a component if its own class defines it, else None. Such a method is a shortcut for what
    `forward` computes, and a subclass with another `forward` must not inherit it."""
    return getattr(part, name) if name in vars(type(part)) else None
