"""One page per study, from the run store and its study record alone: no torch, no config, no tracker."""

from gpt2lab.report.page import terminal_summary, write_report

__all__ = ["terminal_summary", "write_report"]
