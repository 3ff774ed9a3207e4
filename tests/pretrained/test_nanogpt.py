"""nanoGPT's checkpoints: the names, shapes and extras of its train.py, against Hugging Face's model with exact GELU."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from their_gpt2 import SIZES, same_logits
from transformers import GPT2LMHeadModel

from gpt2lab import load_gpt2
from gpt2lab.errors import ConfigError, DataFault

Theirs = Callable[..., GPT2LMHeadModel]
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def checkpoint(model: GPT2LMHeadModel, *, bias: bool, prefix: str = "", padded: int = 0) -> dict[str, Any]:
    """What nanoGPT's train.py saves: torch's linear layers, the tied head under both names, optimizer, config."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if bias or not name.endswith(".bias"):
            weights[prefix + name] = tensor.t().contiguous() if name.endswith(TURNED) else tensor
    if padded:
        table = torch.cat([weights[f"{prefix}transformer.wte.weight"], torch.full((padded, SIZES["n_embd"]), 0.5)])
        weights[f"{prefix}transformer.wte.weight"] = weights[f"{prefix}lm_head.weight"] = table
    args = {
        "n_layer": 3, "n_head": 4, "n_embd": 24, "block_size": 16, "bias": bias, "dropout": 0.2,
        "vocab_size": SIZES["vocab_size"] + padded,
    }  # fmt: skip
    moments = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "model": weights, "optimizer": moments, "model_args": args, "iter_num": 4,
        "best_val_loss": torch.tensor(3.2), "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
    }  # fmt: skip


def without_biases(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same with every bias at zero, which is what having none means."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_it_becomes_the_equivalent_assembly(
    theirs: Theirs, tmp_path: Path, tokens: torch.Tensor, bias: bool, prefix: str
) -> None:
    model = theirs(activation_function="gelu")
    model = model if bias else without_biases(model)
    torch.save(checkpoint(model, bias=bias, prefix=prefix), tmp_path / "ckpt.pt")
    ours = load_gpt2(tmp_path / "ckpt.pt")
    assert same_logits(ours, model, tokens)
    assert not same_logits(ours, theirs(), tokens)  # tanh is something else
    assert ours.config.bias is bias and ours.config.dropout == 0.2 and not ours.training
    assert any(name.endswith(".bias") for name, _ in ours.named_parameters()) is bias


GPTConfig = dataclasses.make_dataclass("GPTConfig", list(SIZES))
"""As in the script of build-nanogpt, whose checkpoints name it `__main__.GPTConfig`."""


def test_a_checkpoint_of_build_nanogpt(
    theirs: Theirs, tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = theirs()
    GPTConfig.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    settings = GPTConfig(*SIZES.values())
    settings.block_size = 16
    weights = checkpoint(model, bias=True)["model"] | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    torch.save({"model": weights, "config": settings, "step": 5, "val_loss": 3.1}, tmp_path / "model_00005.pt")
    monkeypatch.undo()
    assert same_logits(load_gpt2(tmp_path / "model_00005.pt"), model, tokens)
    del settings.n_head
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    torch.save({"model": weights, "config": settings}, tmp_path / "model_00005.pt")
    with pytest.raises(DataFault, match="config lacks n_head"):
        load_gpt2(tmp_path / "model_00005.pt")


def test_padding_of_the_vocabulary_stays(theirs: Theirs, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = theirs(activation_function="gelu")
    torch.save(checkpoint(model, bias=True, padded=3), tmp_path / "ckpt.pt")
    ours = load_gpt2(tmp_path / "ckpt.pt")
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.shape[-1] == SIZES["vocab_size"] + 3
        assert (logits[..., : SIZES["vocab_size"]] - model(tokens).logits).abs().max() < 1e-5


def test_what_does_not_fit_is_listed(theirs: Theirs, tmp_path: Path) -> None:
    written = checkpoint(theirs(), bias=True)
    del written["model"]["transformer.ln_f.bias"]
    written["model_args"]["block_size"] = 32
    torch.save(written, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError) as caught:
        load_gpt2(tmp_path / "ckpt.pt")
    assert [str(problem) for problem in caught.value.problems][1:] == [
        "ln_f.bias: missing: (24,) is wanted",
        "wpe.weight: (32, 24) is wanted, (16, 24) found",
    ]
    del written["model_args"]["n_head"]
    torch.save(written, tmp_path / "ckpt.pt")
    with pytest.raises(DataFault, match="model_args lacks n_head"):
        load_gpt2(tmp_path / "ckpt.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="no checkpoint of nanoGPT"):
        load_gpt2(tmp_path / "other.pt")
