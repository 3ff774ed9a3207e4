"""Checks of runs for bugs, and of the machine."""

from gpt2lab.doctor.checks import CHECKS, Examination, ExaminedRun, Finding, NotExamined, examine

__all__ = ["CHECKS", "Examination", "ExaminedRun", "Finding", "NotExamined", "examine"]
