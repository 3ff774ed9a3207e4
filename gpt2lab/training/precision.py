"""Device and precision of a training.

Weights, gradients and optimizer state are always float32; the precision is that of matrix products. tf32 rounds their
factors to 10 bits on the GPU's tensor cores. bf16 and fp16 use autocast; on CPU autocast runs norms and softmax in the
precision of their input, so the model converts logits to float32 before its loss. The smallest fp16 number is 6e-8:
losses are scaled up, so that small gradients do not become zero.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
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
    """The device to compute on: `auto` is cuda, else mps, else cpu; of several GPUs that of the local rank. Raises
    EnvironmentFault if it does not exist."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = next(device for device, available in present.items() if available) if name == "auto" else name
    if not present[chosen]:
        raise EnvironmentFault(
            f"this torch ({torch.__version__}) finds no {chosen} device",
            where="training.device",
            hint="--set training.device=auto",
        )
    return torch.device(chosen, local_rank) if chosen == "cuda" and local_rank else torch.device(chosen)


@functools.cache
def device_name(device: torch.device) -> str:
    """The product name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None keeps torch's choice. It affects the last bits of sums."""
    if threads is not None:
        torch.set_num_threads(threads)


def set_arithmetic(precision: Precision, device: torch.device, deterministic: bool = False) -> None:
    """Set which matrix products and kernels torch may use on a GPU; no effect on other devices.

    Call it before the first matrix product, when cuBLAS reads its settings.
    """
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context for forward passes in `precision` on `device`. Raises EnvironmentFault if bf16 is not supported."""
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
    """The loss scaler of fp16; the other precisions have the range of fp32 and need none."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def shortcomings(precision: Precision, device: torch.device) -> list[str]:
    """Notes for readers of the result about this precision on this device."""
    kind = device.type
    if precision == "tf32" and (kind != "cuda" or torch.cuda.get_device_capability(device) < AMPERE):
        return [f"tf32 exists on NVIDIA GPUs from Ampere on only: on this {kind} matrix products were fp32"]
    if precision == "fp16" and kind == "cpu":
        return ["fp16 is emulated on CPU: correct, but a hundred times slower"]
    if precision == "bf16" and kind == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return ["this CPU has no bfloat16 instructions: bf16 is emulated and slow"]
    return []


@contextlib.contextmanager
def memory_guard(phase: str, doing: str, hint: str) -> Iterator[None]:
    """Turn a failed allocation on any device into an EnvironmentFault with phase, size and hint."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise EnvironmentFault(f"out of memory with {doing}", where=phase, hint=hint) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has its own exception; the CPU allocator and mps are recognised by their messages."""
    messages = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "MPS backend out of memory",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in messages
    )
