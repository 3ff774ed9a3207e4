"""Two ranks with half a batch each must find the gradient that one process finds with the whole."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from gpt2lab.registry import PLUGINS, load_plugin
from gpt2lab.testing.cases import Case, batch, distance, disturbed


def ranks_problem(gap: float) -> str | None:
    """The sentence for a gap between two ranks and one."""
    return None if gap < 1e-5 else f"gradients of two ranks and of one differ by {gap:.1e}"


def two_ranks_against_one(todo: list[Case]) -> list[float]:
    """For each case, how far the averaged gradient of two gloo ranks with half a batch each is from that of one process
    with the whole batch. One spawned pair of processes serves all cases."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(folder, todo, tuple(PLUGINS)), nprocs=2, join=True)
        gaps: list[float] = torch.load(f"{folder}/gaps.pt", weights_only=True)
    return gaps


def _rank(rank: int, folder: str, todo: list[Case], plugins: tuple[str, ...]) -> None:
    for plugin in plugins:
        load_plugin(plugin)

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    half = [_gradient(case, slice(rank * 4, rank * 4 + 4)) for case in todo]
    for gradient in half:
        dist.all_reduce(gradient)
        gradient /= 2
    dist.destroy_process_group()
    if rank == 0:
        gaps = [distance(g, _gradient(case, slice(0, 8))) for g, case in zip(half, todo, strict=True)]
        torch.save(gaps, f"{folder}/gaps.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads have been seen to abort a process that takes its time to say goodbye


def _gradient(case: Case, rows: slice) -> Tensor:
    model = disturbed(case.model())
    tokens, targets = (x[rows] for x in batch(rows=8))
    model.objective(tokens, targets)[0].backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in flat])
