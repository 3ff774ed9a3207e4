"""The command line. Thin: each command reads its arguments, makes one call, and prints the result.

Heavy modules are imported only inside commands, so that `gpt2lab --help` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2lab.basics.output import lost, make_output_lossy
from gpt2lab.basics.redaction import masked
from gpt2lab.basics.signals import ENDED, Stopped, ignore_stops, stop_command
from gpt2lab.cli import (
    agents,
    begin,
    catalogue,
    compare,
    data,
    doctor,
    evaluate,
    ledger,
    manage,
    models,
    plan,
    pull,
    results,
    run,
    selftest,
    sweep,
    trace,
    train,
)
from gpt2lab.cli.options import print_fault
from gpt2lab.cli.project import project_options
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Interrupted, Preempted, Problem, causes

COMMANDS: dict[str, tuple[Any, ...]] = {
    "Studies": (begin.init, begin.new, begin.try_, plan.check, run.run, run.work, sweep.sweep, run.noise),
    "Single runs": (train.train, train.baseline),
    "Results": (
        results.report, manage.studies, manage.status, manage.runs, manage.show, manage.diff, manage.curves,
        compare.compare, results.serve, results.ui, results.sync,
    ),
    "Records": (
        manage.note, manage.tag, ledger.ledger, ledger.register, pull.pull, manage.clean, results.why, run.adopt,
    ),
    "Models": (evaluate.eval_, models.sample, models.export, trace.trace),
    "Components and data": (
        catalogue.components, catalogue.explain, catalogue.schema, catalogue.test_plugin, data.group,
    ),
    "Installation": (doctor.doctor, plan.machine, selftest.group, agents.mcp),
}  # fmt: skip
"""Heading in the help text -> commands."""


class Commands(typer.core.TyperGroup):
    """Lists commands below headings, which Typer does only with rich markup."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        longest = max(map(len, self.commands))
        for heading in COMMANDS:
            listed = [c for c in self.commands.values() if getattr(c, "rich_help_panel", None) == heading]
            with formatter.section(heading):
                formatter.write_dl([
                    (str(c.name).ljust(longest), c.get_short_help_str(formatter.width - longest)) for c in listed
                ])  # fmt: skip


app = typer.Typer(
    name="gpt2lab",
    cls=Commands,
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


for heading, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=heading)
        else:
            app.command(command.__name__.strip("_").replace("_", "-"), rich_help_panel=heading)(command)

READER_GONE = 141
COLLECTED_AFTER = (50_000, 10, 10)
"""Thresholds of Python's garbage collector: with its defaults it visits what imports made again and again."""
TRAINS = {"run", "work", "try", "sweep", "train", "baseline", "noise", "adopt"}
# typer brings its own click since 0.16 or so, and used the installed one before: of both, this is the usage error
USAGE: type[Any] = typer.BadParameter.__bases__[0]


def main(app: typer.Typer = app) -> None:
    """Run one command. Errors show where, what and what to do next; a traceback only with `--debug`
    anywhere on the line."""
    gc.set_threshold(*COLLECTED_AFTER)
    words = [word for word in sys.argv[1:] if word != "--debug"]
    make_output_lossy()
    stop_command()
    code = execute(words, "--debug" in sys.argv, app)
    ignore_stops()
    code = with_losses(code, words)
    gc.freeze()  # or Python would visit every object of torch before it ends, which takes half as long as its import
    sys.exit(code)


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
        print(f"gpt2lab: warning: {problem}", file=sys.stderr)
        return 0
    return print_fault(EnvironmentFault([problem]), as_json="--json" in words)


