"""Measuring a trained model: validation loss, bits per byte, losses at other context lengths."""

from gpt2lab.evaluation.validation import (
    EvaluationConfig,
    ValidationResult,
    context_losses,
    evaluate,
    evaluation_key,
    validation_loss,
)

__all__ = [
    "EvaluationConfig",
    "ValidationResult",
    "context_losses",
    "evaluate",
    "evaluation_key",
    "validation_loss",
]
