"""The benchmarks' command line, as `python -m benchmarks` calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from benchmarks.__main__ import app
from gpt2lab.cli import main


@pytest.fixture
def call(gpt2lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call one command in an empty folder; -> its exit code, standard output and standard error."""
    monkeypatch.setattr("gpt2lab.cli.main", partial(main, app))
    return gpt2lab
