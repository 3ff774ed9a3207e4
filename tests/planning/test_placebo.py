"""Assemblies that are written differently and compute the same are recognised, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.config import load_config
from gpt2lab.planning.placebo import same_function
from gpt2lab.registry import SLOTS

PLACEBOS = [
    "model.position=[learned, none]",
    "model.mlp={name: gelu_tanh, ratio: 4}",
    "model.mask={name: sliding_window, window: 128}",  # as long as the context
    "model.embedding=[plain, {name: scaled, factor: 1}]",
    "model.stack=[{name: shared_layers, every: 4}]",
    "model.attention={name: gqa, n_kv_head: 4}",
]
DIFFERENT = [
    "model.mask={name: sliding_window, window: 127}",
    "model.scores={name: plain, softcap: 50}",
    "model.norm={name: layernorm, eps: 1e-6}",
    "model.dropout=0.1",
    "model.init=gpt2_tf",  # the same function of other weights
    "model.init={name: gpt2, std: 0.021}",
    "model.parametrization={name: mup, base_width: 128}",
    "model.residual=parallel",
    "model.residual=scaled_residual",
    "model.objective=[cross_entropy, z_loss]",
    "model.head={name: tied, softcap: 30}",
    "model.linear={name: quantized, bits: 16}",
    "model.linear={name: quantized, warmup: 1.0}",
]


@pytest.mark.parametrize("change", PLACEBOS)
def test_a_placebo_is_recognised(change: str) -> None:
    assert same_function(load_config("nano").model, load_config("nano", [change]).model)


@pytest.mark.parametrize("change", DIFFERENT)
def test_a_change_is_not_taken_for_one(change: str) -> None:
    assert not same_function(load_config("nano").model, load_config("nano", [change]).model)


class Dropped(Module):
    """Leaves out sequences at random while training, each by itself or all of a batch together."""

    def __init__(self, builder: Builder, *, together: bool = False) -> None:
        super().__init__()
        self.together = together

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        kept = torch.rand(1 if self.together else len(x), 1, 1) < 0.5
        return x * kept if self.training else x


@pytest.mark.usefixtures("no_plugins_after")
def test_parts_that_draw_for_each_sequence_or_for_the_batch_differ() -> None:
    SLOTS["embedding"].register("dropped", source="a test")(Dropped)
    each, together = (load_config("nano", [f"model.embedding=[plain, {{name: dropped, together: {together}}}]"]).model
                      for together in ("false", "true"))  # fmt: skip
    assert not same_function(each, together)
    assert same_function(each, each)


def test_document_masks_differ_although_separators_are_rare() -> None:
    model = load_config("gpt2-124m", ["model.n_layer=1", "model.block_size=64", "evaluation.context_tokens=4096"]).model
    masked = load_config(
        "gpt2-124m",
        ["model.n_layer=1", "model.block_size=64", "evaluation.context_tokens=4096", "model.mask=documents"],
    ).model
    assert not same_function(model, masked)
