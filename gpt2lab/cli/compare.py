"""The command that judges a table of results of any runs: compare."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.text import harmless
from gpt2lab.cli.options import Json, Runs, print_json
from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    from gpt2lab.analysis import Verdicts

MLFLOW = "mlflow:"
OPTIONS = {
    "higher_is_better=True": "--higher-is-better",
    "higher_is_better=False": "--lower-is-better",
    r"^(\w+)_(\w+)=": r"--\1-\2 ",
    r"^(\w+)=": r"--\1 ",
}
"""Pattern of a hint for Python, such as baseline='learned' -> the option of this command."""


def looks_of(text: str) -> tuple[int, ...]:
    """Numbers of seeds, written as 3,5,8. Raises typer.BadParameter."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 3,5,8")
    return tuple(map(int, numbers))


def pair_of(text: str) -> tuple[str, str]:
    """Two arms, written as A,B. Raises typer.BadParameter."""
    arm, _, against = map(str.strip, text.partition(","))
    if not arm or not against or arm == against or "," in against:
        raise typer.BadParameter(f"{text!r} is not two arms such as rotary,learned")
    return arm, against


def compare(
    file: Annotated[
        str,
        typer.Argument(
            help="A CSV file with columns arm, seed (or run) and value, a loss in nats, or a metric known by name; or "
            "what Weights & Biases or MLflow export; files or a folder of TensorBoard, W&B (offline), trackio or "
            "lm-eval; an MLflow experiment, as mlflow:NAME; or one study of it, as mlflow:posenc@nano.",
            metavar="TABLE|FOLDER|mlflow:EXPERIMENT",
        ),
    ],
    baseline: Annotated[str, typer.Option("--baseline", "-b", help="The arm that others are compared with.")],
    smallest_effect: Annotated[
        float, typer.Option("--smallest-effect", "-x", help="Smallest difference that matters.")
    ],
    metric: Annotated[str | None, typer.Option("--metric", help="The metric, or the value column.")] = None,
    higher_is_better: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better", help="Direction, if the metric's name does not determine it."
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option("--unit", help="Unit, if the metric's name does not determine it.")
    ] = None,
    arm: Annotated[
        str | None, typer.Option("--arm", help="Column with the arm, such as params.model.", metavar="COLUMN")
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", help="Column that distinguishes runs of an arm.", metavar="COLUMN")
    ] = None,
    contrast: Annotated[
        list[Any] | None,
        typer.Option(
            "--contrast",
            parser=pair_of,
            metavar="A,B",
            help="Judge A against B, in place of every arm against the baseline; repeatable.",
        ),
    ] = None,
    looks: Annotated[
        Any,
        typer.Option(
            "--looks",
            parser=looks_of,
            metavar="N,N,...",
            help="Seeds per arm at which it was declared to look, as 3,5,8; seeds count in the order of their numbers, "
            "runs in MLflow as they were begun.",
        ),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Rate of false positives for the whole family.")] = 0.05,
    unigram: Annotated[
        float | None,
        typer.Option("--unigram", help="Loss of counting tokens alone, in nats; runs not 0.05 below it failed."),
    ] = None,
    force_exploratory: Annotated[
        bool,
        typer.Option(
            "--force-exploratory",
            help="Show numbers of arms that the table's column not_comparable bars; claim nothing of them.",
        ),
    ] = False,
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", help="MLflow's address; by default MLFLOW_TRACKING_URI or the store's."),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Judge a table of results trained elsewhere. Prints a verdict per arm, and how the values were read."""
    from gpt2lab.analysis import compare as judge

    try:
        verdicts = judge(
            rows_of(file, tracking_uri, runs),
            baseline=baseline,
            smallest_effect=smallest_effect,
            alpha=alpha,
            metric=metric,
            arm=arm,
            seed=seed,
            contrasts=contrast or None,
            unigram=unigram,
            looks=looks,
            force_exploratory=force_exploratory,
            higher_is_better=higher_is_better,
            unit=unit,
        )
    except ConfigError as error:
        for python, option in OPTIONS.items():
            error.hint = error.hint and re.sub(python, option, error.hint)
        raise
    refuse_unknown_arms(verdicts)
    if json_:
        print_json(verdicts.to_json(), indent=1)
    else:
        print(harmless(f"{verdicts}\nread as: {verdicts.read_as}"))


def rows_of(table: str, tracking_uri: str | None, runs: Path) -> Any:
    """The table as `gpt2lab.compare` takes it: the path of a CSV file, or the runs of an MLflow experiment."""
    if not table.startswith(MLFLOW):
        return Path(table)
    from gpt2lab.tracking.addresses import default_uri
    from gpt2lab.tracking.mlflow import read_experiment

    return read_experiment(table.removeprefix(MLFLOW), tracking_uri or default_uri(runs))


def refuse_unknown_arms(verdicts: Verdicts) -> None:
    """Raises ConfigError for arms without rows: in Python they may be declared early, on a command line they are
    typos."""
    present = [arm.name for arm in verdicts.arms if arm.declared]
    absent = [arm.name for arm in verdicts.arms if not arm.declared]
    if absent:
        raise ConfigError([Problem("--contrast", unknown("arm", name, present)) for name in absent])