def execute(arguments: list[str], debug: bool, app: typer.Typer = app) -> int:
    """Run one command, with errors printed to standard error; -> its exit code."""
    name = str(app.info.name)
    try:
        refuse_lost_folder()
        options = project_options()
        defaults = dict.fromkeys(typer.main.get_command(app).commands, options) if options else {}  # type: ignore[attr-defined]
        code = app(args=arguments, standalone_mode=False, prog_name=name, default_map=defaults)
        if code == Interrupted.exit_code:  # typer's answer to KeyboardInterrupt
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        return print_fault(Interrupted(ENDED), as_json="--json" in arguments)
    except SystemExit:  # a command's own exit code
        raise
    except BaseException as error:  # a plug-in may raise any
        if isinstance(error, USAGE) and (help_text := error.format_message()).startswith("Usage:"):
            print(help_text)  # of a group of commands without a command
            return 0
        if debug and not isinstance(error, (USAGE, Stopped)):
            print(masked(traceback.format_exc()), file=sys.stderr)
            if not isinstance(error, Gpt2labError):
                return 1
        fault = fault_of(error, name, arguments)
        words = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        fault.hint = fault.hint or " ".join([name, *words, "--help"])
        return print_fault(fault, as_json="--json" in arguments)
    return code if isinstance(code, int) else 0


def refuse_lost_folder() -> None:
    """Raises EnvironmentFault where the current folder is gone."""
    try:
        os.getcwd()
    except OSError as error:
        hint = "cd to a folder that exists"
        raise EnvironmentFault(str(error.strerror), where="the current folder", hint=hint) from None


def fault_of(error: BaseException, name: str, arguments: list[str]) -> Gpt2labError:
    """What a command raised, for its user. A bug of ours leaves its trace in a file."""
    if isinstance(error, Gpt2labError):
        return error
    if isinstance(error, Stopped):
        return Preempted(
            f"stopped by {error} while nothing trained; nothing is lost", hint="the same command continues"
        )
    if isinstance(error, USAGE):
        what, where = error.format_message(), error.ctx.command_path if error.ctx else name
        hint = with_set(error, what, [name, *arguments]) or f"{where} --help"
        return Usage(what[:1].lower() + what[1:].rstrip("."), where=where, hint=hint)
    if out_of_memory(error):
        return no_memory(error)
    # Python before 3.13 turns a loop of links into a RuntimeError
    system = error.__context__ if str(error).startswith("Symlink loop") else error
    if isinstance(system, OSError) and system.errno in REFUSED:
        return EnvironmentFault(str(system.strerror), where=str(system.filename or name), hint="add --debug")
    return of_plugin(error) or Bug(error)


def with_set(error: Any, what: str, arguments: list[str]) -> str | None:
    """The command line with `--set` before settings that were given without it, as other programs take them."""
    settings = re.findall(r"[\w.]+=[^\s)]+", what) if "extra argument" in what else []
    if not settings or not any("--set" in parameter.opts for parameter in error.ctx.command.params):
        return None
    return shlex.join(word for each in arguments for word in (("--set", each) if each in settings else (each,)))


def of_plugin(error: BaseException) -> ConfigError | None:
    """An error with a line of a plug-in in its trace; None where there is none."""
    from gpt2lab.registry import PLUGINS, line_in

    for file in PLUGINS:
        if line := line_in(error, file):
            what = f"this plug-in raised {type(error).__name__}: {error}"
            hint = shlex.join(["gpt2lab", "test-plugin", file])
            return ConfigError([Problem(f"{file}:{line}", what)], hint=f"{hint}; for the trace, add --debug")
    return None


class Usage(Gpt2labError):
    """A command line that cannot be read."""

    code = "USAGE"


class Bug(Gpt2labError):
    """Our own mistake, with the trace kept in a file."""

    code = "INTERNAL"
    exit_code = 1

    def __init__(self, error: BaseException) -> None:
        trace = masked("".join(traceback.format_exception(error)))
        try:
            advice = f"this is a bug in gpt2lab; its trace is in {keep_trace(trace)}"
        except OSError:
            advice = f"this is a bug in gpt2lab:\n{trace}"
        super().__init__(f"{type(error).__name__}: {error}", hint=advice)

    def render(self) -> str:
        return "\n".join([*super().render().splitlines()[:1], str(self.hint)])


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
