"""The pages of studies, sweeps and the whole store, from the run store alone: no torch, no config, no tracker.

Names are imported on first use, because matplotlib is slow to import and commands that draw nothing use parts of this.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.reports.front import write_front
    from gpt2lab.reports.index import write_index
    from gpt2lab.reports.page import is_current, publish
    from gpt2lab.reports.read import read_study, read_sweep
    from gpt2lab.reports.study import terminal_summary, write_report
    from gpt2lab.reports.sweep import terminal_sweep, write_sweep_report

__all__ = [
    "is_current",
    "publish",
    "read_study",
    "read_sweep",
    "terminal_summary",
    "terminal_sweep",
    "write_front",
    "write_index",
    "write_report",
    "write_sweep_report",
]
_MODULES = {
    "front": ("write_front",),
    "index": ("write_index",),
    "page": ("is_current", "publish"),
    "read": ("read_study", "read_sweep"),
    "study": ("terminal_summary", "write_report"),
    "sweep": ("terminal_sweep", "write_sweep_report"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2lab.reports' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gpt2lab.reports.{_HOME[name]}"), name)
