"""Hooks that no shipped component uses: short components that do, which pass the contract tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab import testing
from gpt2lab.components.base import Builder, Role, parameter
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.objective import CrossEntropyOf
from gpt2lab.registry import SLOTS


class Recurrent(nn.Module):
    """A state per channel in place of attention, decayed by every token; the cache keeps the last state."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        C = builder.dims.n_embd
        self.c_in, self.c_proj = builder.linear(C, 2 * C), builder.linear(C, C, "residual_out")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        keep, new = self.c_in(x).chunk(2, -1)
        state, name = torch.zeros_like(x[:, 0]), f"{ctx.depth}.state"
        if ctx.cache is not None:
            state = ctx.cache.last.get(name, state)
        states = []
        for t in range(x.shape[1]):
            if ctx.documents is not None and t > 0:
                fresh = ctx.documents[:, t] != ctx.documents[:, t - 1]
                state = state.masked_fill(fresh[:, None], 0.0)
            state = torch.sigmoid(keep[:, t]) * state + new[:, t]
            states.append(state)
        if ctx.cache is not None:
            ctx.cache.last[name] = state
        out: Tensor = self.c_proj(torch.stack(states, 1))
        return out


class Untying(nn.Module):
    """A tied head that learns a difference to the table in the second half of the training."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.progress = builder.progress
        self.change = parameter(torch.empty(builder.dims.vocab_size, builder.dims.n_embd), Role("head", gain=0.0))

    def forward(self, rows: Tensor, embedding: Any) -> Tensor:
        logits: Tensor = embedding.unembed(rows)
        return logits + (self.progress.value >= 0.5) * F.linear(rows, self.change)


class WithoutPrefix(nn.Module):
    """Cross entropy without the first tokens of each sequence, in place of cross_entropy."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()

    def from_hidden(self, x: Tensor, targets: Tensor, ctx: ForwardContext, cross_entropy: CrossEntropyOf) -> Tensor:
        return cross_entropy(x, torch.where(ctx.q_positions < 3, -100, targets))


@pytest.fixture(params=[("attention", Recurrent), ("head", Untying), ("objective", WithoutPrefix)], ids=lambda p: p[0])
def case(request: pytest.FixtureRequest, no_plugins_after: None) -> testing.Case:
    slot, factory = request.param
    SLOTS[slot].register("hooked", source="a test")(factory)
    return testing.Case(slot, "hooked")


def test_the_contract_holds(case: testing.Case) -> None:
    problems = {testing.name_of(check): testing.problem_of(check, case) for check in testing.checks_for(case.slot)}
    assert not {name: problem for name, problem in problems.items() if problem}


@pytest.mark.usefixtures("no_plugins_after")
def test_a_head_that_unties_does_so_in_the_middle_of_the_training() -> None:
    SLOTS["head"].register("hooked", source="a test")(Untying)
    model = testing.disturbed(testing.Case("head", "hooked").model())
    tokens, targets = testing.batch()
    trained = []
    for share in (0.4, 0.6):
        model.progress.set(share)
        model.zero_grad()
        model.objective(tokens, targets)[0].backward()
        trained.append(model.get_parameter("lm_head.change").grad.abs().max() > 0)  # type: ignore[union-attr]
    assert trained == [False, True]


@pytest.mark.usefixtures("no_plugins_after")
def test_a_prefix_without_loss_has_none() -> None:
    SLOTS["objective"].register("hooked", source="a test")(WithoutPrefix)
    model = testing.Case("norm", "layernorm").model(objective=["hooked"])
    tokens, targets = testing.batch()
    objective, _ = model.objective(tokens, targets)
    plain = F.cross_entropy(model(tokens)[:, 3:].flatten(0, 1), targets[:, 3:].flatten(), reduction="sum")
    torch.testing.assert_close(objective * targets.numel(), plain)
