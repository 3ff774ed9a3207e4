"""What is measured of a run: its evaluations while it trains and at its end, and what it cost."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.config import Config
from gpt2lab.data.prepared import Prepared
from gpt2lab.evaluation.tasks import EncodedTask, answer_task, encode_task, read_tasks, task_result
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window, plain_windows
from gpt2lab.evaluation.windows import Parts, WindowLosses
from gpt2lab.inspection.costs import peak_flops, slower_precision
from gpt2lab.model import GPT
from gpt2lab.runner.job import Job
from gpt2lab.training.allocator import high_water
from gpt2lab.training.diagnostics import TOKENS, build, diagnose
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import device_name, memory_guard, shortcomings
from gpt2lab.training.state import TrainState

SCREENS = (0.1, 0.25, 0.5, 0.75)
"""Shares of training at which the loss is taken too: reports say how early the order of arms shows."""

EVALUATION_TOKENS_AT_ONCE = {"cpu": 4_096}  # what fits into a core's cache is a quarter faster
GPU_EVALUATION_TOKENS_AT_ONCE = 65_536


def sequences_at_once(config: Config, device: str) -> int:
    """Sequences in one pass of an evaluation: as the config says for training, else what suits the type of device."""
    at_once = EVALUATION_TOKENS_AT_ONCE.get(device, GPU_EVALUATION_TOKENS_AT_ONCE)
    return config.training.micro_batch_sequences or max(1, at_once // config.model.block_size)


def is_due(step: int, config: Config) -> bool:
    """Whether the curve has a point after `step`."""
    steps = config.training.steps
    screens = {max(1, round(share * steps)) for share in SCREENS}
    return step == steps or step % config.evaluation.every_steps == 0 or step in screens


def evaluated(
    model: GPT, config: Config, data: Prepared, device: str, evaluation: EvaluationConfig,
    documents: NDArray[np.int64] | None = None, world: World = ALONE, parts: Parts | None = None,
) -> tuple[dict[str, Any], WindowLosses]:  # fmt: skip
    """One evaluation of a run's model: its record and the loss of each window. Every rank must call it."""
    return evaluate_by_window(
        model, data.validation, evaluation, block_size=config.model.block_size,
        batch_sequences=sequences_at_once(config, device), byte_lengths=data.byte_lengths, documents=documents,
        parts=parts, precision=config.training.precision, world=world,
    )  # fmt: skip


def validation_loss(
    model: GPT, config: Config, data: Prepared, device: str, world: World = ALONE, *, is_last: bool = False
) -> float:
    """The loss on the validation tokens of the curve, or of the final evaluation. Every rank must call it."""
    record, _ = evaluated(model, config, data, device, config.evaluation.loss_only(is_last=is_last), world=world)
    return float(record["metrics"]["val/loss"])


def point_of_curve(model: GPT, config: Config, data: Prepared, device: str, world: World = ALONE) -> dict[str, float]:
    """The validation loss, and how large numbers inside the model are."""
    return {"val/loss": validation_loss(model, config, data, device, world)} | health(model, config, data)


def encoded_tasks(config: Config, data: Prepared) -> list[EncodedTask]:
    """The questions of the tasks that are asked while a run trains, as tokens of its data's tokenizer."""
    choices = read_tasks(config.evaluation.tasks, "evaluation.tasks")
    if not choices:
        return []
    limit = config.evaluation.task_documents
    return [encode_task(choice, data.tokenizer, limit=limit, spread=True) for choice in choices]


def on_tasks(tasks: Sequence[EncodedTask], model: GPT, config: Config, world: World = ALONE) -> dict[str, float]:
    """What the model reaches in them, by `task/<name>/<measure>`. Every rank must call it, and answers its share."""
    block, values = config.model.block_size, dict[str, float]()
    for task in tasks:
        answers = answer_task(task, model, precision=config.training.precision, world=world)
        values |= {f"task/{name}": value for name, value in task_result(task, answers, block).values().items()}
    return values


def health(model: GPT, config: Config, data: Prepared) -> dict[str, float]:
    """Diagnostics on the first of the validation windows, the same for every arm."""
    block = config.model.block_size
    windows = plain_windows(data.validation, block_size=block, total=config.evaluation.total(data.validation))
    whole = [w.start for w in windows if w.length == block][: max(1, TOKENS // block)]
    if not whole:
        return {}
    tokens = np.stack([data.validation[start : start + block] for start in whole])
    with memory_guard("diagnostics", f"{len(whole)} sequences of {block} tokens in one pass", "a smaller model"):
        return diagnose(model, tokens, config.training.precision, build(config.evaluation.diagnostics))


def account(
    state: TrainState, config: Config, job: Job, device: torch.device, time: dict[str, float], ranks: int
) -> dict[str, Any]:
    """Cost and machine, as in result.json. time: seconds by phase."""
    precision = config.training.precision
    seconds = state.seconds + time["evaluation"] + time["saving"]
    rate = state.tokens / state.seconds if state.seconds else None
    peak, peak_from = peak_flops(device, precision, job.threads)
    mfu = rate * job.flops_per_token / (peak * ranks) if rate and peak else None
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "time": {**time, "other": round(max(0.0, seconds - sum(time.values())), 3)},
        "tokens_per_second": rate and round(rate, 1),
        "flops_per_token": job.flops_per_token,
        "mfu": mfu and round(mfu, 4),
        "peak_flops": peak,
        "peak_from": peak_from,
        "peak_memory_bytes": peak_memory(),
        "skipped_steps": state.guard.skipped,
        "spikes": state.guard.spikes,
        "stack": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device.type,
            "device_name": device_name(device),
            "threads": job.threads,
            "ranks": ranks,
            "compiled": bool(job.identity.get("compiled")),
        },
        "notes": shortcomings(precision, device) or slower_precision(device, precision, job.threads),
    }


def peak_memory() -> int:
    """Bytes at the peak: of the GPU's allocator where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return high_water()
