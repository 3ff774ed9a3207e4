"""Answers that stay the same as long as code and files do, kept in the user's cache folder.

Components can be asked only after torch was imported, which is most of the time of a short command. So an answer is
kept with a sum of every file that was opened for it, or would have been if it existed, and given again only while all
of them, the code, and what is installed are as they were.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import site
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gpt2lab.data.files import data_home
from gpt2lab.errors import Gpt2labError
from gpt2lab.registry import ENTRY_POINTS, PLUGINS, SLOTS
from gpt2lab.reports.inputs import PACKAGE, sum_of_code
from gpt2lab.store import read_json, write_json
from gpt2lab.store.files import sha256

SYSTEM = re.compile(r"/(proc|sys|dev(?!/shm/))/")
CODE = re.compile(r"\.(py|pyc|so)$|\.(dist|egg)-info/")
"""What is installed, which counts as a whole."""
_opened: list[set[Path]] = []
"""The files opened so far, of every question that is being answered."""


def kept(kind: str, question: object, answer: Callable[[], Any]) -> Any:
    """What `answer()` returns, plain data, or what it returned to the same question before. Answers by components that
    are not gpt2lab's own are not kept, nor are exceptions.

    kind: the folder of such answers.
    """
    key = "" if PLUGINS or entry_points(group=ENTRY_POINTS) else sum_of_code()
    key = key and sha256(repr((key, _installed(), os.getcwd(), question)).encode())[:32]
    path = data_home() / kind / f"{key}.json"
    with contextlib.suppress(Gpt2labError):  # an unreadable record counts as absent
        known = read_json(path) if key else None
        if known and all(_sum(Path(file)) == sum_ for file, sum_ in known["files"].items()):
            return known["answer"]
    with opened() as files:
        result = answer()
    own = all(component.factory.__module__.startswith("gpt2lab.") for slot in SLOTS.values() for component in slot)
    with contextlib.suppress(Gpt2labError):
        if key and own:
            sums = {str(file): _sum(file) for file in sorted(files) if not file.is_dir()}  # of absent ones too
            write_json(path, {"answer": result, "files": sums})
    return result


@contextlib.contextmanager
def opened() -> Iterator[set[Path]]:
    """The files, code and caches apart, that are opened by this process meanwhile."""
    _watch()
    files: set[Path] = set()
    _opened.append(files)
    try:
        yield files
    finally:
        _opened.remove(files)


@functools.cache
def _watch() -> None:
    """Python keeps such a hook until the process ends."""
    aside = (f"{PACKAGE}{os.sep}", f"{data_home()}{os.sep}")

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _opened and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not (path.startswith(aside) or SYSTEM.match(path) or CODE.search(path)):
                for files in _opened:
                    files.add(Path(path))

    sys.addaudithook(note)


def _installed() -> list[tuple[str, int]]:
    """What changes when a package is installed, updated or removed."""
    folders = {folder for folder in (*site.getsitepackages(), site.getusersitepackages(), *sys.path) if folder}
    return [(folder, os.stat(folder).st_mtime_ns) for folder in sorted(folders) if os.path.isdir(folder)
            and Path(folder).name in ("site-packages", "dist-packages")]  # fmt: skip


def _sum(path: Path) -> str:
    """Of a file; "" where it cannot be read."""
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""
