"""`benchmarks tokenize`: both sides tokenize the same text, the figures add up, other tokens are told."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tokenize
from benchmarks.tokenize import measured
from gpt2lab.data.corpora import corpus
from gpt2lab.errors import ConfigError, NumericsFault


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"It's {name} 'text' of 12,345 words, naïve as it is. \n\n" * 400)
    return tmp_path / "*.txt"


def test_figures_of_both_sides(text: Path) -> None:
    chosen = corpus.read({"name": "text", "paths": [str(text)]})
    found = measured(chosen, processes=1, blocks=3, block_bytes=100_000)
    assert len(found.ours) == len(found.theirs) == 3 and min(*found.ours, *found.theirs) > 0
    each = [a / b for a, b in zip(found.ours, found.theirs, strict=True)]
    assert found.ratio == pytest.approx(statistics.geometric_mean(each), rel=1e-12)
    assert found.interval is not None and found.interval[0] < found.interval[1]
    assert 60_000 < found.block_bytes < 140_000
    assert measured(chosen, processes=2, blocks=1, block_bytes=100_000).interval is None


def test_other_tokens_are_no_comparison(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_compare", lambda *a, real=tokenize._compare: real(a[0] + 1, *a[1:]))
    with pytest.raises(NumericsFault, match="the two sides give different tokens"):
        measured(corpus.read({"name": "text", "paths": [str(text)]}), processes=1, blocks=1, block_bytes=1000)


def test_a_corpus_of_tokens_has_no_text(tmp_path: Path) -> None:
    for name in ("train", "val"):
        np.arange(60, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    with pytest.raises(ConfigError, match="holds no text"):
        measured(corpus.read({"name": "tokens", "paths": [str(tmp_path / "*.bin")]}), processes=1, blocks=1)


def test_the_command(text: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]) -> None:
    monkeypatch.setattr(tokenize, "BLOCK_BYTES", 1000)
    words = ["tokenize", "--corpus", f"{{name: text, paths: ['{text}']}}", "--blocks", "2", "--processes", "1"]
    found = json.loads(call(*words, "--json")[1])
    assert found["processes"] == 1 and len(found["ours"]) == 2
    assert "times as fast" in call(*words)[1]
