"""The benchmarks' command line, as `python -m benchmarks` calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from benchmarks.__main__ import app
from gpt2lab.cli import main


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call one command; -> its exit code, standard output and standard error."""

    def answer(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(app)
        return int(ended.value.code or 0), *capfd.readouterr()

    return answer
