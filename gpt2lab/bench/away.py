"""A side in a process of its own: each has its own allocator, as a training of its own would.

Ours is set up there as the workers of runs are. The two processes take turns; while one works, the other waits for a
line on its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from gpt2lab.bench.sides import Side, Spec
from gpt2lab.bench.work import Work
from gpt2lab.bench.writers import Passage, Writer
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError
from gpt2lab.training.allocator import keep_memory
from gpt2lab.training.precision import Precision, set_threads

KINDS: dict[str, tuple[type[Any], type[Any]]] = {"training": (Spec, Work), "generation": (Writer, Passage)}
"""What makes a side, and what that has to do: plain data both."""


class Away:
    """A side at work in another process. Raises what making the side raises there."""

    def __init__(self, spec: Spec | Writer, work: Work | Passage, device: torch.device, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2lab.bench.away"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        kind = next(kind for kind, (specs, _) in KINDS.items() if isinstance(spec, specs))
        question = {
            "kind": kind, "spec": asdict(spec), "work": asdict(work), "device": device.type, "threads": threads,
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

    def __enter__(self) -> Away:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

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
            raise EnvironmentFault(f"a side's process ended with code {code}", where="bench",
                                   hint="a smaller batch or configuration")  # fmt: skip
        answer: dict[str, Any] = json.loads(line)
        if "what" in answer:
            kind = ConfigError if answer["code"] == ConfigError.code else EnvironmentFault
            raise kind(answer["what"], where=answer["where"], hint=answer["hint"])
        return answer


def serve() -> None:
    """What the process does: make the side, then take as many steps as each line says. What others' code prints goes
    to standard error, as standard output is for answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    question = json.loads(sys.stdin.readline())
    specs, works = KINDS[question["kind"]]
    spec, work, device = specs(**question["spec"]), works(**question["work"]), torch.device(question["device"])
    set_threads(question["threads"])
    if question["kind"] == "training" and spec.name == "gpt2lab":
        keep_memory()
    try:
        side = spec.make(work, device)
    except Gpt2labError as error:
        [problem, *_] = error.problems
        say({"code": error.code, "where": problem.where, "what": problem.what, "hint": error.hint})
        return
    say({"name": side.name, "precision": side.precision})
    for line in sys.stdin:
        say(timed(side, json.loads(line)["steps"], device))


def timed(side: Side, steps: int, device: torch.device) -> dict[str, Any]:
    """Take some steps; -> seconds per step, and what each computed."""
    began = time.perf_counter()
    losses = [side.step() for _ in range(steps)]
    getattr(torch, device.type).synchronize()  # a GPU computes behind the program's back
    return {"seconds": (time.perf_counter() - began) / steps, "losses": losses}


if __name__ == "__main__":
    serve()
