"""Whether a run that was declared elsewhere would be the same run here; asked before a step is trained."""

from __future__ import annotations

import torch

from gpt2lab.config import Config, config_from_text
from gpt2lab.errors import EnvironmentFault
from gpt2lab.identity import PART_NAMES, digest, run_id, run_identity
from gpt2lab.registry import load_plugin
from gpt2lab.runner.job import Job
from gpt2lab.training.precision import choose_device


def config_of(job: Job) -> Config:
    """Its config, once its plug-ins are loaded."""
    for plugin in job.plugins:
        load_plugin(plugin)
    return config_from_text(job.config)


def refuse_another_run(job: Job, config: Config) -> None:
    """Raises EnvironmentFault where code, torch or device are not those that the run was declared with."""
    device = choose_device(config.training.device).type
    here = run_identity(
        config,
        data=job.identity["data"],
        device=device,
        threads=job.threads if device == "cpu" else 0,
        torch_version=torch.__version__,
        compiled=bool(job.identity.get("compiled")),
    )
    if run_id(here) != job.run_id:
        names = [
            PART_NAMES.get(key, key) for key, value in here.items() if digest(value) != digest(job.identity.get(key))
        ]
        what = f"it would be another run here: {', '.join(names)} differ from what was declared"
        hint = "the environment and the code of the declaring machine; or declare again from this one"
        raise EnvironmentFault(what, where=f"run {job.run_id}", hint=hint)
