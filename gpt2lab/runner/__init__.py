"""One run: the only package that imports all parts of a training. A worker process executes it."""

from gpt2lab.basics.signals import StopRequest
from gpt2lab.runner.job import NOTHING_LEFT, REPLAYED, Job, job_for
from gpt2lab.runner.measured import evaluated, sequences_at_once
from gpt2lab.runner.training import execute
from gpt2lab.runner.worker import main, record_failure, work

__all__ = [
    "NOTHING_LEFT",
    "REPLAYED",
    "Job",
    "StopRequest",
    "evaluated",
    "execute",
    "job_for",
    "main",
    "record_failure",
    "sequences_at_once",
    "work",
]
