"""`benchmarks generate`: all sides write the same text, the figures add up, mistakes are refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from benchmarks import turns
from benchmarks.generate import GenerationSpec, Passage
from gpt2lab.errors import ConfigError

Call = Callable[..., tuple[int, str, str]]
PASSAGE = Passage("a", sequences=2, prompt_tokens=5, new_tokens=6)


def test_all_sides_write_the_same() -> None:
    device = torch.device("cpu")
    sums = {name: GenerationSpec(name).make(PASSAGE, device).step() for name in ("gpt2lab", "transformers", "plain")}
    assert len(set(sums.values())) == 1, sums
    cold = GenerationSpec("gpt2lab", cold=True).make(PASSAGE, device)
    assert cold.step() == sums["plain"] and cold.name == "gpt2lab, cold"
    other = Passage("a", sequences=2, prompt_tokens=6, new_tokens=6)
    assert GenerationSpec("gpt2lab").make(other, device).step() != sums["plain"]


def test_mistakes_are_told(call: Call) -> None:
    code, _, err = call("generate", "--precision", "fp8", "--device", "gpu")
    assert code == 2 and "--precision: unknown precision 'fp8'" in err and "--device: unknown device 'gpu'" in err
    code, _, err = call("generate", "--config", "a", "--tokens", "64", "--threads", "1")
    assert code == 2 and "24 tokens of prompt and 64 new ones exceed the context of 64" in err
    code, _, err = call("generate", "--config", "zzz", "--threads", "1")
    assert code == 2 and "unknown configuration 'zzz'" in err
    for side, said in (("transformer", "did you mean 'transformers'"), ("engine", "generates nothing")):
        with pytest.raises(ConfigError, match=said):
            GenerationSpec(side).make(PASSAGE, torch.device("cpu"))


@pytest.mark.slow
def test_what_the_command_prints(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    words = ("generate", "--config", "a", "--prompt", "4", "--tokens", "8", "--batch", "2", "--blocks", "2",
             "--threads", "1")  # fmt: skip
    code, out, err = call(*words)
    assert code == 0, err
    assert "times as fast as transformers (2 blocks" in out and "both wrote the same tokens" in out
    code, out, _ = call(*words, "--vs", "plain", "--cold", "--json")
    found = json.loads(out)
    assert [side["name"] for side in found["sides"]] == ["gpt2lab, cold", "plain"]
    assert found["same_tokens"] and found["ratio"] > 0 and found["interval"] is None
    assert all(side["low"] <= side["milliseconds"] <= side["high"] for side in found["sides"])
