"""The noise floor: measure it, list those that were measured."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Jobs, Json, Plugin, Runs, Set

if TYPE_CHECKING:
    from gpt2lab.planning.noise import Floor


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(noise)


def noise(
    preset: Annotated[
        str | None,
        typer.Argument(help="Preset or file; without it, list the stored noise floors.", metavar="PRESET"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-n", help="Runs with different seeds.", min=3)] = 10,
    same_seed: Annotated[
        int, typer.Option("--same-seed", help="Runs of the first seed, that one included.", min=1)
    ] = 2,
    set_: Set = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option("--tokens-per-parameter", help="Length of training, as in a ladder of scales.")
    ] = None,
    jobs: Jobs = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; train nothing.")] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Measure the noise between repeats of a recipe. Used for planning and for verdicts on few seeds."""
    from gpt2lab.display import console_for
    from gpt2lab.planning.noise import floors
    from gpt2lab.store import Store

    console, store = console_for(to_stderr=json_), Store(runs)
    if preset is None:
        show(list(floors(store)), console, as_json=json_)
        return
    from gpt2lab.cli.run import print_plan, train
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.experiments.noise import aa_study, measured
    from gpt2lab.planning.noise import write_floor
    from gpt2lab.records import NoiseFloor

    ablation = aa_study(
        preset, seeds=seeds, same_seed=same_seed, overrides=tuple(set_ or ()),
        tokens_per_parameter=tokens_per_parameter, plugins=tuple(plugin or ()),
    )  # fmt: skip
    with rich_progress() as progress:
        study = Study.prepare(ablation, store, jobs=jobs, progress=progress)
    if dry_run:
        print_plan(study.plan(), store, console, json_)
        return
    words = ["gpt2lab", "noise", preset, "--seeds", str(seeds), *(w for item in set_ or () for w in ("--set", item))]
    result = train(study, shlex.join(words), console, tracking=not no_tracking)
    if result.failed:
        raise SystemExit(1)
    floor = measured(study.plan(), store)
    write_floor(floor, store)
    store.write_study(result.record.with_(noise=NoiseFloor(**floor.as_record())))
    show([floor], console, as_json=json_)


def show(found: list[Floor], console: Any, *, as_json: bool) -> None:
    """Floors with their intervals, as a table or as JSON."""
    from dataclasses import asdict

    if as_json:
        json.dump([asdict(floor) for floor in found], sys.stdout)
        print()
        return
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.text import quantity

    if not found:
        console.print("no noise floor has been measured; `gpt2lab noise nano` measures one", markup=False)
        return
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("scale", "tokens", "runs", "sd", "95 % interval", "same seed", "on", "measured"):
        shown.add_column(name, justify="right" if name in ("tokens", "runs", "sd") else "left")
    for floor in found:
        again = floor.same_seed
        same = "-" if not again else "same bits" if again["identical"] else f"sd {again['sd']:.2g}"
        failed = f", {floor.failed} failed" if floor.failed else ""
        cells = (
            floor.scale, quantity(floor.tokens), f"{len(floor.values)}{failed}", f"{floor.sd:.3g} nats",
            f"[{floor.low:.3g}, {floor.high:.3g}]", same,
            f"torch {floor.stack['torch']}, {floor.stack['device']}", floor.age.removeprefix("measured "),
        )  # fmt: skip
        shown.add_row(*(Text(cell) for cell in cells))
    console.print(shown)
