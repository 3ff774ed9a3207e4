"""Text to ids in batches, here or in processes of their own; the order and the ids are the same either way.

A process is a fresh interpreter at the end of two pipes: nothing is forked from a program that may have threads, and
when that program dies, however it does, its pipes close and the process ends.

N ids of a batch, n pieces in it
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.passing import Pass
from gpt2lab.data.piping import (
    described,
    packed_numbers,
    packed_texts,
    rebuilt,
    receive,
    send,
    unpacked_numbers,
    unpacked_texts,
)
from gpt2lab.data.sources import Place
from gpt2lab.data.split import SplitName
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, pieces
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import EnvironmentFault
from gpt2lab.registry import PLUGINS, Choice, load_plugin

BATCH_CHARACTERS = 1 << 18
OUTSTANDING = 2
"""Batches under way for each process: one that it works on, and one that is ready when it is done."""

ENDING_SECONDS = 5.0
PIPE_BYTES = 1 << 20
"""Under way between two processes: with Linux's usual 64 KiB they would wait for each other many times in a batch."""

T = TypeVar("T")
Encoded = tuple[NDArray[Any], NDArray[np.int64]]
"""Ids of all pieces, separators included (N,), and how many each piece has (n,)."""


class Piece(NamedTuple):
    """Text of bounded length. size: its bytes. last: whether its document ends with it. name: its document's."""

    split: SplitName
    name: str | None
    text: str
    size: int
    last: bool


@dataclass
class Batch:
    """Neighbouring pieces. place: where reading goes on behind them; None inside a document."""

    pieces: list[Piece] = field(default_factory=list)
    place: Place = None

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(piece.size for piece in self.pieces)

    @property
    def texts(self) -> list[str]:
        return [piece.text for piece in self.pieces]

    @property
    def lasts(self) -> list[bool]:
        return [piece.last for piece in self.pieces]


def batches(texts: Pass) -> Iterator[Batch]:
    """The pieces of a pass, gathered to at least BATCH_CHARACTERS; an empty document is one empty piece."""
    batch, held = Batch(), 0
    for split, name, chunks in texts:
        before: str | None = None
        for piece in pieces(chunks):
            if before is not None:
                batch.pieces.append(_piece(split, name, before, last=False))
                held += len(before)
                if held >= BATCH_CHARACTERS:
                    yield batch
                    batch, held = Batch(), 0
            before = piece
        batch.pieces.append(_piece(split, name, before or "", last=True))
        held += len(before or "")
        if held >= BATCH_CHARACTERS:
            batch.place = texts.place()
            yield batch
            batch, held = Batch(), 0
    if batch.pieces:
        yield batch  # the end: nobody will go on from here


def _piece(split: SplitName, name: str | None, text: str, *, last: bool) -> Piece:
    return Piece(split, name, text, len(text) if text.isascii() else len(text.encode()), last)


def encode(tokenizer: Tokenizer, texts: Sequence[str], lasts: Sequence[bool]) -> Encoded:
    """Ids of the texts, and the separator behind each that is the last of a document with any text."""
    ids: list[NDArray[np.int64]] = []
    counts = np.zeros(len(texts), np.int64)
    end = None if tokenizer.separator is None else np.array([tokenizer.separator], dtype=np.int64)
    for i, (text, last) in enumerate(zip(texts, lasts, strict=True)):
        if not text:
            continue
        ids.append(tokenizer.encode(text))
        counts[i] = len(ids[-1])
        if last and end is not None:
            ids.append(end)
            counts[i] += 1
    return (np.concatenate(ids) if ids else np.empty(0, np.int64)), counts


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Here:
    """Encodes in this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Every batch with its ids, in order."""
        return ((batch, encode(self.tokenizer, batch.texts, batch.lasts)) for batch in batches)

    def close(self) -> None:
        """Nothing to end."""


