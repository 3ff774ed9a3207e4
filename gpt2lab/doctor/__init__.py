"""Is this training sound, and is this machine fit to train?"""

from gpt2lab.doctor.checks import CHECKS, Examination, ExaminedRun, Finding, NotExamined, examine

__all__ = ["CHECKS", "Examination", "ExaminedRun", "Finding", "NotExamined", "examine"]
