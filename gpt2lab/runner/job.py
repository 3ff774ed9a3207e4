"""What passes between a worker and the process that started it: job.json in the folder of the run, and exit codes."""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.registry import PLUGINS
from gpt2lab.store import RunFolder, make_folder, read_json, write_json

if TYPE_CHECKING:
    from gpt2lab.data.prepared import Prepared
    from gpt2lab.planning.runs import Run
    from gpt2lab.store import Store

NOTHING_LEFT = 76
"""A worker's exit code when another process had finished the run before it; no error has it."""

REPLAYED = 20
"""Steps at the end that can be trained again from a checkpoint of their own."""


WHERE = "the path of the job.json in a run's folder"


@dataclass(frozen=True)
class Job:
    """One run to be trained: all that a worker needs, wherever it executes."""

    root: str
    run_id: str
    config: str
    identity: dict[str, Any]
    data: str
    flops_per_token: float
    threads: int
    plugins: tuple[str, ...] = ()
    replayable: bool = False
    """whether a checkpoint from shortly before the end is kept, so that `gpt2lab adopt` can replay the last steps"""
    code: str = ""
    """folder of the copy of package and plug-ins that it is to be trained with; empty for those of the worker"""
    profile: bool = False
    """whether a few early steps are traced into the run's folder"""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.root) / self.run_id

    @property
    def path(self) -> Path:
        """Its file, which a worker reads."""
        return self.folder / "job.json"

    def has_failed(self) -> bool:
        """Whether the run has failed since its file was written, by the clock of the disk that both lie on."""
        try:
            return (self.folder / "failure.json").stat().st_mtime_ns > self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def write(self) -> Path:
        """Write its file into the run's folder."""
        RunFolder(self.folder).refuse_links()
        make_folder(self.folder)
        # drafted beside the folder: another process that begins the run now clears leftovers out of it
        draft = self.folder.with_name(f"{self.run_id}.{secrets.token_hex(4)}.job")
        write_json(draft, asdict(self))
        os.replace(draft, self.path)
        return self.path

    @staticmethod
    def read(path: Path) -> Job:
        """Raises DataFault for a damaged file or one that is no job, ConfigError where no file can be read."""
        try:
            fields = read_json(path)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), hint=WHERE) from None
        if fields is None:
            raise ConfigError("there is no such file", where=str(path), hint=WHERE)
        try:
            return Job(**{**fields, "plugins": tuple(fields["plugins"])})
        except (KeyError, TypeError):
            raise DataFault("this is not a job", where=str(path), hint=WHERE) from None


def job_for(
    run: Run, store: Store, data: Prepared, *, flops_per_token: float, threads: int, replayable: bool = False
) -> Job:
    """The run as a worker receives it."""
    return Job(
        root=str(store.root.resolve()),
        run_id=run.id,
        config=run.config.to_yaml(),
        identity=run.identity,
        data=str(data.path),
        flops_per_token=flops_per_token,
        threads=threads,
        plugins=tuple(PLUGINS),
        replayable=replayable,
    )
