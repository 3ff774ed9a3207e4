"""The pages of studies, sweeps and the whole store, from the run store alone: no torch, no config, no tracker."""

from gpt2lab.report.index import write_index
from gpt2lab.report.read import read_study, read_sweep
from gpt2lab.report.study import terminal_summary, write_report
from gpt2lab.report.sweep import terminal_sweep, write_sweep_report

__all__ = [
    "read_study",
    "read_sweep",
    "terminal_summary",
    "terminal_sweep",
    "write_index",
    "write_report",
    "write_sweep_report",
]
