"""`python -m benchmarks`, from the root of a checkout."""

import typer

from benchmarks.ablation import ablation
from benchmarks.calibration import calibration
from benchmarks.components import components
from benchmarks.deciding import deciding
from benchmarks.generate import generate
from benchmarks.keep import keep
from benchmarks.memory import memory
from benchmarks.preemption import preemption
from benchmarks.stacked import stacked
from benchmarks.step import step
from benchmarks.store import store
from benchmarks.tables import tables
from gpt2lab.cli import main

app = typer.Typer(
    name="python -m benchmarks",
    help="Measure ours beside others. The figures are only as good as the machine is quiet; ratios suffer least.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    tables,
    step,
    components,
    memory,
    ablation,
    generate,
    stacked,
    keep,
    deciding,
    preemption,
    store,
    calibration,
):
    app.command()(command)

if __name__ == "__main__":
    main(app)
