"""A reading has the numbers that others compute: Hugging Face's attention and hidden states, and the model's own."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from their_gpt2 import their_model
from transformers import GPT2LMHeadModel

from gpt2lab.data.tokenizers import tokenizer
from gpt2lab.errors import ConfigError
from gpt2lab.inspection.lens import TOP, Reading, logits_at, read
from gpt2lab.inspection.lens_page import page, png
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained import huggingface
from gpt2lab.pretrained.native import KeptTokenizer, save_model
from gpt2lab.registry import SLOTS
from gpt2lab.testing.cases import Case, batch, cases

LAYERS, TOKENS = 3, [5, 3, 17, 3, 5, 3, 17, 40, 2]
SLOTS_OF_STREAMS = ("position", "residual", "attention", "scores", "stack", "head", "embedding", "parametrization")
CASES = cases(c for s in SLOTS_OF_STREAMS for c in SLOTS[s] if c.factory.__module__.startswith("gpt2lab."))


def number(ids: Sequence[int]) -> str:
    return str(ids[0])


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return their_model(n_layer=LAYERS, n_embd=48, vocab_size=50, initializer_range=0.2)


@pytest.fixture(scope="module")
def reading(theirs: GPT2LMHeadModel) -> Reading:
    return read(huggingface.load_gpt2(theirs), TOKENS, number)


@torch.no_grad()
def test_attention_is_hugging_faces(theirs: GPT2LMHeadModel, reading: Reading) -> None:
    expected = theirs(torch.tensor([TOKENS]), output_attentions=True).attentions
    assert [(head.block, head.head) for head in reading.heads] == [(b, h) for b in range(LAYERS) for h in range(4)]
    for head in reading.heads:
        torch.testing.assert_close(head.weights, expected[head.block][0, head.head], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(head.weights.sum(-1), torch.ones(len(TOKENS)), atol=1e-6, rtol=0)
        assert not head.weights.triu(1).any()
    w = expected[1][0, 2].double().numpy()
    means = reading.heads[6].means()
    others = range(1, len(TOKENS))
    assert means["itself"] == pytest.approx(sum(w[t, t] for t in others) / 8, rel=1e-4)
    assert means["previous"] == pytest.approx(sum(w[t, t - 1] for t in others) / 8, rel=1e-4)
    assert means["first"] == pytest.approx(sum(w[t, 0] for t in others) / 8, rel=1e-4)
    back = sum(w[t, s] * (t - s) for t in others for s in range(t)) / 8
    assert means["distance"] == pytest.approx(back, rel=1e-4)
    place, weight = reading.heads[6].looks(5, 1)[0]
    assert weight == pytest.approx(max(w[5]), rel=1e-4) and w[5][place] == max(w[5])


@torch.no_grad()
def test_the_logit_lens_is_the_final_norm_and_the_head_on_hidden_states(
    theirs: GPT2LMHeadModel, reading: Reading
) -> None:
    states = theirs(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    normed = [*(theirs.transformer.ln_f(x) for x in states[:-1]), states[-1]]  # the last one is normed already
    assert len(reading.guesses) == len(reading.actual) == LAYERS + 1
    for depth, x in enumerate(normed):
        expected = theirs.lm_head(x)[0].softmax(-1)
        for t, guesses in enumerate(reading.guesses[depth]):
            top = expected[t].topk(TOP)
            assert [int(guess.token) for guess in guesses] == top.indices.tolist()
            assert [guess.probability for guess in guesses] == pytest.approx(top.values.tolist(), rel=1e-3)
        actual = [float(expected[t, TOKENS[t + 1]]) for t in range(len(TOKENS) - 1)]
        assert reading.actual[depth] == pytest.approx(actual, rel=1e-3)
        assert reading.losses[depth] == pytest.approx(-sum(map(math.log, actual)) / len(actual), rel=1e-3)
    out = theirs(torch.tensor([TOKENS]), labels=torch.tensor([TOKENS]))
    assert reading.losses[-1] == pytest.approx(float(out.loss), rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_the_last_depth_is_what_the_model_predicts(case: Case) -> None:
    """For every component that changes the stream or the head."""
    model = build_model(case.config()).eval()
    tokens = batch()[0][:1, :9]
    found = read(model, tokens[0].tolist(), number)
    expected = model(tokens)[0].softmax(-1).topk(TOP)
    assert [[g.probability for g in guesses] for guesses in found.guesses[-1]] == [
        pytest.approx(row, rel=1e-3, abs=1e-6) for row in expected.values.tolist()
    ]
    assert len(found.guesses) == len(model.block_of) + 1 and not model.drop._forward_hooks
    assert all(torch.isfinite(head.weights).all() and not head.weights.triu(1).any() for head in found.heads)


def test_a_text_that_is_too_long_or_one_token_short() -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=9)).eval()
    with pytest.raises(ConfigError, match="at most 256"):
        read(model, [1] * 257, number)
    with pytest.raises(ConfigError, match="positions are limited to 8"):
        read(model, [1] * 9, number)
    one = read(model, [1], number)
    assert one.heads[0].weights.tolist() == [[1.0]] and math.isnan(one.losses[0]) and one.actual == ((), ())
    assert "tokens; the more colour" in page("m", one) and "nan" not in page("m", one)
    assert logits_at(model, torch.zeros(1, 3, 8)).shape == (3, 9)


def test_a_page_shows_the_weights_and_runs_nothing(reading: Reading) -> None:
    image = Image.open(io.BytesIO(png(reading.heads[0].weights))).convert("RGBA")
    alpha = torch.tensor(list(image.getchannel("A").tobytes())).view(len(TOKENS), -1)
    assert (alpha / 255 - reading.heads[0].weights).abs().max() < 0.5 / 255 + 1e-6
    hostile = "<script>alert('1')</script>"
    shown = page(hostile, Reading((hostile,) * 9, reading.heads, reading.guesses, reading.actual))
    assert "<script" not in shown and "alert(&#39;1&#39;)" in shown
    assert not re.search(r"https?://|\bon\w+=|javascript:|url\((?!data:)", shown)
    assert shown.count("<details") == len(reading.heads)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build_model(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=256), seed=3)
    save_model(model, tmp_path / "model", tokenizer=KeptTokenizer(tokenizer.read("bytes")))
    return tmp_path / "model"


def test_the_command_prints_80_columns_data_and_a_page(saved: Path, gpt2lab: Callable[..., Any]) -> None:
    def call(*words: object) -> tuple[int, str]:
        code, out, err = gpt2lab("trace", "--run", saved, *words)
        return code, out + err

    text = ("--text", "To be, or not\n to be")
    code, said = call(*text, "--page", saved.parent / "page.html")
    assert code == 0 and "reads 20 tokens, the last of them e" in said and f"page: {saved.parent}" in said
    assert max(len(line.rstrip()) for line in said.splitlines() if not line.startswith(("/", "page"))) <= 80
    assert "⏎" in (saved.parent / "page.html").read_text(encoding="utf-8")
    found = json.loads(call(*text, "--json")[1])
    assert found["schema"] == 1 and "".join(found["tokens"]) == text[1] and len(found["attention"]) == 4
    assert len(call(*text, "--layer", 1)[1].splitlines()) == len(said.splitlines()) - 3  # two heads and the page
    assert "there is no block 2" in call(*text, "--layer", 2)[1]
    for words, problem in (((), "--run and --text belong together"), (("--text", "é" * 40), "positions are limited")):
        code, said = call(*words)
        assert code == 2 and problem in said
