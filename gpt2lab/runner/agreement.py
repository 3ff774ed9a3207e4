"""What all ranks of a run must have alike before they train it together: otherwise gradients of different trainings
would be averaged, and nothing would say so."""

from __future__ import annotations

from typing import Any

import torch

from gpt2lab.config import Config
from gpt2lab.runner.job import Job
from gpt2lab.schema import flatten
from gpt2lab.store import RunFolder, read_json
from gpt2lab.training.checkpoints import Loaded
from gpt2lab.training.manifest import MANIFEST


def plan_of(job: Job, config: Config) -> dict[str, Any]:
    """Every setting by its key, and what the run's identity holds beside them: data, code, torch."""
    identity = {key: value for key, value in job.identity.items() if key != "settings"}
    return {**flatten(config.tree()), **flatten(identity), "torch here": torch.__version__, "run id": job.run_id}


def start_of(run: RunFolder, loaded: Loaded | None) -> dict[str, Any]:
    """The checkpoint that was loaded, with the sum of its manifest."""
    if loaded is None:
        return {"checkpoint": "none"}
    manifest = read_json(run.checkpoints / f"step_{loaded.step:06d}" / MANIFEST) or {}
    return {"checkpoint": f"step {loaded.step}, {str(manifest.get('sha256'))[:12]}"}
