"""A tiny preset and ablation, as text."""

from __future__ import annotations

from collections.abc import Callable

from tiny import CONTEXTS, ablation

from gpt2lab.planning.plan import Plan

TINY = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: 24, batch_tokens: 64, threads: 1, device: cpu}}
evaluation: {{every_steps: 8, tokens: 256, context_tokens: 64}}
scale: {{smallest_effect: 0.05, caveat: "early training: sign only"}}
"""
ABLATION = ablation("tiny.yaml", CONTEXTS, "expected: {rotary: better}")

Planned = Callable[..., Plan]
