"""What every component can rely on: the model's dimensions, the place where it is built, and roles for parameters.

A factory receives a `Site` and returns a module; during a forward pass modules receive a `Step` (see step.py). No
component asks for another by name: it asks the site to make whatever was chosen for a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """Probability of dropping, after the embedding, on attention weights, and at the end of each branch."""
    mlp_ratio: float = Field(4.0, gt=0.0)
    """Hidden width of an MLP divided by n_embd."""

    @property
    def head_size(self) -> int:
        """Channels per head."""
        return self.n_embd // self.n_head


Kind = Literal["embedding", "position", "hidden", "residual_out", "head", "router", "vector"]


@dataclass(frozen=True)
class Role:
    """What a parameter is for. Init, weight decay, Muon and muP read this, never a name.

    kind:   `embedding`, `position` (tables looked up), `hidden` (a matrix inside a block), `residual_out` (the last
            matrix of a branch, which writes into the stream), `head`, `router`, or `vector` (gains, biases, scalars).
    layer:  the block it belongs to, if any.
    gain:   factor on the standard deviation at init; None leaves it to the init (GPT-2: 1/sqrt(2 L) for residual_out).
    rows:   names and heights of matrices stacked in one tensor, as query, key and value in c_attn.
    active: fraction that works on one token (below 1 for experts).
    """

    kind: Kind
    layer: int | None = None
    gain: float | None = None
    rows: tuple[tuple[str, int], ...] = ()
    active: float = 1.0


@dataclass(frozen=True)
class Param:
    """A parameter with its dotted name and role, as optimizers and inits receive it. rate: factor on its learning rate,
    which `decay_groups` and `build_optimizers` see to."""

    name: str
    tensor: nn.Parameter
    role: Role
    rate: float = 1.0


def mark(tensor: torch.Tensor, role: Role) -> nn.Parameter:
    """`tensor` as a parameter that carries its role; unmarked ones with fewer than two dimensions count as vectors."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    parameter.role = role  # type: ignore[attr-defined]
    return parameter


def params(model: nn.Module) -> list[Param]:
    """Every parameter of `model` once, in order of construction, with its role.

    Raises ValueError for a matrix whose role nobody stated.
    """
    found = []
    for name, tensor in model.named_parameters():
        role = getattr(tensor, "role", Role("vector") if tensor.ndim < 2 else None)
        if role is None:
            raise ValueError(f"{name} {tuple(tensor.shape)} has no role: wrap it as mark(tensor, Role('hidden', ...))")
        found.append(Param(name, tensor, role))
    return found


class Linear(nn.Linear):
    """torch's Linear, left undrawn: the `init` slot fills weights, so building a large model costs nothing twice."""

    def reset_parameters(self) -> None:
        """Zero the bias; the weight stays as allocated until the model is initialised."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class Site:
    """Where a component is being built.

    dims:    the model's sizes.
    choices: slot name -> the pattern of choices, repeated over the layers.
    layer:   index of the block, None outside blocks.
    width:   channels of what is to be normalised; n_embd unless an inner part says otherwise.
    gain:    init gain for the matrices built here (see Role), set by residual schemes that bring their own.
    """

    dims: Dims
    choices: Mapping[str, tuple[Choice, ...]]
    layer: int | None = None
    width: int | None = None
    gain: float | None = None

    def at(self, **changes: Any) -> Site:
        """The same site with some fields changed."""
        return replace(self, **changes)

    def choice(self, slot: str) -> Choice:
        """What was chosen for `slot` in this layer."""
        pattern = self.choices[slot]
        return pattern[(self.layer or 0) % len(pattern)]

    def make(self, slot: str) -> Any:
        """Build what was chosen for a neighbouring slot in this layer."""
        return SLOTS[slot].build(self.choice(slot), self)

    def make_all(self, slot: str) -> list[Any]:
        """Build every part of an ordered list slot."""
        return [SLOTS[slot].build(choice, self) for choice in self.choices[slot]]

    def linear(
        self, n_in: int, n_out: int, kind: Kind = "hidden", *, rows: Mapping[str, int] | None = None, bias: bool = True
    ) -> Linear:
        """A linear map (..., n_in) -> (..., n_out) whose weight (n_out, n_in) has its role; biases as the model has."""
        layer = Linear(n_in, n_out, bias=bias and self.dims.bias)
        mark(layer.weight, Role(kind, self.layer, self.gain, tuple((rows or {}).items())))
        return layer

    def table(self, n_rows: int, n_columns: int, kind: Kind) -> nn.Parameter:
        """A looked-up matrix (n_rows, n_columns) with its role."""
        return mark(torch.empty(n_rows, n_columns), Role(kind, self.layer, self.gain))


def short_cut(part: object, name: str) -> Any:
    """The method `name` of a component if its very class defines it, else None. A short cut says what the component
    computes; an heir that computes something else must not inherit that claim."""
    return getattr(part, name) if name in vars(type(part)) else None
