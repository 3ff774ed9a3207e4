"""Checkpoints that are whole or not there at all, and that are checked to the last byte before they are used.

    checkpoints/step_000800/{model.safetensors, optimizer.safetensors, state.json, manifest.json}

There is no pointer to the newest one: the folders themselves say which there are. The manifest holds sizes and sha256
sums, because neither torch nor safetensors notices a flipped bit. No file is a pickle, so reading one can never run
code: the nested state of an optimizer is split into plain JSON and tensors by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2lab.basics.faults import point
from gpt2lab.errors import ConfigError, DataFault, Problem, causes, command
from gpt2lab.store import disk_fault, from_json, make_folder, open_file, publish_folder, temporary_beside, to_json
from gpt2lab.training.state import Fit, TrainState, take_fitting

STEP = re.compile(r"step_([0-9]{6,})")
MODEL, OPTIMIZER, STATE = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
FORMAT = 2
MANIFEST = "manifest.json"
MARKS = ("tensor", "tuple", "items")  # of what JSON has no form for
BEFORE_FORMAT_2 = "optimizer.pt"
RANDOM = "not stored: every micro-step seeds it from the run's seed, the step, the micro-step and the rank"


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
        point("save.begin")
        _write(temporary, state, dict(extra or {}))
        point("save.rename")
        if final.exists():
            aside = temporary_beside(final)
            os.replace(final, aside)
            publish_folder(temporary, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            publish_folder(temporary, final)
        point("save.done")
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = os_error(error)
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
        saved = _read(path, step)
        if isinstance(saved, str):
            damaged.append(Problem(str(path), saved))
            continue
        _fit(state, saved, path)
        return Loaded(step, saved["extra"], tuple(damaged), newest - step)
    if damaged:
        raise DataFault(damaged, hint=f"to train again from the start, remove {command(folder)}")
    return None


def start_from(folder: Path, step: int, state: TrainState) -> None:
    """Let `state` begin where the training in `folder` stood after `step`. Raises ConfigError when there is no such
    checkpoint or it does not fit, DataFault when it is damaged."""
    path, saved = _kept(folder, step)
    try:
        state.start_from(saved)
    except ConfigError as error:
        raise _misfit(error, path, "branch: {take: weights} begins with the weights that fit") from None


def weights_from(folder: Path, step: int, state: TrainState) -> Fit:
    """Let the model of `state` begin with the weights that the training in `folder` had after `step`, its average where
    it had one, as far as they fit. Raises ConfigError when there is no such checkpoint or nothing fits, DataFault when
    it is damaged."""
    _, saved = _kept(folder, step)
    return take_fitting(state.model, saved["model"])


def _kept(folder: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a step to branch from, and its content."""
    path = folder / f"step_{step:06d}"
    steps = sorted(step for step, _ in checkpoints(folder))
    if step not in steps:
        kept = f"it keeps {', '.join(map(str, steps))}" if steps else "it keeps none"
        raise ConfigError(
            f"there is no checkpoint of step {step} to branch from: {kept}",
            where=str(folder),
            hint="training.milestone_every_steps in the run to branch from keeps checkpoints for good",
        )
    saved = _read(path, step)
    if isinstance(saved, str):
        raise DataFault(saved, where=str(path))
    return path, saved


def prune(
    folder: Path, keep: int = 2, *, best: int | None = None, milestone_every_steps: int | None = None
) -> list[Path]:
    """Delete what is older than the newest `keep` good checkpoints, and return it.

    The checkpoint of step `best` stays, and those whose step is a multiple of `milestone_every_steps`. Damaged ones do
    not count, so they never push a good one out.
    """
    newest_first = list(checkpoints(folder))
    if len(newest_first) <= keep:
        return []
    good = 0
    for index, (step, path) in enumerate(newest_first):
        good += damage(path, step, FILES) is None
        if good == keep:
            every = milestone_every_steps or math.inf
            old = [path for step, path in newest_first[index + 1 :] if step != best and step % every]
            for path in old:
                point("prune")
                _remove(path)
            return old
    return []


def best_step(folder: Path, losses: Mapping[int, float]) -> int | None:
    """The good checkpoint with the lowest loss in nats, the newest of equal ones; None when no good one has a loss.

    losses: validation loss by step, as the journal has them.
    """
    measured = [
        (losses[step], -step, path) for step, path in checkpoints(folder) if math.isfinite(losses.get(step, math.nan))
    ]
    return next((-step for _, step, path in sorted(measured) if damage(path, -step, FILES) is None), None)


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, damaged or not, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    finished = [(int(match[1]), path) for path in entries if (match := STEP.fullmatch(path.name))]
    yield from sorted(finished, reverse=True)


