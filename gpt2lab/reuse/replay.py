"""Train a finished run's first and last steps again with the code that is there now, and compare bit for bit.

Compared are losses, gradient norms and rates with the journal, weights and optimizer state with the final checkpoint,
and the final evaluation with its record. The store is only read.

Layer: above the runner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.batches import Batches
from gpt2lab.data.files import data_home
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import Gpt2labError
from gpt2lab.evaluation import validation_documents
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.runner import REPLAYED, evaluated
from gpt2lab.store import RunFolder
from gpt2lab.training.checkpoints import checkpoints, load_latest
from gpt2lab.training.compiling import compiled
from gpt2lab.training.loop import steps
from gpt2lab.training.precision import choose_device, loss_scaler, set_threads
from gpt2lab.training.state import TrainState

FIRST = 5
"""Steps trained again from the start: they hold initial weights, warm-up and the first batches."""

Logged = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Replayed:
    """How a replay came out. `parted`: where it first left the old run, empty when every bit was the same.
    `evaluation`: key of the evaluation that came out the same, None when the old run has none."""

    parted: str = ""
    evaluation: str | None = None


def can_be_replayed(run: RunFolder) -> bool:
    """Whether a finished run kept a checkpoint from shortly before its end, or is so short that none is needed."""
    result = run.result() or {}
    return result.get("status") == "finished" and (
        0 < int(result.get("steps") or 0) <= REPLAYED or any(checkpoints(run.replay))
    )


def replay(old: RunFolder, data: Prepared, threads: int) -> Replayed:
    """Replay a finished run on `threads` CPU threads, those that it had."""
    set_threads(threads)
    try:
        return _replay(old, data)
    except Gpt2labError as error:
        return Replayed(str(error))
    except Exception as error:  # what is put to the test may fail in any way; the other runs go on
        return Replayed(f"it fails with {type(error).__name__}: {error}")


def _replay(old: RunFolder, data: Prepared) -> Replayed:
    text, identity = old.config(), (old.identity() or {}).get("identity", {})
    if text is None:
        return Replayed("its config is gone")
    if identity.get("data") != data.fingerprint:
        return Replayed("its data is not that of the plan")
    config = config_from_text(text)
    if config.branch:
        return Replayed(f"it branches from {config.branch}, and its first steps are not replayed")
    logged = {row["step"]: row["metrics"] for row in old.rows()}
    parted = _other_rates(config, logged)
    translated = bool(identity.get("compiled"))
    if config.training.steps > REPLAYED:
        parted = parted or _retrained(_fresh(config, translated), config, data, logged, until=FIRST)
    state = _fresh(config, translated)
    if not parted and config.training.steps > REPLAYED and load_latest(old.replay, state) is None:
        return Replayed("it kept no checkpoint to replay from")
    parted = parted or _retrained(state, config, data, logged, until=config.training.steps)
    parted = parted or _unlike_final(state, config, old)
    return Replayed(parted) if parted else _evaluated(state, config, data, old, str(identity.get("device")))


def _fresh(config: Config, translated: bool = False) -> TrainState:
    device = choose_device(config.training.device)
    model = build_model(config.model, seed=config.seed, device=device)
    if translated:
        compiled(model, data_home() / "compiled")
    scaler = loss_scaler(config.training.precision, device)
    return TrainState(model, build_optimizers(config.optim, model.params()), scaler=scaler)


def _other_rates(config: Config, logged: Logged) -> str:
    """The first step whose learning rate would be another one now, over the whole of the training."""
    multiplier = config.optim.multiplier(config.training.steps)
    for step, metrics in logged.items():
        now = {"train/lr": config.optim.lr * multiplier(step - 1)} if "train/lr" in metrics else {}
        parted = _unlike(step, now, {name: metrics[name] for name in now})
        if parted:
            return parted
    return ""


def _retrained(state: TrainState, config: Config, data: Prepared, logged: Logged, *, until: int) -> str:
    """Train `state` on to step `until` and hold every step that was logged against the journal."""
    block, training = config.model.block_size, config.training
    batches = Batches(data.train, block, training.batch_tokens // block, config.seed)
    for record in steps(state, batches, config.optim, training, seed=config.seed, stop_at=until):
        now, before = (
            {k: v for k, v in metrics.items() if k.startswith("train/")}
            for metrics in (record.metrics, logged.get(record.step, {}))
        )
        parted = _unlike(record.step, now, before) if now and before else ""
        if parted:
            return parted
    return ""


def _unlike(step: int, now: Mapping[str, float], before: Mapping[str, float]) -> str:
    """The first number of a step that is not exactly what it was."""
    for name in [*before, *(name for name in now if name not in before)]:
        x, y = now.get(name), before.get(name)
        if x != y:
            apart = f" ({abs(x - y):.2g} apart)" if x is not None and y is not None else ""
            return f"step {step}: {name} is {x!r}, was {y!r}{apart}"
    return ""


def _unlike_final(state: TrainState, config: Config, old: RunFolder) -> str:
    """What differs from the final checkpoint, weights and optimizer state alike."""
    kept = _fresh(config)
    loaded = load_latest(old.checkpoints, kept)
    if loaded is None or loaded.step != state.step:
        return "its final weights are gone"
    ours, theirs = (dict(_leaves({k: s.state_dict()[k] for k in ("model", "optimizers")})) for s in (state, kept))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs:
            return f"after step {state.step} {name} is {'gone' if name in theirs else 'new'}"
        if not same_bits(ours[name], theirs[name]):
            return f"after step {state.step} {name} differs{_apart(ours[name], theirs[name])}"
    return ""


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a tree of mappings and lists, by dotted name."""
    inner = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if inner is None:
        yield name, tree
    else:
        for key, value in inner:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors have the same type, shape and bytes, so that 0 and -0 differ; other values, are equal."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _apart(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        count = int((a != b).sum())
        far = float((a.double() - b.double()).abs().max())
        return f" in {count} of {a.numel()} numbers, by up to {far:.2g}"
    return ""


def _evaluated(state: TrainState, config: Config, data: Prepared, old: RunFolder, device: str) -> Replayed:
    """What differs when the final weights are evaluated again: metrics, contexts, and the loss of each window."""
    model = cast(GPT, state.model)
    record, windows = evaluated(model, config, data, device, config.evaluation, validation_documents(data))
    key = str(record["key"])
    before, old_windows = old.evaluation(key), old.windows(key)
    if before is None:
        return Replayed()
    now = json.loads(json.dumps({**record, "windows": windows.record(key)}))  # as it would be read back
    for part in ("metrics", "contexts"):
        if before.get(part) != now.get(part):
            return Replayed(f"the final evaluation gives other {part}: {now.get(part)}, was {before.get(part)}")
    if old_windows is not None and old_windows != now["windows"]:
        return Replayed("the final evaluation gives other losses of single windows")
    return Replayed(evaluation=key)
