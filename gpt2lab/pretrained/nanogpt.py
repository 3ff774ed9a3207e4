"""nanoGPT's checkpoints: the same model with exact GELU, mostly without biases, in one file of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.pretrained.files import unpickled
from gpt2lab.pretrained.names import NANOGPT, fill
from gpt2lab.training.state import canonical

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def load_nanogpt(path: str | Path) -> GPT:
    """The model of a checkpoint that nanoGPT's train.py wrote (`ckpt.pt`), in evaluation mode. Optimizer and config
    beside it are left alone. A padded vocabulary keeps its rows: its scores take part in nanoGPT's softmax as well.

    Source: karpathy/nanoGPT, model.py and train.py; its MLP uses torch's GELU without approximation. Raises ConfigError
    when it is something else or weights do not fit, DataFault when it cannot be read.
    """
    file = Path(path)
    found = unpickled(file)
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), Mapping) or "model_args" not in found:
        raise ConfigError(
            "no checkpoint of nanoGPT: model and model_args are expected in it", where=str(path), hint="docs/weights.md"
        )
    args: Mapping[str, Any] = found["model_args"]
    missing = [key for key in SIZES if not isinstance(args.get(key), int) or args[key] < 1]
    if missing:
        raise DataFault(f"model_args lacks {', '.join(missing)}", where=str(path))
    config = ModelConfig(
        **{key: args[key] for key in SIZES},
        bias=bool(args.get("bias", True)),  # checkpoints from before it was an option have biases
        dropout=float(args.get("dropout", 0.0)),
        mlp="gelu",
    )
    weights: dict[str, Tensor] = canonical(found["model"])
    model = GPT(config)
    fill(model, weights, NANOGPT, str(path))
    return model.eval()
