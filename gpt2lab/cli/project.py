"""The project file `gpt2lab.toml`: options that need not be typed at each command.

plugins = ["parts.py"]      # as --plugin, relative to the file
scale = "nano"
runs = "runs"
reports = "reports"
jobs = 2
campaign = "rope"           # as --campaign
sbatch = "--partition=gpu --gpus=1"   # of workers in Slurm
tracking = "http://127.0.0.1:5000"    # as MLFLOW_TRACKING_URI, or false
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError, unknown

FILE = "gpt2lab.toml"
OPTIONS = {"plugins": "plugin", "scale": "scale", "runs": "runs", "reports": "out", "jobs": "jobs",
           "campaign": "campaign", "sbatch": "sbatch", "tracking": "no_tracking"}  # fmt: skip
"""Key of the file -> parameter of commands."""
TYPES: dict[str, Any] = {"plugins": list, "jobs": int, "tracking": (str, bool)}


def project_file() -> Path | None:
    """The nearest project file in this folder or one above it, not above the user's home."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
        if folder == Path.home() or (folder / ".git").exists():
            return None
    return None


def project_options() -> dict[str, Any]:
    """Parameters of commands that the project file sets; the environment has its tracker. Raises ConfigError."""
    file = project_file()
    if file is None:
        return {}
    import tomllib

    try:
        written = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(file)) from None
    options: dict[str, Any] = {}
    value: Any
    for key, value in written.items():
        if key not in OPTIONS:
            raise ConfigError(unknown("key", key, OPTIONS), where=str(file))
        if not isinstance(value, TYPES.get(key, str)) or (isinstance(value, bool) and key != "tracking"):
            raise ConfigError(f"{value!r} is of another type than expected", where=f"{file}: {key}")
        if key == "plugins":
            value = [str(file.parent / str(plugin)) for plugin in value]
        elif key in ("runs", "reports"):
            value = str(file.parent / value)
        elif key == "tracking":
            if isinstance(value, str):
                os.environ.setdefault("MLFLOW_TRACKING_URI", value)
            value = value is False
        options[OPTIONS[key]] = value
    return options
