"""Trained models and finished runs: opening, judging and measuring them, why two differ, adopting them for new code."""
