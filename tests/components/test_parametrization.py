"""muP: equal to the standard parametrisation at its base width; std, rates, decay and factors by role at others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers, optimizer
from gpt2lab.pretrained.huggingface import misfits
from gpt2lab.testing.cases import Case
from gpt2lab.testing.checks import check_rates

BASE, VOCABULARY = 32, 101


def mup(**options: Any) -> dict[str, Any]:
    return {"name": "mup", "base_width": BASE, **options}


def sizes(width: int, **parts: Any) -> ModelConfig:
    fixed = {"n_layer": 2, "n_head": width // 16, "n_embd": width, "block_size": 24, "vocab_size": VOCABULARY}
    return ModelConfig(**{**fixed, **parts})


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (4, 25), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def trained(model: GPT, steps: int = 3) -> list[float]:
    """Losses of AdamW's first steps, which the model has behind it afterwards."""
    optimizers, losses = build_optimizers(OptimConfig(lr=3e-3), model.params()), []
    for _ in range(steps):
        loss, _ = model.objective(*batch())
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for each in optimizers:
            each.step()
    return losses


@pytest.fixture
def one_group(no_plugins_after: None) -> str:
    """An optimizer that puts everything into one group, registered for the time of a test."""

    def everything(params: Sequence[Param], lr: float) -> list[Optimizer]:
        """Adam for all alike."""
        return [torch.optim.Adam([p.tensor for p in params], lr=lr)]

    optimizer.register("one_group", source="test")(everything)
    return "one_group"


@pytest.mark.parametrize("parts", [{}, {"head": "untied", "mlp": "moe", "scores": {"name": "plain", "scale": 0.3}}])
def test_at_the_base_width_it_is_the_standard_parametrisation_to_the_bit(parts: dict[str, Any]) -> None:
    standard = build_model(sizes(BASE, **parts), seed=3)
    ours = build_model(sizes(BASE, parametrization=mup(base_head=16), **parts), seed=3)
    assert trained(ours) == trained(standard)
    for (name, mine), theirs in zip(ours.named_parameters(), standard.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("width", [16, 64, 256])
def test_what_is_drawn_by_kind_and_width(width: int) -> None:
    """The same random numbers, so ratios are exact: 1/sqrt(m) in blocks, 1/m of routers, 1 elsewhere."""
    m = width / BASE
    parts = {"mlp": "moe", "head": "untied"}
    standard, ours = (build_model(sizes(width, parametrization=p, **parts)) for p in ("standard", mup()))
    expected = {"hidden": m**-0.5, "residual_out": m**-0.5, "router": 1 / m}
    seen = set()
    for mine, theirs in zip(ours.params(), standard.params(), strict=True):
        torch.testing.assert_close(mine.tensor, theirs.tensor * expected.get(mine.role.kind, 1.0))
        assert mine.rate == (1 / m if mine.role.kind in expected else 1.0), mine.name
        assert theirs.rate == 1.0
        seen.add(mine.role.kind)
    assert seen == {"embedding", "position", "head", "vector", *expected}
    depth = 1 / math.sqrt(2 * 2)
    assert ours.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02 * m**-0.5, rel=0.1)
    assert ours.h[1].attn.c_proj.weight.std().item() == pytest.approx(0.02 * depth * m**-0.5, rel=0.1)
    assert ours.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_rates_and_decay_of_every_group() -> None:
    """A step takes the same share off every matrix: rate times decay is one number."""
    model = build_model(sizes(4 * BASE, parametrization=mup()))
    config = OptimConfig.model_validate({"lr": 8e-3, "optimizer": {"name": "adamw", "weight_decay": 0.1}})
    (built,) = build_optimizers(config, model.params())
    found = {
        id(tensor): (group["lr"], group["base_lr"], group["weight_decay"])
        for group in built.param_groups
        for tensor in group["params"]
    }
    for param in model.params():
        lr, base_lr, decay = found[id(param.tensor)]
        matrix = param.role.kind in ("hidden", "residual_out")
        assert lr == base_lr == pytest.approx(2e-3 if matrix else 8e-3), param.name
        assert decay == (0.0 if param.role.kind == "vector" else pytest.approx(0.4 if matrix else 0.1)), param.name


def test_adams_first_step_moves_each_kind_by_its_rate() -> None:
    """Measured on the weights: without decay Adam's first step moves every weight by its rate."""
    model = build_model(sizes(4 * BASE, parametrization=mup(), bias=False))
    before = {p.name: p.tensor.detach().clone() for p in model.params()}
    config = OptimConfig.model_validate(
        {"lr": 8e-3, "optimizer": {"name": "adamw", "weight_decay": "0", "eps": "1e-20"}}
    )
    optimizers = build_optimizers(config, model.params())
    model.loss(*batch()).backward()
    for each in optimizers:
        each.step()
    for param in model.params():
        moved = (param.tensor - before[param.name]).abs().max().item()
        assert moved == pytest.approx(2e-3 if param.role.kind in ("hidden", "residual_out") else 8e-3, rel=1e-3)


