"""Costs of a model, counted on the meta device: parameters and training FLOPs per token. And the peak FLOP/s of a
device, for the MFU of runs."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.components.context import Cache
from gpt2lab.data.files import data_home
from gpt2lab.errors import Gpt2labError
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.store import read_json, write_json
from gpt2lab.training.precision import Precision


@dataclass(frozen=True)
class Costs:
    """Parameters and floating-point work of one model.

    parameters:               all of them, each once.
    non_embedding_parameters: without token and position tables and an untied head.
    active_parameters:        those used for one token (experts count by the chosen share).
    flops_per_token:          forward and backward, in FLOP, at the full context.
    """

    parameters: int
    non_embedding_parameters: int
    active_parameters: int
    flops_per_token: float


@lru_cache(maxsize=256)
def cache_numbers(config: ModelConfig) -> float:
    """Numbers that generation keeps for each token of a full context, such as keys and values of all layers. Counted by
    running the model on the meta device; a window shorter than the context saves none, as nothing is dropped."""
    with torch.device("meta"):
        model, cache = GPT(config), Cache()
        tokens = torch.zeros(1, config.block_size, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, cache=cache)
    tensors = [*cache.rows.values(), *cache.last.values()]
    return sum(rows.numel() for rows in tensors) / config.block_size


@lru_cache(maxsize=256)
def parameters(config: ModelConfig) -> int:
    """All parameters of a model, each once: the figure of `costs`, in a few milliseconds."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


class Untracked:
    """In the place of the counter's table by module, which cannot enter a module without gradients, as an objective
    of hidden rows alone does with the head."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@lru_cache(maxsize=256)
def costs(config: ModelConfig) -> Costs:
    """Build on the meta device, run one sequence of block_size tokens forward and backward, and count.

    The count is of matrix multiplications as written: attention counts the whole square of scores, masked or not, and
    an MLP with experts counts an even load.
    """
    with torch.device("meta"):
        model = GPT(config)
        tokens = torch.zeros(1, config.block_size, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Untracked()  # type: ignore[assignment]
        with counter:
            model.objective(tokens, tokens)[0].backward()
    parameters = model.params()
    tables = sum(p.tensor.numel() for p in parameters if p.role.kind in ("embedding", "position", "head"))
    total = sum(p.tensor.numel() for p in parameters)
    active = sum(p.tensor.numel() * p.role.active for p in parameters)
    return Costs(total, total - tables, round(active), counter.get_total_flops() / config.block_size)


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
    """Peak FLOP/s of this device in `precision`, and the source of the figure; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for model, figures in KNOWN.items():
        if model in name:
            return figures[COLUMN[precision]] * 1e12, f"{model}'s data sheet"
    if device.type == "cpu" and precision == "fp16":
        return None, "fp16 on CPU is emulated"
    measured = _measured(device, precision, threads)
    cores = f" on {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
    return measured, f"a product of {SIZE} x {SIZE} matrices measured here{cores}"


def slower_precision(device: torch.device, precision: Precision, threads: int) -> list[str]:
    """A note where this CPU multiplies bfloat16 numbers more slowly than float32 ones, as some with instructions for
    them do."""
    if device.type != "cpu" or precision != "bf16":
        return []
    bf16, fp32 = (_measured(device, kind, threads) / 1e9 for kind in ("bf16", "fp32"))
    slower = f"bf16 is slower than fp32 on this CPU: {bf16:.0f} against {fp32:.0f} GFLOP/s in matrix products"
    return [slower] if bf16 < fp32 else []


def _measured(device: torch.device, precision: Precision, threads: int) -> float:
    kind = f"{device.type}-{precision}-{threads}-{torch.__version__}".replace("+", "_")
    path = data_home() / "peaks" / f"{kind}.json"
    best = 0.0
    with contextlib.suppress(Gpt2labError, KeyError, TypeError):  # an unreadable record counts as absent
        best = float((read_json(path) or {"flops": 0.0})["flops"])
    flops = matmul_flops(device, precision, threads)
    if flops > best:
        with contextlib.suppress(Gpt2labError):
            write_json(path, {"flops": flops})
    return max(best, flops)


@lru_cache
def matmul_flops(device: torch.device, precision: Precision, threads: int, size: int = SIZE) -> float:
    """FLOP/s of a square matrix product, the best of repeats over SECONDS; measured once by each process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16 if precision == "fp16" else torch.float32
        # random values: GPUs multiply regular patterns with less power, hence faster
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
