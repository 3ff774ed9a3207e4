"""The command line. Thin: it reads arguments, calls one thing, prints what comes back.

Heavy modules are imported inside commands only, so that `gpt2lab --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import Any

import typer

from gpt2lab.cli import (
    baseline,
    catalogue,
    compare,
    data,
    doctor,
    eval,
    export,
    identity,
    noise,
    results,
    run,
    sample,
    selftest,
    sweep,
    trace,
    train,
)
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
run.add_to(app)
sweep.add_to(app)
train.add_to(app)
baseline.add_to(app)
results.add_to(app)
compare.add_to(app)
catalogue.add_to(app)
selftest.add_to(app)
noise.add_to(app)
identity.add_to(app)
eval.add_to(app)
export.add_to(app)
doctor.add_to(app)
trace.add_to(app)
sample.add_to(app)
app.add_typer(data.app, name="data")

INTERRUPTED = 130
READER_GONE = 141
# typer brings its own click since 0.16 or so, and used the installed one before: of both, this is the usage error
USAGE: type[Any] = typer.BadParameter.__bases__[0]


def main(app: typer.Typer = app) -> None:
    """Run one command. Whatever goes wrong, the user sees where, what and what next, never a traceback; `--debug`
    anywhere on the line shows it all."""
    debug = "--debug" in sys.argv
    try:
        code = answer([word for word in sys.argv[1:] if word != "--debug"], debug, app)
        sys.stdout.flush()
    except BrokenPipeError:  # `gpt2lab components | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = READER_GONE
    sys.exit(code)


def answer(arguments: list[str], debug: bool, app: typer.Typer = app) -> int:
    """Run one command; -> its exit code, everything that is to be said about an error having been said."""
    name = str(app.info.name)
    try:
        code = app(args=arguments, standalone_mode=False, prog_name=name)
    except Gpt2labError as error:
        if debug:
            traceback.print_exc()
        error.hint = error.hint or help_of(name, arguments)
        return complain(error.render(), error.exit_code)
    except USAGE as error:
        return misused(error)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return complain(internal(error), 1)
    return code if isinstance(code, int) else 0


def complain(text: str, code: int) -> int:
    """Print to standard error; -> the exit code."""
    print(text, file=sys.stderr)
    return code


def help_of(name: str, arguments: list[str]) -> str:
    """The command that shows what the command line offers here."""
    words = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    return " ".join([name, *words, "--help"])


def misused(error: Any) -> int:
    """Say what is wrong with the command line itself; a group of commands without a command shows its help."""
    what = error.format_message()
    if what.startswith("Usage:"):
        print(what)
        return 0
    where = error.ctx.command_path if error.ctx else "gpt2lab"
    problem = Problem(where, what[:1].lower() + what[1:].rstrip("."))
    return complain(f"gpt2lab: error [USAGE] {problem}\ntry: {where} --help", 2)


def internal(error: Exception) -> str:
    """Our own bug, in one line, with the trace kept in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="gpt2lab-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"gpt2lab: error [INTERNAL] {printable(f'{type(error).__name__}: {error}')}\n"
        f"this is a bug in gpt2lab; its trace is in {file.name}"
    )
