"""A tiny GPT-2 with the same weights in transformers and here, biases and norms away from zeros and ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from their_gpt2 import their_model
from transformers import GPT2LMHeadModel

from gpt2lab.generation import Reader, Sampling, generate
from gpt2lab.model import GPT
from gpt2lab.pretrained.huggingface import load_gpt2

VOCABULARY, CONTEXT = 97, 32
PROMPTS = [[5, 17, 3, 90, 41], [60, 2, 2, 8, 33], [1, 96, 50, 7, 20]]


@lru_cache(maxsize=1)
def theirs() -> GPT2LMHeadModel:
    return their_model(n_embd=48, n_positions=CONTEXT, vocab_size=VOCABULARY, bos_token_id=0, initializer_range=0.3)


@lru_cache(maxsize=1)
def ours() -> GPT:
    return load_gpt2(theirs()).eval()


def continued(
    model: GPT | Reader, prompts: Sequence[Sequence[int]], settings: Sampling, **how: object
) -> list[list[int]]:
    """All new tokens of every prompt."""
    reader = model if isinstance(model, Reader) else Reader(model, rows=len(prompts))
    found: list[list[int]] = [[] for _ in prompts]
    for new in generate(reader, prompts, settings, **how):  # type: ignore[arg-type]
        for sample, token in new.items():
            found[sample].append(token)
    return found
