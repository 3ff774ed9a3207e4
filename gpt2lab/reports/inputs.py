"""Whether the page that lies in a folder is the one that would be written there.

Drawing takes most of the time of a report, and a finished study is often asked for again. So a page is kept with a sum
over all that it is made from: the code of this package, the versions of what draws, and every file of the store, so
that no section has to say which of them it reads. Records count by their content, because commands write them again
that change nothing in them; files of runs by their size and times.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil

from gpt2lab.errors import Gpt2labError
from gpt2lab.store import Store, read_bytes
from gpt2lab.store.files import sha256

PACKAGE = Path(__file__).parents[1]
VERSIONS = ("fonttools", "jinja2", "matplotlib", "numpy", "scipy")
RECORDS = ("studies", "sweeps", "noise", "tracking")
"""Folders of a store whose files count by content."""


def sum_of_store(store: Store) -> str:
    """A sum over the files that pages are made from. Taken before they are read, it never covers more than a page."""
    records = [
        (str(path.relative_to(store.root)), _content(path))
        for folder in RECORDS
        for path in sorted((store.root / folder).rglob("*.json"))
    ]
    runs = [(run.id, list(run.stamps())) for run in store.runs()]
    return sha256(repr((records, runs)).encode())


def _content(path: Path) -> str:
    """A sum of a file; of one that cannot be read, why, as pages say so too."""
    try:
        return sha256(read_bytes(path) or b"")
    except Gpt2labError as error:
        return str(error)


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
