"""How fast a device could be: what a training's speed is measured against (model FLOPs utilisation, arXiv:2204.02311).

Of known GPUs the makers' figures for dense matrix products; of everything else what one large product reaches here,
the best of all measurements, kept in
the user's cache folder: a machine that is busy looks slow.
"""

from __future__ import annotations

import contextlib
import time

import torch

from gpt2lab.data.files import data_home
from gpt2lab.errors import Gpt2labError
from gpt2lab.store import read_json, write_json
from gpt2lab.training.precision import Precision

# TFLOP/s, dense, from NVIDIA's data sheets: name as torch gives it -> (fp32, tf32, bf16 and fp16)
KNOWN = {
    "H200": (67.0, 494.7, 989.4),
    "H100 80GB HBM3": (66.9, 494.7, 989.4),
    "H100 PCIe": (51.2, 378.0, 756.0),
    "A100": (19.5, 156.0, 311.8),
    "L40S": (91.6, 183.2, 362.1),
    "A10": (31.2, 62.5, 125.0),
    "RTX 4090": (82.6, 82.6, 165.2),
    "RTX 3090": (35.6, 35.6, 71.0),
}
COLUMN: dict[Precision, int] = {"fp32": 0, "tf32": 1, "bf16": 2, "fp16": 2}
SIZE, SECONDS, FEWEST = 1024, 0.15, 3


def peak_flops(device: torch.device, precision: Precision, threads: int) -> tuple[float | None, str]:
    """FLOP/s that this device reaches at most in `precision`, and in words where that figure comes from; None where
    nothing sensible is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, figures in KNOWN.items():
        if known in name:
            return figures[COLUMN[precision]] * 1e12, f"{known}'s data sheet"
    if device.type == "cpu" and precision == "fp16":
        return None, "fp16 on CPU is emulated"
    measured = _measured(device, precision, threads)
    cores = f" on {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
    return measured, f"a product of {SIZE} x {SIZE} matrices measured here{cores}"


def _measured(device: torch.device, precision: Precision, threads: int) -> float:
    kind = f"{device.type}-{precision}-{threads}-{torch.__version__}".replace("+", "_")
    path = data_home() / "peaks" / f"{kind}.json"
    best = 0.0
    with contextlib.suppress(Gpt2labError, KeyError, TypeError):  # unreadable is as good as absent
        best = float((read_json(path) or {"flops": 0.0})["flops"])
    found = matmul_flops(device, precision, threads)
    if found > best:
        with contextlib.suppress(Gpt2labError):
            write_json(path, {"flops": found})
    return max(best, found)


def matmul_flops(device: torch.device, precision: Precision, threads: int, size: int = SIZE) -> float:
    """FLOP/s of a square matrix product, the best of what fits into SECONDS."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16 if precision == "fp16" else torch.float32
        # a GPU multiplies numbers that have a pattern with less power, hence faster
        dice = torch.Generator(device).manual_seed(0)
        a = torch.randn(size, size, device=device, generator=dice).to(dtype)
        (a @ a)[0, 0].item()  # the first of a process may take a hundred times as long
        times: list[float] = []
        while sum(times) < SECONDS or len(times) < FEWEST:
            began = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / min(times)
