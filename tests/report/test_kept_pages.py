"""A page is kept while nothing changes that it is made from, and drawn again as soon as anything does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_study import declare, run_id, typed

from gpt2lab.reports import inputs, page
from gpt2lab.reports.page import Section, is_current
from gpt2lab.reports.read import read_study
from gpt2lab.reports.study import write_report
from gpt2lab.store import Store

RUN = run_id("rotary", 0)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose only entry stands for the sum of the code: a file of the package may be newer than these tests."""
    sums = ["as it is"]
    monkeypatch.setattr(page, "sum_of_code", lambda: sums[0])
    return sums


@pytest.fixture
def written(tmp_path: Path, code: list[str]) -> Path:
    """A folder with the runs of a study, and a page of it with next to nothing on it."""
    declare(tmp_path / "runs")
    read = read_study("posenc", tmp_path / "runs")
    shown = page.Page(about=read.name, heading="A question", title="A page", files=("report.md",))
    page.write_page(tmp_path / "reports" / read.name, shown, {"results.csv": "rotary"}, 1, page.sum_of(read))
    return tmp_path


def current(folder: Path, **options: Any) -> bool:
    return is_current(read_study("posenc@nano", folder / "runs", **options), folder / "reports")


def replaced(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Change one file in place; a text of equal length leaves even its size as it was."""

    def change(folder: Path) -> None:
        [path] = folder.glob(file)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def other_study(folder: Path) -> None:
    """Another question in the same store, which may share runs and be a rung of the same ladder."""
    record = json.loads((folder / "runs/studies/posenc@nano.json").read_text())
    (folder / "runs/studies/other@nano.json").write_text(json.dumps(record | {"name": "other@nano"}))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "record": replaced("runs/studies/posenc@nano.json", "early training", "long training!"),
    "result": replaced(f"runs/{RUN}/result.json", "412000000", "412000001"),
    "evaluation": replaced(f"runs/{RUN}/evaluations/*.json", "131072", "131073"),
    "journal": replaced(f"runs/{RUN}/metrics.jsonl", '"step": 10', '"step": 11'),
    "note": lambda folder: Store(folder / "runs").run(RUN).remark(note="odd"),
    "run without its result": lambda folder: (folder / "runs" / RUN / "result.json").unlink(),
    "another study": other_study,
    "links to MLflow": lambda folder: (
        (folder / "runs/tracking").mkdir(),
        (folder / "runs/tracking/posenc@nano.json").write_text("{}"),
    ),
    "edited page": replaced("reports/posenc@nano/results.csv", "rotary", "Rotary"),
    "lost file": lambda folder: (folder / "reports/posenc@nano/report.md").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_page_has_it_drawn_again(written: Path, change: Callable[[Path], Any]) -> None:
    assert current(written)
    change(written)
    assert not current(written)


def test_options_code_and_sections_of_plugins_have_it_drawn_again(
    written: Path, code: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert current(written) and not current(written, force_exploratory=True)
    for code[0] in ("edited", ""):  # "": it changed while the process ran
        assert not current(written)
    code[0] = "as it is"
    assert current(written)
    entries = [*page.SECTIONS["study"]]
    monkeypatch.setitem(page.SECTIONS, "study", entries)
    page.section(order=55)(lambda read: None)  # of this module, as of a plug-in
    assert not current(written)


def test_what_changes_nothing_leaves_it(written: Path, no_figures: None) -> None:
    store = Store(written / "runs")
    record = typed(json.loads((written / "runs/studies/posenc@nano.json").read_text()))
    store.write_study(record)
    write_report(read_study("posenc", store.root), written / "reports")
    store.write_study(record)
    (store.run(RUN).path / "checkpoints/step_000800").mkdir(parents=True)
    (store.root / "mlflow.db").touch()
    assert current(written)


def test_a_page_with_an_error_in_a_section_is_drawn_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_made_or_error", lambda entry, read: [Section(title=entry.title, failed=True)])
    write_report(read_study("posenc", written / "runs"), written / "reports")
    assert not current(written)


def test_the_sum_of_the_code_covers_every_file_and_is_not_known_where_one_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "PACKAGE", tmp_path)
    sum_of_code = inputs.sum_of_code.__wrapped__
    (tmp_path / "page.css").write_text("a {}")
    assert sum_of_code() == ""
    monkeypatch.setattr(inputs.psutil.Process, "create_time", lambda self: time.time() + 60)
    sums = [sum_of_code()]
    (tmp_path / "page.css").write_text("b {}")
    sums.append(sum_of_code())
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/page.pyc").touch()
    assert sum_of_code() == sums[-1]
    (tmp_path / "new.py").touch()
    sums.append(sum_of_code())
    monkeypatch.setattr(inputs, "version", lambda package: "another")
    sums.append(sum_of_code())
    assert len({*sums, ""}) == 5


def test_sections_are_read_without_matplotlib() -> None:
    """It takes most of the time of a command that keeps a page, so functions that draw import it."""
    script = (
        "import sys; from gpt2lab.reports import sections, sweep; sections.load()\n"
        "print([name for name in ('matplotlib', 'fontTools', 'scipy.special', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"