def _write(folder: Path, state: TrainState, extra: dict[str, Any]) -> None:
    """Fill a fresh folder with the files of a checkpoint. Raises ConfigError for what they cannot hold."""
    folder.mkdir()
    content = state.state_dict()
    weights = {name: tensor.contiguous() for name, tensor in content.pop("model").items()}
    plain, tensors = split_tree(content)
    save_tensors(weights, folder / MODEL)
    point("save.weights")
    save_tensors(tensors, folder / OPTIMIZER)
    point("save.optimizer")
    record = {"format": FORMAT, **plain, "random": RANDOM, "extra": extra}
    (folder / STATE).write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    point("save.state")
    write_manifest(folder, state.step)
    point("save.manifest")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write contiguous tensors to a new file, readable by whom the umask allows: safetensors alone makes it private."""
    file.touch(exist_ok=False)
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)


def _read(folder: Path, step: int) -> dict[str, Any] | str:
    """The content of a checkpoint on the CPU, or why it cannot be used."""
    if (folder / BEFORE_FORMAT_2).exists():
        return f"written by an earlier version, with {BEFORE_FORMAT_2}, which is no longer read"
    reason = damage(folder, step, FILES)
    if reason is not None:
        return f"damaged: {reason}"
    try:
        content: dict[str, Any] = from_json((folder / STATE).read_bytes())
        if content["format"] != FORMAT:
            return f"{STATE} is of format {content['format']}; this version reads {FORMAT}"
        # Copies, because a mapped file is aligned otherwise than torch's memory, and matrix products can see that.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / OPTIMIZER).items()}
        extra = content.pop("extra")
        return {**join_tree(content, tensors), "model": load_file(folder / MODEL), "extra": extra}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        return f"damaged: cannot be read: {str(error).partition(chr(10))[0]}"


def _fit(state: TrainState, saved: dict[str, Any], path: Path) -> None:
    """Load into `state`, or say which checkpoint does not fit and in what."""
    try:
        state.load_state_dict(saved)
    except ConfigError as error:
        raise _misfit(error, path) from None


def _misfit(
    error: ConfigError,
    path: Path,
    hint: str = "use the config that this checkpoint was trained with, or another run folder",
) -> ConfigError:
    return ConfigError([Problem(str(path), "belongs to another architecture"), *error.problems], hint=hint)


def _remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that a kill halfway leaves no folder that looks like one."""
    aside = temporary_beside(path)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _size(state: TrainState) -> int:
    """Bytes of the tensors in a checkpoint."""
    return sum(tensor.numel() * tensor.element_size() for tensor in split_tree(state.state_dict())[1].values())


def os_error(error: BaseException) -> OSError | None:
    """The operating system's reason behind `error`: itself, what it was raised from, or what its sentence quotes."""
    for cause in causes(error, implicit=True):
        if isinstance(cause, OSError):
            return cause
        quoted = re.search(r"\(os error (\d+)\)", str(cause))
        if quoted:
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return None


def write_manifest(folder: Path, step: int) -> None:
    """Describe every file in `folder` as it is now; the manifest carries a sum of itself."""
    files = {file.name: _described(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    (folder / MANIFEST).write_bytes(_sealed({"format": 1, "step": step, "files": files}))


def damage(folder: Path, step: int, names: Collection[str]) -> str | None:
    """What is wrong with the files `names` in `folder`, against its manifest for `step`; None if every byte is right.

    Finds accidents, not forgery: whoever can write the files can write the manifest.
    """
    try:
        with open_file(folder / MANIFEST) as file:
            written = file.read()
        content = json.loads(written)
        files = content.pop("files")
        seal = content.pop("sha256")
        if written != _sealed({**content, "files": files}):
            return f"{MANIFEST} is not what was written (its sha256 is not {str(seal)[:12]}...)"
        if content != {"format": 1, "step": step} or files.keys() != set(names):
            return f"{MANIFEST} describes something else: {content}, {', '.join(files)}"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is not a manifest"
    for name, expected in files.items():
        try:
            actual = _described(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if actual["bytes"] != expected["bytes"]:
            return f"{name} has {actual['bytes']:,} bytes, not {expected['bytes']:,}"
        if actual != expected:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _described(file: Path) -> dict[str, Any]:
    with open_file(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": digest}


def _sealed(content: dict[str, Any]) -> bytes:
    """The one way in which this content can be written, with its own sum inside."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True).encode()


def split_tree(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold of `tree`, exactly, and its tensors by dotted name; a tensor in two places is there once.

    Raises ConfigError for anything that is neither a tensor nor a number, text, list, tuple or mapping of such. A
    tensor's place in the JSON says `{"tensor": its name}`; `tuple` and `items` keep what JSON has no form for.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, name: str) -> Any:
        inside = f"{name}." if name else ""
        if isinstance(value, Tensor):
            known = names.setdefault(id(value), name)
            tensors.setdefault(known, value.detach().contiguous())
            return {"tensor": known}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [plain(v, f"{inside}{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [plain(v, f"{inside}{i}") for i, v in enumerate(value)]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and not set(MARKS) & set(value):
                return {key: plain(v, inside + key) for key, v in value.items()}
            return {"items": [[plain(key, name), plain(v, f"{inside}{key}")] for key, v in value.items()]}
        raise ConfigError(
            f"a checkpoint cannot hold {name}, a {type(value).__name__}, without code that runs when it is read",
            where="optim.optimizer",
            hint="keep tensors, numbers, text, lists and mappings in the optimizer's state",
        )

    return plain(tree, ""), tensors


def join_tree(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split_tree` took apart. Raises KeyError or TypeError for what `split_tree` did not write."""
    if isinstance(plain, list):
        return [join_tree(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "tuple" in plain:
        return tuple(join_tree(value, tensors) for value in plain["tuple"])
    if "items" in plain:
        return {join_tree(key, tensors): join_tree(value, tensors) for key, value in plain["items"]}
    return {key: join_tree(value, tensors) for key, value in plain.items()}
