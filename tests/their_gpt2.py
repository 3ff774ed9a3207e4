"""Hugging Face's GPT-2, tiny and with weights that hide no mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.model import GPT

SIZES = {"n_layer": 3, "n_embd": 24, "n_head": 4, "n_positions": 16, "vocab_size": 61}


def their_model(spread: float = 0.05, **changes: Any) -> GPT2LMHeadModel:
    """A random GPT2LMHeadModel; biases and norms away from their initial zeros and ones, or they would be untested.

    spread: standard deviation that is added to matrices.
    """
    torch.manual_seed(0)
    nothing = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **nothing, **ids, **changes}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else spread))
    return model


def same_logits(ours: GPT, other: GPT2LMHeadModel, tokens: torch.Tensor) -> bool:
    """Whether both say the same, to float32's last digits."""
    with torch.no_grad():
        return bool((ours(tokens) - other(tokens).logits).abs().max() < 1e-5)


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a file of weights."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
