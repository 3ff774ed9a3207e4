"""Where runs train: the options of `run` and `sweep`, by hand or from a profile of gpt2lab.toml, and what they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.project import profile_options
from gpt2lab.errors import ConfigError, unknown

if TYPE_CHECKING:
    from gpt2lab.executors import Executor
    from gpt2lab.planning.machine import Machine

LOCAL, PRINT, SLURM, RAY = "local", "print", "slurm", "ray"
EXECUTORS = (LOCAL, SLURM, RAY, PRINT)
USED_BY = {"workers": (SLURM, RAY), "sbatch": (SLURM,), "jobs": EXECUTORS}
"""Option -> the executors that it is for."""


def check_executor(name: str, plugins: Sequence[str]) -> None:
    """Raises ConfigError for a name that is neither one of ours nor registered by a plug-in."""
    if name in EXECUTORS:
        return
    from gpt2lab.config import fill_slots
    from gpt2lab.executors import executor

    fill_slots(plugins)
    if name not in executor:
        hint = "--plugin FILE, where its class is registered"
        raise ConfigError(unknown("executor", name, [*EXECUTORS, *executor.names()]), where="--executor", hint=hint)


def use_profile(context: typer.Context, name: str | None) -> str | None:
    """Take a profile's options as defaults of this command. Raises ConfigError."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **profile_options(name)}
    return name


Profile = Annotated[
    str | None,
    typer.Option("--profile", help="Options of [profiles.NAME] in gpt2lab.toml, such as the executor.", is_eager=True,
                 callback=use_profile, metavar="NAME"),
]  # fmt: skip
ExecutorName = Annotated[
    str,
    typer.Option("--executor", metavar="|".join((*EXECUTORS, "NAME")), help="Where runs train: here, in Slurm, on Ray, "
                 "wherever the printed command is started, or in a plug-in's executor."),
]  # fmt: skip
Workers = Annotated[
    int,
    typer.Option("--workers", help="Slurm jobs, or GPUs (CPU runs) on Ray; each with --jobs runs at a time.", min=1),
]
Sbatch = Annotated[
    str, typer.Option("--sbatch", help="Options of each Slurm job, such as '--partition=gpu --gpus=1 --time=12:00:00'.")
]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", help="Ranks of every run, which share its batches: one per GPU, or CPU cores. Runs then "
                 "train one at a time.", min=1),
]  # fmt: skip
MachineFile = Annotated[
    Path | None,
    typer.Option("--machine", help="With --dry-run or --executor: plan for the machine in this file, written by "
                 "`gpt2lab machine`."),
]  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Where runs train. jobs: runs at a time of each worker. ranks: of each run. machine: that of the workers, where it
    is described."""

    executor: str
    workers: int
    sbatch: tuple[str, ...]
    jobs: int | None
    ranks: int
    machine: Machine | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether workers of a cluster train."""
        return self.executor in (SLURM, RAY)

    @property
    def local_jobs(self) -> int | None:
        """Runs at a time on this machine, as they were asked for; `jobs` of a cluster's worker do not concern it."""
        return None if self.is_elsewhere else self.jobs

    @cached_property
    def plugin(self) -> Executor | None:
        """The executor, if it is a plug-in's. Raises ConfigError where it lacks a member."""
        from gpt2lab.executors import Executor, executor

        if self.is_elsewhere or self.executor in (LOCAL, PRINT):
            return None
        factory = executor[self.executor].factory
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            what = f"{factory.__name__} is made without arguments, but: {error}"
            raise ConfigError(what, where=f"--executor {self.executor}", hint="give its arguments defaults") from None
        made: Executor = factory()
        members = [name for name in vars(Executor) if not name.startswith("_")]
        if missing := [name for name in members if not hasattr(made, name)]:
            what = f"{factory.__name__} lacks {', '.join(missing)}"
            raise ConfigError(what, where=f"--executor {self.executor}", hint=f"an executor has {', '.join(members)}")
        return made

    def machine_like(self, machine: Machine) -> Machine:
        """The machine to plan for, where it is described or else like this one; with as many runs at a time as workers
        of the cluster train, or a plug-in's executor takes."""
        from dataclasses import replace

        if self.plugin is not None:
            return replace(machine, jobs=self.plugin.capacity)
        if not self.is_elsewhere:
            return machine
        gpus = 1 if self.executor == RAY else max(self.ranks, machine.gpus)  # of each worker
        jobs = self.jobs or (gpus if machine.gpus and self.ranks == 1 else 1)
        return replace(machine, jobs=self.workers * jobs, gpus=self.workers * gpus if machine.gpus else 0)

    def executor_for(self, name: str, say: Callable[[str], None]) -> Executor | None:
        """The executor for a study's or sweep's runs; None for processes of this machine. say: takes its messages."""
        if self.executor == SLURM:
            from gpt2lab.executors.slurm import SlurmExecutor

            return SlurmExecutor(name, self.workers, self.sbatch, self.jobs, self.ranks, say)
        if self.executor == RAY:
            from gpt2lab.executors.ray import RayExecutor

            return RayExecutor(self.workers * (self.jobs or 1), self.jobs or 1, say)
        return self.plugin


def location_of(
    context: typer.Context, executor: str, workers: int, sbatch: str, jobs: int | None, nproc: int | None,
    machine: Path | None, dry_run: bool,
) -> Location:  # fmt: skip
    """Where options say. Raises ConfigError; typer.BadParameter for an option that would have no effect."""
    import shlex

    from gpt2lab.planning.machine import machine_of

    check_executor(executor, context.params.get("plugin") or ())
    for name, executors in USED_BY.items():
        if is_typed(context, name) and executor not in executors:
            *others, last = executors
            known = f"{', '.join(others)} and {last}" if others else last
            what = f"has no effect with --executor {executor}; it is for {known}"
            raise typer.BadParameter(what, param_hint=f"--{name}")
    ranks = nproc or 1
    jobs = jobs_beside(ranks, jobs, context)
    if ranks > 1 and executor not in (LOCAL, SLURM, PRINT):
        what = f"trains every run in one process; for {ranks} ranks, submit this command itself, without --executor"
        raise typer.BadParameter(what, param_hint=f"--executor {executor}")
    used = dry_run or executor != LOCAL
    if machine and not used and is_typed(context, "machine"):
        raise typer.BadParameter("a plan for another machine needs --dry-run or --executor", param_hint="--machine")
    try:
        options = tuple(shlex.split(sbatch))
    except ValueError as error:
        raise ConfigError(str(error), where="--sbatch") from None
    return Location(executor, workers, options, jobs, ranks, machine_of(machine) if machine and used else None)


def jobs_beside(ranks: int, jobs: int | None, context: Any) -> int | None:
    """Runs at a time, as they were asked for; None where ranks share each. Raises typer.BadParameter where both stand
    on the command line."""
    if jobs and ranks > 1 and is_typed(context, "jobs"):
        raise typer.BadParameter("has no effect with --nproc, with which runs train one at a time", param_hint="--jobs")
    return jobs if ranks == 1 else None


def is_typed(context: Any, name: str) -> bool:
    """Whether an option stands on the command line, and does not come from gpt2lab.toml."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
