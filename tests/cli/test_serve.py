"""`gpt2lab serve`: pages are made when they are opened, only their own files are given, and running ones refresh."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2lab.cli import serve
from gpt2lab.store import Store

STUDY = {
    "name": "mine@nano", "ablation": "mine", "scale": "nano", "question": "Which?", "baseline": "a",
    "arms": {"a": {"runs": {"0": "a" * 16}}, "b": {"runs": {"0": "b" * 16}}}, "contrasts": [["b", "a"]], "seeds": [0],
    "smallest_effect": 0.05, "alpha": 0.05, "evaluation": {"key": "k" * 16},
}  # fmt: skip


SWEEP = {
    "name": "lr@nano", "sweep": "lr", "scale": "nano", "question": "Which rate?", "trials": 1,
    "evaluation": {"key": "k" * 16}, "hash": "h", "searches": {"lr": {"slots": 1, "seeds": [100], "trials": [
        {"slot": 0, "outcome": "running", "settings": {"optim.lr": 0.1}, "runs": {"100": "c" * 16}}]}},
}  # fmt: skip


@pytest.fixture
def port(tmp_path: Path, no_figures: None) -> Iterator[int]:
    from gpt2lab.records import StudyRecord, SweepRecord

    Store(tmp_path / "runs").write_study(StudyRecord.read(STUDY, "a test"))
    Store(tmp_path / "runs").write_sweep(SweepRecord.read(SWEEP, "a test"))
    (tmp_path / "secret").write_text("secret")
    with serve.server(tmp_path / "runs", tmp_path / "reports", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "127.0.0.1") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    return connection.getresponse()


def test_pages_are_made_when_they_are_opened(port: int, tmp_path: Path) -> None:
    assert not (tmp_path / "reports").exists()
    index, page = get(port, "/"), get(port, "/mine@nano/")
    assert (index.status, page.status) == (200, 200)
    assert b"/mine%40nano/" in index.read() and b"Which?" in page.read()
    assert page.headers["Refresh"] is None
    assert get(port, "/mine@nano/report.md").status == 200


def test_a_page_refreshes_itself_while_a_run_trains(port: int, tmp_path: Path) -> None:
    run = Store(tmp_path / "runs").run("a" * 16)
    with run.lock():
        assert get(port, "/mine@nano/").headers["Refresh"] == str(serve.EVERY_SECONDS)
        assert get(port, "/lr@nano/").headers["Refresh"] is None
    with Store(tmp_path / "runs").run("c" * 16).lock():
        assert get(port, "/lr@nano/").headers["Refresh"] == str(serve.EVERY_SECONDS)


def test_an_earlier_declaration_keeps_its_page_and_address(port: int, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    before = get(port, "/mine@nano/").read()
    store.write_study(store.study("mine").with_(question="And now?", hash="7" * 16))
    page = get(port, "/mine@nano/")
    assert page.status == 200 and b"And now?" in (body := page.read()) and b'<a href="/mine%40nano~1/">' in body
    for address in ("/mine@nano~1/", "/mine@nano%231/", "/mine%40nano~1/index.html"):
        older = get(port, address)
        assert older.status == 200 and b"Which?" in (text := older.read()) and b"And now?" not in text
    assert get(port, "/mine@nano~1/report.md").status == 200 and get(port, "/mine@nano~2/").status == 404
    assert b"Which?" in before


OUTSIDE = (
    "/../secret", "/mine@nano/../../secret", "/mine@nano/..%2f..%2fsecret", "/%2e%2e/secret",
    "/mine@nano/.written.json", "/other@nano/",
)  # fmt: skip


def test_nothing_but_pages_is_given(port: int) -> None:
    get(port, "/mine@nano/")
    assert {path: get(port, path).status for path in OUTSIDE} == dict.fromkeys(OUTSIDE, 404)


def test_another_name_for_this_machine_gets_no_page(port: int) -> None:
    assert get(port, "/", host="elsewhere.example").status == 421


def test_mlflow_is_entered_where_a_study_is_compared(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.setattr(serve, "links", lambda *_: {"experiment_id": "7", "parent_run_id": "f00"})
    assert b'href="/mlflow/mine%40nano"' in get(port, "/mine@nano/").read()
    assert get(port, "/mlflow/mine@nano").headers["Location"] == (
        "http://mlflow.example/#/experiments/7/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=f00"
    )
    for place in ("/mlflow", "/mlflow/", "/mlflow/other"):
        list_of_all = "http://mlflow.example/#/experiments?workflowType=machine_learning"
        assert get(port, place).headers["Location"] == list_of_all
