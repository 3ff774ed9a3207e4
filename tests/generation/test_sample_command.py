"""`gpt2lab sample`, as a user calls it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2lab.basics.text import harmless
from gpt2lab.data.tokenizers import TokenizerSite, bytes_
from gpt2lab.errors import ConfigError
from gpt2lab.generation import encoded
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.pretrained.native import save_model

BYTES = bytes_(TokenizerSite(Path()))
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, gpt2lab: Call) -> Call:
    """The command line in an empty folder with three models: of bytes, with rotary positions, and with GPT-2's BPE."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 48}
    save_model(build_model(ModelConfig(**sizes, vocab_size=256), seed=1), tmp_path / "bytes", tokenizer="bytes")
    rotary = build_model(ModelConfig(**sizes, vocab_size=256, position="rotary"), seed=1)
    save_model(rotary, tmp_path / "rotary", tokenizer="bytes", precision="bf16")
    save_gpt2(build_model(ModelConfig(**sizes), seed=1), tmp_path / "gpt2")
    save_model(build_model(ModelConfig(**sizes, vocab_size=99)), tmp_path / "mute")
    return gpt2lab


def sampled(call: Call, *words: str) -> dict[str, object]:
    code, out, err = call("sample", *words, "--json")
    assert code == 0, err
    found: dict[str, object] = json.loads(out)
    return found


def test_text_goes_to_standard_output_and_speed_to_the_other(call: Call) -> None:
    code, out, err = call("sample", "gpt2", "--prompt", "To be,", "--max-new-tokens", "8")
    assert code == 0, err
    assert out.startswith("To be,") and out.endswith("\n") and len(out) > 10
    assert "8 tokens in" in err and "tokens/s" in err
    (only,) = sampled(call, "gpt2", "--prompt", "To be,", "--max-new-tokens", "8")["samples"]  # type: ignore[misc]
    assert f"To be,{only['text']}\n" == out and len(only["tokens"]) == 8


def test_several_samples_are_told_apart_and_the_first_is_the_same(call: Call) -> None:
    words = ("gpt2", "--prompt", "A", "--max-new-tokens", "5", "--seed", "3", "--temperature", "1.5", "--top-p", "0.9")
    code, out, _ = call("sample", *words, "--samples", "3")
    assert code == 0 and [line for line in out.splitlines() if line.startswith("---")] == [
        "--- 1 of 3 ---", "--- 2 of 3 ---", "--- 3 of 3 ---",
    ]  # fmt: skip
    three, one = sampled(call, *words, "--samples", "3"), sampled(call, *words)
    assert three["samples"][0] == one["samples"][0] and three["samples"][1] != one["samples"][0]  # type: ignore[index]
    assert all(f"A{sample['text']}\n" in out for sample in three["samples"])  # type: ignore[attr-defined]


def test_the_prompt_may_come_from_a_file(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("caf\u00e9\n", encoding="utf-8")
    words = ("bytes", "--max-new-tokens", "3", "--temperature", "0")
    found = sampled(call, *words, "--prompt-file", "p.txt")
    assert found["prompt"] == "caf\u00e9\n" and found["prompt_tokens"] == 6
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("caf\u00e9\n".encode())))
    assert sampled(call, *words, "--prompt-file", "-")["samples"] == found["samples"]


def test_a_stop_text_ends_the_sample(call: Call) -> None:
    whole = sampled(call, "gpt2", "--prompt", "A", "--max-new-tokens", "20", "--seed", "1")["samples"][0]["text"]  # type: ignore[index]
    stop = whole[5:9]
    cut = sampled(call, "gpt2", "--prompt", "A", "--max-new-tokens", "20", "--seed", "1", "--stop", stop)
    assert cut["samples"][0]["text"] == whole[: whole.index(stop)]  # type: ignore[index]


def test_an_empty_prompt_begins_a_document() -> None:
    from gpt2lab.data.tokenizers import gpt2

    assert encoded("", gpt2(TokenizerSite(Path()))) == [50256]
    assert encoded("", BYTES) == [10]
    assert encoded("ab", BYTES) == [97, 98]


