"""The ledger of a store: what is added, and that whatever is changed or taken out is found and named."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from gpt2lab.store.ledger import FILE, append, hash_of, read_ledger


def add(root: Path, study: str) -> None:
    line = {"kind": "declared", "campaign": "", "study": study, "contrasts": [{"p": None}]}
    assert append(root, lambda ledger: line) is not None


def test_lines_are_numbered_chained_and_read_back(tmp_path: Path) -> None:
    for study in ("a@nano", "b@nano"):
        add(tmp_path, study)
    assert append(tmp_path, lambda ledger: None) is None
    ledger = read_ledger(tmp_path)
    assert [(line["number"], line["study"]) for line in ledger.lines] == [(1, "a@nano"), (2, "b@nano")]
    assert ledger.lines[1]["previous"] == ledger.lines[0]["hash"] and not ledger.problems
    assert ledger.head == f"2:{ledger.lines[1]['hash']}" and ledger.has(f"1:{ledger.lines[0]['hash']}")
    assert not ledger.has("1:00") and read_ledger(tmp_path / "none").head == ""


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda lines: [*lines[:1], lines[1].replace("b@nano", "x@nano"), lines[2]], "line 2 (x@nano, declared"),
        (lambda lines: [lines[0], lines[2]], "line 2 is missing before line 3"),
        (lambda lines: lines[1:], "line 1 is missing before line 2"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1 is missing before line 2"),
        (lambda lines: [lines[0], "{", lines[2]], "line 2 of the file cannot be read"),
        (lambda lines: [lines[0], anew(lines[1]), lines[2]], "line 3 (c@nano, declared"),
    ],
    ids=["changed", "removed", "first removed", "order", "unreadable", "changed with its hash"],
)
def test_what_is_changed_is_named(tmp_path: Path, damage: object, named: str) -> None:
    for study in ("a@nano", "b@nano", "c@nano"):
        add(tmp_path, study)
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join(damage(lines)) + "\n")  # type: ignore[operator]
    problems = read_ledger(tmp_path).problems
    assert problems and named in problems[0]
    add(tmp_path, "d@nano")  # which says no less of it
    assert read_ledger(tmp_path).problems[: len(problems)] == problems


def anew(text: str) -> str:
    """A line with another study, and the hash of that."""
    line = json.loads(text) | {"study": "x@nano"}
    return json.dumps(line | {"hash": hash_of(line)})


def test_what_a_kill_leaves_of_a_line_is_written_over(tmp_path: Path) -> None:
    add(tmp_path, "a@nano")
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:40])
    assert len(read_ledger(tmp_path).lines) == 1
    add(tmp_path, "b@nano")
    ledger = read_ledger(tmp_path)
    assert len(ledger.lines) == 2 and not ledger.problems


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=several, args=(tmp_path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    ledger = read_ledger(tmp_path)
    assert len(ledger.lines) == 40 and not ledger.problems


def several(root: Path, name: str) -> None:
    for _ in range(20):
        add(root, name)
