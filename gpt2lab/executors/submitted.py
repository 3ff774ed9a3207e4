"""The code of submitted runs: a copy of the package and the plug-ins, in the folder of runs.

Workers start minutes or days after a submission, and again after each preemption. They import this copy, so editing
the checkout meanwhile changes nothing. Configs need no copy: job.json holds them in full.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NoReturn

from gpt2lab.errors import EnvironmentFault, Gpt2labError
from gpt2lab.runner import Job
from gpt2lab.store import Store, disk_fault, make_folder

FOLDER = "submitted"
"""In the folder of runs: one folder for each state of the code, named by a hash of its files."""
IMPORTS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Variables by which a process and all that it starts import a copy."""
UNUSED_SECONDS = 86_400.0
"""For which a copy is kept that no run has: a submission may be about to write its jobs."""
PACKAGE = Path(__file__).resolve().parents[1]


def with_copy(job: Job) -> Job:
    """The job, to be trained with a copy of the present code. Raises EnvironmentFault."""
    folder = copy_of_code(Path(job.root), job.plugins)
    plugins = tuple(str(folder / _place(number, plugin)) for number, plugin in enumerate(job.plugins))
    return replace(job, code=str(folder), plugins=plugins)


@cache  # what this process has imported stays the same, too
def copy_of_code(root: Path, plugins: tuple[str, ...]) -> Path:
    """The folder of a copy of package and plug-ins below `root`, which is made unless it exists."""
    files = {place: file.read_bytes() for place, file in sorted(_files(plugins))}
    sums = "\n".join(f"{place} {hashlib.sha256(data).hexdigest()}" for place, data in files.items())
    folder = root / FOLDER / hashlib.sha256(sums.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, Gpt2labError):  # then some are left
        remove_unused(root)
    if folder.is_dir():
        os.utime(folder)
        return folder
    draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    try:
        for place, data in files.items():
            make_folder((draft / place).parent)
            (draft / place).write_bytes(data)
        draft.rename(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.is_dir():  # where it is, another process was quicker
            raise disk_fault(error, folder) from error
    return folder


def remove_unused(root: Path) -> None:
    """Remove the copies below `root` that no submission has used for a day and no unfinished run is to be trained with.
    Raises DataFault, OSError."""
    old = [copy for copy in (root / FOLDER).glob("*") if time.time() - copy.stat().st_mtime > UNUSED_SECONDS]
    unfinished = [
        run.path / "job.json" for run in Store(root).runs() if old and not (run.path / "result.json").exists()
    ]
    used = {Path(Job.read(job).code).name for job in unfinished if job.exists()}
    for copy in old:
        if copy.name not in used:
            shutil.rmtree(copy)


def environment_of(code: Path) -> dict[str, str]:
    """The environment of a process that imports the copy in `code`, and of all that it starts. Raises
    EnvironmentFault."""
    if not (code / "gpt2lab").is_dir():
        what = "the code that the runs were submitted with is gone"
        raise EnvironmentFault(what, where=str(code), hint="submit again: the command that declared the study")
    beside = sorted(str(folder) for folder in (code / "plugins").glob("*"))
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(code), *beside, *inherited]
    # without the second, Python would first look into the present folder, which may be the checkout
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}


def is_imported(job: Job) -> bool:
    """Whether this process imports the code that the job is to be trained with."""
    return not job.code or Path(job.code).resolve() == PACKAGE.parent


def enter(job: Job) -> NoReturn:
    """Begin this command again, as a process that imports the job's copy of the code. Raises EnvironmentFault."""
    environment = environment_of(Path(job.code))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "gpt2lab", *sys.argv[1:]], environment)


def _files(plugins: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(place in the copy, file) of the package, the plug-ins, and the modules beside them that they have imported."""
    for file in _sources(PACKAGE):
        yield f"gpt2lab/{file.relative_to(PACKAGE)}", file
    for number, plugin in enumerate(plugins):
        yield _place(number, plugin), Path(plugin)
        folder = Path(plugin).parent
        for name, module in list(sys.modules.items()):
            where = getattr(module, "__file__", None)
            if not where or "." in name or name in ("gpt2lab", "__main__"):
                continue
            file = Path(where).resolve()
            package = file.parent if file.name == "__init__.py" else None
            if (package or file).parent != folder:
                continue
            for part in _sources(package) if package else [file]:
                yield f"plugins/{number}/{part.relative_to(folder)}", part


def _sources(package: Path) -> Iterator[Path]:
    return (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _place(number: int, plugin: str) -> str:
    return f"plugins/{number}/{Path(plugin).name}"