def test_the_end_of_text_ends_a_sample_unless_asked_to_go_on(call: Call, tmp_path: Path) -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=48, head={"name": "tied", "bias": True}))
    with torch.no_grad():
        model.lm_head.bias[50256] = 1e4
    save_model(model, tmp_path / "ender", tokenizer="gpt2")
    code, out, _ = call("sample", "ender", "--prompt", "A", "--max-new-tokens", "5")
    assert (code, out) == (0, "A\n")
    found = sampled(call, "ender", "--prompt", "A", "--max-new-tokens", "5", "--past-end")
    assert found["samples"][0]["tokens"] == [50256] * 5  # type: ignore[index]


def test_what_exceeds_the_context_is_refused_or_slides(call: Call) -> None:
    code, out, err = call("sample", "bytes", "--prompt", "x" * 40, "--max-new-tokens", "30")
    assert code == 2 and not out
    assert "40 tokens of prompt and 30 new ones do not fit" in err and "--max-new-tokens 9, or --window" in err
    filled = sampled(call, "bytes", "--prompt", "x" * 40)  # the default number of tokens is cut to the room there is
    assert len(filled["samples"][0]["tokens"]) == 9  # type: ignore[index]
    assert "a prompt of at most 48 tokens" in call("sample", "bytes", "--prompt", "x" * 49)[2]
    slid = sampled(call, "bytes", "--prompt", "x" * 60, "--max-new-tokens", "99", "--window")
    assert len(slid["samples"][0]["tokens"]) == 99  # type: ignore[index]
    code, _, err = call("sample", "rotary", "--prompt", "x" * 40, "--max-new-tokens", "30")
    assert code == 0 and "continue past the 48 that it was trained at" in err


def test_precision_is_that_of_training_unless_given(call: Call) -> None:
    words = ("rotary", "--prompt", "x", "--max-new-tokens", "2")
    assert sampled(call, *words)["precision"] == "bf16"
    assert sampled(call, *words, "--precision", "fp32")["precision"] == "fp32"
    assert sampled(call, *words, "--precision", "fp16", "--device", "cpu")["precision"] == "fp32"


def test_all_wrong_options_are_told_at_once(call: Call) -> None:
    code, _, err = call(
        "sample", "bytes", "--prompt", "x", "--prompt-file", "none.txt", "--temperature", "-1", "--top-p", "1.5",
        "--samples", "0", "--precision", "fp8", "--top-k", "0",
    )  # fmt: skip
    assert code == 2
    for told in ("--temperature: -1.0 does not fit: it must be at least 0", "--top-p: 1.5", "--top-k: 0",
                 "--samples: 0", "--precision: unknown precision 'fp8'",
                 "--prompt-file: the prompt is in --prompt already",
                 "--prompt-file none.txt: it cannot be read"):  # fmt: skip
        assert told in err, err


def test_what_cannot_be_sampled_says_why(call: Call, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for words, told in (
        (("mute", "--prompt", "x"), "its tokenizer is not known"),
        (("nowhere", "--prompt", "x"), "neither a run in runs begins with 'nowhere'"),
        (("bytes", "--prompt-file", "latin.txt"), "it is not UTF-8: byte 3"),
    ):
        code, _, err = call("sample", *words)
        assert code == 2 and told in err, err


def test_characters_that_a_tokenizer_lacks_are_named() -> None:
    class Letters:
        vocab_size, separator, byte_lengths = 2, None, np.ones(2, np.int64)

        def encode(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.array([{"a": 0, "b": 1}[c] for c in text], np.int64)

        def decode(self, ids: object) -> str:
            return "".join("ab"[i] for i in ids)  # type: ignore[attr-defined]

    assert encoded("abba", Letters()) == [0, 1, 1, 0]
    with pytest.raises(ConfigError, match="cannot write 'c', '!'"):
        encoded("cab!c", Letters())
    with pytest.raises(ConfigError, match="cannot write"):
        encoded("a\udcff", BYTES)


def test_a_model_cannot_steer_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\r\x9b\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\n\tc"
