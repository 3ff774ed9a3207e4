"""Optimizers against torch's own, a library's and the formulas of their papers, and the recipe's parameter groups."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytorch_optimizer import NorMuon
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2lab.components.base import Param, Role
from gpt2lab.errors import ConfigError
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers, decay_groups, optimizer
from gpt2lab.optim.optimizers import POLAR_EXPRESS, orthogonal
from gpt2lab.registry import SLOTS

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=29)
RATE = 3e-3


@pytest.fixture
def forgetful(no_plugins_after: None) -> str:
    """An optimizer that leaves out every vector, registered for the time of a test."""

    def matrices_only(params: Sequence[Param], lr: float) -> list[Optimizer]:
        """Updates matrices alone."""
        return [torch.optim.SGD([p.tensor for p in params if p.tensor.ndim > 1], lr=lr)]

    optimizer.register("forgetful", source="test")(matrices_only)
    return "forgetful"


def optimizer_of(weight: nn.Parameter, name: str, lr: float = RATE, rate: float = 1.0, **options: object) -> Any:
    """A component on one matrix. rate: the matrix's factor."""
    config = OptimConfig.model_validate({"lr": lr, "optimizer": {"name": name, **options}})
    (made,) = build_optimizers(config, [Param("w", weight, Role("hidden"), rate=rate)])
    return made


def adamw(params: Sequence[nn.Parameter], decay: float, **options: Any) -> Optimizer:
    """torch's, by the recipe; vectors do not decay."""
    matrices, vectors = ([p for p in params if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, **options)


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
    plain = adamw(list(twin.parameters()), 0.2, foreach=False, fused=False)
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


def test_frozen_parameters_get_no_gradient_and_no_decay() -> None:
    model = build_model(TINY)
    config = OptimConfig(freeze=("wte.*", "h.*.attn.*"))
    optimizers = build_optimizers(config, model.params())
    taken = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        still = name.startswith("wte.") or ".attn." in name
        assert (id(p) in taken, p.requires_grad) == (not still, not still), name
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    model.objective(tokens, tokens)[0].backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


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
    (model, gradients), twin = stepped("muon", 2, momentum=0.9, weight_decay=0.2, split_rows=False)
    named = dict(twin.named_parameters())
    inside = [n for n in named if n.startswith("h.") and named[n].ndim == 2]
    assert len(inside) == 8  # c_attn, c_proj, c_fc, c_proj of two blocks
    theirs = [
        torch.optim.Muon([named[n] for n in inside], lr=3e-3, momentum=0.9, weight_decay=0.2,
                         adjust_lr_fn="match_rms_adamw"),
        adamw([p for n, p in named.items() if n not in inside], 0.2),
    ]  # fmt: skip
    for drawn in gradients:
        for n, p in named.items():
            p.grad = drawn[n].clone()
        for one in theirs:
            one.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=0, atol=1e-6)


Rule = Callable[[Tensor, Tensor, dict[str, Any], int], Tensor]


