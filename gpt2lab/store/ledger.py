"""The ledger of a store: a line for every declaration and every verdict, in the order in which they were written.

Lines are only added. Each has its number, the hash of the line before it (`previous`) and a hash of itself (`hash`), so
that a line that was changed or taken out is found, by number. What no chain can show is that its end was cut off or
that all of it was written anew: records of studies name the line of their declaration, and `gpt2lab register` prints a
line for a place that others keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import DataFault
from gpt2lab.store.files import disk_fault, fsync_folder, make_folder, read_bytes, sha256
from gpt2lab.store.locks import file_lock, now

FILE = "ledger.jsonl"
DECLARED, VERDICT = "declared", "verdict"
START = "0" * 32
"""What the first line names as the one before it."""

Line = Mapping[str, Any]
"""`number`, `kind`, `at`, what was declared or found, `previous`, `hash`."""


@dataclass(frozen=True)
class Ledger:
    """The lines that can be read, and what is wrong with the chain, in sentences without a full stop."""

    lines: Sequence[Line]
    problems: Sequence[str] = ()

    @property
    def head(self) -> str:
        """`14:9f...`: the number and the hash of the last line; "" without lines."""
        return f"{self.lines[-1]['number']}:{self.lines[-1]['hash']}" if self.lines else ""

    def has(self, head: str) -> bool:
        """Whether the line that was the last one when `head` was printed is still there."""
        return head in {f"{line['number']}:{line['hash']}" for line in self.lines}


def hash_of(line: Line) -> str:
    """Of a line without its hash, 128 bits."""
    return sha256(json.dumps({key: line[key] for key in sorted(line) if key != "hash"}).encode())[:32]


def read_ledger(root: Path) -> Ledger:
    """The ledger of the store in `root`. What a kill has left of a last line is no part of it."""
    data = read_bytes(root / FILE) or b""
    lines, problems = list[Line](), list[str]()
    number, previous = 0, START
    for place, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        line = _line(text)
        if line is None:
            problems.append(f"line {place} of the file cannot be read")
            continue
        if line["hash"] != hash_of(line):
            problems.append(f"line {line['number']} ({_about(line)}) was changed after it was written")
        if line["number"] != number + 1:
            problems.append(f"{_missing(number + 1, line['number'] - 1)} before line {line['number']}")
        elif line["previous"] != previous:
            problems.append(f"line {line['number']} ({_about(line)}) does not follow the line before it")
        lines.append(line)
        number, previous = line["number"], line["hash"]
    return Ledger(lines, problems)


def _line(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"number": int, "kind": str, "at": str, "study": str, "campaign": str, "previous": str, "hash": str}
    whole = isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items())
    return line if whole and isinstance(line.get("contrasts"), list) else None


def _about(line: Line) -> str:
    return f"{line['study']}, {line['kind']} {line['at']}"


def _missing(first: int, last: int) -> str:
    if last < first:
        return "the order was changed"
    return f"line {first} is missing" if first == last else f"lines {first} to {last} are missing"


def append(root: Path, make: Callable[[Ledger], Line | None]) -> Line | None:
    """Add the line that `make` returns for the present ledger, with its number, time, and hashes; -> the line, None
    where it returns none. It is plain data without numbers that are not finite. One process at a time. Raises
    EnvironmentFault, DataFault."""
    path = root / FILE
    with file_lock(root / "ledger.lock"):
        ledger = read_ledger(root)
        made = make(ledger)
        if made is None:
            return None
        last: Line = ledger.lines[-1] if ledger.lines else {"number": 0, "hash": START}
        line = {"number": last["number"] + 1, "at": now(), **made, "previous": last["hash"]}
        whole = {**line, "hash": hash_of(line)}
        _write(path, (json.dumps(whole, allow_nan=False) + "\n").encode())
        return whole


def _write(path: Path, line: bytes) -> None:
    """Add a line, over what a kill has left of one. Raises EnvironmentFault with the file as it was, DataFault."""
    before = read_bytes(path)
    end = (before or b"").rfind(b"\n") + 1
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(descriptor, end)
            if os.pwrite(descriptor, line, end) != len(line):
                os.ftruncate(descriptor, end)
                raise DataFault("only a part of a line could be written", where=str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if before is None:
            fsync_folder(path.parent)
    except OSError as error:
        raise disk_fault(error, path, len(line)) from error
