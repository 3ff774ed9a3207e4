"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from gpt2lab.data.progress import rich_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_each_phase_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with rich_progress(stream) as say:
        for seconds in range(25):
            now = 100.0 + seconds
            say(seconds * 10**6, 25 * 10**6, "writing tokens")
        say(0, 0, "counting")
        say(40 * 10**9, 48 * 10**9, "writing tokens")  # continued: the rate is that of what is done here
        now += 20
        say(40 * 10**9 + 20 * 10**6, 48 * 10**9, "writing tokens")
    assert stream.getvalue().splitlines() == [
        "writing tokens: 0.0 of 25.0 MB",
        "writing tokens: 10.0 of 25.0 MB, 1.0 MB/s, 0:15 left",
        "writing tokens: 20.0 of 25.0 MB, 1.0 MB/s, 0:05 left",
        "counting",
        "writing tokens: 40,000.0 of 48,000.0 MB",
        "writing tokens: 40,020.0 of 48,000.0 MB, 1.0 MB/s, 2:13:00 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with rich_progress(stream) as say:
        say(5, 10, "writing tokens")
        say(0, 0, "counting")
    assert "counting" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()
