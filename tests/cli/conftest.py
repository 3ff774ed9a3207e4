"""An ablation to call the command line with, and a store that others' runs filled."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from gpt2lab.store import Store

sys.path.append(str(Path(__file__).parents[1] / "report"))  # for its made-up study

PRESET = """
model: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 2}}
training: {{steps: 4, batch_tokens: 64, threads: 1, device: cpu, checkpoint_every_steps: 4}}
evaluation: {{every_steps: 4, tokens: 128}}
scale: {{smallest_effect: 0.05}}
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some 11,000 bytes of words."""
    return tiny.write_text(tmp_path / "text.txt", 2400)


@pytest.fixture
def ablation(tmp_path: Path, text: Path) -> Path:
    """An ablation's file, beside its preset and text."""
    (tmp_path / "preset.yaml").write_text(PRESET.format(text=text))
    file = tmp_path / "ablation.yaml"
    file.write_text(tiny.ablation("preset.yaml", seeds=1))
    return file


@pytest.fixture
def trained(
    gpt2lab: Callable[..., Any], ablation: Path, tmp_path: Path, inline: list[str], once: Any
) -> Callable[..., dict[str, dict[str, str]]]:
    """Train the ablation with some seeds in this process, once for all tests; -> run ids by arm and seed."""

    def train(*words: object, steps: int = 30) -> dict[str, dict[str, str]]:
        preset = ablation.with_name("preset.yaml")
        preset.write_text(preset.read_text().replace("steps: 4,", f"steps: {steps},"))

        def first() -> None:
            answer = gpt2lab("run", ablation, "--no-tracking", *words)
            assert answer.code == 0, answer.err

        if os.environ["GPT2LAB_DATA"] == str(tmp_path / "data-home"):
            once(" ".join(map(str, (*words, steps))), tmp_path, first)
        else:
            first()
        arms = Store(tmp_path / "runs").study("tiny").arms
        return {arm: entry.runs for arm, entry in arms.items()}

    return train


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A runs folder with the finished study posenc@nano."""
    from made_up_study import declare  # type: ignore[import-not-found]

    declare(tmp_path / "runs")
    return tmp_path / "runs"
