"""The same model as Hugging Face's GPT-2, to float32's last digits: forward, backward, and ten steps of training."""

from __future__ import annotations

from pathlib import Path

import parity
import pytest
import torch
from parity import Case, Data, compared, preset, their_gpt2

from gpt2lab import load_gpt2, save_gpt2
from gpt2lab.model import ModelConfig

TINY = Case("tiny", ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=32, vocab_size=97), 4, 32)
WHOLE, DEEP = preset("gpt2-124m", 1, 256), preset("gpt2-355m", 1, 128)
SIZES = [WHOLE, *(preset(name, 1, 128, layers=2) for name in ("gpt2-355m", "gpt2-774m", "gpt2-1558m"))]

# What is allowed in each precision: elements of logits, loss, elements of gradients, losses of ten steps in nats; how
# far weights may end apart, as a share of how far they moved.
TOLERANCES = {
    "fp32": {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-6, "losses": 1e-5, "apart / moved": 1e-4},
    "bf16": {"logits": 5e-2, "loss": 2e-3, "gradients": 1e-3, "losses": 2e-3, "apart / moved": 1e-1},
}


def within(found: dict[str, float], precision: str, name: str) -> None:
    """Print the figures, so that they can be tabulated, and hold them against the tolerances."""
    print(f"\n{name} {precision}:", ", ".join(f"{what} {value:.2e}" for what, value in found.items()))
    assert {what: found[what] for what, limit in TOLERANCES[precision].items() if found.get(what, 0.0) > limit} == {}
    assert found.get("ours from fp32", 0.0) <= 1.1 * found.get("theirs from fp32", 0.0)  # rounding, and nothing else


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_model(precision: str) -> None:
    found = compared(TINY, precision)
    within(found, precision, TINY.name)
    assert found["largest gradient"] > 1e-2 and found["largest move"] > 1e-3  # there was something to compare


@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_size(case: Case, precision: str) -> None:
    found = compared(case, precision)
    within(found, precision, case.name)
    assert found["largest gradient"] > 1e-2 and found["largest move"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("case", "length"), [(WHOLE, 1024), (DEEP, DEEP.length)], ids=["1,024 tokens", "24 layers"])
def test_one_pass_of_the_whole_context_and_of_every_layer(case: Case, length: int, precision: str) -> None:
    theirs = their_gpt2(case.model).eval()
    data = Data(theirs.config.vocab_size, 1, length)
    found = parity.passes(load_gpt2(theirs), theirs, data, precision)
    within(found, precision, f"{case.name}, {length} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_weights_go_there_and_back_unchanged(case: Case, tmp_path: Path) -> None:
    theirs = their_gpt2(case.model)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_gpt2(tmp_path / "a")
    save_gpt2(ours, tmp_path / "b")
    again = type(theirs).from_pretrained(tmp_path / "b")
    for (name, one), (other, two) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(one.view(torch.int32), two.view(torch.int32)), name
