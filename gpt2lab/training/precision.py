"""Where a training computes and in which numbers.

Weights, gradients and optimizer state are float32 always; a precision is what matrix products are done in. tf32 rounds
their factors to 10 bits on the GPU's tensor cores. bf16 and fp16 go through autocast; on CPU autocast leaves norms and
softmax in whatever arrives, so the model itself brings logits to float32 before its loss. fp16 reaches down to 6e-8
only: its losses are scaled up, so that small gradients do not vanish.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

from gpt2lab.errors import EnvironmentFault

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]

AMPERE = (8, 0)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: DeviceName = "auto", local_rank: int = 0) -> torch.device:
    """The device to compute on; `auto` takes cuda, else mps, else cpu; of several GPUs that of the local rank. Raises
    EnvironmentFault if it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = next(device for device, there in present.items() if there) if name == "auto" else name
    if not present[chosen]:
        raise EnvironmentFault(
            f"this torch ({torch.__version__}) finds no {chosen} device",
            where="training.device",
            hint="--set training.device=auto",
        )
    return torch.device(chosen, local_rank) if chosen == "cuda" and local_rank else torch.device(chosen)


def set_threads(threads: int | None) -> None:
    """Compute with that many CPU threads; None leaves torch's choice. The count changes sums in their last bits."""
    if threads is not None:
        torch.set_num_threads(threads)


def set_arithmetic(precision: Precision, device: torch.device, deterministic: bool = False) -> None:
    """Tell torch which matrix products and kernels a GPU may choose; on other devices there is nothing to tell.

    To be called before the first matrix product: what makes cuBLAS deterministic is read then.
    """
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes in `precision` on `device`. Raises EnvironmentFault where bf16 is missing."""
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and lacks_bf16:
        raise EnvironmentFault(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic",
            where="training.precision",
            hint="--set training.precision=fp16, or fp32",
        )
    return torch.autocast(device.type, AUTOCAST[precision])


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps the small gradients of fp16 above zero; the other precisions have the range of fp32 and need none."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def shortcomings(precision: Precision, device: torch.device) -> list[str]:
    """What a reader of the result should know about this precision on this device, in sentences."""
    kind = device.type
    if precision == "tf32" and (kind != "cuda" or torch.cuda.get_device_capability(device) < AMPERE):
        return [f"tf32 exists on NVIDIA GPUs from Ampere on only: on this {kind} matrix products were fp32"]
    if precision == "fp16" and kind == "cpu":
        return ["fp16 is emulated on CPU: right, but a hundred times slower"]
    if precision == "bf16" and kind == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return ["this CPU has no bfloat16 instructions: bf16 is emulated, and slow"]
    return []


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
