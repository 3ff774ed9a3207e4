"""AdamW against torch's own, and the recipe's parameter groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

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
