"""A manifest of sizes and sha256 sums, because neither torch nor safetensors notices a flipped bit in a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int) -> None:
    """Describe every file in `folder` as it is now; the manifest carries a sum of itself."""
    files = {file.name: _described(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    (folder / MANIFEST).write_bytes(_sealed({"format": 1, "step": step, "files": files}))


def damage(folder: Path, step: int, names: Collection[str]) -> str | None:
    """What is wrong with the files `names` in `folder`, against its manifest for `step`; None if every byte is right.

    Finds accidents, not forgery: whoever can write the files can write the manifest.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
        content = json.loads(written)
        files = content.pop("files")
        seal = content.pop("sha256")
        if written != _sealed({**content, "files": files}):
            return f"{MANIFEST} is not what was written (its sha256 is not {str(seal)[:12]}...)"
        if content != {"format": 1, "step": step} or files.keys() != set(names):
            return f"{MANIFEST} describes something else: {content}, {', '.join(files)}"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is not a manifest"
    for name, expected in files.items():
        try:
            found = _described(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found["bytes"] != expected["bytes"]:
            return f"{name} has {found['bytes']:,} bytes, not {expected['bytes']:,}"
        if found != expected:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": digest}


def _sealed(content: dict[str, Any]) -> bytes:
    """The one way in which this content can be written, with its own sum inside."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True).encode()
