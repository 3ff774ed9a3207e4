"""One run, wired: the only package that knows all the parts of a training. It is what a worker process executes."""

from gpt2lab.runner.job import NOTHING_LEFT, PARENT, REPLAYED, Job
from gpt2lab.runner.main import main, record_failure, work
from gpt2lab.runner.measured import evaluated, sequences_at_once
from gpt2lab.runner.stop import StopRequest
from gpt2lab.runner.training import execute

__all__ = [
    "NOTHING_LEFT",
    "PARENT",
    "REPLAYED",
    "Job",
    "StopRequest",
    "evaluated",
    "execute",
    "main",
    "record_failure",
    "sequences_at_once",
    "work",
]
