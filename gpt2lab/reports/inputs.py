"""Whether the page that lies in a folder is the one that would be written there.

Drawing takes most of the time of a report, and a finished study is often asked for again. So a page is kept with a sum
over all that it is made from: the code of this package, the versions of what draws, and every file of the store, so
that no section has to say which of them it reads. Records count by their content, because commands write them again
that change nothing in them; files of runs by their size and times.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from gpt2lab.store import Store, read_bytes
from gpt2lab.store.files import sha256

PACKAGE = Path(__file__).parents[1]
VERSIONS = ("fonttools", "jinja2", "matplotlib", "numpy", "scipy")
RECORDS = ("studies", "sweeps", "noise", "tracking")
"""Folders of a store whose files count by content."""
OF_A_RUN = re.compile(r"[0-9a-f]{16}")
NOT_READ = ("checkpoints", "replay")
"""Folders of a run that no page is made from."""


def sum_of_store(store: Store) -> str:
    """A sum over the files that pages are made from. Taken before they are read, it never covers more than a page."""
    records = [
        (str(path.relative_to(store.root)), sha256(read_bytes(path) or b""))
        for folder in RECORDS
        for path in sorted((store.root / folder).rglob("*.json"))
    ]
    runs = [
        files
        for entry in sorted(os.scandir(store.root), key=lambda entry: entry.name) if OF_A_RUN.fullmatch(entry.name)
        for files in _files(entry.path, entry.name)
    ]  # fmt: skip
    return sha256(repr((records, runs)).encode())


def _files(folder: str, name: str) -> Iterator[tuple[Any, ...]]:
    """Every file in a folder of that name, with what changes when it does."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from () if entry.name in NOT_READ else _files(entry.path, f"{name}/{entry.name}")
        else:
            with contextlib.suppress(FileNotFoundError):  # a temporary name
                stat = entry.stat()
                yield f"{name}/{entry.name}", stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def sum_of_code() -> str:
    """A sum over the code that makes pages; "" where files have changed since this process began, so that it may run
    others than those."""
    began = psutil.Process().create_time() - 2  # seconds by which that clock may be wrong
    files = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    if max(path.stat().st_ctime for path in files) >= began:
        return ""
    contents = [(str(path.relative_to(PACKAGE)), sha256(path.read_bytes())) for path in files]
    return sha256(repr((contents, sys.version, *map(version, VERSIONS))).encode())
