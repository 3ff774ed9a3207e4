"""Files as a config names them: paths and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from gpt2lab.errors import ConfigError


def matching(paths: Sequence[str], *, key: str = "paths", example: str = "*.txt") -> list[Path]:
    """The files that `paths` name, each once, sorted; every pattern must match. `key`: the option of the corpus that
    they come from. Raises ConfigError."""
    found: set[Path] = set()
    for written in paths:
        pattern = os.path.expanduser(written)
        hits = (
            [Path(pattern)] if os.path.lexists(pattern) else [Path(hit) for hit in glob.glob(pattern, recursive=True)]
        )
        files = {hit.resolve() for hit in hits if hit.is_file()}
        if not files:
            folder = os.path.isdir(pattern)
            raise ConfigError(
                f"'{written}' {'is a folder' if folder else 'matches no file'}",
                where=f"data.corpus.{key}",
                hint=f"{key}: ['{written.rstrip('/')}/{example}']" if folder else f"ls {written}",
            )
        found |= files
    return sorted(found)


def named(files: Sequence[Path]) -> dict[str, Path]:
    """Names below the deepest folder that holds all files: the same wherever that folder is."""
    if not files:
        raise ConfigError("no paths given", where="data.corpus.paths", hint="paths: ['folder/*.txt']")
    root = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(root).as_posix(): file for file in files}
