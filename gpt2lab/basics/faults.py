"""Fault injection for tests. Without GPT2LAB_FAULT in the environment nothing happens.

    GPT2LAB_FAULT="kill@backward:3"                 SIGKILL at the third hit of that point in this process
    GPT2LAB_FAULT="signal=TERM@step:4,nan@loss:2"   several, separated by commas
    GPT2LAB_FAULT="inf@grad:5+,rank=1"              from the fifth hit on; on rank 1 only (RANK in the environment)

Hits are counted in each process from its start. A fault without a number happens at the first hit.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from gpt2lab.errors import ConfigError, unknown

VARIABLE = "GPT2LAB_FAULT"

POINTS = {
    "forward": "before a micro-batch's forward pass",
    "backward": "after a micro-batch's backward pass",
    "optimizer": "after gradients are clipped, before weights change",
    "step": "after a step is counted",
    "evaluation": "before an evaluation",
    "journal.append": "before a row is written",
    "save.begin": "before a checkpoint's temporary folder is made",
    "save.weights": "after the weights are written",
    "save.optimizer": "after the optimizer's state is written",
    "save.state": "after state.json is written",
    "save.manifest": "after the manifest is written",
    "save.rename": "before a checkpoint gets its final name",
    "save.done": "after it has its final name",
    "prune": "before an old checkpoint is deleted",
    "result": "before the result is written",
    "data.shard": "after a token shard is whole",
    "data.state": "after the state of preparing data is saved",
}
"""Every point in the code, with a description."""

TENSORS = {"loss": "a micro-batch's loss before its backward pass", "grad": "one gradient before clipping"}
"""Every tensor that `nan` and `inf` can spoil."""

ACTIONS = ("kill", "stop", "raise", "memory", "full", "signal", "sleep", "nan", "inf")
ENTRY = re.compile(r"(?P<action>\w+)(=(?P<value>[\w.]+))?@(?P<where>[\w.]+)(:(?P<hit>\d+)(?P<on>\+)?)?")

X = TypeVar("X")


class InjectedFault(RuntimeError):
    """Raised by `raise@...`, like an unexpected error in our code."""


@dataclass(frozen=True)
class Fault:
    """`action` at the hit of that number of the point or tensor `where`, and `on` every later hit too."""

    action: str
    value: str
    where: str
    hit: int
    on: bool

    def happen(self) -> None:
        """Break the process as its action says; returns for `signal` and `sleep` only."""
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "signal":
                os.kill(os.getpid(), signal.Signals[f"SIG{self.value}"])
            case "sleep":
                time.sleep(float(self.value))
            case "memory":
                raise MemoryError(f"injected at {self.where}")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case _:
                raise InjectedFault(f"injected at {self.where}")


_on = VARIABLE in os.environ
_faults: list[Fault] | None = None
_hits: Counter[str] = Counter()


def point(name: str) -> None:
    """A place where the process can be broken; one comparison when nothing is to be broken."""
    if _on:
        for fault in _due(name):
            fault.happen()


def tensor(name: str, values: X) -> X:
    """`values`, a tensor, as it is, or times NaN or infinity when this is its turn; gradients through it break too."""
    if _on:
        for fault in _due(name):
            spoilt: Any = values
            values = spoilt * float(fault.action)
    return values


def arm_from_environment() -> None:
    """Take what GPT2LAB_FAULT says now, hits counted from here. For processes whose environment came after their
    imports, and to refuse a mistaken one early. Raises ConfigError."""
    arm(os.environ.get(VARIABLE, ""))


def arm(spec: str) -> None:
    """Break what `spec` says from now on; "" for nothing. Raises ConfigError."""
    global _on, _faults
    _hits.clear()
    _faults = parse(spec)
    _on = bool(_faults)


def parse(spec: str) -> list[Fault]:
    """The faults of a specification that are for this rank. Raises ConfigError."""
    entries = [entry.strip() for entry in spec.split(",") if entry.strip()]
    ranks = [entry.removeprefix("rank=") for entry in entries if entry.startswith("rank=")]
    if not all(rank.isdecimal() for rank in ranks):
        raise ConfigError(f"'rank={ranks[0]}' is not the number of a rank", where=VARIABLE)
    faults = [_fault(entry) for entry in entries if not entry.startswith("rank=")]
    return faults if not ranks or os.environ.get("RANK", "0") in ranks else []


def _fault(entry: str) -> Fault:
    match = ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(f"'{entry}' is not action@point:hit", where=VARIABLE, hint=f'{VARIABLE}="kill@backward:3"')
    action, value, where = match["action"], match["value"] or "", match["where"]
    if action not in ACTIONS:
        raise ConfigError(unknown("action", action, ACTIONS), where=VARIABLE)
    places = TENSORS if action in ("nan", "inf") else POINTS
    if where not in places:
        raise ConfigError(unknown("tensor" if places is TENSORS else "point", where, places), where=VARIABLE)
    number = re.fullmatch(r"\d+(\.\d+)?", value) is not None
    fits = {"signal": f"SIG{value}" in signal.Signals.__members__, "sleep": number}.get(action, not value)
    if not fits or match["hit"] == "0":
        raise ConfigError(
            f"'{entry}' is not a valid fault", where=VARIABLE, hint="signal=TERM@step:1, sleep=0.5@step:1, kill@step:1"
        )
    return Fault(action, value, where, int(match["hit"] or 1), match["on"] is not None)


def _due(name: str) -> Iterator[Fault]:
    """The faults due at this hit of `name`. The variable is read at the first hit, so that imports never fail."""
    if _faults is None:
        arm_from_environment()
    _hits[name] += 1
    for fault in _faults or ():
        if fault.where == name and (_hits[name] == fault.hit or (fault.on and _hits[name] > fault.hit)):
            yield fault
