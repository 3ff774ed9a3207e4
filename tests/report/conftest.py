"""Studies to report on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from made_up_study import declare

from gpt2lab.reports import page


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`declare` below tmp_path/runs."""
    return partial(declare, tmp_path / "runs")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/ and the report of one complete study; to be read only."""
    from gpt2lab.reports.read import read_study
    from gpt2lab.reports.study import write_report

    folder = tmp_path_factory.mktemp("finished")
    declare(folder / "runs")
    write_report(read_study("posenc", folder / "runs"), folder / "reports")
    return folder


@pytest.fixture(autouse=True)
def no_section_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a section is one of its test."""
    monkeypatch.setattr(page, "_made_or_error", page.made_by)
