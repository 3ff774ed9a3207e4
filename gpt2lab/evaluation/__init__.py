"""Measuring a trained model: validation loss, bits per byte, losses at other context lengths and per window, and
metrics and tasks, which plug-ins can extend."""

from gpt2lab.evaluation import known_tasks, metrics  # noqa: F401  (fill their slots)
