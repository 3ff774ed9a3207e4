"""The command line. Thin: each command reads its arguments, makes one call, and prints the result.

Heavy modules are imported only inside commands, so that `gpt2lab --help` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2lab.cli import catalogue, compare, data, manage, models, results, run, selftest, train
from gpt2lab.cli.options import SCHEMA
from gpt2lab.cli.project import project_options
from gpt2lab.errors import EnvironmentFault, Gpt2labError, Preempted, Problem, causes, printable
from gpt2lab.output import lost, make_output_lossy
from gpt2lab.redaction import masked
from gpt2lab.signals import Stopped, ignore_stops, stop_command

app = typer.Typer(
    name="gpt2lab",
    help="Ablation studies of GPT-2: a question in YAML goes in, a report with verdicts comes out.",
    epilog="With --debug anywhere on the line, errors show their traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"gpt2lab {version('gpt2lab')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Options before a command."""


COMMANDS = (
    run.run, catalogue.new, run.check, run.machine, run.sweep, train.train, train.baseline, results.report,
    manage.studies, manage.runs, manage.status, manage.show, manage.diff, manage.curves, manage.tag, manage.note,
    manage.clean, results.sync, results.ui, results.serve, compare.compare, catalogue.components, catalogue.explain,
    catalogue.schema, catalogue.test_plugin, selftest.group, run.noise, results.why, run.adopt, models.eval_,
    models.export, models.doctor, catalogue.trace, models.sample, data.group,
)  # fmt: skip
"""In the order of the help text."""
for command in COMMANDS:
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command(command.__name__.strip("_").replace("_", "-"))(command)

INTERRUPTED = 130
READER_GONE = 141
TRAINS = {"run", "sweep", "train", "baseline", "noise", "adopt"}
# typer brings its own click since 0.16 or so, and used the installed one before: of both, this is the usage error
USAGE: type[Any] = typer.BadParameter.__bases__[0]


def main(app: typer.Typer = app) -> None:
    """Run one command. Errors show where, what and what to do next; a traceback only with `--debug`
    anywhere on the line."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    make_output_lossy()
    stop_command()
    code = execute(words, "--debug" in sys.argv, app)
    ignore_stops()
    sys.exit(with_losses(code, words))


def with_losses(code: int, words: list[str]) -> int:
    """The exit code of a command some of whose output may be lost, as with `gpt2lab components | head`. Of one that
    trains the runs count; another did nothing but print."""
    error = lost(sys.stdout)
    if error is None or code:
        return code
    if error.errno == errno.EPIPE:
        return 0 if set(words[:1]) & TRAINS else READER_GONE
    problem = Problem("standard output", f"what was printed is lost: {error.strerror}")
    if set(words[:1]) & TRAINS:
        return print_error(f"gpt2lab: warning: {problem}", 0)
    return print_error(EnvironmentFault([problem]).render(), EnvironmentFault.exit_code)


def execute(arguments: list[str], debug: bool, app: typer.Typer = app) -> int:
    """Run one command, with errors printed to standard error; -> its exit code."""
    name = str(app.info.name)
    try:
        os.getcwd()
    except OSError as error:
        fault = EnvironmentFault(str(error.strerror), where="the current folder", hint="cd to a folder that exists")
        return print_error(fault.render(), fault.exit_code)
    try:
        options = project_options()
        defaults = dict.fromkeys(typer.main.get_command(app).commands, options) if options else {}  # type: ignore[attr-defined]
        code = app(args=arguments, standalone_mode=False, prog_name=name, default_map=defaults)
    except Gpt2labError as error:
        if debug:
            print(masked(traceback.format_exc()), file=sys.stderr)
        words = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        error.hint = error.hint or " ".join([name, *words, "--help"])
        return print_fault(error, as_json="--json" in arguments)
    except USAGE as error:
        return usage_error(error, as_json="--json" in arguments)
    except Stopped as stop:
        what = f"stopped by {stop} while nothing trained; nothing is lost"
        return print_error(Preempted(what, hint="the same command continues").render(), Preempted.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if debug:
            return print_error(masked(traceback.format_exc()), 1)
        if out_of_memory(error):
            return print_error(no_memory(error).render(), EnvironmentFault.exit_code)
        # Python before 3.13 turns a loop of links into a RuntimeError
        system = error.__context__ if str(error).startswith("Symlink loop") else error
        if isinstance(system, OSError) and system.errno in REFUSED:
            fault = EnvironmentFault(str(system.strerror), where=str(system.filename or name), hint="add --debug")
            return print_error(fault.render(), fault.exit_code)
        return print_error(internal_error(error), 1)
    return code if isinstance(code, int) else 0


def print_error(text: str, code: int) -> int:
    """Print to standard error; -> the exit code."""
    print(text, file=sys.stderr)
    return code


def usage_error(error: Any, *, as_json: bool = False) -> int:
    """Print a usage error; for a group of commands without a command, its help."""
    what = error.format_message()
    if what.startswith("Usage:"):
        print(what)
        return 0
    where = error.ctx.command_path if error.ctx else "gpt2lab"
    fault = Usage(what[:1].lower() + what[1:].rstrip("."), where=where, hint=f"{where} --help")
    return print_fault(fault, as_json=as_json)


class Usage(Gpt2labError):
    """A command line that cannot be read."""

    code = "USAGE"


def print_fault(fault: Gpt2labError, *, as_json: bool) -> int:
    """Print an error, as JSON on one line where the command was to print JSON; -> the exit code."""
    text = json.dumps({"schema": SCHEMA, "error": fault.as_record()}) if as_json else fault.render()
    return print_error(text, fault.exit_code)


MEMORY = ("not enough memory", "annot allocate memory", "can't allocate memory", "can't start new thread",
          "failed to map segment", "std::bad_alloc")  # fmt: skip
"""What torch, the loader of libraries and the kernel say when a process may not have more memory."""
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
)  # fmt: skip
"""Errors of the operating system that are no bug of a program, wherever they occur."""
TRACES_KEPT = 20


def out_of_memory(error: BaseException) -> bool:
    """Whether this, or what it was raised from, is a limit of memory rather than a bug."""
    return any(
        isinstance(cause, MemoryError) or any(words in str(cause) for words in MEMORY)
        for cause in causes(error, implicit=True)
    )


def no_memory(error: BaseException) -> EnvironmentFault:
    """The machine, or a limit of this process, has no more memory."""
    line = str(error).partition("\n")[0]
    return EnvironmentFault(
        f"out of memory{f': {line}' if line else ''}",
        where=type(error).__name__,
        hint="ulimit -v unlimited, fewer --jobs, or a smaller model or batch",
    )


def internal_error(error: Exception) -> str:
    """Our own bug, in one line, with the trace kept in a file."""
    summary = (
        f"gpt2lab: error [INTERNAL] {printable(masked(f'{type(error).__name__}: {error}'))}\nthis is a bug in gpt2lab"
    )
    trace = masked("".join(traceback.format_exception(error)))
    try:
        return f"{summary}; its trace is in {keep_trace(trace)}"
    except OSError:
        return f"{summary}:\n{trace}"


def state_home() -> Path:
    """The user's folder for what programs remember between calls (XDG base directory specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gpt2lab"


def keep_trace(trace: str) -> Path:
    """Write a trace into the user's state folder, of which the newest are kept; returns the file. Raises OSError."""
    folder = state_home() / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".log", delete=False, errors="backslashreplace") as file:
        file.write(trace)
    old = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime_ns)[:-TRACES_KEPT]
    for path in old:
        with contextlib.suppress(OSError):
            path.unlink()
    return Path(file.name)
