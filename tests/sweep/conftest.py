"""Fixtures of another folder."""

from postgres_server import postgres, postgres_cluster  # noqa: F401
