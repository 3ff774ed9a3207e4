"""What every optimizer, average and schedule must do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpt2lab.optim.groups import OptimConfig, build_averaging, build_optimizers
from gpt2lab.registry import SLOTS
from gpt2lab.testing.cases import Case, batch, distance, disturbed
from gpt2lab.training.checkpoints import join_tree, split_tree
from gpt2lab.training.state import TrainState, step_of

RATES = (3e-3, 0.1)
"""Rates to try: not every optimizer takes steps of Adam's size."""


def training(case: Case, lr: float = RATES[0]) -> TrainState:
    """A tiny GPT-2 in training with this optimizer or average."""
    model = Case("norm", "layernorm").model().train()
    config = OptimConfig.model_validate({"lr": lr, case.slot: case.choice()})
    optimizers = build_optimizers(config, model.params())
    return TrainState(model, optimizers, averaging=build_averaging(config, model.params(), steps=8))


def advance(state: TrainState, steps: int, generator_seed: int = 0) -> float:
    """Train on one batch; -> its loss afterwards."""
    model: Any = state.model
    tokens, targets = batch()
    for _ in range(steps):
        gradients(model)
        torch.manual_seed(generator_seed)
        for optimizer in state.optimizers:
            step_of(optimizer, lambda: gradients(model))
        state.step += 1
        if state.averaging is not None:
            state.averaging.update(state.step)
    loss: Tensor = model.loss(tokens, targets)
    return loss.item()


def gradients(model: Any, seed: int = 1, factor: float = 1.0) -> Tensor:
    """Replace the gradients by those of a batch's loss times a factor, and return it."""
    model.zero_grad()
    loss: Tensor = factor * model.loss(*batch(seed))
    loss.backward()
    return loss


def gap(one: TrainState, other: TrainState, part: str = "model") -> float:
    """The largest difference between weights, of those that are evaluated, or those in training (`trained`)."""
    first, second = (state.state_dict() for state in (one, other))
    before, after = first.get(part, first["model"]), second.get(part, second["model"])
    return max(distance(before[name], after[name]) for name in before)


def check_optimizer(case: Case) -> None:
    """Takes every parameter exactly once, and lowers the loss."""
    state = training(case)
    taken = [id(p) for o in state.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in state.model.parameters()), "not every parameter is taken exactly once"
    first, reached = advance(state, 0), [advance(training(case, lr), 10) for lr in RATES]
    losses = " and ".join(f"{loss:.3f} at rate {lr}" for loss, lr in zip(reached, RATES, strict=True))
    assert min(reached) < first - 0.1, f"loss went from {first:.3f} to {losses} in ten steps on one batch"


