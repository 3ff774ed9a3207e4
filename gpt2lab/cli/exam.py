"""What `gpt2lab eval --tasks` shows, and how what was measured late reaches MLflow."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.exam import Examined
    from gpt2lab.store import Store


def exam_record(examined: Examined, limit: int | None) -> dict[str, Any]:
    """Everything for programs."""
    from gpt2lab.evaluation.tasks.results import record

    return {
        "source": examined.name,
        "run": examined.run,
        "limit": limit,
        "tasks": [record(one) for one in examined.results],
        "reused": examined.reused,
    }


def print_exam(examined: Examined, console: Any) -> None:
    """A row for each figure with its standard error, then whose rules they follow."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(examined.name), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "measure", "value", "± error", "questions"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right", overflow="fold")
    for one in examined.results:
        for place, figure in enumerate(one.figures):
            error = "" if figure.stderr is None else shown(figure.stderr)
            head, asked = (one.task, f"{one.questions:,}") if place == 0 else ("", "")
            table.add_row(Text(head), figure.name, shown(figure.value), error, asked)
    console.print(table)
    for one in examined.results:
        rules = "; ".join(f"{figure.name}: {figure.how}" for figure in one.figures)
        console.print(f"{one.task}: {one.protocol}. {rules}", markup=False, highlight=False)
        if one.cut:
            cut = f"  {one.cut:,} of {one.questions:,} questions are longer than the context and lose their beginning"
            console.print(cut, markup=False, highlight=False)


def shown(value: float) -> str:
    """Four decimals for shares, fewer digits for what is large."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def mirror(store: Store, run: str | None = None, study: str | None = None) -> None:
    """Bring MLflow up to date for what is there already: `study`, or the studies and sweeps that hold `run`. A tracker
    that does not work costs one line."""
    from gpt2lab.errors import Gpt2labError
    from gpt2lab.tracking import Tracker, open_tracker
    from gpt2lab.tracking.follower import links, sync, tracked_records

    records = [store.study(study)] if study else [record for record in tracked_records(store) if run in held(record)]
    for record in records:
        name = record["name"]
        if not links(store, name, record.get("kind", "study")):
            continue

        def sink(ablation: str = record["ablation"]) -> Tracker:
            return open_tracker(store.root, ablation)

        try:
            sync(store, record, sink, lambda line: print(line, file=sys.stderr))
        except Gpt2labError as error:
            print(f"not sent to MLflow: {error}; gpt2lab sync {name} does it later", file=sys.stderr)


def held(record: Mapping[str, Any]) -> Collection[str]:
    """Ids of the runs of a study's arms, or of a sweep's trials."""
    return {run for arm in record["arms"].values() for run in arm["runs"].values()}
