"""AdamW against torch's own, and the recipe's parameter groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gpt2lab.components.base import Param, Role
from gpt2lab.errors import ConfigError
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers, decay_groups, optimizer
from gpt2lab.registry import SLOTS

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=29)


@pytest.fixture
def forgetful() -> Iterator[str]:
    """An optimizer that leaves out every vector, registered for the time of a test."""

    def matrices_only(params: Sequence[Param], lr: float) -> list[Optimizer]:
        """Updates matrices alone."""
        return [torch.optim.SGD([p.tensor for p in params if p.tensor.ndim > 1], lr=lr)]

    optimizer.register("forgetful", source="test")(matrices_only)
    yield "forgetful"
    del optimizer._components["forgetful"]


def test_defaults_are_the_recipe() -> None:
    config = OptimConfig()
    assert config.optimizer.options == {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert (config.lr, config.grad_clip) == (6e-4, 1.0)
    assert config.schedule.full() == {"name": "cosine", "final_fraction": 0.1}


def test_written_options_are_converted_and_checked() -> None:
    config = OptimConfig.model_validate({"lr": "1e-3", "optimizer": {"name": "adamw", "betas": ["0.8", "0.9"]}})
    assert config.lr == 1e-3
    assert config.optimizer.options["betas"] == (0.8, 0.9)
    for wrong in ({"betas": ["0.9", "1.0"]}, {"eps": "0"}, {"weight_decay": "-1"}, {"beta": "0.9"}):
        with pytest.raises(ValueError, match=r"adamw|fit"):
            OptimConfig.model_validate({"optimizer": {"name": "adamw", **wrong}})


def test_matrices_and_embeddings_decay_and_vectors_do_not() -> None:
    params = build_model(TINY).params()
    table = Param("scales", nn.Parameter(torch.ones(2, 2)), Role("vector"))
    decayed, others = decay_groups([*params, table], 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(p.tensor): p.name for p in [*params, table]}
    assert {names[id(t)] for t in others["params"]} == {"scales"} | {p.name for p in params if p.tensor.ndim == 1}
    assert {"wte.weight", "wpe.weight"} <= {names[id(t)] for t in decayed["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(params) + 1


def test_steps_equal_plain_torch_adamw() -> None:
    config = OptimConfig.model_validate({"lr": 3e-3, "optimizer": {"name": "adamw", "weight_decay": 0.2}})
    model = build_model(TINY, seed=3)
    twin = copy.deepcopy(model)
    ours = build_optimizers(config, model.params())
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.2},
            {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    assert all(group["fused"] for o in ours for group in o.param_groups)
    generator = torch.Generator().manual_seed(0)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
            # Drawn, not the model's: gradients of key biases are rounding noise around zero, which Adam amplifies.
            mine.grad = torch.randn(mine.shape, generator=generator)
            reference.grad = mine.grad.clone()
        for each in (*ours, plain):
            each.step()
    for mine, reference, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-7)
        assert (mine - before).abs().max() > 2e-3


def test_every_group_keeps_its_peak_rate() -> None:
    optimizers = build_optimizers(OptimConfig(lr=2e-3), build_model(TINY).params())
    assert {group["base_lr"] for o in optimizers for group in o.param_groups} == {2e-3}


def test_an_optimizer_that_forgets_parameters_is_refused(forgetful: str) -> None:
    config = OptimConfig.model_validate({"optimizer": forgetful})
    with pytest.raises(ConfigError, match=r"forgetful updates .*bias 0 times"):
        build_optimizers(config, build_model(TINY).params())
    assert forgetful in SLOTS["optimizer"].names()


def stepped(name: str, steps: int, **options: object) -> tuple[Any, Any]:
    """A model after steps by a component, and its twin with the same gradients but the weights from before."""
    config = OptimConfig.model_validate({"lr": 3e-3, "optimizer": {"name": name, **options}})
    model = build_model(TINY, seed=3)
    twin = copy.deepcopy(model)
    ours = build_optimizers(config, model.params())
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(steps):
        drawn = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = drawn[n].clone()
        for one in ours:
            one.step()
        assert all(torch.equal(p.grad, drawn[n]) for n, p in model.named_parameters() if p.grad is not None)
        gradients.append(drawn)
    return (model, gradients), twin


def test_lion_is_algorithm_2_of_its_paper() -> None:
    """By hand, as the paper has it: c = b1 m + (1 - b1) g, w -= rate (sign(c) + decay w), m = b2 m + (1 - b2) g."""
    (model, gradients), twin = stepped("lion", 3, betas=[0.9, 0.99], weight_decay=0.3)
    expected = dict(twin.named_parameters())
    with torch.no_grad():
        for name, weight in expected.items():
            average = torch.zeros_like(weight)
            for drawn in gradients:
                mixed = 0.9 * average + 0.1 * drawn[name]
                decay = 0.3 if weight.ndim >= 2 else 0.0
                weight -= 3e-3 * (torch.sign(mixed) + decay * weight)
                average = 0.99 * average + 0.01 * drawn[name]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-7)


def test_muon_is_torchs_on_matrices_inside_blocks_and_adamw_elsewhere() -> None:
    (model, gradients), twin = stepped("muon", 2, momentum=0.9, weight_decay=0.2)
    named = dict(twin.named_parameters())
    inside = [n for n in named if n.startswith("h.") and named[n].ndim == 2]
    assert len(inside) == 8  # c_attn, c_proj, c_fc, c_proj of two blocks
    theirs = [
        torch.optim.Muon([named[n] for n in inside], lr=3e-3, momentum=0.9, weight_decay=0.2,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for n, p in named.items() if p.ndim >= 2 and n not in inside], "weight_decay": 0.2},
             {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0}],
            lr=3e-3, betas=(0.9, 0.95), eps=1e-8,
        ),
    ]  # fmt: skip
    for drawn in gradients:
        for n, p in named.items():
            p.grad = drawn[n].clone()
        for one in theirs:
            one.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=0, atol=1e-6)
