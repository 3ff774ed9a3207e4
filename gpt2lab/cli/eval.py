"""The command that measures trained models: eval."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Plugin, Runs

if TYPE_CHECKING:
    from gpt2lab.analysis import Verdicts
    from gpt2lab.analysis.verdicts import Contrast
    from gpt2lab.evaluation.runs import TaskScores
    from gpt2lab.reuse.measure import Measured, StudyMeasured
    from gpt2lab.store import Store

ON_TEXT = ("loss", "perplexity", "bits_per_byte")
"""What is measured on a corpus unless something is asked for."""
SECONDS_BETWEEN_LINES = 10.0


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command("eval")(evaluate)


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A run id or its first digits; with --tasks or --corpus also a folder of weights.", metavar="[SOURCE]"
        ),
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Evaluate all finished runs of this study.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Metric, such as top1 or calibration,bins=10; all by default."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks, such as hellaswag,lambada,arc_easy:split=validation.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first N documents of each task.", min=1)] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Evaluate on this text: a corpus, or files such as 'text/*.txt'.")
    ] = None,
    plugin: Plugin = None,
    runs: Runs = Path("runs"),
    tracking: Annotated[bool, typer.Option(help="Send results to MLflow if the study is there.")] = True,
    json_: Json = False,
) -> None:
    """Evaluate trained models with metrics or tasks. Results are stored with the runs."""
    from gpt2lab.config import fill_slots
    from gpt2lab.errors import ConfigError
    from gpt2lab.store import Store

    if (source is None) == (study is None):
        raise ConfigError("one run, or one study, is expected", hint="gpt2lab eval --study NAME --metric top1")
    if tasks is not None and (metric or corpus):
        raise ConfigError("--tasks stands by itself, without --metric and --corpus", hint="gpt2lab eval --help")
    if (study is not None and corpus) or (tasks is None and limit):
        wrong = "--limit is about --tasks" if limit else "--corpus is about one model, not about a study"
        raise ConfigError(wrong, hint="gpt2lab eval --help")
    fill_slots(plugin or ())
    store = Store(runs)
    if tasks is not None:
        ask(store, source, study, tasks.split(","), limit, json_)
    else:
        measure_metrics(store, source, study, metric or (), corpus, json_)
    if tracking:
        mirror(store, run_id(store, source) if source else None, study)


def run_id(store: Store, source: str) -> str | None:
    """The run that is meant, if one is."""
    from gpt2lab.pretrained.load import run_of

    run = run_of(source, store)
    return run.id if run else None


def ask(
    store: Store, source: str | None, study: str | None, words: Sequence[str], limit: int | None, json_: bool
) -> None:
    """Put tasks to a model or to all runs of a study, and show what they reach."""
    from gpt2lab.display import console_for
    from gpt2lab.evaluation.runs import evaluate_study_tasks, evaluate_tasks
    from gpt2lab.evaluation.tasks import read_tasks

    choices = read_tasks(words, "--tasks")
    with shown_progress() as progress:
        if study is not None:
            compared = evaluate_study_tasks(study, store, choices, limit=limit, progress=progress)
        else:
            found = evaluate_tasks(str(source), store, choices, limit=limit, progress=progress)
    if json_:
        print_json(study_record(compared) if study is not None else task_record(found, limit))
    elif study is not None:
        print_study(compared, console_for())
    else:
        print_tasks(found, console_for())


def measure_metrics(
    store: Store, source: str | None, study: str | None, words: Sequence[str], corpus: str | None, json_: bool
) -> None:
    """Metrics of a run, of all runs of a study, or of any model on the text of a corpus."""
    from gpt2lab.display import console_for
    from gpt2lab.evaluation.runs import measure_on_text
    from gpt2lab.reuse.measure import measure, measure_study, read_metrics

    asked = read_metrics(words or (ON_TEXT if corpus else ()))
    with shown_progress() as progress:
        if study is not None:
            found = measure_study(study, store, asked, progress=progress)
        elif corpus is not None:
            values = measure_on_text(str(source), store, corpus, asked, progress=progress)
            record: dict[str, Any] = {"source": source, "corpus": corpus, "values": values}
        else:
            alone = measure(store.find(str(source)), asked, progress=progress)
            values, record = dict(alone.values), run_record(alone)
    if json_:
        print_json(study_record(found) if study is not None else record)
    elif study is not None:
        print_study(found, console_for())
    else:
        for name, value in values.items():
            print(f"{name}: {value:.6g}")


def task_record(scores: TaskScores, limit: int | None) -> dict[str, Any]:
    """Everything for programs."""
    from gpt2lab.evaluation.tasks import record

    return {
        "source": scores.name,
        "run": scores.run,
        "limit": limit,
        "tasks": [record(result) for result in scores.results],
        "reused": scores.reused,
    }


def print_tasks(scores: TaskScores, console: Any) -> None:
    """A row for each figure with its standard error, then whose rules they follow."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(scores.name), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "measure", "value", "± error", "questions"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right", overflow="fold")
    for result in scores.results:
        for place, figure in enumerate(result.figures):
            error = "" if figure.stderr is None else shown(figure.stderr)
            head, questions = (result.task, f"{result.questions:,}") if place == 0 else ("", "")
            table.add_row(Text(head), figure.name, shown(figure.value), error, questions)
    console.print(table)
    for result in scores.results:
        rules = "; ".join(f"{figure.name}: {figure.how}" for figure in result.figures)
        console.print(f"{result.task}: {result.protocol}. {rules}", markup=False, highlight=False)
        if result.cut:
            cut = f"  {result.cut:,} of {result.questions:,} questions are longer than the context"
            console.print(f"{cut} and lose their beginning", markup=False, highlight=False)


