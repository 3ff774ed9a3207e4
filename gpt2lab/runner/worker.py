"""A worker process around one run: its job, its log, its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

from gpt2lab.basics.output import make_output_lossy
from gpt2lab.basics.redaction import masked
from gpt2lab.basics.signals import StopRequest, parent_of
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Preempted, RankLost
from gpt2lab.runner.arrival import config_of, refuse_another_run
from gpt2lab.runner.job import NOTHING_LEFT, WHERE, Job
from gpt2lab.runner.training import execute
from gpt2lab.store import Store, make_folder, now, write_atomically
from gpt2lab.training.allocator import keep_memory
from gpt2lab.training.compiling import compile_fault
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import choose_device
from gpt2lab.training.ranks import OtherRankFailed, RankEnvironment, join_world


def main() -> int:
    """Execute the job whose job.json is the only argument; -> the exit code. What it prints is the run's log."""
    stop = StopRequest()
    stop.listen()
    make_output_lossy()
    try:
        if len(sys.argv) != 2:
            raise ConfigError("one argument is expected", where="python -m gpt2lab.worker", hint=WHERE)
        job = Job.read(Path(sys.argv[1]))
    except Gpt2labError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    code = work(job, stop)
    if RankEnvironment.read().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what is left of a failed collective would wait for the others, of a good one can still abort
    return code


def work(job: Job, stop: StopRequest) -> int:
    """Execute `job`, as one of several ranks where the environment says so; -> the exit code. An error is printed and
    recorded here, by one rank."""
    keep_memory()
    try:
        make_folder(Path(job.root))
        if job.code:  # submitted from elsewhere, perhaps
            refuse_another_run(job, config_of(job))
        with world_of(job, stop) as world:
            return 0 if execute(job, stop, world) else NOTHING_LEFT
    except OtherRankFailed as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Preempted as error:
        if RankEnvironment.read().rank == 0:
            print(error.render(), file=sys.stderr)
        return error.exit_code
    except Gpt2labError as error:
        if error.code != "LOCK":
            record_failure(job, error)
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except BaseException as error:  # a component may even exit
        fault = compile_fault(error)
        record_failure(job, fault or error)
        print(masked(traceback.format_exc()), file=sys.stderr)
        return fault.exit_code if fault else 1


def world_of(job: Job, stop: StopRequest) -> AbstractContextManager[World]:
    """The ranks that this process trains with, as the environment names them; or this process alone."""
    if RankEnvironment.read().size == 1:
        return contextlib.nullcontext(ALONE)
    training = config_of(job).training

    def on_lost(error: RankLost) -> None:
        record_failure(job, error)
        print(error.render(), file=sys.stderr, flush=True)

    device = choose_device(training.device).type
    return join_world(device, training.rank_timeout_seconds, on_lost, parent_of(), stop.__bool__)


def record_failure(job: Job, error: BaseException) -> None:
    """Write failure.json in one sentence and error.log in full, so that the study can go on and its report can say
    why."""
    folder, step = Store(job.root).run(job.run_id), 0
    with contextlib.suppress(Gpt2labError, OSError):  # a damaged journal may be the very failure
        step = max((row["step"] for row in folder.rows()), default=0)
    reason = masked(str(error) if isinstance(error, Gpt2labError) else f"{type(error).__name__}: {error}")
    record: dict[str, object] = {"reason": reason, "phase": "training" if step else "start", "step": step, "at": now()}
    if (environment := RankEnvironment.read()).size > 1:
        record["rank"] = environment.rank
    if isinstance(error, Gpt2labError):
        record |= {"code": error.code, "exit_code": error.exit_code, "hint": error.hint}
    with contextlib.suppress(ConfigError, EnvironmentFault):  # a full disk may be it: then the log alone has it
        folder.fail(record)
        write_atomically(folder.path / "error.log", masked("".join(traceback.format_exception(error))))
