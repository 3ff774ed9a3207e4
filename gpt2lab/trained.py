"""A model that can be used, from wherever it lies: a run of the store, a folder of weights, a checkpoint of another
project. Layer: above `reuse`, whose way to a run's weights and data it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.prepared import Prepared, list_prepared
from gpt2lab.data.tokenizers import GPT2_SIZE, Tokenizer, TokenizerSite
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError, nearest
from gpt2lab.model import GPT, build_model
from gpt2lab.pretrained import load_gpt2
from gpt2lab.reuse.measure import data_of, load_weights
from gpt2lab.store import RunFolder, Store
from gpt2lab.training.checkpoints import checkpoints
from gpt2lab.training.precision import Precision, choose_device

WITHOUT_FILES = ("gpt2", "bytes")
"""Tokenizers that are the same whatever text was prepared with them."""


@dataclass(frozen=True)
class Trained:
    """A model that can be used. name: as shown. model: in evaluation mode. tokenizer: None where it is not known."""

    name: str
    model: GPT
    tokenizer: Tokenizer | None
    precision: Precision


def open_trained(source: str, store: Store, *, device: torch.device | None = None) -> Trained:
    """The model that `source` names: a run id or how it begins, the path of a run's folder, or a folder of weights in
    Hugging Face's layout.

    device: where the model goes; None takes a GPU if there is one. Raises ConfigError when there is no such thing,
    DataFault when it is damaged or its weights are gone.
    """
    device = device or choose_device()
    path = Path(source)
    if (path / "run.json").is_file():
        return _of_run(RunFolder(path.absolute()), device)
    if path.is_dir():
        return _of_folder(source, device)
    starts = [run for run in store.runs() if run.id.startswith(source)] if source else []
    if len(starts) == 1:
        return _of_run(starts[0], device)
    if starts:
        raise ConfigError(f"'{source}' begins {len(starts)} run ids", hint="gpt2lab runs")
    raise _nothing(source, store)


def _of_run(run: RunFolder, device: torch.device) -> Trained:
    """A run's newest weights: those of its end, or so far."""
    result, text = run.result(), run.config()
    if result is not None and result["status"] == "diverged":
        raise ConfigError("it diverged: there are no final weights", where=run.id, hint="gpt2lab runs")
    if text is None:
        raise DataFault("no config.yaml: what it trained is not known", where=str(run.path), hint=f"ls {run.path}")
    config = config_from_text(text, str(run.path / "config.yaml"))
    if result is not None:
        step, name = int(result["steps"]), run.id
    else:
        step = next((found for found, _ in checkpoints(run.checkpoints)), 0)
        name = f"{run.id} (not finished: step {step:,} of {config.training.steps:,})"
        if not step:
            raise ConfigError(f"{run.status()}, and without a checkpoint so far", where=run.id, hint="gpt2lab runs")
    model = build_model(config.model, seed=config.seed, device=device)
    load_weights(model, run, step)
    return Trained(name, model.eval(), _tokenizer_of(run, config), config.training.precision)


def _tokenizer_of(run: RunFolder, config: Config) -> Tokenizer | None:
    """What made the run's tokens; None where that is gone."""
    choice = config.data.tokenizer
    if choice.name in WITHOUT_FILES:
        built: Tokenizer = tokenizer_slot.build(choice, TokenizerSite(Path()))
        return built
    wanted = ((run.identity() or {}).get("identity") or {}).get("data")
    found = (data for _, data in list_prepared() if isinstance(data, Prepared) and data.fingerprint == wanted)
    try:
        return (next(found, None) or data_of(run, config)).tokenizer
    except Gpt2labError:
        return None


def _of_folder(source: str, device: torch.device) -> Trained:
    model = load_gpt2(source).to(device)
    return Trained(source, model.eval(), _gpt2_tokenizer(model), "fp32")


def _gpt2_tokenizer(model: GPT) -> Tokenizer | None:
    """GPT-2's own, for a model with its vocabulary."""
    if model.config.vocab_size != GPT2_SIZE:
        return None
    built: Tokenizer = tokenizer_slot.build(tokenizer_slot.read("gpt2"), TokenizerSite(Path()))
    return built


def _nothing(source: str, store: Store) -> ConfigError:
    """Both were looked for, and neither is there."""
    beside = Path(source).absolute().parent
    names = [entry.name for entry in beside.iterdir() if entry.is_dir()] if beside.is_dir() else []
    guess = nearest(source, [run.id for run in store.runs()]) or nearest(Path(source).name, names)
    meant = f"; did you mean '{guess}'?" if guess else ""
    return ConfigError(
        f"neither a run in {store.root} begins with '{source}', nor is there a folder of that name{meant}",
        hint="gpt2lab runs",
    )
