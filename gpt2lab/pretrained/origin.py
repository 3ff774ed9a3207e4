"""Weights of others as the start of a training: `branch: {from: gpt2}` in a config."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from gpt2lab.errors import ConfigError, DataFault, Problem
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.pretrained.files import fetched, is_hub_name
from gpt2lab.pretrained.huggingface import has_gpt2_tokenizer, load_gpt2
from gpt2lab.pretrained.native import is_native, load_model, read_record, tokenizer_in
from gpt2lab.training.state import Fit, take_fitting, weight_problems, weights_of

POSITIONS = "wpe.weight"


@dataclass(frozen=True)
class Origin:
    """Weights to start from. source: an absolute path, or a name on the hub. model: their assembly. digest: of the
    weights, whatever files they are in. tokenizer: that they were trained with, as a choice; None if it is not
    known."""

    source: str
    model: ModelConfig
    digest: str
    tokenizer: object

    @property
    def branch(self) -> str:
        """As in `Config.branch`."""
        return f"{self.source}#{self.digest}"


def is_weights(source: str) -> bool:
    """Whether this is a path, or may be a name on the hub."""
    return bool(source) and (Path(source).expanduser().exists() or is_hub_name(source))


@cache
def origin_of(source: str) -> Origin:
    """The weights that `source` names: whatever `load_gpt2` reads, or a folder in gpt2lab's layout. Raises ConfigError,
    DataFault or EnvironmentFault."""
    path = Path(source).expanduser()
    source = str(path.absolute()) if path.exists() else source
    model, tokenizer = _opened(source)
    return Origin(source, model.config, _digest(model), tokenizer)


def _opened(source: str) -> tuple[GPT, object]:
    """The model, and the choice of its tokenizer if it is known."""
    path = Path(source)
    if is_native(path):
        tokenizer = tokenizer_in(path, read_record(path))
        if tokenizer is not None and tokenizer.files:
            problem = (
                f"its tokenizer was trained on its own text ({tokenizer.choice}); other text would get another one"
            )
            raise ConfigError(problem, where=source, hint="weights with the tokenizer gpt2 or bytes")
        return load_model(path), tokenizer.choice.full() if tokenizer else None
    if not path.exists() and is_hub_name(source):
        path = fetched(source)
    model = load_gpt2(path)
    return model, "gpt2" if has_gpt2_tokenizer(path, model.config.vocab_size) else None


def start_from_weights(branch: str, model: GPT, *, strict: bool) -> Fit:
    """Copy the weights of `Config.branch` into `model`, whose context may be shorter; not strict: those that fit.
    Raises ConfigError where they do not fit, DataFault where they are no longer those that the run was declared
    with."""
    source, _, digest = branch.rpartition("#")
    origin, _ = _opened(source)
    if _digest(origin) != digest:
        problem = "holds other weights than when this run was declared"
        raise DataFault(problem, where=source, hint="the same command with the config's file, for another run")
    weights = weights_of(origin)
    if POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][: model.config.block_size]
    if strict and (problems := weight_problems(model, weights)):
        where = Problem(source, "its weights do not fit the model section")
        raise ConfigError([where, *problems], hint="branch: {take: weights} begins with the weights that fit")
    return take_fitting(model, weights)


def _digest(model: GPT) -> str:
    """64 bits of the sha256 of all weights, with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights_of(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