class Pool:
    """Encodes in `processes` others, each with the tokenizer of `choice` and `folder`."""

    def __init__(self, choice: Choice, folder: Path, processes: int) -> None:
        self.count = processes
        self._workers = [_Worker(choice, folder) for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tokenizing")

    @staticmethod
    def can(choice: Choice) -> bool:
        """Whether other processes find the tokenizer: not one that was registered in the program that runs."""
        return tokenizer_slot[choice.name].factory.__module__ != "__main__"

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Every batch with its ids, in order. Raises what encoding raises, and EnvironmentFault when a process ends."""
        return in_order(batches, lambda batch: self._ask(batch.texts, batch.lasts), self._threads, self.count)

    def _ask(self, texts: Sequence[str], lasts: Sequence[bool]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.ask(texts, lasts)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.reap()


def in_order(
    items: Iterable[T], work: Callable[[T], Encoded], threads: ThreadPoolExecutor, count: int
) -> Iterator[tuple[T, Encoded]]:
    """Each item with what `work` makes of it, in order, OUTSTANDING times `count` of them under way."""
    under_way: deque[tuple[T, Future[Encoded]]] = deque()
    for item in items:
        under_way.append((item, threads.submit(work, item)))
        if len(under_way) >= OUTSTANDING * count:
            first, made = under_way.popleft()
            yield first, made.result()
    for first, made in under_way:
        yield first, made.result()


class _Worker:
    """One process. It is asked by one thread at a time."""

    def __init__(self, choice: Choice, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2lab.data.encoding"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=PIPE_BYTES,
        )  # fmt: skip
        module = tokenizer_slot[choice.name].factory.__module__
        self._send([choice.full(), str(folder), [str(plugin) for plugin in PLUGINS], module])

    def ask(self, texts: Sequence[str], lasts: Sequence[bool]) -> Encoded:
        sizes, content = packed_texts(texts)
        self._send([sizes, list(lasts)], content)
        assert self._process.stdout is not None
        try:
            answer, content = receive(self._process.stdout)
        except (EOFError, ValueError, MemoryError, OverflowError):
            raise self._ended() from None
        if "error" in answer:
            raise rebuilt(answer["error"])
        return unpacked_numbers(answer["dtype"], content), np.array(answer["counts"], np.int64)

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what was still to be sent
                pipe.close()

    def _send(self, message: object, content: bytes = b"") -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message, content)
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> EnvironmentFault:
        try:
            code = self._process.wait(timeout=ENDING_SECONDS)
        except subprocess.TimeoutExpired:  # it answers nonsense
            self._process.kill()
            code = self._process.wait()
        told = signal.Signals(-code).name if code < 0 else f"code {code}"
        return EnvironmentFault(
            f"a tokenizing process ended ({told})", where="data.tokenizer", hint="the same command with --processes 1"
        )


def serve() -> None:
    """What such a process does: build the tokenizer, then answer until the pipe closes. What others' code prints goes
    to standard error; Ctrl-C is for the program that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tokenizer: Tokenizer | Exception
    try:
        tokenizer = _built(*receive(questions)[0])
    except Exception as error:
        tokenizer = error
    while True:
        try:
            (sizes, lasts), content = receive(questions)
        except EOFError:
            return
        try:
            answer(answers, tokenizer, unpacked_texts(sizes, content), lasts)
        except BrokenPipeError:
            os._exit(1)  # nobody listens any more


def answer(answers: BinaryIO, tokenizer: Tokenizer | Exception, texts: Sequence[str], lasts: Sequence[bool]) -> None:
    """Send what the texts are, or why that cannot be said."""
    try:
        if isinstance(tokenizer, Exception):
            raise tokenizer
        ids, counts = encode(tokenizer, texts, lasts)
    except Exception as error:
        send(answers, {"error": described(error)})
    else:
        dtype, content = packed_numbers(ids)
        send(answers, {"counts": counts.tolist(), "dtype": dtype}, content)


def _built(choice: dict[str, Any], folder: str, plugins: Sequence[str], module: str) -> Tokenizer:
    for plugin in plugins:
        load_plugin(plugin)
    if module not in sys.modules:
        importlib.import_module(module)
    built: Tokenizer = tokenizer_slot.build(tokenizer_slot.read(choice), TokenizerSite(Path(folder)))
    return built


if __name__ == "__main__":
    serve()
