"""Weight files of other projects, read without running code or fetched from the Hugging Face hub; and atomic
replacement of folders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2lab.data.rows import first_line
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Problem, command
from gpt2lab.store import disk_fault, make_folder, publish_folder, read_json, temporary_beside
from gpt2lab.training.checkpoints import os_error

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
TOKENIZER = ("vocab.json", "tokenizer.json")
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLED, f"{PICKLED}.index.json")
"""Names of weight files in a folder, in order of preference."""
OFFICIAL = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
"""Names on the hub without an owner."""


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json. Raises ConfigError when there is none, DataFault when it cannot be read."""
    settings = read_json(folder / "config.json")
    if settings is None:
        problem = "no GPT-2 in Hugging Face layout here: there is no config.json"
        raise ConfigError(problem, where=str(folder), hint=command("ls", folder))
    return settings


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or several. Raises ConfigError when there is none, DataFault when one is
    damaged or missing."""
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        problem = f"no GPT-2 in Hugging Face layout here: there is none of {', '.join(WEIGHTS)}"
        raise ConfigError(problem, where=str(folder), hint=command("ls", folder))
    if not name.endswith(".json"):
        return read_tensors(folder / name)
    weights: dict[str, Tensor] = {}
    for part in shards(folder / name):
        weights |= read_tensors(part)
    return weights


def shards(index: Path) -> list[Path]:
    """The files that an index names. Raises DataFault when it is not an index or one of them is missing."""
    files = [index.parent / name for name in shard_names(index)]
    missing = [Problem(str(index), f"names {file.name}, which is not there") for file in files if not file.is_file()]
    if missing:
        raise DataFault(missing)
    return files


def shard_names(index: Path) -> list[str]:
    """The names in an index, each once; names of files in its folder, no paths. Raises DataFault."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if all(Path(name).name == name for name in names):
            return names
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise DataFault("not an index of weights", where=str(index))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU. Raises DataFault when it is damaged or not a plain mapping of tensors."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataFault(f"cannot be read: {first_line(error)}", where=str(file)) from error
    weights = unpickled(file)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataFault("a mapping of names to tensors is expected", where=str(file))
    return weights


class PickledConfig:
    """The values of build-nanogpt's `GPTConfig`, a class that only its own script defines."""


def unpickled(file: Path) -> Any:
    """The content of a file of torch.save, with `weights_only`: tensors, plain values and `PickledConfig`, never code.
    Raises DataFault."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(PickledConfig, "__main__.GPTConfig")]):
            warnings.simplefilter("ignore")  # about pickle formats
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any malformed file
        asks_for_code = "nsupported global" in str(error) or "nsupported class" in str(error)
        message = "it holds more than tensors and plain values, and such files can run code: refused"
        reason = message if asks_for_code else f"cannot be read as a file of torch.save ({type(error).__name__})"
        raise DataFault(reason, where=str(file)) from error


@contextlib.contextmanager
def replacing(path: str | Path, known: Collection[str]) -> Iterator[Path]:
    """An empty folder to fill, which replaces `path` on success; an interruption leaves the old folder or none. A
    folder with files other than `known` is not replaced.

    Raises ConfigError for such a folder, EnvironmentFault when the disk is full or cannot be written.
    """
    final = Path(path).resolve()
    refuse_others_files(final, path, known)
    temporary, backup = temporary_beside(final), temporary_beside(final)
    try:
        make_folder(final.parent)
        temporary.mkdir()
        yield temporary
        if final.exists():
            os.replace(final, backup)
        publish_folder(temporary, final)
    except (OSError, SafetensorError) as error:
        cause = os_error(error)
        if cause is None:
            raise
        raise disk_fault(cause, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if backup.exists() and not final.exists():  # the replacement failed
            os.replace(backup, final)
        shutil.rmtree(backup, ignore_errors=True)


def refuse_others_files(final: Path, path: str | Path, known: Collection[str]) -> None:
    """Raises ConfigError when a save would destroy other files."""
    if final.exists() and not final.is_dir():
        raise ConfigError("there is a file of that name", where=str(path), hint="another name")
    other_files = sorted(entry.name for entry in final.iterdir() if entry.name not in known) if final.is_dir() else []
    if other_files:
        names = ", ".join(other_files[:3]) + (", ..." if len(other_files) > 3 else "")
        raise ConfigError(f"the folder holds other files ({names}): not replaced", where=str(path), hint="a new name")


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous float32 tensors on the CPU, as safetensors requires."""
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}


def fetched(name: str) -> Path:
    """The folder in the hub's cache with config and weights of `name`, fetched if necessary.

    Raises EnvironmentFault when the package is missing or the hub does not answer, ConfigError when it has no such
    model.
    """
    where = f"'{name}' (no folder here, so a name on the Hugging Face hub)"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise EnvironmentFault(
            "reading from the hub needs huggingface_hub", where=where, hint="pip install huggingface_hub"
        ) from None
    offline, hint = not hub_answers(), "download it where there is a network, and give the folder"

    def file(filename: str) -> Path | None:
        """Its path in the cache; None when the hub (or, offline, the cache) has no such file."""
        try:
            return Path(hf_hub_download(name, filename, local_files_only=offline))
        except EntryNotFoundError:
            return None

    try:
        config = file("config.json")
        weights = next(filter(None, map(file, WEIGHTS)), None) if config else None
        if weights is not None and weights.name.endswith(".json"):
            weights = weights if all(map(file, shard_names(weights))) else None
        if config and weights:
            for filename in TOKENIZER:
                file(filename)
            return config.parent
    except RepositoryNotFoundError:
        raise ConfigError("neither here nor on the hub", where=where, hint="the name of a folder") from None
    except Exception as error:  # of the network, through several libraries
        raise EnvironmentFault(f"the hub cannot be read: {first_line(error)}", where=where, hint=hint) from error
    if offline:
        raise EnvironmentFault(
            "the hub cannot be read: it does not answer, and its cache does not hold this", where=where, hint=hint
        )
    raise ConfigError(f"the hub has no config.json with weights ({', '.join(WEIGHTS)})", where=where)


def is_hub_name(source: str) -> bool:
    """Whether `source` may be a name on the hub: one of OpenAI's, or owner/name where no folder is called like the
    owner."""
    owner, _, name = source.partition("/")
    return source in OFFICIAL or bool(owner and name and "/" not in name and not Path(owner).exists())


def hub_answers() -> bool:
    """Whether the hub can be reached; the package itself would retry for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of the network
        return False
    return True
