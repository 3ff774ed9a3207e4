"""The project file `gpt2lab.toml`: options that need not be typed at each command.

plugins = ["parts.py"]      # as --plugin, relative to the file
scale = "nano"
runs = "runs"
reports = "reports"
jobs = 2
campaign = "rope"           # as --campaign
sbatch = "--partition=gpu --gpus=1"   # of workers in Slurm
tracking = "http://127.0.0.1:5000"    # as MLFLOW_TRACKING_URI, or false

[profiles.cluster]                    # for --profile cluster
executor = "slurm"
workers = 8
sbatch = "--partition=gpu --gpus=1 --time=12:00:00"
machine = "node.json"
price = 2.5                           # of a GPU hour
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError, unknown

FILE = "gpt2lab.toml"
OPTIONS = {"plugins": "plugin", "scale": "scale", "runs": "runs", "reports": "out", "jobs": "jobs",
           "campaign": "campaign", "sbatch": "sbatch", "tracking": "no_tracking"}  # fmt: skip
"""Key of the file -> parameter of commands."""
TYPES: dict[str, Any] = {"plugins": list, "jobs": int, "tracking": (str, bool), "workers": int, "nproc": int,
                         "price": (int, float)}  # fmt: skip
PROFILES = "profiles"
PROFILE = ("executor", "workers", "jobs", "nproc", "sbatch", "machine", "price")
"""Keys of a profile, each the parameter of a command."""


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
    file, written = project_content()
    options: dict[str, Any] = {}
    for key, value in written.items():
        if key != PROFILES:
            options[OPTIONS.get(key, key)] = checked(key, value, OPTIONS, file)
    return options


def profile_options(name: str) -> dict[str, Any]:
    """Parameters of commands that a profile of the project file sets. Raises ConfigError."""
    file, written = project_content()
    profiles = written.get(PROFILES, {})
    if not isinstance(profiles, dict) or not isinstance(profiles.get(name), dict):
        known = profiles if isinstance(profiles, dict) else ()
        hint = f"a section [{PROFILES}.{name}] in {FILE}; docs/cluster.md"
        raise ConfigError(unknown("profile", name, known), where=str(file or FILE), hint=hint)
    return {key: checked(key, value, PROFILE, file) for key, value in profiles[name].items()}


def project_content() -> tuple[Path | None, dict[str, Any]]:
    """The project file and what it says; nothing where there is none. Raises ConfigError."""
    file = project_file()
    if file is None:
        return None, {}
    import tomllib

    try:
        return file, tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(file)) from None


def checked(key: str, value: Any, known: Iterable[str], file: Path | None) -> Any:
    """The value of a key, as its parameter takes it. Raises ConfigError."""
    if key not in known:
        raise ConfigError(unknown("key", key, known), where=str(file))
    if not isinstance(value, TYPES.get(key, str)) or (isinstance(value, bool) and key != "tracking"):
        raise ConfigError(f"{value!r} is of another type than expected", where=f"{file}: {key}")
    folder = file.parent if file else Path()
    if key == "plugins":
        return [str(folder / str(plugin)) for plugin in value]
    if key in ("runs", "reports", "machine"):
        return str(folder / value)
    if key == "tracking":
        if isinstance(value, str):
            os.environ.setdefault("MLFLOW_TRACKING_URI", value)
        return value is False
    return value
