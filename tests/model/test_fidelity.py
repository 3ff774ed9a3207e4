"""The default assembly is GPT-2: same numbers as Hugging Face's, same size and cost as published."""

from __future__ import annotations

import math

import pytest
import torch
from their_gpt2 import their_model
from transformers import GPT2LMHeadModel

from gpt2lab.config import load_config
from gpt2lab.inspection.costs import costs
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained import huggingface

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 2, 768, 12, 64, 50257


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    return their_model(spread=0.0, **sizes)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_gradients_equal_hugging_face(theirs: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    ours = huggingface.load_gpt2(theirs)
    out = theirs(tokens, labels=tokens)  # shifts labels itself
    assert (ours(tokens) - out.logits).abs().max() < 1e-5
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    loss = ours.loss(tokens, targets)
    assert abs(loss.item() - out.loss.item()) < 1e-5
    theirs.zero_grad()
    out.loss.backward()
    loss.backward()
    reference = huggingface.from_hf({name: p.grad for name, p in theirs.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == reference.keys()
    worst = {name: (gradients[name] - reference[name]).abs().max().item() for name in gradients}
    assert max(worst.values()) < 1e-5, worst


def test_names_are_hugging_faces(theirs: GPT2LMHeadModel) -> None:
    config = ModelConfig(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, block_size=CONTEXT, vocab_size=VOCABULARY)
    with torch.device("meta"):
        from gpt2lab.model import GPT

        names = {f"transformer.{name}" for name, _ in GPT(config).named_parameters()}
    assert names == {name for name, _ in theirs.named_parameters()}


# Radford et al. 2019 (with the tied head counted once); FLOPs per token 6 N + 12 L d T with N the matmul weights
@pytest.mark.parametrize(
    ("preset", "sizes", "parameters", "megaflop"),
    [
        ("gpt2-124m", (12, 12, 768), 124_439_808, 854.4),
        ("gpt2-355m", (24, 16, 1024), 354_823_168, 2_422.7),
        ("gpt2-774m", (36, 20, 1280), 774_030_080, 5_198.9),
        ("gpt2-1558m", (48, 25, 1600), 1_557_611_200, 10_273.5),
    ],
)
def test_published_sizes_and_flops(preset: str, sizes: tuple[int, int, int], parameters: int, megaflop: float) -> None:
    layers, heads, width = sizes
    config = ModelConfig(n_layer=layers, n_head=heads, n_embd=width)
    assert load_config(preset).model == config
    found = costs(config)
    matmul_weights = 12 * layers * width**2 + 50257 * width
    assert found.parameters == found.active_parameters == parameters
    assert found.flops_per_token == 6 * matmul_weights + 12 * layers * width * 1024
    assert round(found.flops_per_token / 1e6, 1) == megaflop


def test_variants_of_the_124m_have_the_published_sizes() -> None:
    assert costs(ModelConfig(bias=False)).parameters == 124_337_664
    assert costs(ModelConfig(head="untied")).parameters == 124_439_808 + 38_597_376


def test_an_objective_of_hidden_rows_alone_is_counted() -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
    both = costs(ModelConfig(**sizes, objective=[{"name": "cross_entropy"}, {"name": "multi_token"}]))
    assert costs(ModelConfig(**sizes, objective=[{"name": "multi_token"}])).parameters == both.parameters
    assert 0 < costs(ModelConfig(**sizes, objective=[{"name": "multi_token"}])).flops_per_token < both.flops_per_token


def test_experts_count_by_the_share_that_works() -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
    dense, sparse = (
        costs(ModelConfig(**sizes)),
        costs(ModelConfig(**sizes, mlp={"name": "moe", "experts": 4, "top_k": 1})),
    )
    matrices = 2 * 2 * 32 * 128  # per layer two matrices of C x 4C
    assert sparse.parameters - sparse.active_parameters == 3 * matrices
    router = 6 * 2 * 32 * 4
    assert sparse.flops_per_token == dense.flops_per_token + router


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        # layers make no difference to these
        ({"head": {"name": "untied", "zero_init": True}, "n_layer": 1}, math.log(50257) - 1e-3, math.log(50257) + 1e-3),
        ({"init": "zero_projections", "n_layer": 1}, 11.40, 11.70),
    ],
)
def test_loss_at_initialisation_at_124m(changes: dict[str, object], low: float, high: float) -> None:
    # a stream that starts as the bare embedding predicts its own token
    model = build_model(ModelConfig(**changes), seed=1)  # type: ignore[arg-type]
    tokens = torch.randint(0, 50257, (2, 129), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert low <= model.loss(tokens[:, :-1], tokens[:, 1:]).item() <= high
