"""Runs that ended without having been trained."""

from __future__ import annotations

from typing import Any

from gpt2lab.store import RunFolder


def end(folder: RunFolder, result: dict[str, Any], **identity: object) -> None:
    """Leave all files that a run has when it ends."""
    folder.write_identity({"id": folder.id, "identity": identity})
    folder.write_config("seed: 0")
    folder.metrics.touch()
    folder.finish(result)
