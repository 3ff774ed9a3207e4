"""The pages of studies, sweeps and the whole store, from the run store alone: no torch, no config, no tracker."""

from gpt2lab.reports.front import write_front
from gpt2lab.reports.index import write_index
from gpt2lab.reports.page import publish
from gpt2lab.reports.read import read_study, read_sweep
from gpt2lab.reports.study import terminal_summary, write_report
from gpt2lab.reports.sweep import terminal_sweep, write_sweep_report

__all__ = [
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
