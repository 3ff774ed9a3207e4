"""Reproduce GPT-2 124M."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Runs, Set

if TYPE_CHECKING:
    from gpt2lab.experiments.baseline import Baseline


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(baseline)


def baseline(
    corpus: Annotated[str, typer.Option("--corpus", help="Corpus to train on.")] = "fineweb-10b",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; if few, a tenth is warm-up.", min=1)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens in each step, over all ranks.", min=1)
    ] = None,
    set_: Set = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Ranks; by default one per GPU of this machine.", min=1)
    ] = None,
    max_days: Annotated[float, typer.Option("--max-days", help="Do not start a longer training.")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate; train nothing.")] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Reproduce GPT-2 124M by its published recipe.

    Prints the time, memory and disk that it takes here, then trains it. Compares the validation loss with the published
    curve, where text, batch and schedule are the recipe's.
    """
    import gpt2lab.experiments.baseline as reproduction
    from gpt2lab.cli import train
    from gpt2lab.display import console_for
    from gpt2lab.store import Store
    from gpt2lab.training.ranks import RankEnvironment

    place, store = RankEnvironment.read(), Store(runs)
    console = console_for(to_stderr=json_)
    reproduction.refuse_torchrun(place.size)
    found = reproduction.plan_baseline(
        store, ranks=nproc or gpus(), corpus=corpus, steps=steps, batch_tokens=batch_tokens,
        overrides=tuple(set_ or ()), say=lambda text: console.print(text, markup=False, highlight=False),
    )  # fmt: skip
    for line in reproduction.lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        print_json(found) if json_ else None
        return
    reproduction.refuse_hopeless(found, max_days)
    reproduction.refuse_full_disk(found, store)
    code = train.run(
        reproduction.PRESET, place, overrides=found.overrides, seed=None, nproc=found.ranks, plugins=(), dry_run=False,
        profile=False, tracking=not no_tracking, runs=runs, as_json=json_, watch=reproduction.watch(found),
    )  # fmt: skip
    if code:
        train.leave(code, one_of_many=False)


def gpus() -> int:
    """GPUs of this machine, or 1 where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def print_json(found: Baseline) -> None:
    """What it takes, for programs."""
    record: dict[str, Any] = {
        "overrides": found.overrides, "ranks": found.ranks, "device": found.machine.device_name,
        "parameters": found.costs.parameters, "flops_per_token": found.costs.flops_per_token,
        "steps": found.config.training.steps, "batch_tokens": found.config.training.batch_tokens,
        "micro_batch_sequences": found.micro.sequences, "seconds": found.seconds,
        "memory_bytes": found.micro.memory_bytes, "disk_bytes": found.disk_bytes, "differs": found.differs,
    }  # fmt: skip
    print(json.dumps(record))
