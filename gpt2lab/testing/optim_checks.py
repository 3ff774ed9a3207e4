"""What every optimizer and every schedule must do."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from gpt2lab.model import GPT
from gpt2lab.optim.groups import OptimConfig, build_optimizers
from gpt2lab.registry import SLOTS
from gpt2lab.testing.cases import Case, batch, distance, disturbed


def check_optimizer(case: Case) -> None:
    """Takes every parameter exactly once, lowers the loss, keeps all of its state in the state dict."""
    slot = SLOTS["optimizer"]
    choice = slot.read({"name": case.name, **case.options})

    def start() -> tuple[GPT, list[torch.optim.Optimizer]]:
        model = Case("norm", "layernorm").model().train()
        return model, slot.build(choice, model.params(), 3e-3)

    def advance(model: GPT, optimizers: list[torch.optim.Optimizer], steps: int) -> float:
        tokens, targets = batch()
        for _ in range(steps):
            loss = model.loss(tokens, targets)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        return model.loss(tokens, targets).item()

    model, optimizers = start()
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()), "not every parameter is taken exactly once"
    first = model.loss(*batch()).item()
    advance(model, optimizers, 5)
    twin, others = start()
    twin.load_state_dict(model.state_dict())
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last, resumed = advance(model, optimizers, 5), advance(twin, others, 5)
    assert last < first - 0.1, f"loss went from {first:.3f} to {last:.3f} in ten steps on one batch"
    assert last == resumed, "a restored optimizer continues differently: the state dict misses something"


def check_gradients_untouched(case: Case) -> None:
    """After a step, backward leaves the gradient of its batch and nothing else."""
    slot = SLOTS["optimizer"]
    model = Case("norm", "layernorm").model().train()
    optimizers = slot.build(slot.read({"name": case.name, **case.options}), model.params(), 3e-3)
    parameters = list(model.parameters())
    for seed in range(3):
        wanted = torch.autograd.grad(model.loss(*batch(seed)), parameters)
        model.zero_grad()
        model.loss(*batch(seed)).backward()
        gap = max(distance(p.grad, g) for p, g in zip(parameters, wanted, strict=True) if p.grad is not None)
        assert gap < 1e-6, f"after {seed} steps the gradient of a batch is off by {gap:.1e}: something was added to it"
        for optimizer in optimizers:
            optimizer.step()


def check_rates(case: Case) -> None:
    """Where it offers `rates`: a parameter with a factor on its rate moves by that factor as far as without, and how
    far does not follow the size of gradients."""
    if "rates" not in SLOTS["optimizer"][case.name].can:
        return

    def moves(factor: float, loss_factor: float) -> dict[tuple[str, str], float]:
        model = disturbed(Case("norm", "layernorm").model().train())
        params = [replace(p, rate=factor if p.role.kind == "hidden" else 1.0) for p in model.params()]
        config = OptimConfig.model_validate({"lr": 1e-3, "optimizer": {"name": case.name, **case.options}})
        optimizers = build_optimizers(config, params)
        before = [p.tensor.detach().clone() for p in params]
        (loss_factor * model.loss(*batch())).backward()
        for optimizer in optimizers:
            optimizer.step()
        moved = zip(params, before, strict=True)
        kinds = ("hidden", "residual_out")
        return {(p.name, p.role.kind): distance(p.tensor, start) for p, start in moved if p.role.kind in kinds}

    plain, slow, small = moves(1.0, 1.0), moves(0.25, 1.0), moves(1.0, 0.1)
    for (name, kind), moved in plain.items():
        expected = moved * (0.25 if kind == "hidden" else 1.0)
        slower, smaller = slow[name, kind], small[name, kind] / moved
        assert abs(slower / expected - 1) < 0.05, f"{name} moved {slower:.2e}, its rate says {expected:.2e}"
        assert abs(smaller - 1) < 0.05, f"with gradients of a tenth {name} moves {smaller:.2f} times as far"


def check_schedule(case: Case) -> None:
    """A pure function of the step with values in [0, 1] that rises during warm-up and never ends above its peak."""
    slot = SLOTS["schedule"]
    choice = slot.read({"name": case.name, **case.options})
    for steps, warmup in ((100, 10), (100, 0), (7, 7)):
        multiplier = slot.build(choice, steps, warmup)
        values = [multiplier(step) for step in range(steps)]
        assert all(0 <= v <= 1 for v in values), f"values outside [0, 1]: {min(values)} .. {max(values)}"
        assert values == [multiplier(step) for step in range(steps)], "not a pure function of the step"
        assert values[0] > 0, "the first step learns nothing: its rate is zero"
        assert values[:warmup] == sorted(values[:warmup]), "falls during warm-up"
        assert values[-1] <= max(values), "ends above its peak"
