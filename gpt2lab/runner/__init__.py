"""One run, wired: the only package that knows all the parts of a training. It is what a worker process executes."""

from gpt2lab.runner.job import NOTHING_LEFT, REPLAYED, Job, job_for
from gpt2lab.runner.measured import evaluated, sequences_at_once
from gpt2lab.runner.training import execute
from gpt2lab.runner.worker import main, record_failure, work
from gpt2lab.signals import StopRequest

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
