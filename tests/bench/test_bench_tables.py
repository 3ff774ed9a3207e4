"""`benchmarks tables`: what was measured stands in the page, with its place, and nothing else changes there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import step, turns
from benchmarks.generate import GenerationComparison, GenerationResult, Passage
from benchmarks.sides import WORKS, Work
from benchmarks.step import Comparison, SideResult
from benchmarks.tables import BEGIN, END, PAGE, Findings, page_of, replaced
from gpt2lab.errors import ConfigError

Call = Callable[..., tuple[int, str, str]]
WHERE = {"device": "cpu", "name": "Some CPU", "cores": 2, "threads": 1, "blocks": 9, "torch": "2.13", "python": "3.12",
         "gpt2lab": "0.1", "date": "2026-01-01"}  # fmt: skip


def side(name: str, precision: str = "fp32") -> SideResult:
    return SideResult(name, precision, 12.345, 12.0, 13.0, 8e4, 5e10, 1e11, 0.5, 2**20, (4.2,))


def test_a_page_has_a_row_for_each_measurement_and_names_unequal_precision() -> None:
    half, whole, plain = side("gpt2lab", "bf16"), side("gpt2lab"), side("plain")
    found = Findings(where=WHERE)
    found.steps = [Comparison("a", WORKS["a"], "cpu", 1, 9, (half, plain), 1.4, (1.2, 1.5))]
    found.peers = [Comparison("nano", WORKS["nano"], "cpu", 1, 9, (whole, side("nanoGPT")), 1.1, None)]
    texts = GenerationResult("gpt2lab", "fp32", 1, 1, 1, 46.51), GenerationResult("transformers", "fp32", 1, 1, 1, 27)
    found.generation = [GenerationComparison(Passage("c", 8), "cpu", 1, 9, texts, True, 1.7, (1.6, 1.8))]
    found.absent = ["c, nanogpt: there is no such file"]
    text = page_of(found)
    assert "| a, bf16 | 1.40 [1.20, 1.50] (bf16 against fp32) | 12.35 | 12.35 | 50 % | 1.0 MiB | 1.0 MiB |" in text
    assert "| nano | nanoGPT | 1.10 | 12.35 | 12.35 |" in text
    assert "| c, 8 at once, fp32 | transformers | 1.70 [1.60, 1.80] | 46.51 | 27 |" in text
    assert "- c, nanogpt: there is no such file" in text
    assert text.startswith("Some CPU, 2 cores, 1 thread; torch 2.13") and "in our loop" not in text


def test_only_what_is_between_the_marks_is_replaced() -> None:
    cpu, cuda = BEGIN.format("cpu"), BEGIN.format("cuda")
    page = f"before\n\n{cpu}\n\nold\n\n{END}\n\n{cuda}\n{END}\nafter\n"
    assert replaced(page, "cpu", r"new \1") == page.replace("old", r"new \1")
    assert replaced(page, "cuda", "new") == page.replace(f"{cuda}\n", f"{cuda}\n\nnew\n\n")
    with pytest.raises(ConfigError, match="no place for these tables"):
        replaced(page, "mps", "new")
    assert BEGIN.format("cpu") in (Path(__file__).parents[2] / PAGE).read_text()


@pytest.mark.slow
def test_one_command_measures_and_tells_what_is_absent(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKS, "a", Work(n_layer=1, n_head=2, n_embd=16, block_size=8, sequences=3, vocab_size=31))
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(step, "LIMIT_SIZE", 64)
    words = ("tables", "--configs", "a", "--blocks", "2", "--threads", "1", "--only", "step,peers", "--nanogpt", "none")
    code, out, err = call(*words, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert [c["sides"][0]["precision"] for c in found["steps"]] == ["fp32", "bf16"]
    assert [c["sides"][1]["name"] for c in found["peers"]] == ["transformers"] and found["where"]["threads"] == 1
    assert found["absent"] == ["a, nanogpt: there is no such file"]
    code, _, err = call("tables", "--only", "stepp")
    assert code == 2 and "unknown part 'stepp'; did you mean 'step'" in err
