"""One page per study, from the run store and its study record alone: no torch, no config, no tracker."""

from gpt2lab.report.page import terminal_summary, write_report
from gpt2lab.report.results import contexts, final_values, judge, load_results, missing_runs

__all__ = [
    "contexts",
    "final_values",
    "judge",
    "load_results",
    "missing_runs",
    "terminal_summary",
    "write_report",
]