def against_formula(name: str, rule: Rule, steps: int = 4, shape: tuple[int, ...] = (5, 3), **options: Any) -> None:
    """A component on one matrix at a constant rate beside `rule`: (weight, gradient, memory, step from 1) -> weight."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    expected, memory = weight.detach().clone(), dict[str, Any]()
    made = optimizer_of(weight, name, **options)
    for step in range(1, steps + 1):
        gradient = torch.randn(shape, generator=generator)
        weight.grad = gradient.clone()
        made.step()
        expected = rule(expected, gradient, memory, step)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


def average(memory: dict[str, Any], name: str, value: Tensor, decay: float) -> Tensor:
    memory[name] = decay * memory.get(name, torch.zeros_like(value)) + (1 - decay) * value
    result: Tensor = memory[name]
    return result


def masked(update: Tensor, gradient: Tensor) -> Tensor:
    agree = ((update > 0) & (gradient > 0)) | ((update < 0) & (gradient < 0))
    return update * agree * update.numel() / (agree.sum() + 1)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_by_hand(nesterov: bool) -> None:
    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        g = g + 0.1 * w
        memory["b"] = 0.8 * memory.get("b", 0) + g
        return w - RATE * (g + 0.8 * memory["b"] if nesterov else memory["b"])

    against_formula("sgd", rule, momentum=0.8, nesterov=nesterov, weight_decay=0.1)


def test_adafactor_by_hand() -> None:
    """The first steps of algorithm 4 of the paper: v is R C / mean(R), decayed by 1 - t^-0.8; then its clipping."""

    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        decay = 1 - step**-0.8
        rows = average(memory, "rows", g.square().mean(1, keepdim=True), decay)
        columns = average(memory, "columns", g.square().mean(0, keepdim=True), decay)
        u = g / (rows * columns / rows.mean()).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        return w - 0.1 * RATE * w - RATE * w.square().mean().sqrt() * u

    against_formula("adafactor", rule, steps=3)


def test_adopt_by_hand() -> None:
    """Algorithm 2: v_0 = g_0^2; from t = 1 on, m averages clip(g / max(sqrt(v), eps), t^(1/4)), and v follows."""

    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        w = w * (1 - RATE * 0.1)
        if step == 1:
            memory["v"] = g.square()
            return w
        limit = (step - 1) ** 0.25
        m = average(memory, "m", (g / memory["v"].sqrt().clamp(min=1e-6)).clamp(-limit, limit), 0.9)
        average(memory, "v", g.square(), 0.99)
        return w - RATE * m

    against_formula("adopt", rule, betas=[0.9, 0.99], steps=6)


@pytest.mark.parametrize("horizon", [5, None])
def test_ademamix_by_hand(horizon: int | None) -> None:
    """Algorithm 1 with the schedules of alpha and b3 in its appendix."""

    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        share = 1.0 if horizon is None else min(1.0, step / horizon)
        slow = 0.99 if share == 1 else math.exp(
            math.log(0.9) * math.log(0.99) / ((1 - share) * math.log(0.99) + share * math.log(0.9))
        )  # fmt: skip
        m = average(memory, "m", g, 0.9) / (1 - 0.9**step)
        v = average(memory, "v", g.square(), 0.95) / (1 - 0.95**step)
        s = average(memory, "s", g, slow)
        return w - RATE * ((m + 3 * share * s) / (v.sqrt() + 1e-8) + 0.1 * w)

    against_formula("ademamix", rule, betas=[0.9, 0.95, 0.99], alpha=3, horizon_steps=horizon, steps=7)


def test_cautious_adamw_by_hand() -> None:
    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        m = average(memory, "m", g, 0.9) / (1 - 0.9**step)
        v = average(memory, "v", g.square(), 0.95) / (1 - 0.95**step)
        return w - RATE * (masked(m / (v.sqrt() + 1e-8), g) + 0.1 * w)

    against_formula("adamw_cautious", rule)


def test_cautious_lion_by_hand() -> None:
    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        m = memory.get("m", torch.zeros_like(w))
        average(memory, "m", g, 0.8)
        return w - RATE * (masked((0.5 * m + 0.5 * g).sign(), g) + 0.1 * w)

    against_formula("lion", rule, betas=[0.5, 0.8], weight_decay=0.1, cautious=True)


def test_soap_by_hand() -> None:
    """Adam between the eigenvectors of the averages of g g' and g' g, of which every third step takes a power
    iteration. A square matrix: others have eigenvalues of zero, whose vectors are not unique."""

    def rule(w: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        if step == 1:
            for side, product in (("l", g @ g.T), ("r", g.T @ g)):
                memory["q" + side] = torch.linalg.eigh(average(memory, side, product, 0.9))[1]
            return w
        turn = memory["ql"].T @ g @ memory["qr"]
        m = average(memory, "m", g, 0.8) / (1 - 0.8 ** (step - 1))
        v = average(memory, "v", turn.square(), 0.9) / (1 - 0.9 ** (step - 1))
        u = memory["ql"] @ ((memory["ql"].T @ m @ memory["qr"]) / (v.sqrt() + 1e-8)) @ memory["qr"].T
        w = (w - RATE * u) * (1 - RATE * 0.1)
        for side, product in (("l", g @ g.T), ("r", g.T @ g)):
            average(memory, side, product, 0.9)
        return w

    against_formula("soap", rule, shape=(4, 4), steps=4, betas=[0.8, 0.9], every_steps=50)


def test_the_vocabulary_is_not_rotated_by_soap() -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=29))
    (soap,) = build_optimizers(OptimConfig.model_validate({"optimizer": "soap"}), model.params())
    model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    soap.step()
    sizes = {n: [len(side) for side in soap.state[p]["GG"]] for n, p in model.named_parameters() if p.ndim == 2}
    assert sizes["wte.weight"] == [0, 8]
    assert [32, 8] in sizes.values() and [24, 8] in sizes.values()  # c_fc and c_attn


def test_schedule_free_by_hand() -> None:
    """x is the mean of z weighted by the squared rate; gradients are taken between the two, where decay applies too."""

    def rule(y: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
        z, x = memory.get("z", y), memory.get("x", y)
        v = average(memory, "v", g.square(), 0.95) / (1 - 0.95**step)
        memory["z"] = z - RATE * (g / (v.sqrt() + 1e-8) + 0.1 * y)
        memory["x"] = x + (memory["z"] - x) / step  # at a constant rate all weights are equal
        return 0.1 * memory["z"] + 0.9 * memory["x"]

    against_formula("schedule_free", rule, steps=6)


def test_sam_by_hand() -> None:
    """Three steps on |w|^4 / 4, whose gradient is |w|^2 w; Adam's part is torch's."""
    weight = nn.Parameter(torch.tensor([[3.0, -4.0], [1.0, 2.0]]))
    by_hand = nn.Parameter(weight.detach().clone())
    sam, inner = optimizer_of(weight, "sam", rho=0.5), adamw([by_hand], 0.1)

    def gradient() -> None:
        weight.grad = weight.detach().square().sum() * weight.detach()

    for _ in range(3):
        gradient()
        sam.step(gradient)
        start = by_hand.detach()
        worst = start + 0.5 * start / start.norm()  # the gradient has the direction of w
        by_hand.grad = worst.square().sum() * worst
        inner.step()
        torch.testing.assert_close(weight, by_hand, rtol=0, atol=1e-6)


def test_independent_decay_does_not_depend_on_the_rate() -> None:
    """Without a gradient three steps leave (1 - decay s)^3 of a weight, at every peak rate, with s the multiplier."""
    for lr in (1e-4, 1e-2):
        weight = nn.Parameter(torch.ones(2, 2))
        one = optimizer_of(weight, "adamw_independent", lr, rate=0.25, weight_decay=1e-2)
        for _ in range(3):
            weight.grad = torch.zeros(2, 2)
            one.param_groups[0]["lr"] = 0.5 * one.param_groups[0]["base_lr"]
            one.step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 2), (1 - 0.5e-2) ** 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_stacked_matrices_and_experts_one_by_one(nesterov: bool) -> None:
    """Beside torch's Muon, which gets each of them as a matrix of its own."""
    generator = torch.Generator().manual_seed(0)
    stacked = nn.Parameter(torch.randn(20, 8, generator=generator))
    experts = nn.Parameter(torch.randn(3, 6, 8, generator=generator))
    params = [
        Param("c_attn", stacked, Role("hidden", rows=(("q", 8), ("k", 4), ("v", 8)))),
        Param("experts", experts, Role("hidden")),
    ]
    config = OptimConfig.model_validate({"lr": RATE, "optimizer": {"name": "muon", "nesterov": nesterov}})
    ours = build_optimizers(config, params)
    parts = [nn.Parameter(part.clone()) for part in (*stacked.detach().split([8, 4, 8]), *experts.detach())]
    theirs = torch.optim.Muon(
        parts, lr=RATE, momentum=0.95, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        stacked.grad, experts.grad = (torch.randn(p.shape, generator=generator) for p in (stacked, experts))
        gradients = (*stacked.grad.split([8, 4, 8]), *experts.grad)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient.clone()
        for one in (*ours, theirs):
            one.step()
    for mine, reference in zip((*stacked.split([8, 4, 8]), *experts), parts, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_normed_rows_are_those_of_the_library() -> None:
    start = normal(12, 8)
    mine, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    ours = optimizer_of(mine, "muon", 0.01, normed_rows=True, weight_decay=0.1)
    reference = NorMuon(
        [{"params": [theirs], "use_muon": True}], lr=0.01, update_scale="match_rms", weight_decay=0.1, beta2=0.95
    )
    for step in range(3):
        for weight in (mine, theirs):
            weight.grad = normal(12, 8, seed=step + 1)
        ours.step()
        reference.step()
    assert torch.allclose(mine, theirs, atol=2e-4)  # both orthogonalise in bfloat16
    assert (mine - start).abs().max() > 4e-3


def test_polar_express_steps_end_nearer_to_orthogonal() -> None:
    x = normal(64, 128)
    old, new = (torch.linalg.svdvals(y.float()) for y in (orthogonal(x), orthogonal(x, POLAR_EXPRESS)))
    assert (new - 1).abs().mean() < (old - 1).abs().mean() < 0.2


def test_momentum_grows_and_cautious_decay_spares_weights() -> None:
    weight = nn.Parameter(normal(4, 4))
    options = {"momentum_warmup_steps": 2, "cautious_decay": True, "weight_decay": 1.0, "nesterov": False}
    made = optimizer_of(weight, "muon", 0.1, **options)
    gradients, average = [normal(4, 4, seed=i) for i in range(3)], torch.zeros(4, 4)
    for gradient, momentum in zip(gradients, (0.85, 0.9, 0.95), strict=True):
        average = momentum * average + (1 - momentum) * gradient
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        made.step()
        update = orthogonal(average).float()
        wanted = before - 0.1 * before * (before * update > 0) - 0.1 * 0.4 * update
        assert torch.allclose(weight, wanted, atol=1e-5)


def test_optimizers_of_the_libraries_by_name() -> None:
    start = normal(4, 4)
    for name, settings, kind in (("RAdam", {"betas": ["0.8", "0.9"]}, torch.optim.RAdam), ("Lamb", {}, None)):
        weight, twin = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        made = optimizer_of(weight, "library", 0.1, optimizer=name, settings=settings, weight_decay=0.0)
        assert type(made).__name__ == name
        weight.grad, twin.grad = normal(4, 4, seed=1), normal(4, 4, seed=1)
        made.step()
        if kind is not None:
            kind([twin], lr=0.1, betas=(0.8, 0.9)).step()
            assert torch.equal(weight, twin)
    for wrong in ({"optimizer": "Adam2"}, {"settings": {"beta": "1"}}):
        with pytest.raises(ConfigError, match=r"Adam2|beta"):
            optimizer_of(nn.Parameter(start), "library", **wrong)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError) as caught:
        build_optimizers(OptimConfig.model_validate({"optimizer": "adopt"}), build_model(TINY).params())
    assert "pip install 'gpt2lab[optimizers]'" in caught.value.render()
