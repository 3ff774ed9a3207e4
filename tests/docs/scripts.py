"""Scripts of the notes as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

NOTES = Path(__file__).parents[2] / "docs" / "notes"


def loaded(name: str) -> ModuleType:
    """The script of that name, which others may import from then on."""
    spec = importlib.util.spec_from_file_location(name, NOTES / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coordinates = loaded("coordinates")
