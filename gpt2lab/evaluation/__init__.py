"""Measuring a trained model: validation loss, bits per byte, losses at other context lengths and per window, and
metrics and tasks, which plug-ins can extend."""

from gpt2lab.evaluation import known_tasks  # noqa: F401  (fills the slot)
from gpt2lab.evaluation.metrics import Rows, Subject, apply, metric
from gpt2lab.evaluation.tasks import Task, choose, complete, fill, task, written
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window, evaluation_key
from gpt2lab.evaluation.windows import Parts, WindowLosses, divisions, validation_documents

__all__ = [
    "EvaluationConfig",
    "Parts",
    "Rows",
    "Subject",
    "Task",
    "WindowLosses",
    "apply",
    "choose",
    "complete",
    "divisions",
    "evaluate_by_window",
    "evaluation_key",
    "fill",
    "metric",
    "task",
    "validation_documents",
    "written",
]
