"""Two sides timed in turns, A B A B, so that whatever else the machine does falls on both.

Each is in a process of its own with an allocator of its own, as a training would be; ours is set up there as the
workers of runs are. While one works, the other waits for a line on its standard input.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from scipy import stats

from benchmarks.sides import Side, Spec
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError
from gpt2lab.training.allocator import keep_memory
from gpt2lab.training.precision import Precision, set_threads

ROOT = Path(__file__).parents[1]
"""Where processes find this folder, whatever folder the caller is in."""
BLOCK_SECONDS = 1.0
MOST_STEPS = 50
CONFIDENCE = 0.95


class Recipe(Protocol):
    """What makes a side: plain data that another process can be given."""

    def make(self, work: Any, device: torch.device, /) -> Side:
        """The side, ready to work."""
        ...


class SideProcess:
    """A side at work in another process. Raises what making the side raises there."""

    def __init__(self, recipe: Recipe, work: Any, device: torch.device, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.turns"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        question = {
            "pickled": base64.b64encode(pickle.dumps((recipe, work))).decode(), "device": device.type,
            "threads": threads,
        }  # fmt: skip
        try:
            made = self._ask(question)
        except BaseException:
            self.close()
            raise
        self.name: str = made["name"]
        self.precision: Precision = made["precision"]

    def run(self, steps: int) -> tuple[float, list[float]]:
        """Seconds per step of the next `steps`, and what each computed, as a number (see Side)."""
        answer = self._ask({"steps": steps})
        return float(answer["seconds"]), list(answer["losses"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EnvironmentFault(f"a side's process ended with code {code}", where="benchmarks",
                                   hint="a smaller batch or configuration")  # fmt: skip
        answer: dict[str, Any] = json.loads(line)
        if "what" in answer:
            kind = ConfigError if answer["code"] == ConfigError.code else EnvironmentFault
            raise kind(answer["what"], where=answer["where"], hint=answer["hint"])
        return answer


def in_turns(sides: Sequence[SideProcess], blocks: int) -> list[list[float]]:
    """Seconds per step of every side in each block; a block has as many steps as fit into about a second."""
    counts = [max(1, min(MOST_STEPS, round(BLOCK_SECONDS / side.run(1)[0]))) for side in sides]
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(blocks):
        for side, count, found in zip(sides, counts, taken, strict=True):
            found.append(side.run(count)[0])
    return taken


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """How many times as fast ours is: the median over pairs of neighbouring blocks, which a few blocks with other load
    do not move, and its interval between two of those ratios, by the binomial distribution; None below six pairs."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    outside = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(ratios), 0.5)) - 1
    return statistics.median(ratios), (ratios[outside], ratios[-1 - outside]) if outside >= 0 else None


@dataclass(frozen=True)
class Timing:
    """Sides timed in turns, ours first, then the other. values: what the first steps computed. seconds: per step, of
    every block. ratio, interval: of these two, see `ratio_of`."""

    names: list[str]
    precisions: list[Precision]
    values: list[list[float]]
    seconds: list[list[float]]
    ratio: float
    interval: tuple[float, float] | None


def time_sides(recipes: Sequence[Recipe], work: Any, device: torch.device, *, blocks: int, first_steps: int) -> Timing:
    """Time two or more sides over `blocks` blocks each, in turns and in processes of their own."""
    with ExitStack() as stack:
        sides = [stack.enter_context(closing(SideProcess(r, work, device, torch.get_num_threads()))) for r in recipes]
        values = [side.run(first_steps)[1] for side in sides]
        seconds = in_turns(sides, blocks)
    names, precisions = [side.name for side in sides], [side.precision for side in sides]
    return Timing(names, precisions, values, seconds, *ratio_of(seconds[1], seconds[0]))


def serve() -> None:
    """What the process does: make the side, then take as many steps as each line says. What others' code prints goes
    to standard error, as standard output is for answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    question = json.loads(sys.stdin.readline())
    recipe, work = pickle.loads(base64.b64decode(question["pickled"]))
    device = torch.device(question["device"])
    set_threads(question["threads"])
    if isinstance(recipe, Spec) and recipe.name in ("gpt2lab", "engine"):
        keep_memory()  # as workers of runs do
    try:
        side = recipe.make(work, device)
    except Gpt2labError as error:
        [problem, *_] = error.problems
        say({"code": error.code, "where": problem.where, "what": problem.what, "hint": error.hint})
        return
    say({"name": side.name, "precision": side.precision})
    for line in sys.stdin:
        say(timed(side, json.loads(line)["steps"], device))


def timed(side: Side, steps: int, device: torch.device) -> dict[str, Any]:
    """Take some steps; -> seconds per step, and what each computed.

    With one thread on CPU, seconds are those that this process computed, whatever else the machine did meanwhile.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    began = clock()
    losses = [side.step() for _ in range(steps)]
    getattr(torch, device.type).synchronize()  # a GPU computes behind the program's back
    return {"seconds": (clock() - began) / steps, "losses": losses}


if __name__ == "__main__":
    serve()