def check_resume(case: Case) -> None:
    """Continues exactly from what a checkpoint holds, without pickle, and whether or not it was evaluated."""
    whole, resumed = training(case), training(case)
    advance(whole, 4)
    with whole.evaluated():
        pass
    plain, tensors = split_tree(whole.state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed.load_state_dict(join_tree(json.loads(json.dumps(plain)), copies))
    reference = training(case)
    advance(reference, 8)
    advance(whole, 4)
    advance(resumed, 4)
    assert gap(reference, whole, "trained") == 0.0, "an evaluation in between changes the training"
    for part in ("trained", "model"):
        assert gap(whole, resumed, part) == 0.0, (
            "a restored optimizer continues differently: its state misses something"
        )


def check_same_on_all_ranks(case: Case) -> None:
    """Equal gradients give equal weights, whatever the state of the global generator, which differs between ranks."""
    one, other = training(case), training(case)
    advance(one, 3, generator_seed=1)
    before = torch.get_rng_state()
    advance(other, 3, generator_seed=2)
    apart = gap(one, other, "trained")
    assert apart == 0.0, f"draws from the global generator, so ranks drift apart (by {apart:.1e} in three steps)"
    torch.set_rng_state(before)


def check_average(case: Case) -> None:
    """An average leaves the training alone, and lies between the weights that it averages."""
    plain, averaged = training(Case("averaging", "none")), training(case)
    low, high = (dict[str, Tensor]() for _ in range(2))
    for _ in range(8):
        advance(plain, 1)
        advance(averaged, 1)
        for name, tensor in plain.model.named_parameters():
            low[name] = torch.minimum(low.get(name, tensor), tensor).detach().clone()
            high[name] = torch.maximum(high.get(name, tensor), tensor).detach().clone()
    assert gap(plain, averaged, "trained") == 0.0, "the training is another one with the average"
    with averaged.evaluated():
        for name, tensor in averaged.model.named_parameters():
            outside = torch.maximum(low[name] - tensor, tensor - high[name]).max().item()
            assert outside < 1e-6, f"{name} is {outside:.1e} outside of the values that it had"


def check_gradients_untouched(case: Case) -> None:
    """After a step, backward leaves the gradient of its batch and nothing else."""
    state = training(case)
    model: Any = state.model
    parameters = list(model.parameters())
    for seed in range(3):
        wanted = torch.autograd.grad(model.loss(*batch(seed)), parameters)
        gradients(model, seed)
        off = max(distance(p.grad, g) for p, g in zip(parameters, wanted, strict=True) if p.grad is not None)
        assert off < 1e-6, f"after {seed} steps the gradient of a batch is off by {off:.1e}: something was added to it"
        for optimizer in state.optimizers:
            step_of(optimizer, lambda seed=seed: gradients(model, seed))  # type: ignore[misc]


def check_rates(case: Case) -> None:
    """Where it offers `rates`: a parameter with a factor on its rate moves by that factor as far as without, and how
    far does not follow the size of gradients."""
    if "rates" not in SLOTS["optimizer"][case.name].can:
        return

    component, lr = SLOTS["optimizer"][case.name], 1e-3
    # decay does not follow the factor, and would hide small first steps
    plain_steps = {"weight_decay": 0.0} if "weight_decay" in component.parameters else {}
    choice = {"name": case.name, **case.options, **plain_steps}

    def moves(factor: float, loss_factor: float) -> dict[tuple[str, str], float]:
        model = disturbed(Case("norm", "layernorm").model().train())
        params = [replace(p, rate=factor if p.role.kind == "hidden" else 1.0) for p in model.params()]
        config = OptimConfig.model_validate({"lr": lr, "optimizer": choice})
        optimizers = build_optimizers(config, params)
        before = [p.tensor.detach().clone() for p in params]
        kinds = ("hidden", "residual_out")
        inside = [(p, start) for p, start in zip(params, before, strict=True) if p.role.kind in kinds]
        gradients(model, factor=loss_factor)
        for _ in range(2):  # the first step of some only initialises averages
            for optimizer in optimizers:
                step_of(optimizer, lambda: gradients(model, factor=loss_factor))
            if any(distance(p.tensor, start) for p, start in inside):
                break
        return {(p.name, p.role.kind): distance(p.tensor, start) for p, start in inside}

    plain, slow, small = moves(1.0, 1.0), moves(0.25, 1.0), moves(1.0, 0.1)
    for (name, kind), moved in plain.items():
        expected = moved * (0.25 if kind == "hidden" else 1.0)
        slower, smaller = slow[name, kind], small[name, kind] / moved
        assert abs(slower / expected - 1) < 0.05, f"{name} moved {slower:.2e}, its rate says {expected:.2e}"
        assert abs(smaller - 1) < 0.05, f"with gradients of a tenth {name} moves {smaller:.2f} times as far"


def check_schedule(case: Case) -> None:
    """A pure function of the step with values in [0, 1] that rises during warm-up and never ends above its peak."""
    for steps, warmup in ((100, 10), (100, 0), (7, 7)):
        multiplier = SLOTS["schedule"].build(case.choice(), steps, warmup)
        values = [multiplier(step) for step in range(steps)]
        assert all(0 <= v <= 1 for v in values), f"values outside [0, 1]: {min(values)} .. {max(values)}"
        assert values == [multiplier(step) for step in range(steps)], "not a pure function of the step"
        assert values[0] > 0, "the first step learns nothing: its rate is zero"
        assert values[:warmup] == sorted(values[:warmup]), "falls during warm-up"
        assert values[-1] <= max(values), "ends above its peak"
