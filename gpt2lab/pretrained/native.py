"""gpt2lab's layout, for any assembly: model.safetensors and gpt2lab.json, with the tokenizer if it is known.

    FOLDER/{model.safetensors, gpt2lab.json, tokenizer/...}

gpt2lab.json: format, gpt2lab (version), model (every setting and every option), precision, tokenizer (choice or null),
components (those of plug-ins, with the file that registers them), files (sha256 of all others).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

import gpt2lab
from gpt2lab.data.files import file_sha256
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, Problem, command
from gpt2lab.identity import plain
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.pretrained.files import SAFETENSORS, read_tensors, replacing
from gpt2lab.registry import SLOTS, Choice, Misfit
from gpt2lab.schema import reason
from gpt2lab.store import read_json, write_json
from gpt2lab.training.checkpoints import save_tensors
from gpt2lab.training.precision import Precision
from gpt2lab.training.state import weight_problems, weights_of

FORMAT = 1
RECORD, TOKENIZER = "gpt2lab.json", "tokenizer"


@dataclass(frozen=True)
class KeptTokenizer:
    """How to rebuild a tokenizer. files: paths of the files that it wrote when first built."""

    choice: Choice
    files: tuple[Path, ...] = ()

    def build(self) -> Tokenizer:
        """Build it. Raises EnvironmentFault when a package that it needs is not installed."""
        folder = self.files[0].parent if self.files else Path()
        built: Tokenizer = tokenizer_slot.build(self.choice, TokenizerSite(folder))
        return built


def save_model(
    model: GPT, path: str | Path, *, tokenizer: KeptTokenizer | str | None = None, precision: Precision = "fp32"
) -> Path:
    """Write any assembly so that `load_model` reads it. An older folder of weights is replaced atomically.

    tokenizer: of its texts; a name suffices for those without files, such as gpt2.  precision: for evaluation.

    Raises ConfigError when the folder holds other files, EnvironmentFault when it cannot be written.
    """
    saved_tokenizer = KeptTokenizer(tokenizer_slot.read(tokenizer)) if isinstance(tokenizer, str) else tokenizer
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights_of(model).items()}
    with replacing(path, (SAFETENSORS, RECORD, TOKENIZER)) as folder:
        save_tensors(weights, folder / SAFETENSORS)
        if saved_tokenizer is not None and saved_tokenizer.files:
            (folder / TOKENIZER).mkdir()
            for file in saved_tokenizer.files:
                shutil.copyfile(file, folder / TOKENIZER / file.name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        record = {
            "format": FORMAT,
            "gpt2lab": gpt2lab.__version__,
            "model": {name: plain(value) for name, value in model.config},  # every option, since defaults may change
            "precision": precision,
            "tokenizer": saved_tokenizer.choice.full() if saved_tokenizer is not None else None,
            "components": _from_plugins(model.config, saved_tokenizer),
            "files": {str(file.relative_to(folder)): file_sha256(file) for file in files},
        }
        write_json(folder / RECORD, record)
    return Path(path)


def load_model(path: str | Path) -> GPT:
    """The model that `save_model` wrote, in evaluation mode. Plug-ins that it needs must be loaded before.

    Raises ConfigError when a plug-in is missing or the folder has another layout, DataFault when a file is
    damaged.
    """
    folder = Path(path)
    record = read_record(folder)
    model = GPT(_read(record["model"], str(folder / RECORD)))
    weights = read_tensors(folder / SAFETENSORS)
    problems = weight_problems(model, weights)
    if problems:
        raise DataFault(
            [Problem(str(folder), "its weights are not those of its settings"), *problems],
            hint="the code of a component has changed since",
        )
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(weights[name])
    return model.eval()


def is_native(path: str | Path) -> bool:
    """Whether this is a folder in gpt2lab's layout."""
    return (Path(path) / RECORD).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """gpt2lab.json, with its files and components checked. Raises ConfigError, DataFault."""
    file = folder / RECORD
    record = read_json(file)
    if record is None:
        raise ConfigError(f"no model in gpt2lab's layout here: there is no {RECORD}", where=str(folder))
    written = record.get("format")
    if written != FORMAT:
        raise DataFault(f"of format {written}; this version reads {FORMAT}", where=str(file))
    if {"model", "precision", "tokenizer", "components", "files"} - record.keys():
        raise DataFault("not as it was written: something is missing", where=str(file))
    problems = list(_damage(folder, record["files"]))
    if problems:
        raise DataFault(problems, hint="export it again")
    unknown = [
        Problem(str(file), f"{part['slot']} {part['name']} comes from {part['from']}, which is not loaded")
        for part in record["components"]
        if part["slot"] not in SLOTS or part["name"] not in SLOTS[part["slot"]]
    ]
    if unknown:
        plugins = {part["from"] for part in record["components"]}
        raise ConfigError(unknown, hint=" ".join(command("--plugin", name) for name in sorted(plugins)))
    if record["precision"] not in get_args(Precision):
        raise DataFault(f"precision '{record['precision']}' is unknown", where=str(file))
    return record


def tokenizer_in(folder: Path, record: Mapping[str, Any]) -> KeptTokenizer | None:
    """The tokenizer of a folder in gpt2lab's layout. Raises ConfigError when there is none of its name."""
    if record["tokenizer"] is None:
        return None
    names = [name for name in record["files"] if name.startswith(f"{TOKENIZER}/")]
    try:
        choice = tokenizer_slot.read(record["tokenizer"])
    except Misfit as misfit:
        raise ConfigError(str(misfit), where=str(folder / RECORD)) from None
    return KeptTokenizer(choice, tuple(folder / name for name in names))


def _read(tree: Mapping[str, Any], where: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        problems = [
            Problem(where, f"model.{'.'.join(map(str, wrong['loc']))}: "
                    + (str(wrong["ctx"]["what"]) if wrong["type"] == "misfit" else reason(wrong)))
            for wrong in error.errors()
        ]  # fmt: skip
        raise ConfigError(problems, hint="gpt2lab components, and the plug-ins of this model") from None


def _from_plugins(config: ModelConfig, tokenizer: KeptTokenizer | None) -> list[dict[str, str]]:
    """Chosen components that are not ours, and the file or package that registers them."""
    choices = [choice for several in config.choices().values() for choice in several]
    choices += [tokenizer.choice] if tokenizer is not None else []
    records = []
    for choice in dict.fromkeys(choices):
        module = SLOTS[choice.slot][choice.name].factory.__module__
        if module.partition(".")[0] != "gpt2lab":
            file = getattr(sys.modules.get(module), "__file__", None)
            source = Path(file).name if file and "." not in module else module
            records.append({"slot": choice.slot, "name": choice.name, "from": source})
    return records


def _damage(folder: Path, files: Mapping[str, str]) -> Iterator[Problem]:
    for name, sha256 in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield Problem(str(folder / RECORD), f"names '{name}', which is not in this folder")
        elif not (folder / name).is_file():
            yield Problem(str(folder / name), "missing")
        elif file_sha256(folder / name) != sha256:
            yield Problem(str(folder / name), f"damaged: its sha256 is not {sha256[:12]}...")
    if SAFETENSORS not in files:
        yield Problem(str(folder / RECORD), f"does not name {SAFETENSORS}")
