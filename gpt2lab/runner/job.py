"""What a worker is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.registry import PLUGINS

if TYPE_CHECKING:
    from gpt2lab.data.prepared import Prepared
    from gpt2lab.planning.runs import Run
    from gpt2lab.store import Store

PARENT = "GPT2LAB_PARENT"
"""Names the process, by its id, whose end is a worker's end."""

NOTHING_LEFT = 76
"""A worker's exit code when another process had finished the run before it; no error has it."""

REPLAYED = 20
"""Steps at the end that can be trained again from a checkpoint of their own."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs, as plain data: it crosses a process border, or a cluster's queue, as JSON."""

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
    profile: bool = False
    """whether a few early steps are traced into the run's folder"""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        return Job(**{**fields, "plugins": tuple(fields["plugins"])})


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
