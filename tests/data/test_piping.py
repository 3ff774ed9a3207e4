"""What passes between a program and its tokenizing processes arrives as it was."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

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
from gpt2lab.errors import DataFault, Gpt2labError, Problem


def passed_on(message: Any, content: bytes) -> tuple[Any, bytes]:
    stream = io.BytesIO()
    send(stream, message, content)
    stream.seek(0)
    found = receive(stream)
    with pytest.raises(EOFError):
        receive(stream)
    return found


def test_texts_of_every_kind_arrive() -> None:
    texts = ["", "plain\n\0", "\u00e9\u4e2d\U0001f600", "lone \ud800 surrogate", '{"a": 1}']
    sizes, content = packed_texts(texts)
    (found, raw) = passed_on([sizes, [True]], content)
    assert unpacked_texts(found[0], raw) == texts
    assert unpacked_texts([], b"") == []


@pytest.mark.parametrize("largest", [0, 65_535, 65_536, 2**32 - 1, 2**32])
def test_numbers_arrive_in_the_fewest_bytes(largest: int) -> None:
    numbers = np.array([0, 1, largest], np.int64)
    dtype, content = packed_numbers(numbers)
    assert len(content) == 3 * (2 if largest < 2**16 else 4 if largest < 2**32 else 8)
    assert unpacked_numbers(dtype, content).astype(np.int64).tolist() == numbers.tolist()
    assert unpacked_numbers(*packed_numbers(np.empty(0, np.int64))).size == 0


def test_a_type_of_numbers_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="O8"):
        unpacked_numbers("O8", b"12345678")


@pytest.mark.parametrize("end", [1, 15, 20, -1])
def test_a_torn_message_is_an_end(end: int) -> None:
    stream = io.BytesIO()
    send(stream, {"a": [1, 2, 3]}, b"content")
    with pytest.raises(EOFError):
        receive(io.BytesIO(stream.getvalue()[:end]))


def test_errors_come_back_as_what_they_were() -> None:
    fault = rebuilt(described(DataFault([Problem("a.bin", "damaged"), Problem("b.bin", "missing")], hint="again")))
    assert isinstance(fault, DataFault) and fault.exit_code == DataFault.exit_code
    assert isinstance(fault, Gpt2labError) and "b.bin: missing" in str(fault) and fault.hint == "again"
    missing = rebuilt(described(FileNotFoundError(2, "No such file", "x")))
    assert isinstance(missing, FileNotFoundError) and "No such file" in str(missing)

    class Own(Exception):
        pass

    other = rebuilt(described(Own("odd")))
    assert type(other) is RuntimeError and str(other) == "Own: odd"
    undecodable = rebuilt(described(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")))
    assert type(undecodable) is RuntimeError and "bad" in str(undecodable)
