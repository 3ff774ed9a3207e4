"""GPT-2's initial weights: the documented moments of every tensor, in ours and in Hugging Face's, and the loss that
follows from them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained.huggingface import from_hf

STD, SIGMAS = 0.02, 5.0


def ours(layers: int, **sizes: int) -> dict[str, Tensor]:
    return dict(build_model(ModelConfig(n_layer=layers, block_size=128, **sizes), seed=1).named_parameters())


def theirs(layers: int, **sizes: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=layers, n_positions=128, bos_token_id=None, eos_token_id=None, **sizes)
    return from_hf(dict(GPT2LMHeadModel(config).named_parameters()))


def expected_std(name: str, layers: int) -> float:
    """0.02 everywhere, residual projections over sqrt(2 L).  Source: Radford et al. 2019, section 2.3."""
    return STD / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else STD


def check_moments(weights: dict[str, Tensor], layers: int) -> None:
    """Mean, standard deviation and kurtosis of each matrix within 5 standard errors of N(0, std); vectors exact."""
    for name, tensor in weights.items():
        values = tensor.detach().double().flatten()
        if tensor.ndim == 1:
            assert values.eq(1.0 if name.endswith("weight") else 0.0).all(), name
            continue
        std, n = expected_std(name, layers), values.numel()
        assert abs(values.mean().item()) < SIGMAS * std / math.sqrt(n), name
        assert abs(values.std().item() / std - 1) < SIGMAS / math.sqrt(2 * n), name
        kurtosis = ((values / std) ** 4).mean().item()
        assert abs(kurtosis - 3) < SIGMAS * math.sqrt(96 / n), name  # Var z^4 = 105 - 9
        assert stats.kstest(values[:: max(1, n // 20_000)].numpy() / std, "norm").pvalue > 1e-6, name


@pytest.mark.parametrize("made", [ours, theirs])
def test_moments_of_every_tensor(made: object) -> None:
    check_moments(made(3, n_head=4, n_embd=96, vocab_size=700), 3)  # type: ignore[operator]


@pytest.mark.parametrize("wrong", ["wpe.weight", "h.2.mlp.c_proj.weight", "h.0.attn.c_attn.weight", "h.1.ln_2.bias"])
def test_a_tensor_that_is_off_by_four_percent_is_found(wrong: str) -> None:
    weights = ours(3, n_head=4, n_embd=96, vocab_size=700)
    with torch.no_grad():
        weights[wrong].mul_(1.04).add_(0.0 if weights[wrong].ndim == 2 else 1e-6)
    with pytest.raises(AssertionError, match=wrong.replace(".", r"\.")):
        check_moments(weights, 3)


@pytest.mark.slow
@pytest.mark.parametrize("made", [ours, theirs])
def test_moments_of_every_tensor_at_124m(made: object) -> None:
    check_moments(made(12, n_head=12, n_embd=768, vocab_size=50257), 12)  # type: ignore[operator]


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_the_loss_at_the_start_follows_from_the_tied_head(std: float) -> None:
    """Logits are normal with variance C std^2, so the loss is ln V + C std^2 / 2, and not ln V."""
    width, vocabulary, rows = 64, 2000, 16
    model = build_model(
        ModelConfig(
            n_layer=2, n_head=2, n_embd=width, block_size=512, vocab_size=vocabulary, init={"name": "gpt2", "std": std}
        ),
        seed=1,
    )
    tokens = torch.randint(0, vocabulary, (rows, 513), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    variance = width * std**2
    own = math.expm1(width * std) / vocabulary  # at most: the stream still resembles its own token's embedding
    error = SIGMAS * math.sqrt(variance / (rows * 512))
    low, high = math.log(vocabulary) + variance / 2 - error, math.log(vocabulary) + variance / 2 + error + own
    assert low < loss < high
    assert low > math.log(vocabulary)  # the law is told apart from ln V


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_at_the_start_at_124m(seed: int) -> None:
    model = build_model(ModelConfig(), seed=seed)
    tokens = torch.randint(0, 50257, (4, 1025), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    print(f"\nloss at the start, seed {seed}: {loss:.4f}")
    assert 10.90 <= loss <= 11.05
