"""A text of words, and a tiny ablation over it: two arms of a two-layer model that train in about a second."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ["speak", "noble", "queen", "and", "the", "of", "night", "to", "sword", "love"]
PRESET = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256, dropout: 0.1}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: 24, batch_tokens: 64, threads: 1, checkpoint_every_steps: 6, device: cpu}}
evaluation: {{every_steps: 8, tokens: 256, context_tokens: 64}}
scale: {{smallest_effect: 0.05}}
"""
ABLATION = """
ablation: tiny
question: Does rotary help a tiny model?
base: {base}
baseline: learned
arms:
  learned: {{}}
  rotary: {{model.position: rotary}}
seeds: {seeds}
"""
CONTEXTS = "evaluate: {contexts: [0.5, 1, 2]}"


def write_text(path: Path, count: int = 2000) -> Path:
    """A file of so many words, about nine bytes for two."""
    dice = random.Random(0)
    path.write_text(" ".join(dice.choice(WORDS) for _ in range(count)))
    return path


def ablation(base: str | Path, *lines: str, seeds: int = 2) -> str:
    """The text of an ablation over a preset, with further lines."""
    return "\n".join([ABLATION.format(base=base, seeds=seeds).rstrip(), *lines, ""])


def write_ablation(folder: Path) -> Path:
    """ablation.yaml, beside its preset tiny.yaml and text."""
    (folder / "tiny.yaml").write_text(PRESET.format(text=write_text(folder / "text.txt")))
    file = folder / "ablation.yaml"
    file.write_text(ablation(folder / "tiny.yaml", CONTEXTS))
    return file