def shown(value: float) -> str:
    """Four decimals for shares, fewer digits for what is large."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def mirror(store: Store, run: str | None = None, study: str | None = None) -> None:
    """Bring MLflow up to date for what is there already: `study`, or the studies and sweeps that hold `run`. A tracker
    that does not work costs one line."""
    from gpt2lab.errors import Gpt2labError
    from gpt2lab.tracking import Tracker, open_tracker
    from gpt2lab.tracking.follower import links, sync, tracked_records

    records = (
        [store.study(study).plain()] if study else [record for record in tracked_records(store) if run in held(record)]
    )
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


def print_json(record: dict[str, Any]) -> None:
    """For programs."""
    from gpt2lab.analysis.verdicts import as_json

    print(json.dumps(as_json(record), indent=1, allow_nan=False))


def shown_progress() -> Any:
    """What is done so far, on standard error: a bar on a terminal; elsewhere a line for each metric or task and run,
    and another one now and then."""
    import contextlib
    import time
    from collections.abc import Callable, Iterator

    @contextlib.contextmanager
    def lines() -> Iterator[Callable[[int, int, str], None]]:
        last, since = "", 0.0

        def told(done: int, total: int, what: str) -> None:
            nonlocal last, since
            if what != last or time.monotonic() - since >= SECONDS_BETWEEN_LINES:
                amount = f": {done:,} of {total:,}" if what == last else ""
                print(f"{what}{amount}", file=sys.stderr, flush=True)
                last, since = what, time.monotonic()

        yield told

    @contextlib.contextmanager
    def bar() -> Iterator[Callable[[int, int, str], None]]:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("", total=None)
            yield lambda done, total, what: shown.update(task, completed=done, total=total, description=what)

    return bar() if sys.stderr.isatty() else lines()


def run_record(measured: Measured) -> dict[str, Any]:
    """One run's values for programs."""
    return {"run": measured.id, "values": dict(measured.values), "reused": measured.reused}


def study_record(measured: StudyMeasured) -> dict[str, Any]:
    """A study's values and differences for programs."""
    missing = [{"arm": r.arm, "seed": r.seed, "run": r.id, "status": r.status, "reason": r.reason}
               for r in measured.missing]  # fmt: skip
    return {
        "study": measured.study,
        "metrics": {
            name: {
                "arms": [arm_record(arm) for arm in verdicts.arms],
                "contrasts": [contrast_record(contrast) for contrast in verdicts.contrasts],
            }
            for name, verdicts in measured.verdicts.items()
        },
        "missing": missing,
        "reused": measured.reused,
    }


def arm_record(arm: Any) -> dict[str, Any]:
    """One arm: mean, sd, n and the value of each seed."""
    counts = {"n": arm.n, "failed": arm.failed, "missing": arm.missing}
    return {"arm": arm.name, "mean": arm.mean, "sd": arm.sd, **counts, "values": dict(arm.values)}


def contrast_record(contrast: Contrast) -> dict[str, Any]:
    """One difference with its interval, not adjusted for the family: nothing is claimed."""
    comparable = contrast.word != "not comparable"
    return {
        "arm": contrast.arm,
        "against": contrast.against,
        "difference": contrast.difference if comparable else None,
        "low": contrast.raw_low if comparable else None,
        "high": contrast.raw_high if comparable else None,
        "n": [contrast.n_arm, contrast.n_against],
        "failed": [contrast.failed_arm, contrast.failed_against],
        "word": "exploratory" if comparable else "not comparable",
        "reason": contrast.reason,
    }


def print_study(measured: StudyMeasured, console: Any) -> None:
    """Every value as a table of arms, then the differences."""
    for name, verdicts in measured.verdicts.items():
        console.print(arms_table(name, verdicts))
        for contrast in verdicts.contrasts:
            console.print(f"  {difference_line(contrast)}", markup=False, highlight=False)
        console.print()
    for run in measured.missing:
        console.print(f"{run.arm} seed {run.seed}: {run.status}: {run.reason}", markup=False, highlight=False)
    told = f"{measured.metrics - measured.reused} values measured now, {measured.reused} read from the store"
    console.print(f"{told}. Not declared before running: exploratory, descriptive numbers.", highlight=False)


def arms_table(name: str, verdicts: Verdicts) -> Any:
    """One row for each arm."""
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.text import number

    table = Table(title=Text(name), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "mean", "sd", "n", "values"):
        table.add_column(column, justify="left" if column in ("arm", "values") else "right", overflow="fold")
    for arm in verdicts.arms:
        values = [number(value) for value in arm.values.values()]
        values += [f"{arm.failed} failed"] * bool(arm.failed) + [f"{arm.missing} missing"] * bool(arm.missing)
        mean, sd = number(arm.mean if arm.n else None), number(arm.sd if arm.n > 1 else None)
        table.add_row(Text(arm.name), mean, sd, str(arm.n), ", ".join(values))
    return table


def difference_line(contrast: Contrast) -> str:
    """`rotary - learned: +0.0123 [-0.0100, +0.0346] (n = 3, 3), exploratory`."""
    from gpt2lab.analysis.wording import effect

    head = f"{contrast.arm} - {contrast.against}:"
    record = contrast_record(contrast)
    if record["word"] == "not comparable":
        return f"{head} not comparable: {contrast.reason}"
    numbers = effect(contrast.difference, contrast.raw_low, contrast.raw_high, "").replace("  ", " ").strip()
    return f"{head} {numbers} (n = {contrast.n_arm}, {contrast.n_against}), exploratory"
