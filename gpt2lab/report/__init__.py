"""One page per study, from the run store and its study record alone: no torch, no config, no tracker."""

from gpt2lab.report.page import terminal_summary, write_report
from gpt2lab.report.read import read_study

__all__ = ["read_study", "terminal_summary", "write_report"]
