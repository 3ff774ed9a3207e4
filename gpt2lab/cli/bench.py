"""How fast and how large training is, measured beside others: bench step, bench memory, bench ablation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli import bench_generate, bench_tokenize
from gpt2lab.cli.run import Json
from gpt2lab.errors import ConfigError, unknown

if TYPE_CHECKING:
    import torch

    from gpt2lab.bench.ablation import Packing
    from gpt2lab.bench.compare import Comparison

app = typer.Typer(help="Measure training beside others.", no_args_is_help=True)

PRECISIONS = ("fp32", "bf16", "fp16")
Size = Annotated[
    str, typer.Option("--config", help="What is trained: a, b256, b50k, c or d (see docs/performance.md).")
]
Precision = Annotated[str, typer.Option("--precision", help="Of our matrix products: fp32, bf16 or fp16.")]
OtherPrecision = Annotated[str, typer.Option("--vs-precision", help="Of the other side's: fp32 or bf16.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")]


def add_to(parent: typer.Typer) -> None:
    """Put this file's commands into the application."""
    bench_generate.add_to(app)
    bench_tokenize.add_to(app)
    parent.add_typer(app, name="bench")


@app.command()
def step(
    config: Size = "a",
    vs: Annotated[
        str, typer.Option("--vs", help="The other side: plain, transformers, or nanogpt=PATH of a checkout.")
    ] = "plain",
    model: Annotated[str, typer.Option("--model", help="plain puts the plain model into our engine.")] = "gpt2lab",
    precision: Precision = "fp32",
    vs_precision: OtherPrecision = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile our model.")] = False,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of steps of each side, in turns.", min=1)] = 5,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Time only; memory takes a process each.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Time our training step and another's in turns: same weights, same batches, one process.

    The figures are only as good as the machine is quiet; the ratio suffers least, as both sides take turns.
    """
    from dataclasses import replace

    from gpt2lab.bench.compare import compare
    from gpt2lab.bench.sides import Spec
    from gpt2lab.bench.work import work_named

    if model not in ("gpt2lab", "plain"):
        raise ConfigError(unknown("model", model, ("gpt2lab", "plain")), where="--model")
    work = work_named(config)
    if vs == "transformers":
        work = replace(work, bias=True)  # it knows no GPT-2 without
    ours = Spec("gpt2lab", checked(precision, PRECISIONS), plain_model=model == "plain", compile=compile_)
    theirs = Spec(vs, checked(vs_precision, PRECISIONS[:2]))
    found = compare(config, work, (ours, theirs), chosen_device(device, threads), blocks=blocks, memory=not no_memory)
    if json_:
        print(json.dumps(found.to_json()))
    else:
        show(found)


@app.command()
def memory(
    config: Size = "b256",
    batches: Annotated[str, typer.Option("--batches", help="Sequences in a batch, with commas.")] = "2,8,32",
    vocabularies: Annotated[str, typer.Option("--vocabularies", help="Sizes, with commas.")] = "256,8192,50304",
    vs: Annotated[str, typer.Option("--vs", help="As for bench step.")] = "plain",
    precision: Precision = "fp32",
    vs_precision: OtherPrecision = "fp32",
    threads: Threads = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Measure the peak memory of training against batch and vocabulary, each in a process of its own."""
    from dataclasses import replace

    from gpt2lab.bench.memory import peak_bytes
    from gpt2lab.bench.sides import Spec
    from gpt2lab.bench.work import work_named

    place, at = chosen_device(device, threads), thread_count()
    base = replace(work_named(config), bias=vs == "transformers")
    specs = (Spec("gpt2lab", checked(precision, PRECISIONS)), Spec(vs, checked(vs_precision, PRECISIONS[:2])))
    rows: list[dict[str, Any]] = []
    for vocab_size in integers(vocabularies, "--vocabularies"):
        for sequences in integers(batches, "--batches"):
            work = replace(base, vocab_size=vocab_size, sequences=sequences)
            peaks = {spec.name.partition("=")[0]: peak_bytes(spec, work, place, at) for spec in specs}
            rows.append({"vocab_size": vocab_size, "sequences": sequences, "peak_memory_bytes": peaks})
    if json_:
        print(json.dumps({"config": config, "precision": precision, "threads": at, "rows": rows}))
        return
    from rich.table import Table

    from gpt2lab.display import console_for
    from gpt2lab.text import memory as in_units

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("vocabulary", "batch", *rows[0]["peak_memory_bytes"], "share"):
        table.add_column(name, justify="right")
    for row in rows:
        mine, other = row["peak_memory_bytes"].values()
        cells = (
            f"{row['vocab_size']:,}",
            str(row["sequences"]),
            in_units(mine),
            in_units(other),
            f"{mine / other:.2f}",
        )
        table.add_row(*cells)
    console_for().print(table)


