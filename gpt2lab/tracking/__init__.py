"""Tracking: the journal on disk is the truth; MLflow is a mirror that may lag, fail and catch up.

journal.py writes and follows metrics.jsonl; follower.py follows a study, or a sweep as trials.py has it; delivery.py
carries its rows to a mirror; mlflow.py is the mirror, experiments.py reads anybody's experiment; no other file imports
mlflow.
"""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)([^\s/@:]*):[^\s]*(?=@)")
_TOKEN_AS_USER = re.compile(r"(https?://)[^\s/@:]+(?=@)", re.IGNORECASE)
_IN_QUERY = re.compile(r"([?&](?:[a-z_]*password|passwd|pwd|secret|token|api_?key)=)[^&\s'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """`text` with the passwords in its URIs replaced by ***; what every message and record shows of a URI."""
    text = _CREDENTIALS.sub(r"\1:***", text)
    text = _TOKEN_AS_USER.sub(r"\1***", text)
    return _IN_QUERY.sub(r"\1***", text)
