"""Measuring a trained model: validation loss, bits per byte, losses at other context lengths and per window, and
metrics that anybody can add."""

from gpt2lab.evaluation.metrics import Rows, Subject, apply, metric
from gpt2lab.evaluation.part_metrics import document_loss, frequency_loss
from gpt2lab.evaluation.parts import Parts, divisions
from gpt2lab.evaluation.validation import (
    EvaluationConfig,
    ValidationResult,
    context_losses,
    evaluate,
    evaluate_by_window,
    evaluation_key,
    validation_loss,
)
from gpt2lab.evaluation.windows import WindowLosses, validation_documents

__all__ = [
    "EvaluationConfig",
    "Parts",
    "Rows",
    "Subject",
    "ValidationResult",
    "WindowLosses",
    "apply",
    "context_losses",
    "divisions",
    "document_loss",
    "evaluate",
    "evaluate_by_window",
    "evaluation_key",
    "frequency_loss",
    "metric",
    "validation_documents",
    "validation_loss",
]
