"""Hashes of large files that lie elsewhere, remembered for as long as their size and time of change stay the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from gpt2lab.data.files import canonical_sha256, data_home, disk, file_sha256, publish
from gpt2lab.errors import EnvironmentFault

FRESH_SECONDS = 2.0
"""A file changed so lately may change again without a new time of change: its hash is not remembered."""


def known_sha256(path: Path, *, skip: int = 0, seen: Callable[[int], None] | None = None) -> str:
    """sha256 of a file but for its first `skip` bytes; `seen` is told the bytes that are read, if any are.

    Raises EnvironmentFault for a file that cannot be read.
    """
    try:
        stat = os.stat(path)
        facts = {"path": str(path), "skip": skip, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        note = data_home() / "hashes" / f"{canonical_sha256([str(path), skip])[:32]}.json"
        kept = _noted(note)
        if {k: v for k, v in kept.items() if k != "sha256"} == facts:
            return str(kept["sha256"])
        found = file_sha256(path, seen, skip=skip)
    except OSError as error:
        raise EnvironmentFault(f"cannot be read: {error.strerror}", where=str(path), hint=f"ls -l {path}") from error
    if time.time() - stat.st_mtime > FRESH_SECONDS:
        with disk(note.parent):
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({**facts, "sha256": found}))
            publish(temporary, note)
    return found


def _noted(note: Path) -> dict[str, object]:
    try:
        kept = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and "sha256" in kept else {}
