"""GPT-2 weights in and out, in the layout of Hugging Face's `GPT2LMHeadModel`.

Names are the same on both sides, so only two things differ: their linear layers in blocks store (in, out), ours (as
torch's) (out, in); and theirs carry the prefix `transformer.`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.store import write_atomically

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files store among the weights
PREFIX = "transformer."


def from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names and shapes -> ours. A head tied to the embedding is dropped, as ours has none."""
    ours = {}
    for name, tensor in weights.items():
        name = name.removeprefix(PREFIX)
        if name == "lm_head.weight" or name.endswith(NOT_WEIGHTS):
            continue
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return ours


def to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> Hugging Face names and shapes, without the tied head, as their own files are."""
    return {
        PREFIX + name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
        for name, tensor in weights.items()
    }


def is_canonical(config: ModelConfig) -> bool:
    """Whether every component that shapes weights is GPT-2's own, so that the layout can hold them."""
    shaping = set(ModelConfig.model_fields) & set(config.choices()) - {"init", "objective"}
    reference = ModelConfig()
    same = all(set(config.choices()[slot]) == set(reference.choices()[slot]) for slot in shaping)
    return same and config.bias and config.mlp_ratio == reference.mlp_ratio


def load_gpt2(source: Any) -> GPT:
    """A canonical model with the weights of `source`: a folder with config.json and model.safetensors, or a
    Hugging Face `GPT2LMHeadModel`.

    Raises ConfigError when files are missing or shapes do not fit.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        try:
            settings = json.loads((folder / "config.json").read_text())
            weights: Mapping[str, Tensor] = load_file(folder / "model.safetensors")
        except (OSError, ValueError) as error:
            raise ConfigError(f"no GPT-2 in Hugging Face layout here ({error})", where=str(folder)) from error
    else:
        settings, weights = source.config.to_dict(), source.state_dict()
    config = ModelConfig(
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_embd=settings["n_embd"],
        block_size=settings.get("n_positions", settings.get("n_ctx")),
        vocab_size=settings["vocab_size"],
    )
    model = build_model(config)
    try:
        model.load_state_dict(from_hf(weights))
    except RuntimeError as error:
        raise ConfigError(
            f"weights do not fit: {error}", where=str(source) if isinstance(source, str) else ""
        ) from error
    return model


def save_gpt2(model: GPT, path: str | Path) -> Path:
    """Write config.json and model.safetensors that `transformers` and `load_gpt2` read. Raises ConfigError when the
    assembly is not canonical GPT-2, for which that layout has no room."""
    config = model.config
    if not is_canonical(config):
        raise ConfigError("only canonical GPT-2 has a Hugging Face layout; this assembly differs", where="save_gpt2")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    save_file(to_hf(weights), folder / "model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    return folder
