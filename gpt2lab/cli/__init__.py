"""The command line. Thin: each command reads its arguments, makes one call, and prints the result.

Heavy modules are imported only inside commands, so that `gpt2lab --help` is fast.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import Any

import typer

from gpt2lab.cli import catalogue, compare, data, models, results, run, selftest, train
from gpt2lab.errors import Gpt2labError, Problem, printable

app = typer.Typer(
    name="gpt2lab",
    help="Ablation studies of GPT-2: a question in YAML goes in, a report with verdicts comes out.",
    epilog="With --debug anywhere on the line, errors show their traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    run.run, run.check, run.machine, run.sweep, train.train, train.baseline, results.report, results.runs, results.show,
    results.sync, results.ui, compare.compare, catalogue.components, catalogue.explain, catalogue.test_plugin,
    selftest.group, run.noise, results.why, run.adopt, models.eval_, models.export, models.doctor, catalogue.trace,
    models.sample, data.group,
)  # fmt: skip
"""In the order of the help text."""
for command in COMMANDS:
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command(command.__name__.strip("_").replace("_", "-"))(command)

INTERRUPTED = 130
BROKEN_PIPE = 141
# the usage error of click, which newer versions of typer bundle
USAGE: type[Any] = typer.BadParameter.__bases__[0]


def main(app: typer.Typer = app) -> None:
    """Run one command. Errors show where, what and what to do next; a traceback only with `--debug`
    anywhere on the line."""
    debug = "--debug" in sys.argv
    try:
        code = execute([word for word in sys.argv[1:] if word != "--debug"], debug, app)
        sys.stdout.flush()
    except BrokenPipeError:  # `gpt2lab components | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def execute(arguments: list[str], debug: bool, app: typer.Typer = app) -> int:
    """Run one command, with errors printed to standard error; -> its exit code."""
    name = str(app.info.name)
    try:
        code = app(args=arguments, standalone_mode=False, prog_name=name)
    except Gpt2labError as error:
        if debug:
            traceback.print_exc()
        words = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        error.hint = error.hint or " ".join([name, *words, "--help"])
        return print_error(error.render(), error.exit_code)
    except USAGE as error:
        return usage_error(error)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return print_error(internal_error(error), 1)
    return code if isinstance(code, int) else 0


def print_error(text: str, code: int) -> int:
    """Print to standard error; -> the exit code."""
    print(text, file=sys.stderr)
    return code


def usage_error(error: Any) -> int:
    """Print a usage error; for a group of commands without a command, its help."""
    what = error.format_message()
    if what.startswith("Usage:"):
        print(what)
        return 0
    where = error.ctx.command_path if error.ctx else "gpt2lab"
    problem = Problem(where, what[:1].lower() + what[1:].rstrip("."))
    return print_error(f"gpt2lab: error [USAGE] {problem}\ntry: {where} --help", 2)


def internal_error(error: Exception) -> str:
    """The message for an unexpected exception, whose traceback is written to a file."""
    with tempfile.NamedTemporaryFile("w", prefix="gpt2lab-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"gpt2lab: error [INTERNAL] {printable(f'{type(error).__name__}: {error}')}\n"
        f"this is a bug in gpt2lab; its trace is in {file.name}"
    )