@app.command()
def ablation(
    file: Annotated[str, typer.Argument(help="An ablation's YAML file.", metavar="FILE")] = "ablations/posenc.yaml",
    scale: Annotated[str, typer.Option("--scale", "-s", help="Preset to run at.")] = "nano",
    arms: Annotated[str, typer.Option("--arms", help="Only these arms, separated by commas.")] = "learned,rotary,none",
    seeds: Annotated[int | None, typer.Option("--seeds", "-n", help="Seeds per arm.", min=1)] = None,
    steps_: Annotated[
        int | None, typer.Option("--steps", help="Steps of each run, in place of the preset's.", min=2)
    ] = None,
    json_: Json = False,
) -> None:
    """Time an ablation packed as `gpt2lab run` packs it against its runs one after another with all cores each.

    Nothing is kept and nothing goes to MLflow. The figures are only as good as the machine is quiet.
    """
    from gpt2lab.bench.ablation import bench_ablation
    from gpt2lab.display import console_for, display

    console = console_for(to_stderr=True)
    found = bench_ablation(
        file,
        scale=scale,
        arms=[name.strip() for name in arms.split(",") if name.strip()],
        seeds=seeds,
        steps=steps_,
        shown=lambda plan: display(console, "packed", plan.machine.jobs),
    )
    if json_:
        print(json.dumps(found.to_json()))
    else:
        show_packing(found)


def show_packing(found: Packing) -> None:
    """A table of two rows and two sentences."""
    from rich.table import Table

    from gpt2lab.display import console_for

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "side by side", "threads each", "seconds", "of training"):
        table.add_column(name, justify="right" if name else "left")
    for name, way in (("packed", found.packed), ("one after another", found.serial)):
        table.add_row(name, str(way.jobs), str(way.threads), f"{way.seconds:.1f}", f"{way.training_seconds:.1f}")
    console = console_for()
    console.print(table)
    cold, warm = found.start_up["cold"], found.start_up["warm"]
    said = (
        f"{found.ablation}: {found.runs} runs of {found.steps} steps are done {found.ratio:.2f} times as fast packed\n"
        f"a worker begins its first step after {warm:.2f} s, in a process from scratch after {cold:.2f} s"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def show(found: Comparison) -> None:
    """A table of two rows and a sentence."""
    from rich.table import Table

    from gpt2lab.display import console_for
    from gpt2lab.text import memory as in_units
    from gpt2lab.text import quantity

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "precision", "ms per step", "blocks", "tokens/s", "FLOP/s", "of the limit", "memory"):
        table.add_column(name, justify="left" if name in ("", "precision") else "right")
    for side in found.sides:
        table.add_row(
            side.name, side.precision, f"{side.milliseconds:.4g}", f"{side.low:.4g} to {side.high:.4g}",
            quantity(side.tokens_per_second), quantity(side.flops_per_second), f"{100 * side.of_limit:.0f} %",
            in_units(side.peak_memory_bytes),
        )  # fmt: skip
    console = console_for()
    console.print(table)
    ours, theirs = found.sides
    reach = f", 95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}" if found.interval else ""
    said = (
        f"configuration {found.config}: {ours.name} is {found.ratio:.2f} times as fast as {theirs.name}{reach} "
        f"({found.blocks} blocks each, {found.device}, {found.threads} threads)"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def checked(precision: str, known: tuple[str, ...]) -> Any:
    """Raises ConfigError."""
    if precision not in known:
        raise ConfigError(unknown("precision", precision, known), where="bench")
    return precision


def chosen_device(name: str, threads: int | None) -> torch.device:
    """The device, with torch's threads set. Raises ConfigError, or EnvironmentFault where there is none."""
    from gpt2lab.training.precision import choose_device, set_threads

    if name not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(unknown("device", name, ("auto", "cpu", "cuda", "mps")), where="--device")
    set_threads(threads)
    return choose_device(name)  # type: ignore[arg-type]


def thread_count() -> int:
    """Torch's."""
    import torch

    return torch.get_num_threads()


def integers(text: str, where: str) -> list[int]:
    """`2,8,32`. Raises ConfigError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"'{text}' is no list of whole numbers", where=where, hint=f"{where} 2,8,32") from error
    if min(found) < 1:
        raise ConfigError(f"{min(found)} is below 1", where=where, hint=f"{where} 2,8,32")
    return found
