"""Generation gives what transformers' own gives, sample by sample, within the context and past it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from carried import CONTEXT, PROMPTS, VOCABULARY, continued, ours, theirs

from gpt2lab.errors import ConfigError
from gpt2lab.generation import Reader, Sampling, generate
from gpt2lab.model import GPT, ModelConfig, build_model

GREEDY = Sampling(temperature=0, max_new_tokens=20)


def expected(prompts: list[list[int]], **how: Any) -> list[list[int]]:
    """By transformers."""
    tokens = torch.tensor(prompts)
    out = theirs().generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **how)
    return [row[len(prompts[0]) :].tolist() for row in out]


def naive(model: GPT, prompt: list[int], new_tokens: int, limit: int | None = None) -> list[int]:
    """Greedy, by reading the whole context for each token; cropped to its newest `limit // 2` whenever it is full."""
    tokens, first = list(prompt), max(0, len(prompt) - limit) if limit else 0
    for _ in range(new_tokens):
        if limit and len(tokens) - first > limit:
            first = len(tokens) - limit // 2
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens[first:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(penalty: float) -> None:
    found = continued(ours(), PROMPTS, GREEDY.model_copy(update={"repetition_penalty": penalty}))
    assert found == expected(PROMPTS, max_new_tokens=20, repetition_penalty=penalty)
    assert len({tuple(row) for row in found}) == 3 and len(set(found[0])) > 5, "the weights should say something"
    assert (found == continued(ours(), PROMPTS, GREEDY)) == (penalty == 1)


def test_stop_tokens_end_a_sample_as_in_transformers() -> None:
    whole = continued(ours(), PROMPTS, GREEDY)
    stop = whole[0][7]
    found = continued(ours(), PROMPTS, GREEDY.model_copy(update={"stop_tokens": (stop,)}))
    assert found[0] == whole[0][: whole[0].index(stop) + 1]
    rows = expected(PROMPTS, max_new_tokens=20, eos_token_id=stop)
    assert all(row[: len(mine)] == mine and set(row[len(mine) :]) <= {0} for row, mine in zip(rows, found, strict=True))


def test_a_caller_can_end_a_sample() -> None:
    found = continued(ours(), PROMPTS, GREEDY, ended=lambda sample, token: sample == 1)
    whole = continued(ours(), PROMPTS, GREEDY)
    assert found == [whole[0], whole[1][:1], whole[2]]
    assert continued(ours(), PROMPTS, GREEDY, ended=lambda sample, token: True) == [row[:1] for row in whole]


def test_prompts_of_different_length_do_not_touch_each_other() -> None:
    prompts = [PROMPTS[0], PROMPTS[1][:2], PROMPTS[2], PROMPTS[0] + PROMPTS[1]]
    together = continued(ours(), prompts, GREEDY)
    assert together == [continued(ours(), [prompt], GREEDY)[0] for prompt in prompts]


def test_a_sample_does_not_depend_on_how_many_are_drawn() -> None:
    settings = Sampling(max_new_tokens=20, temperature=1.2, top_k=50, seed=3)
    five = continued(ours(), [PROMPTS[0]] * 5, settings)
    assert five[:2] == continued(ours(), [PROMPTS[0]] * 2, settings)
    assert five == continued(ours(), [PROMPTS[0]] * 5, settings)
    assert len({tuple(row) for row in five}) == 5
    assert five != continued(ours(), [PROMPTS[0]] * 5, settings.model_copy(update={"seed": 4}))


def test_drawing_touches_no_global_random_state() -> None:
    before = torch.get_rng_state()
    continued(ours(), PROMPTS, Sampling(max_new_tokens=3))
    assert torch.equal(before, torch.get_rng_state())


def test_one_reader_serves_many_and_the_model_is_left_alone() -> None:
    model = build_model(ours().config, seed=1).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reader = Reader(model, rows=3)
    first = continued(reader, PROMPTS, GREEDY)
    assert continued(reader, PROMPTS, GREEDY) == first
    assert model.training and not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    shared = {id(p) for p in model.parameters()} == {id(p) for p in reader.model.parameters()}
    assert shared, "the twin has parameters of its own"
    model.loss(torch.tensor(PROMPTS)[:, :-1], torch.tensor(PROMPTS)[:, 1:]).backward()  # no inference tensors in it


def test_a_generator_leaves_the_callers_mode_alone() -> None:
    for _ in generate(Reader(ours()), PROMPTS, GREEDY):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        break


def test_ids_beyond_the_tokenizers_are_never_drawn() -> None:
    settings = Sampling(max_new_tokens=25, temperature=3.0)
    found = continued(ours(), [PROMPTS[0]] * 8, settings, vocab_size=40)
    ids = set(itertools.chain.from_iterable(found))
    assert max(ids) < 40 and len(ids) > 25


def test_text_that_does_not_fit_is_refused_before_the_first_token() -> None:
    settings = Sampling(temperature=0, max_new_tokens=CONTEXT)
    with pytest.raises(ConfigError, match="5 tokens of prompt and 32 new ones do not fit") as caught:
        generate(Reader(ours()), PROMPTS, settings)
    assert "--max-new-tokens 28" in str(caught.value.hint)
    fits = settings.model_copy(update={"max_new_tokens": 28})
    assert continued(ours(), PROMPTS, fits) == expected(PROMPTS, max_new_tokens=28)
    with pytest.raises(ConfigError) as caught:
        generate(Reader(ours()), [[1] * 33], GREEDY)
    assert "a prompt of at most 32 tokens" in str(caught.value.hint)


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[0] * 9])
def test_a_sliding_window_reads_the_newest_half_again(prompt: list[int]) -> None:
    settings = Sampling(temperature=0, max_new_tokens=60)
    assert continued(ours(), [prompt], settings, slide=True) == [naive(ours(), prompt, 60, CONTEXT)]


@pytest.mark.parametrize("position", ["rotary", "alibi", "t5_bias", "sinusoidal", "none"])
def test_schemes_without_an_end_go_past_the_training_context(position: str) -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=VOCABULARY, position=position)
    model = build_model(config).eval()
    settings = Sampling(temperature=0, max_new_tokens=30)
    assert continued(model, [PROMPTS[0]], settings) == [naive(model, PROMPTS[0], 30)]
    assert continued(model, [PROMPTS[0]], settings, slide=True) == [naive(model, PROMPTS[0], 30, 12)]


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([[]], "it has no token"),
        ([[1], []], "prompt 1: it has no token"),
        ([[97]], "outside the model's vocabulary of 97"),
        ([[-1]], "outside"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompts: list[list[int]], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        generate(Reader(ours()), prompts, GREEDY)


@pytest.mark.slow
def test_greedy_at_full_size_equals_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2lab.pretrained.huggingface import load_gpt2

    torch.manual_seed(1)
    big = GPT2LMHeadModel(GPT2Config(initializer_range=0.05, eos_token_id=None)).eval()
    tokens = torch.randint(0, 50257, (2, 16))
    out = big.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, max_new_tokens=64
    )
    settings = Sampling(temperature=0, max_new_tokens=64)
    found = continued(load_gpt2(big).eval(), tokens.tolist(), settings)
    assert found == out[:, 16:].tolist() and len(set(found[0])) > 5
