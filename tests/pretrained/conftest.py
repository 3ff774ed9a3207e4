"""Models and folders that others would bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from their_gpt2 import SIZES, their_model
from transformers import GPT2LMHeadModel


@pytest.fixture
def theirs() -> Callable[..., GPT2LMHeadModel]:
    """A new model of theirs: theirs(activation_function="gelu", ...)."""
    return their_model


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 16)"""
    return torch.randint(0, SIZES["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Their model, saved by transformers itself."""
    path = tmp_path / "theirs"
    their_model().save_pretrained(path)
    return path
