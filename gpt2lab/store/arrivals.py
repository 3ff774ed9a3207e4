"""Files of a run that was trained elsewhere, as they arrive in this store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from gpt2lab.errors import DataFault
from gpt2lab.store.files import disk_fault, make_folder, publish_folder, temporary_beside, write_atomically

MANIFEST = "manifest.json"
"""In every checkpoint, whose files arrive together."""
LAST = "result.json"
"""With which a run counts as finished."""

News = Mapping[str, tuple[int, bytes] | None]
"""Place of a file in its run's folder -> (offset, what the file holds from there on), or None for one that is gone."""


def receive(folder: Path, news: News) -> None:
    """Write files into a run's folder, whose lock is held. As where they were written, a kill at any moment leaves
    whole checkpoints, and no result without the files that it sums up. Raises DataFault, EnvironmentFault."""
    for place in news:
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise DataFault("a file outside the run's folder has arrived", where=place)
    whole = {PurePosixPath(place).parent for place in news if place.endswith(f"/{MANIFEST}")}
    for parent in whole:
        final = folder / parent
        files = {place: part for place, part in news.items() if PurePosixPath(place).parent == parent}
        if final.exists() or None in files.values():
            shutil.rmtree(final, ignore_errors=True)
        draft = temporary_beside(final)
        for place, part in files.items():
            if part is not None:
                _write(draft / PurePosixPath(place).name, *part)
        if draft.is_dir():
            publish_folder(draft, final)
    for place in sorted(news, key=lambda place: place == LAST):
        part, path = news[place], folder / place
        if PurePosixPath(place).parent in whole:
            continue
        if part is None:
            path.unlink(missing_ok=True)
            if path.parent != folder and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        else:
            _write(path, *part)


def _write(path: Path, offset: int, data: bytes) -> None:
    if not offset:
        write_atomically(path, data)
        return
    try:
        make_folder(path.parent)
        with path.open("r+b") as file:
            file.truncate(offset)
            file.seek(offset)
            file.write(data)
    except OSError as error:
        raise disk_fault(error, path, len(data)) from error