@pytest.mark.parametrize("head", ["tied", {"name": "untied", "bias": True, "softcap": 5.0}])
def test_logits_are_divided_by_the_ratio_of_widths(head: Any) -> None:
    """By hand: with the weights of one in the other, what the head reads is 1/m of it; softcap and bias come after."""
    m = 4
    plain = build_model(sizes(m * BASE, head=head)).eval()
    ours = build_model(sizes(m * BASE, head=head, parametrization=mup())).eval()
    ours.load_state_dict(plain.state_dict())
    tokens, targets = batch()
    with torch.no_grad():
        rows = plain.hidden(plain.context(tokens)) / m
        expected = plain.lm_head(rows.flatten(0, 1), plain.wte).view(*tokens.shape, -1)
        torch.testing.assert_close(ours(tokens), expected)
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours.loss(tokens, targets), loss)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_heads_that_grow_are_scored_by_one_over_their_size(scale: float | None) -> None:
    """sqrt(base_head)/D on the dot product: what an explicit scale of that size does."""
    D, base_head, width = 64, 16, 4 * BASE
    parts: dict[str, Any] = {"n_head": width // D, "scores": {"name": "plain", "scale": scale}}
    ours = build_model(sizes(width, parametrization=mup(base_head=base_head), **parts)).eval()
    factor = (D**-0.5 if scale is None else scale) * math.sqrt(base_head / D)
    if scale is None:
        assert factor == pytest.approx(math.sqrt(base_head) / D)
    twin = build_model(sizes(width, parametrization=mup(), **parts | {"scores": {"name": "plain", "scale": factor}}))
    twin.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for model in (ours, twin):  # large enough for scores to matter
            model.h[0].attn.c_attn.weight.mul_(20)
        torch.testing.assert_close(ours(batch()[0]), twin.eval()(batch()[0]))
    kept = build_model(sizes(width, parametrization=mup(), **parts)).eval()
    kept.load_state_dict(ours.state_dict())
    assert (kept(batch()[0]) - ours(batch()[0])).abs().max() > 1e-4


def test_an_optimizer_without_rates_of_its_own_is_refused(one_group: str) -> None:
    with pytest.raises(
        ConfigError, match=r"mup needs 'rates' from the optimizer, which one_group does not offer.*adamw"
    ):
        load_config("nano", ["model.parametrization=mup", "optim.optimizer=one_group"])
    load_config("nano", ["optim.optimizer=one_group"])
    config = OptimConfig.model_validate({"optimizer": one_group})
    with pytest.raises(ConfigError, match=r"one_group puts parameters with different rates into one group"):
        build_optimizers(config, build_model(sizes(2 * BASE, parametrization=mup())).params())
    build_optimizers(config, build_model(sizes(BASE, parametrization=mup())).params())


@pytest.mark.usefixtures("no_plugins_after")
def test_an_optimizer_that_offers_rates_and_does_not_keep_them_is_found() -> None:
    def by_gradient(params: Sequence[Param], lr: float) -> list[Optimizer]:
        """Moves as far as the gradient is large."""
        return [torch.optim.SGD([{"params": [p.tensor]} for p in params], lr=lr)]

    def for_all(params: Sequence[Param], lr: float) -> list[Optimizer]:
        """Keeps a rate of its own for each parameter and uses the largest."""
        shared = torch.optim.Adam([{"params": [p.tensor]} for p in params], lr=lr)
        shared.register_step_pre_hook(lambda *_: [group.update(lr=lr) for group in shared.param_groups] and None)
        return [shared]

    for name, made, said in (("by_gradient", by_gradient, "gradients of a tenth"), ("for_all", for_all, "rate says")):
        optimizer.register(name, source="test", can=("rates",))(made)
        with pytest.raises(AssertionError, match=said):
            check_rates(Case("optimizer", name))


def test_options_are_limited_and_weights_do_not_go_where_they_would_mean_something_else() -> None:
    for wrong in ("{name: mup, base_width: 0}", "{name: mup, base_head: 0}", "{name: mup, width: 64}"):
        with pytest.raises(ConfigError, match=r"parametrization"):
            load_config("nano", [f"model.parametrization={wrong}"])
    assert [p.where for p in misfits(sizes(64, parametrization=mup()))] == ["model.parametrization"]
    assert not misfits(sizes(64))
