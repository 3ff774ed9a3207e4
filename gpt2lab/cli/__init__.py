"""The command line. Thin: it reads arguments, calls one thing, prints what comes back.

Heavy modules are imported inside commands only, so that `gpt2lab --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

import click
import typer

from gpt2lab.cli import catalogue, data, results, run
from gpt2lab.errors import Gpt2labError

app = typer.Typer(
    name="gpt2lab",
    help="Ablations of GPT-2 with verdicts one can trust: a question in YAML goes in, evidence comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.add_to(app)
results.add_to(app)
catalogue.add_to(app)
app.add_typer(data.app, name="data")

INTERRUPTED = 130
READER_GONE = 141


def main() -> None:
    """Run one command. Whatever goes wrong, the user sees where, what and what next, never a traceback; `--debug`
    anywhere on the line shows it all."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False, prog_name="gpt2lab")
        sys.stdout.flush()
    except BrokenPipeError:  # `gpt2lab components | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except Gpt2labError as error:
        if debug:
            traceback.print_exc()
        sys.exit(complain(error.render(), error.exit_code))
    except click.ClickException as error:
        sys.exit(complain(f"gpt2lab: error [USAGE] {error.format_message()}\ntry: gpt2lab --help", 2))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        sys.exit(complain(internal(error), 1))
    sys.exit(code if isinstance(code, int) else 0)


def complain(text: str, code: int) -> int:
    """Print to standard error; -> the exit code."""
    print(text, file=sys.stderr)
    return code


def internal(error: Exception) -> str:
    """Our own bug, in one line, with the trace kept in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="gpt2lab-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"gpt2lab: error [INTERNAL] {type(error).__name__}: {error}\n"
        f"this is a bug in gpt2lab; its trace is in {file.name}"
    )
