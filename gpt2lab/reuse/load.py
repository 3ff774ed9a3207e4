"""Opens a trained model from any source: a run of the store, a folder of weights, a checkpoint of another project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2lab.basics.text import quantity
from gpt2lab.config import Config, fill_slots
from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, Gpt2labError, nearest
from gpt2lab.generation import Continuation, Reader, Sampling, encoded, generate
from gpt2lab.model import GPT, build_model
from gpt2lab.pretrained.files import fetched, is_hub_name
from gpt2lab.pretrained.huggingface import has_gpt2_tokenizer, load_gpt2
from gpt2lab.pretrained.native import KeptTokenizer, is_native, load_model, read_record, tokenizer_in
from gpt2lab.reuse.measure import config_of, data_of, ended, load_weights
from gpt2lab.store import RunFolder, Store
from gpt2lab.training.checkpoints import checkpoints
from gpt2lab.training.precision import Precision, choose_device

WITHOUT_FILES = ("gpt2", "bytes")
"""Tokenizers that do not depend on the training text."""


@dataclass(frozen=True)
class Trained:
    """A trained model. name: for display. model: in evaluation mode. tokenizer: None if not known. kept: how to rebuild
    that tokenizer."""

    name: str
    model: GPT
    tokenizer: Tokenizer | None
    precision: Precision
    kept: KeptTokenizer | None = None

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        tokenizer = self.kept.choice if self.kept else "unknown"
        return f"<Trained {self.name}: {quantity(count)} parameters, tokenizer {tokenizer}>"

    def continued(self, prompts: Sequence[str], settings: Sampling) -> list[str]:
        """What it writes after each prompt, kept within its context. Raises ConfigError without a tokenizer."""
        if self.tokenizer is None:
            raise ConfigError("its tokenizer is not known, so it can neither read nor write text", where=self.name)
        samples = [Continuation(self.tokenizer, settings.stop) for _ in prompts]
        reader = Reader(self.model, rows=len(prompts))
        tokens = [encoded(prompt, self.tokenizer) for prompt in prompts]
        for new in generate(reader, tokens, settings, slide=True, vocab_size=self.tokenizer.vocab_size):
            for sample, token in new.items():
                samples[sample].add(token)
        return [sample.text + sample.finish() for sample in samples]


def open_trained(source: str, store: Store, *, device: torch.device | None = None) -> Trained:
    """The model that `source` names: a run id or a prefix of it, the path of a run's folder, a folder of weights in
    Hugging Face's layout or gpt2lab's, a lone file of weights (.safetensors), a checkpoint of nanoGPT or build-nanogpt
    (.pt), or a name on the hub (`gpt2`, `owner/name`).

    device: None takes a GPU if there is one. Plug-ins that the model needs must be loaded before. Raises ConfigError
    when the source does not exist, DataFault when it is damaged or its weights are missing.
    """
    fill_slots()
    device = device or choose_device()
    path = Path(source)
    if not source:
        raise _not_found(source, store)
    run = run_of(source, store)
    if run is not None:
        return _of_run(run, device)
    if path.is_file():
        return _of_weights(path, source, device)
    if path.is_dir():
        return _of_native(path, device) if is_native(path) else _of_weights(path, source, device)
    matches = sum(run.id.startswith(source) for run in store.runs())
    if matches:
        raise ConfigError(f"'{source}' begins {matches} run ids", hint="gpt2lab runs")
    if is_hub_name(source):
        return _of_weights(fetched(source), source, device)
    raise _not_found(source, store)


@dataclass(frozen=True)
class TextModel:
    """A trained model as MLflow wants it."""

    trained: Trained

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """What follows each prompt. model_input: a list of prompts, or a frame whose first column has them. params:
        settings of `Sampling`."""
        prompts = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return self.trained.continued([str(prompt) for prompt in prompts], Sampling(**params or {}))


def _load_pyfunc(path: str) -> TextModel:
    """The function that `mlflow.pyfunc.load_model` calls, with a folder of weights in gpt2lab's layout."""
    fill_slots()
    return TextModel(_of_native(Path(path), choose_device()))


def run_of(source: str, store: Store) -> RunFolder | None:
    """The run that `source` names, by path or by a prefix of its id; None for other sources."""
    path = Path(source)
    if (path / "run.json").is_file():
        return RunFolder(path.absolute())
    matches = [] if path.exists() or not source else [run for run in store.runs() if run.id.startswith(source)]
    return matches[0] if len(matches) == 1 else None


def _of_run(run: RunFolder, device: torch.device) -> Trained:
    """A run's newest weights: final ones, or those of its newest checkpoint."""
    if run.result() is not None:
        config, result = ended(run)
        step, name = int(result["steps"]), run.id
    else:
        config = config_of(run)
        step = next((step for step, _ in checkpoints(run.checkpoints)), 0)
        name = f"{run.id} (not finished: step {step:,} of {config.training.steps:,})"
        if not step:
            raise ConfigError(f"{run.status()}, and without a checkpoint so far", where=run.id, hint="gpt2lab runs")
    model = build_model(config.model, seed=config.seed)
    load_weights(model, run, step)
    model.progress.set(step / config.training.steps)
    return _trained(name, model, config.training.precision, _tokenizer_of(run, config), device)


def _tokenizer_of(run: RunFolder, config: Config) -> KeptTokenizer | None:
    """The tokenizer of the run's data; None if the data is missing."""
    choice = config.data.tokenizer
    if choice.name in WITHOUT_FILES:
        return KeptTokenizer(choice)
    try:
        data = data_of(run, config)
    except Gpt2labError:
        return None
    return KeptTokenizer(choice, tuple(data.path / name for name in data.manifest["files"]))


def _of_weights(path: Path, name: str, device: torch.device) -> Trained:
    """Whatever `load_gpt2` reads: a folder or a file."""
    model = load_gpt2(path)
    known = has_gpt2_tokenizer(path, model.config.vocab_size)
    return _trained(name, model, "fp32", KeptTokenizer(tokenizer_slot.read("gpt2")) if known else None, device)


def _of_native(path: Path, device: torch.device) -> Trained:
    """Weights in gpt2lab's layout."""
    record = read_record(path)
    return _trained(str(path), load_model(path), record["precision"], tokenizer_in(path, record), device)


def _trained(
    name: str, model: GPT, precision: Precision, tokenizer: KeptTokenizer | None, device: torch.device
) -> Trained:
    return Trained(name, model.to(device).eval(), tokenizer.build() if tokenizer else None, precision, tokenizer)


def _not_found(source: str, store: Store) -> ConfigError:
    """The error for a source that is neither a run nor a folder. Raises ConfigError for a study."""
    store.refuse_study(source)
    parent = Path(source).absolute().parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    guess = nearest(source, [run.id for run in store.runs()]) or nearest(Path(source).name, names)
    suggestion = f"; did you mean '{guess}'?" if guess else ""
    return ConfigError(
        f"neither a run in {store.root} begins with '{source}', nor is there a folder of that name{suggestion}",
        hint="gpt2lab runs",
    )
