"""The contract of sections: one function adds one to the page, and one that fails costs its own line only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_reader import Reader, part_of

from gpt2lab.cli import results
from gpt2lab.registry import load_plugin
from gpt2lab.reports import page
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, read_study
from gpt2lab.reports.study import write_report
from gpt2lab.reports.tables import Cell, Link, Row, Table, columns

MakeStudy = Callable[..., dict[str, Any]]
GUARDED = page._made_or_error
EXAMPLE = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/report.md").read_text(), re.S)[0]


@pytest.fixture(autouse=True)
def sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    from gpt2lab.reports.sections import load

    load()
    monkeypatch.setattr(page, "SECTIONS", {kind: list(made) for kind, made in page.SECTIONS.items()})


def titles(source: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>|<summary>(.*?)</summary>", source)  # type: ignore[return-value]


@pytest.mark.usefixtures("no_figures")
def test_the_example_of_the_documentation_stands_where_it_says(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study({"learned": 2.15, "rotary": 1.9})
    (tmp_path / "mine.py").write_text(EXAMPLE)
    load_plugin(tmp_path / "mine.py")
    index = write_report(read_study("posenc", tmp_path / "runs"), tmp_path / "reports")
    found = ["".join(pair) for pair in titles(index.read_text())]
    assert found[found.index("What it costs") + 1] == "The best seed"
    twin = part_of((index.parent / "report.md").read_text(), "The best seed")
    assert re.search(r"^\| rotary \| 1\.\d+ \| [012] \|$", twin, re.M) and "(figures/best-seed.svg)" in twin
    assert (index.parent / "figures/best-seed.svg").exists()
    assert json.loads((index.parent / "verdicts.json").read_text())["best_seed"].keys() == {"learned", "rotary"}


@pytest.mark.usefixtures("no_figures")
def test_the_command_takes_sections_from_a_plug_in(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    (tmp_path / "other.py").write_text(EXAMPLE.replace("The best seed", "Taken from a file"))
    results.report("posenc", plugin=[str(tmp_path / "other.py")], all_=False, force_exploratory=False, publish=False,
                   runs=tmp_path / "runs", out=tmp_path / "reports")  # fmt: skip
    assert "Taken from a file" in (tmp_path / "reports/posenc@nano/index.html").read_text()


@pytest.mark.usefixtures("no_figures")
def test_a_section_that_fails_costs_its_own_line(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study()
    monkeypatch.setattr(page, "_made_or_error", GUARDED)

    @section(order=45, title="Broken")
    def broken(read: StudyRead) -> Iterator[Section]:
        yield Section(points=["half of it"])
        raise ValueError(f"<b>{read.name}\x1b")

    before = page.SECTIONS["study"][:-1]
    index = write_report(read_study("posenc", tmp_path / "runs"), tmp_path / "reports")
    read = Reader(index.read_text())
    assert "This section could not be made" in read.text and "ValueError: <b>posenc@nano\ufffd" in read.text
    assert "<b>" not in index.read_text() and "half of it" not in read.text
    line = broken.__code__.co_firstlineno + 3
    assert f"broken, test_sections.py:{line} made no section: ValueError" in capsys.readouterr().err
    monkeypatch.setattr(page, "SECTIONS", {**page.SECTIONS, "study": before})
    whole = Reader(write_report(read_study("posenc", tmp_path / "runs"), tmp_path / "whole").read_text())
    assert set(whole.words) <= set(read.words)  # every other section is there


def test_tables_and_links_are_escaped_in_both_forms() -> None:
    cells = [Cell("a|b", Link("<i>", "https://example.org/", after="d"), "better", remark="e")]
    parts = Cell(parts=[Cell("one", "two"), Cell("three", Link("here", "place.html"))])
    table = Table([*columns("Arm:number", "Ratio 1:2", "Run:id")], [Row([*cells, parts, Cell("x", link="y")])])
    shown = page.Page(about="a", heading="h", title="t", sections=[Section(title="T", table=table)], files=["x.md"])
    source, twin = page.render_html(shown), page.render_markdown(shown)
    assert [c.kind for c in table.columns] == ["number", "", "id"] and table.columns[1].title == "Ratio 1:2"
    assert Reader(source).links() == ["https://example.org/", "place.html", "y", "x.md"] and "<i>" not in source
    assert (
        r"| **a\|b**; [&lt;i&gt;](https://example.org/) d; e | one; two<br>three; [here](place.html) | [x](y) |" in twin
    )
