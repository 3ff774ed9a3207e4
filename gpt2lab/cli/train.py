"""Train one run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Plugin, Runs, Set

if TYPE_CHECKING:
    from gpt2lab.experiments.single import Watch


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(train)


def train(
    preset: Annotated[
        str, typer.Argument(help="Preset or YAML file, such as nano or ./mine.yaml.", metavar="PRESET_OR_FILE")
    ],
    set_: Set = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, instead of the config's.", min=0)] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Ranks that share every batch: one per GPU, or CPU cores.", min=1)
    ] = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the run and its cost; train nothing.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few steps into the run's trace.json.")] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Train one run: one config, one seed. Under torchrun each process is one of its ranks."""
    from gpt2lab.errors import ConfigError, Gpt2labError
    from gpt2lab.training.ranks import RankEnvironment

    place = RankEnvironment.read()
    if place.size > 1 and nproc is not None:
        raise ConfigError(f"torchrun has started {place.size} ranks already", where="--nproc", hint="leave --nproc out")
    try:
        code = run(
            preset, place, overrides=tuple(set_ or ()), seed=seed, nproc=nproc or 1, plugins=tuple(plugin or ()),
            dry_run=dry_run, profile=profile, tracking=not no_tracking, runs=runs, as_json=json_,
        )  # fmt: skip
    except Gpt2labError as error:
        if place.local_rank == 0:
            raise
        code = error.exit_code  # the first rank of this machine says it
    if code:
        leave(code, place.size > 1)


def run(
    preset: str, place: Any, *, overrides: tuple[str, ...], seed: int | None, nproc: int, plugins: tuple[str, ...],
    dry_run: bool, profile: bool, tracking: bool, runs: Path, as_json: bool, watch: Watch | None = None,
) -> int:  # fmt: skip
    """Plan the run, train it, say what became of it; -> the exit code. Raises what planning and training raise."""
    from gpt2lab.api import command_of_run, tracker_of
    from gpt2lab.cli.results import plain
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.display import PlainLines, console_for, display
    from gpt2lab.experiments import single as s
    from gpt2lab.store import Store

    many, leads = place.size > 1, place.rank == 0
    console, store = console_for(to_stderr=as_json), Store(runs)

    def say(text: list[str]) -> None:
        for line in text if leads else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    with rich_progress() if place.local_rank == 0 else contextlib.nullcontext() as progress:
        single = s.plan_single(
            preset, store, seed=seed, overrides=overrides, plugins=plugins, ranks=place.size if many else nproc,
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", place.size)) if many else None, progress=progress,
            profile=profile,
        )  # fmt: skip
    say(s.lines(single))
    if dry_run:
        say(["finished already"] if single.is_finished else [])
    elif single.is_finished:
        s.refuse_divergence(single)
        say(["finished already; nothing is trained", *s.result_lines(single)])
    else:
        again = command_of_run(preset, overrides=overrides, seed=seed, plugins=plugins)
        tracker = tracker_of(store, s.STUDY) if tracking else None
        if many:
            listener = PlainLines(console)
            code = s.train_as_rank(
                single, leads=leads, reproduce=again, on_event=listener, tracker=tracker, watch=watch
            )  # fmt: skip
            if code:
                return code
            s.refuse_divergence(single)
        else:
            with display(console) as shown:
                s.train_single(single, reproduce=again, on_event=shown, tracker=tracker, watch=watch)
        say([*s.result_lines(single), *(["MLflow: gpt2lab ui"] if tracking else [])])
    if as_json and leads:
        print(json.dumps(plain(s.as_record(single))))
    return 0


def leave(code: int, one_of_many: bool) -> None:
    """End with that code; as one of many at once, because what is left of a collective would wait for the others."""
    if one_of_many:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
