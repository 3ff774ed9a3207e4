"""Contract checks find components of the model that break a rule, and name the cause."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2lab import testing
from gpt2lab.components.attend import Mask
from gpt2lab.components.attention import GroupedAttention
from gpt2lab.components.base import Builder, Role, parameter
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.mlp import MLP
from gpt2lab.components.position import Position
from gpt2lab.components.stack import CrossLayer
from gpt2lab.registry import SLOTS
from gpt2lab.testing import Case, assemblies, problem_of
from gpt2lab.testing.checks import (
    check_costs,
    check_documents,
    check_no_look_ahead,
    check_promises,
    check_resume_of_model,
    check_seed,
)

Register = Callable[..., Case]


@pytest.fixture
def registered(no_plugins_after: None) -> Register:
    """Registers a component for the time of a test."""

    def register(slot: str, factory: Any, **words: Any) -> Case:
        factory.__doc__ = factory.__doc__ or "A mistake for a test of the checks."
        SLOTS[slot].register("wrong", source="a test", **words)(factory)
        return Case(slot, "wrong")

    return register


class AheadInTraining(CrossLayer):
    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x + torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) if self.training else x


class AheadAtTheEnd(CrossLayer):
    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        return torch.cat([x[:, :-2], x[:, -1:] + x[:, -2:-1], x[:, -1:]], 1)


class HiddenSize(CrossLayer):
    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.size = 1.0

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if self.training:
            self.size = 0.9 * self.size + 0.1 * float(x.detach().abs().mean())
        return torch.cat([x[..., :1] * self.size, x[..., 1:]], -1)


class OwnDice(CrossLayer):
    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x * (1 + 0.1 * random.random()) if self.training else x


class ReadsNumbers(MLP):
    def __init__(self, builder: Builder) -> None:
        super().__init__(builder, torch.relu)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return super().forward(x, ctx) if x.abs().mean().item() > 0 else x


class DrawsItself(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.w = parameter(torch.randn(builder.dims.n_embd, builder.dims.n_embd), Role("residual_out", builder.layer))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x @ self.w


class Misspelt(nn.Module):
    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.c_fc = builder.linear(builder.dims.n_embed, 4)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Dilated(Mask):
    every: int = 2

    def allowed(self, ctx: ForwardContext) -> Tensor:
        q, k = ctx.q_positions[:, None], ctx.k_positions[None]
        return (k <= q) & ((q - k) % self.every == 0)


class Deaf(GroupedAttention):
    """Multi-head attention that does not rotate queries and keys."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder, builder.dims.n_head)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        ctx.enter(ctx.depth, Position())
        return super().forward(x, ctx)


class AheadBesideDocuments(GroupedAttention):
    """Multi-head attention that is wrong where the mask separates documents."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder, builder.dims.n_head)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out: Tensor = super().forward(x, ctx)
        return out if self.mask.separator is None else out.roll(-1, 1)


def dilated(builder: Builder) -> Mask:
    return Dilated()


@pytest.mark.parametrize(
    ("slot", "factory", "check", "problem"),
    [
        ("stack", AheadInTraining, check_no_look_ahead, "the component looks ahead while training: logits of token "),
        ("stack", AheadAtTheEnd, check_no_look_ahead, "looks ahead: logits of token 14 moved by "),
        ("stack", HiddenSize, check_resume_of_model, "stack.0.size changed while training and is not in the state"),
        ("stack", OwnDice, check_resume_of_model, "its random numbers are not from torch's global generator"),
        (
            "mlp",
            ReadsNumbers,
            check_costs,
            r"at test_checks_of_models\.py:\d+: Tensor\.item\(\) cannot be called on meta",
        ),
        ("mlp", DrawsItself, check_seed, "building draws from the global random generator"),
        (
            "mlp",
            Misspelt,
            testing.check_builds,
            r"at test_checks_of_models\.py:\d+: 'ModelConfig' object has no attribute",
        ),
        ("mask", dilated, check_documents, "it crosses documents: the logits of one moved by "),
    ],
)
def test_what_breaks_a_rule_is_found(
    slot: str, factory: Any, check: testing.Check, problem: str, registered: Register
) -> None:
    assert re.search(problem, str(problem_of(check, registered(slot, factory))))


@pytest.mark.parametrize(("word", "choice"), [("rotate", "position=rotary"), ("bias", "position=alibi")])
def test_a_capability_without_effect_is_found(word: str, choice: str, registered: Register) -> None:
    case = registered("attention", Deaf, can=(word,))
    assert problem_of(check_promises, case) == f"offers '{word}', but {choice} changes nothing"


def test_a_fault_beside_one_neighbour_names_it(registered: Register) -> None:
    problem = problem_of(
        assemblies.check_neighbours, registered("attention", AheadBesideDocuments, can=("bias", "rotate"))
    )
    assert problem is not None and problem.startswith("beside mask=documents"), problem
    assert problem.count("=") <= 3, problem


class NoisyEmbedding(nn.Module):
    """Noise while training, by which the loss may rise."""

    def __init__(self, builder: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x + 2 * torch.randn_like(x) if self.training else x


def test_a_part_that_draws_gets_the_same_answer_every_time(registered: Register) -> None:
    case = registered("embedding", NoisyEmbedding)
    row = {"embedding": case}
    answers = []
    for seed in range(3):
        torch.manual_seed(seed)
        answers.append(assemblies.problem_in(row))
    assert len(set(answers)) == 1


def test_what_cannot_be_built_is_reported_once(registered: Register) -> None:
    case = registered("mlp", Misspelt)
    results = testing.run_contract([SLOTS["mlp"]["wrong"]])
    assert [(r.check, r.problem is None) for r in results] == [("documented", True), ("builds", False)]
    assert Path(__file__).name in str(results[1].problem) and results[0].case == case
