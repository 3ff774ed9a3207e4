"""A tracker is one class in a plug-in: the example of the documentation mirrors a study, each row once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_study import Lab, row

from gpt2lab.cli import results
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.registry import load_plugin
from gpt2lab.tracking import RunGone, open_tracker
from gpt2lab.tracking.follower import Delivery, Follower, sync
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.usefixtures("no_plugins_after")
DOCS = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the documented tracker, which is registered and chosen."""
    _, _, section = DOCS.read_text(encoding="utf-8").partition("## Trackers")
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    file = tmp_path / "my_tracker.py"
    file.write_text(found[1])
    load_plugin(file)
    monkeypatch.setenv("GPT2LAB_TRACKER", f"lines:{tmp_path}/lines")
    return tmp_path / "lines" / "posenc@nano"


def steps(file: Path) -> list[int]:
    return [line["step"] for line in map(json.loads, file.read_text().splitlines()) if "tokens" in line]


def test_the_documented_tracker_gets_every_row_once(lab: Lab, lines: Path) -> None:
    run = lab.begin(lab.run("rotary", 1))
    lab.write(run, [row(0), row(1)])
    follower = Follower(lab.store, lab.record, lambda: open_tracker(lab.store.root, "posenc"), pytest.fail)
    follower.poll()
    lab.write(run, [row(2), row(3)])
    lab.finish(run)
    assert follower.close() == 0
    lab.train(lab.run("learned", 0))
    assert sync(lab.store, lab.record, lambda: open_tracker(lab.store.root, "posenc")) == 5
    assert steps(lines / "rotary 1.jsonl") == [0, 1, 2, 3]
    assert steps(lines / "learned 0.jsonl") == [0, 1, 2, 3, 4]
    last = json.loads((lines / "rotary 1.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 3, "tokens_per_second": 900.0, "mfu": 0.4, "peak_memory_bytes": 7.0}
    assert json.loads((lines / "rotary 1.json").read_text()) == {"status": "finished", "gpt2lab.status": "finished"}
    assert json.loads((lines / "study.json").read_text())["status"] == "partial"


def test_commands_use_it(lab: Lab, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab.record["ablation"] = "posenc"
    lab.declare()
    lab.train_all()
    page = tmp_path / "reports" / "posenc@nano"
    page.mkdir(parents=True)
    (page / "index.html").write_text("<p>done</p>")
    for sent in (20, 0):
        results.sync("posenc", lab.store.root, page.parent, [str(tmp_path / "my_tracker.py")])
        assert capsys.readouterr().out == f"posenc@nano: {sent} rows sent\n"
    assert (lines / "report" / "index.html").is_file()
    assert json.loads((lines / "study.json").read_text())["status"] == "finished"


def test_what_a_tracker_raises_is_reported_and_a_gone_run_is_opened_again(
    lab: Lab, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(lab.run())
    made = open_tracker(lab.store.root, "posenc")
    failures: list[Exception] = [OSError("disk of http://me:secret@host is full"), RunGone()]

    def failing(run: object, points: object) -> None:
        if failures:
            raise failures.pop(0)
        log(run, points)  # type: ignore[arg-type]

    log = made.log
    monkeypatch.setattr(made, "log", failing)
    with pytest.raises(EnvironmentFault, match="tracking does not work: disk of") as caught:
        sync(lab.store, lab.record, lambda: made)
    assert "secret" not in caught.value.render()
    assert Delivery(lab.store, lab.record, made).send_new() == 5
    assert steps(lines / "learned 0.jsonl") == [0, 1, 2, 3, 4]


def test_mlflow_is_used_unless_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, address in (("", f"{tmp_path}/mlflow.db"), ("mlflow:sqlite:////tmp/other.db", "/tmp/other.db")):
        monkeypatch.setenv("GPT2LAB_TRACKER", name)
        made = open_tracker(tmp_path, "posenc")
        assert isinstance(made, MlflowTracker) and made.shown_uri == f"sqlite:///{address}"
    monkeypatch.setenv("GPT2LAB_TRACKER", "mlfow")
    with pytest.raises(ConfigError, match=r"GPT2LAB_TRACKER: unknown tracker 'mlfow'; did you mean 'mlflow'\?"):
        open_tracker(tmp_path, "posenc")
