"""How processes become the ranks of one training, and how they part.

The variables are those of torchrun and of most clusters' launchers: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, on one machine or several.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Preempted, Problem, RankLost
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.monitor import HINT, Monitor, Position

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set where whoever started the ranks keeps the store that they meet in; otherwise rank 0 does."""

JOIN_SECONDS = 300.0  # between the first rank's arrival and the last one's
COLLECTIVE_PATIENCE = 10  # times the timeout: the monitor is to name the rank first
FIRST_WORD_SECONDS = 0.3  # by which rank 0 may tell first what all of them met: people look there
SHOWN = 20  # differences between ranks that are told
LOST = re.compile(r"gloo|nccl|ProcessGroup|TCPStore|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)

_monitor: Monitor | None = None


class Echo(RankLost):
    """This rank ends because another one does, which says why."""

    @classmethod
    def of(cls, error: Exception) -> Echo:
        """The second of the same kind, or of another: its exit code is that of `error` where that has one."""
        echo = cls(f"another rank ended first; here: {_line(error)}")
        if isinstance(error, Gpt2labError):
            echo.exit_code = error.exit_code
        return echo


@dataclass(frozen=True)
class Place:
    """This process among the ranks, by what its environment says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Place:
        """Raises ConfigError for variables that cannot mean anything."""
        size = _number("WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        place = cls(_number("RANK", None), size, _number("LOCAL_RANK", _number("RANK", None)))
        if not 0 <= place.rank < size:
            raise ConfigError(f"rank {place.rank} of {size} ranks cannot be", where="RANK")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError("is not set, though WORLD_SIZE is", where=name, hint="start the ranks with torchrun")
        return place


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        what = "is not set, though WORLD_SIZE is" if text is None else f"'{text}' is not a number"
        raise ConfigError(what, where=name, hint="start the ranks with torchrun")
    return int(text)


@contextlib.contextmanager
def join_world(
    device: str,
    timeout_seconds: float,
    on_lost: Callable[[RankLost], None] = lambda error: None,
    parent: int | None = None,
) -> Iterator[World]:
    """The world of the ranks that the environment names, while inside; ALONE where it names none.

    device: type of device to train on; a GPU is chosen by the local rank.
    timeout_seconds: after which a rank that is silent, or stands still, is named, and all processes end.
    on_lost: hears of it, in a thread of the one rank that is to tell.
    parent: the process that started this one, whose end is to be this one's; the present parent unless given.

    Raises what is raised inside; but on all ranks except the first to fail, Echo, and RankLost for a rank that is gone.
    """
    global _monitor
    place = Place.of_environment()
    if place.size == 1:
        yield ALONE
        return
    if device == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"rank {place.rank} wants GPU {place.local_rank}, this machine has {torch.cuda.device_count()}",
                where="ranks", hint=f"--nproc {max(1, torch.cuda.device_count())}",
            )  # fmt: skip
        torch.cuda.set_device(place.local_rank)
    hosted = os.environ.get(AGENT_STORE) != "True"
    watch: Monitor | None = None
    try:
        store = meet(place, hosted)
        own = PrefixStore("gpt2lab", store.clone())  # type: ignore[attr-defined]
        watch = _monitor = Monitor(own, place.rank, place.size, timeout_seconds, on_lost, hosted=hosted, parent=parent)
        watch.start()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore("ranks", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=COLLECTIVE_PATIENCE * timeout_seconds + 60),
        )
        yield World(place.rank, place.size, place.local_rank)
        watch.leave()
        dist.destroy_process_group()
    except Preempted:  # all ranks at the same step
        if watch is not None:
            watch.leave()
        dist.destroy_process_group()
        raise
    except Exception as error:
        if watch is None:
            raise RankLost(f"the ranks did not find each other: {_line(error)}", hint=HINT) from error
        raise _told(error, watch) from error
    finally:
        _monitor = None


def meet(place: Place, hosted: bool) -> TCPStore:
    """The store in which ranks find each other, kept by rank 0 unless their starter keeps one."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        place.size if hosted else None,
        is_master=hosted and place.rank == 0,
        timeout=timedelta(seconds=JOIN_SECONDS),
        wait_for_workers=False,
    )


def _told(error: Exception, watch: Monitor) -> Exception:
    """What this rank raises for `error`: itself, if this is the first rank to fail."""
    if not is_loss(error):
        time.sleep(FIRST_WORD_SECONDS if watch.rank else 0.0)
        first = watch.is_first()
        watch.leave()
        return error if first else Echo.of(error)
    end = time.monotonic() + 3 * watch.beat_seconds  # until the others had time to tell why they ended
    while watch.named() is None and time.monotonic() < end:
        time.sleep(watch.beat_seconds / 4)
    first = watch.is_first()
    watch.leave()
    return RankLost(watch.missing(), hint=HINT) if first else Echo("another rank ended first")


def is_loss(error: Exception) -> bool:
    """Whether `error` says that another rank does not answer, rather than that something went wrong here."""
    if isinstance(error, Gpt2labError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def follow(where: Callable[[], Position]) -> None:
    """Let the monitor of this rank know where its training is; nothing where there is none."""
    if _monitor is not None:
        _monitor.where = where


def agree(world: World, facts: Mapping[str, Any]) -> None:
    """Compare what all ranks are about to do. Raises ConfigError on every rank, naming each key and its values."""
    everyone = world.gather({key: str(value) for key, value in facts.items()})
    problems = []
    for key in dict.fromkeys(key for one in everyone for key in one):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks_by_value.setdefault(one.get(key, "nothing"), []).append(rank)
        if len(ranks_by_value) > 1:
            told = [f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {v}" for v, r in ranks_by_value.items()]
            problems.append(Problem(key, f"differs between ranks; {'; '.join(told)}"))
    if problems:
        raise ConfigError(problems[:SHOWN], hint="start every rank with the same command, code, files and packages")
