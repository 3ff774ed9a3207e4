"""Messages between a program and its own processes: plain data as JSON, then bytes as they are. Nothing of it can run
code, whoever wrote it.

N numbers
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import json
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab import errors
from gpt2lab.errors import Gpt2labError, Problem

HEAD = struct.Struct("<QQ")  # bytes of JSON, other bytes
UNSIGNED = ("<u2", "<u4", "<u8")


def send(stream: IO[bytes], message: Any, content: bytes = b"") -> None:
    """Write `message` and bytes. Raises BrokenPipeError when nobody reads any more."""
    text = json.dumps(message).encode()
    stream.write(HEAD.pack(len(text), len(content)))
    stream.write(text)
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Any, bytes]:
    """The next message and its bytes. Raises EOFError at the end, ValueError for what is no message."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        raise EOFError
    sizes = HEAD.unpack(head)
    text, content = (stream.read(size) for size in sizes)
    if (len(text), len(content)) != sizes:
        raise EOFError
    return json.loads(text), content


def packed_texts(texts: Sequence[str]) -> tuple[list[int], bytes]:
    """Bytes of each text, and all of them joined; lone surrogates, which JSON files may hold, survive."""
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    return list(map(len, raw)), b"".join(raw)


def unpacked_texts(sizes: Sequence[int], content: bytes) -> list[str]:
    """What `packed_texts` was given."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [content[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(ends)]


def packed_numbers(numbers: NDArray[Any]) -> tuple[str, bytes]:
    """Numbers from 0 on (N,) in as few bytes as hold the largest: the name of their type, and the bytes."""
    largest = int(numbers.max()) if numbers.size else 0
    dtype = next(name for name in UNSIGNED if largest < 1 << 8 * int(name[-1]))
    return dtype, numbers.astype(dtype).tobytes()


def unpacked_numbers(dtype: str, content: bytes) -> NDArray[Any]:
    """What `packed_numbers` was given, in its smaller type.  -> (N,)"""
    if dtype not in UNSIGNED:
        raise ValueError(dtype)
    return np.frombuffer(content, dtype)


def described(error: Exception) -> dict[str, Any]:
    """An exception as plain data."""
    if isinstance(error, Gpt2labError):
        problems = [[problem.where, problem.what] for problem in error.problems]
        return {"kind": type(error).__name__, "problems": problems, "hint": error.hint}
    return {"kind": type(error).__name__, "what": str(error)}


def rebuilt(record: dict[str, Any]) -> Exception:
    """The error that `described` was given, of its own kind if that is ours or one of Python's that a sentence makes;
    else a RuntimeError."""
    if "problems" in record:
        ours: type[Gpt2labError] = getattr(errors, record["kind"])
        return ours([Problem(where, what) for where, what in record["problems"]], hint=record["hint"])
    kind = getattr(builtins, record["kind"], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # some want more than a sentence
            return kind(record["what"])
    return RuntimeError(f"{record['kind']}: {record['what']}")
