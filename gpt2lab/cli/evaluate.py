"""`eval`: a model, or the runs of a study, on tasks, text and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import number
from gpt2lab.cli.options import RUNS, Json, Plugin, Runs, print_json, say, table_of
from gpt2lab.errors import ConfigError

if TYPE_CHECKING:
    from gpt2lab.analysis.items import TaskContrast
    from gpt2lab.analysis.verdicts import Contrast
    from gpt2lab.reuse.evaluate import TaskScores
    from gpt2lab.reuse.measure import StudyMeasured
    from gpt2lab.store import Store

ON_TEXT = ("loss", "perplexity", "bits_per_byte")
"""Metrics of a corpus unless others are named."""


def eval_(
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
    against: Annotated[
        str | None, typer.Option("--against", help="With --tasks: another model on the same questions.")
    ] = None,
    smallest_effect: Annotated[
        float | None,
        typer.Option(
            "--smallest-effect",
            "-x",
            help="With --tasks: smallest difference in a score that matters, as "
            "0.01; declared before the task is first measured.",
            min=1e-6,
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Evaluate on this text: a corpus, or files such as 'text/*.txt'.")
    ] = None,
    plugin: Plugin = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Evaluate trained models with metrics or tasks. Results are stored with the runs."""
    from functools import partial

    from gpt2lab.config import fill_slots
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.evaluation.tasks import read_tasks
    from gpt2lab.reuse.evaluate import compare_models, evaluate_study_tasks, evaluate_tasks
    from gpt2lab.reuse.measure import measure_study, read_metrics
    from gpt2lab.store import Store

    show: Callable[[Any], None]
    if (source is None) == (study is None):
        raise ConfigError("one run, or one study, is expected", hint="gpt2lab eval --study NAME --metric top1")
    for is_wrong, problem in (
        (tasks is not None and (metric or corpus), "--tasks cannot be combined with --metric or --corpus"),
        (tasks is None and limit, "--limit applies to --tasks only"),
        (study and corpus, "--corpus evaluates one model, not a study"),
        ((tasks is None and (against or smallest_effect)) or (study and against),
         "--against and --smallest-effect apply to --tasks only; a study has its own contrasts"),
    ):  # fmt: skip
        if is_wrong:
            raise ConfigError(problem, hint="gpt2lab eval --help")
    fill_slots(plugin or ())
    store, chosen = Store(runs), None if tasks is None else read_tasks(tasks.split(","), "--tasks")
    with rich_progress(of_bytes=False) as progress:
        if study is not None:
            if chosen is None:
                measured = measure_study(study, store, read_metrics(metric or ()), progress=progress)
            else:
                measured = evaluate_study_tasks(
                    study, store, chosen, limit=limit, progress=progress, smallest_effect=smallest_effect
                )
            record, show = measured.as_record(), partial(print_study, measured)
        elif chosen is not None:
            scores = evaluate_tasks(str(source), store, chosen, limit=limit, progress=progress)
            record, show = scores.as_record(limit), partial(print_tasks, [scores])
            if against:
                other = evaluate_tasks(against, store, chosen, limit=limit, progress=progress)
                contrasts = compare_models(scores, other, smallest_effect=smallest_effect)
                record |= {"against": other.as_record(limit), "contrasts": [c.to_json() for c in contrasts]}
                show = partial(print_tasks, [scores, other], contrasts=contrasts)
        else:
            record = metric_values(str(source), store, metric or (), corpus, progress)
            show = partial(say_values, record["values"])
    if json_:
        print_json(record, indent=1)
    else:
        show(console_for())


def metric_values(
    source: str, store: Store, metrics: Sequence[str], corpus: str | None, progress: Any
) -> dict[str, Any]:
    """Metrics of a run, or of any model on the text of a corpus, as plain data."""
    from gpt2lab.reuse.evaluate import measure_on_text
    from gpt2lab.reuse.measure import measure, read_metrics

    choices = read_metrics(metrics or (ON_TEXT if corpus else ()))
    if corpus is not None:
        values = measure_on_text(source, store, corpus, choices, progress=progress)
        return {"source": source, "corpus": corpus, "values": values}
    measured = measure(store.find(source), choices, progress=progress)
    return {"run": measured.id, "values": dict(measured.values), "reused": measured.reused}


def say_values(values: Mapping[str, float], console: Any) -> None:
    """A line for each value."""
    say(console, *(f"{name}: {value:.6g}" for name, value in values.items()))


def print_tasks(models: Sequence[TaskScores], console: Any, contrasts: Sequence[TaskContrast] = ()) -> None:
    """A row for each figure of a model with its standard error, then differences, protocols and definitions."""
    numbers = ("value", "± error", "questions")
    for scores in models:
        rows = []
        for result in scores.results:
            for place, figure in enumerate(result.figures):
                error = "" if figure.stderr is None else four_decimals(figure.stderr)
                head, questions = (result.task, f"{result.questions:,}") if place == 0 else ("", "")
                rows.append((head, figure.name, four_decimals(figure.value), error, questions))
        console.print(table_of("task", "measure", *numbers, rows=rows, right=numbers, title=scores.name))
    say(console, *map(str, contrasts))
    for result in models[0].results:
        rules = "; ".join(f"{figure.name}: {figure.how}" for figure in result.figures)
        say(console, f"{result.task}: {result.protocol}. {rules}")
        if result.cut:
            cut = f"  {result.cut:,} of {result.questions:,} questions are longer than the context"
            say(console, f"{cut} and lose their beginning")


def four_decimals(value: float) -> str:
    """Four decimals, or four significant digits for large values."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def print_study(measured: StudyMeasured, console: Any) -> None:
    """Every value as a table of arms, then the differences."""
    for name, verdicts in measured.verdicts.items():
        numbers = ("mean", "sd", "n")
        rows = []
        for arm in verdicts.arms:
            values = [number(value) for value in arm.values.values()]
            values += [f"{arm.failed} failed"] * bool(arm.failed) + [f"{arm.missing} missing"] * bool(arm.missing)
            mean, sd = number(arm.mean if arm.n else None), number(arm.sd if arm.n > 1 else None)
            rows.append((arm.name, mean, sd, str(arm.n), ", ".join(values)))
        console.print(table_of("arm", *numbers, "values", rows=rows, right=numbers, title=name))
        say(console, *(f"  {difference_line(contrast)}" for contrast in verdicts.contrasts), "")
    say(console, *(f"{run.arm} seed {run.seed}: {run.status}: {run.reason}" for run in measured.missing))
    count = f"{measured.metrics - measured.reused} values measured now, {measured.reused} read from the store."
    say(console, *map(str, measured.contrasts))
    if any(contrast.word for contrast in measured.contrasts):
        say(
            console, "Intervals and words of tasks are for new seeds and new questions, Holm-adjusted over all of them."
        )
    else:
        count += " Not declared before running: exploratory, descriptive numbers."
    say(console, count)


def difference_line(contrast: Contrast) -> str:
    """`rotary - learned: +0.0123 [-0.0100, +0.0346] (n = 3, 3), exploratory`."""
    from gpt2lab.analysis.wording import effect

    head = f"{contrast.arm} - {contrast.against}:"
    if contrast.word == "not comparable":
        return f"{head} not comparable: {contrast.reason}"
    numbers = effect(contrast.difference, contrast.raw_low, contrast.raw_high, "").replace("  ", " ").strip()
    return f"{head} {numbers} (n = {contrast.n_arm}, {contrast.n_against}), exploratory"
