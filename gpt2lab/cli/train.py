"""Commands that train one run: train, baseline."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.cli import options
from gpt2lab.cli.options import confirm_time, given, print_json, say
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.experiments import command

if TYPE_CHECKING:
    from gpt2lab.experiments.single import Watch


def train(
    context: typer.Context,
    preset: Annotated[
        str, typer.Argument(help="Preset or YAML file, such as nano or ./mine.yaml.", metavar="PRESET_OR_FILE")
    ],
    set_: options.Set = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, instead of the config's.", min=0)] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Ranks that share every batch: one per GPU, or CPU cores.", min=1)
    ] = None,
    plugin: options.Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the run and its cost; train nothing.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few steps into the run's trace.json.")] = False,
    max_days: options.MaxDays = options.MAX_DAYS,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Train one run: one config, one seed. Under torchrun each process is one of its ranks."""
    from gpt2lab.basics.early import started_early

    alone = (nproc or 1) == 1 and os.environ.get("WORLD_SIZE", "1") == "1"
    context.with_resource(started_early(wanted=alone and not dry_run))
    from gpt2lab.training.ranks import RankEnvironment

    world = RankEnvironment.read()
    if world.size > 1 and nproc is not None:
        raise ConfigError(f"torchrun has started {world.size} ranks already", where="--nproc", hint="leave --nproc out")
    try:
        code = train_run(
            preset, world, overrides=tuple(set_ or ()), seed=seed, nproc=nproc or 1, plugins=tuple(plugin or ()),
            dry_run=dry_run, profile=profile, max_days=max_days, tracking=not no_tracking, runs=runs, as_json=json_,
        )  # fmt: skip
    except Gpt2labError as error:
        if world.local_rank == 0:
            raise
        code = error.exit_code  # the first rank of this machine prints it
    if code and world.size > 1:  # immediately: a pending collective would wait for the other ranks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def train_run(
    preset: str, world: Any, *, overrides: tuple[str, ...], nproc: int, runs: Path, tracking: bool, as_json: bool,
    seed: int | None = None, plugins: tuple[str, ...] = (), dry_run: bool = False, profile: bool = False,
    max_days: float = math.inf, watch: Watch | None = None,
) -> int:  # fmt: skip
    """Plan the run, train it and print the result; -> the exit code. Raises what planning and training raise."""
    from gpt2lab import api
    from gpt2lab.basics.progress import PlainLines, display
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.experiments.single import STUDY, Single
    from gpt2lab.store import Store

    many, leads = world.size > 1, world.rank == 0
    console = console_for(to_stderr=as_json)

    def report(*lines: str) -> None:
        say(console, *(lines if leads else ()), wrap=False)

    with rich_progress() if world.local_rank == 0 else contextlib.nullcontext() as progress:
        single = Single.prepare(
            preset, Store(runs), seed=seed, overrides=overrides, plugins=plugins, ranks=world.size if many else nproc,
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if many else None, progress=progress,
            profile=profile,
        )  # fmt: skip
    report(*single.lines())
    if dry_run:
        report(*(["already finished"] if single.is_finished else []))
    elif single.is_finished:
        single.refuse_divergence()
        report("already finished; nothing to train", *single.result_lines())
    else:
        confirm_time(single.seconds, max_days, preset)
        tracker = api.tracker_of(single.store, STUDY) if tracking else None
        if many:
            code = single.train_as_rank(leads=leads, on_event=PlainLines(console), tracker=tracker, watch=watch)
            if code:
                return code
            single.refuse_divergence()
        else:
            with display(console) as listener:
                single.train(on_event=listener, tracker=tracker, watch=watch)
        report(*single.result_lines(), *([f"MLflow: {command('ui', runs=given(runs))}"] if tracking else []))
    if as_json and leads:
        print_json(single.as_record())
    return 0


def baseline(
    corpus: Annotated[str, typer.Option("--corpus", help="Corpus to train on.")] = "fineweb-10b",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; if few, a tenth is warm-up.", min=1)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens in each step, over all ranks.", min=1)
    ] = None,
    set_: options.Set = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Ranks; by default one per GPU of this machine.", min=1)
    ] = None,
    max_days: options.MaxDays = options.MAX_DAYS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate; train nothing.")] = False,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Reproduce GPT-2 124M by its published recipe.

    Prints the time, memory and disk needed on this machine, then trains. Compares the validation loss with the
    published curve if text, batch and schedule match the recipe.
    """
    from functools import partial

    import torch

    from gpt2lab.experiments.baseline import PRESET, Baseline, refuse_torchrun
    from gpt2lab.store import Store
    from gpt2lab.training.ranks import RankEnvironment

    world, store = RankEnvironment.read(), Store(runs)
    console = console_for(to_stderr=json_)
    refuse_torchrun(world.size)
    plan = Baseline.prepare(
        store, ranks=nproc or max(1, torch.cuda.device_count()), corpus=corpus, steps=steps, batch_tokens=batch_tokens,
        overrides=tuple(set_ or ()), say=partial(say, console),
    )  # fmt: skip
    say(console, *plan.lines(), wrap=False)
    if dry_run:
        if json_:
            print_json(plan.as_record())
        return
    plan.refuse_hopeless(store, max_days)
    code = train_run(
        PRESET, world, overrides=plan.overrides, nproc=plan.machine.ranks, tracking=not no_tracking, runs=runs,
        as_json=json_, watch=plan.watch(),
    )  # fmt: skip
    if code:
        raise SystemExit(code)
