"""A trace of a few early steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM_UP, TRACED = 5, 2, 3  # steps: the first ones are not like the others
TRACE = "trace.json"


class Stepped(Protocol):
    """Hears of every step."""

    def step(self) -> None: ...


class Nobody:
    """Does not care."""

    def step(self) -> None:
        return


@contextlib.contextmanager
def profiled(folder: Path, *, on: bool) -> Iterator[Stepped]:
    """Trace steps 8 to 10 of what happens inside into `folder`/trace.json, where `on`."""
    if not on:
        yield Nobody()
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)

    def written(done: profile) -> None:
        done.export_chrome_trace(str(folder / TRACE))
        print(f"traced {TRACED} steps into {folder / TRACE}", flush=True)

    with profile(activities=activities, schedule=plan, on_trace_ready=written, record_shapes=True) as profiler:
        yield profiler
