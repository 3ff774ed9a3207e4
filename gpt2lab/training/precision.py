"""Where a training computes and in which numbers.

Weights, gradients and optimizer state are float32 always. bf16 runs matrix products in bfloat16 by autocast; on CPU
autocast leaves norms and softmax in whatever arrives, so the model itself brings logits to float32 before its loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

from gpt2lab.errors import EnvironmentFault

Precision = Literal["fp32", "bf16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(name: DeviceName = "auto") -> torch.device:
    """The device to compute on; `auto` takes cuda, else mps, else cpu. Raises EnvironmentFault if it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = next(device for device, there in present.items() if there) if name == "auto" else name
    if not present[chosen]:
        raise EnvironmentFault(
            f"this torch ({torch.__version__}) finds no {chosen} device",
            where="training.device",
            hint="--set training.device=auto",
        )
    return torch.device(chosen)


def set_threads(threads: int | None) -> None:
    """Compute with that many CPU threads; None leaves torch's choice. The count changes sums in their last bits."""
    if threads is not None:
        torch.set_num_threads(threads)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes in `precision` on `device`. Raises EnvironmentFault where bf16 is missing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise EnvironmentFault(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic",
            where="training.precision",
            hint="--set training.precision=fp32",
        )
    return torch.autocast(device.type, torch.bfloat16)


@contextlib.contextmanager
def memory_guard(phase: str, doing: str, hint: str) -> Iterator[None]:
    """Turn a failed allocation of any device into an EnvironmentFault that names phase, size and the way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise EnvironmentFault(f"out of memory with {doing}", where=phase, hint=hint) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU allocator and mps are known by their sentences alone."""
    sentences = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "MPS backend out of memory",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in str(error) for s in sentences)
