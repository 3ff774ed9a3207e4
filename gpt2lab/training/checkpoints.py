"""Checkpoints that are whole or not there at all, and that are checked to the last byte before they are used.

    checkpoints/step_000800/{model.safetensors, optimizer.pt, state.json, manifest.json}

There is no pointer to the newest one: the folders themselves say which there are.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt2lab.errors import ConfigError, DataFault, Problem
from gpt2lab.store import disk_fault, make_folder, publish_folder, temporary_beside
from gpt2lab.training.manifest import damage, write_manifest
from gpt2lab.training.state import TrainState

STEP = re.compile(r"step_(\d{6,})")
MODEL, OPTIMIZER, STATE = FILES = ("model.safetensors", "optimizer.pt", "state.json")


@dataclass(frozen=True)
class Loaded:
    """What was loaded: the step, the `extra` that was saved with it, and newer checkpoints that could not be used."""

    step: int
    extra: dict[str, Any]
    damaged: tuple[Problem, ...]
    lost_steps: int

    def __str__(self) -> str:
        if not self.damaged:
            return f"continuing from step {self.step}"
        problems = "; ".join(map(str, self.damaged))
        return f"{problems}. Continuing from step {self.step}: {self.lost_steps} steps are trained again"


def save(folder: Path, state: TrainState, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `state` and `extra` (plain JSON) as `folder`/step_NNNNNN; complete on the disk when this returns.

    A good checkpoint of the same step is kept as it is; a damaged one is replaced. Raises EnvironmentFault when the
    disk is full or cannot be written, with older checkpoints intact and nothing half-written left.
    """
    final = folder / f"step_{state.step:06d}"
    if final.exists() and damage(final, state.step, FILES) is None:
        return final
    temporary = temporary_beside(final)
    try:
        make_folder(folder)
        _write(temporary, state, dict(extra or {}))
        if final.exists():
            aside = temporary_beside(final)
            os.replace(final, aside)
            publish_folder(temporary, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            publish_folder(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise disk_fault(cause, final, _size(state)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_latest(folder: Path, state: TrainState) -> Loaded | None:
    """Load the newest checkpoint whose every byte is right into `state`; None when there is none at all.

    Raises DataFault when there are checkpoints and all are damaged (never starts afresh silently), ConfigError when a
    sound one belongs to another architecture; `state` is unchanged then.
    """
    damaged: list[Problem] = []
    newest: int | None = None
    for step, path in checkpoints(folder):
        newest = step if newest is None else newest
        reason = damage(path, step, FILES)
        saved = _read(path) if reason is None else None
        if isinstance(saved, str):
            reason = saved
        if reason is not None:
            damaged.append(Problem(str(path), f"damaged: {reason}"))
            continue
        assert isinstance(saved, dict)
        _fit(state, saved, path)
        return Loaded(step, saved["extra"], tuple(damaged), newest - step)
    if damaged:
        raise DataFault(damaged, hint=f"to train again from the start, remove {folder}")
    return None


def prune(folder: Path, keep: int = 2) -> list[Path]:
    """Delete what is older than the newest `keep` good checkpoints, and return it.

    Damaged ones do not count, so they never push a good one out.
    """
    found = list(checkpoints(folder))
    if len(found) <= keep:
        return []
    good = 0
    for index, (step, path) in enumerate(found):
        good += damage(path, step, FILES) is None
        if good == keep:
            old = [path for _, path in found[index + 1 :]]
            for path in old:
                _remove(path)
            return old
    return []


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, damaged or not, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), path) for path in entries if (match := STEP.fullmatch(path.name))]
    yield from sorted(found, reverse=True)


def _write(folder: Path, state: TrainState, extra: dict[str, Any]) -> None:
    """Fill a fresh folder with the files of a checkpoint. Raises ConfigError for what could not be read back safely."""
    folder.mkdir()
    content = state.state_dict()
    weights = {name: tensor.contiguous() for name, tensor in content.pop("model").items()}
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    with (folder / OPTIMIZER).open("wb") as file:  # torch hides the reason when a file that it opened itself fails
        torch.save(content.pop("optimizers"), file)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(folder / OPTIMIZER)
    if unsafe:
        raise ConfigError(
            f"its state holds {', '.join(unsafe)}, which could not be read back without running code",
            where="optim.optimizer",
            hint="keep tensors, numbers, strings, lists and dicts in the optimizer's state",
        )
    (folder / STATE).write_text(json.dumps({"format": 1, **content, "extra": extra}, indent=1) + "\n", encoding="utf-8")
    write_manifest(folder, state.step)


def _read(folder: Path) -> dict[str, Any] | str:
    """The content of a checkpoint on the CPU, or why it cannot be read. Never runs code from a file."""
    try:
        content: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        content["model"] = load_file(folder / MODEL)
        content["optimizers"] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return f"{OPTIMIZER} holds more than tensors and numbers, and is refused"
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        return f"cannot be read: {str(error).partition(chr(10))[0]}"
    return content


def _fit(state: TrainState, saved: dict[str, Any], path: Path) -> None:
    """Load into `state`, or say which checkpoint does not fit and in what."""
    try:
        state.load_state_dict(saved)
    except ConfigError as error:
        raise ConfigError(
            [Problem(str(path), "belongs to another architecture"), *error.problems],
            hint="use the config that this checkpoint was trained with, or another run folder",
        ) from None


def _remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that a kill halfway leaves no folder that looks like one."""
    aside = temporary_beside(path)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _size(state: TrainState) -> int:
    """Bytes of the tensors in a checkpoint."""
    content = state.state_dict()
    of_optimizers = [v for o in content["optimizers"] for values in o["state"].values() for v in values.values()]
    tensors = [v for v in (*content["model"].values(), *of_optimizers) if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's reason behind `error`: itself, what it was raised from, or what its sentence quotes."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        if quoted:
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
        error = error.__cause__ or error.__context__
    return None
