"""The tracker in a real MLflow SQLite store: everything once, findable, honest about what is not finite or deleted."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_study import CREATED, Lab, Look, row

from gpt2lab.errors import EnvironmentFault
from gpt2lab.store import Store
from gpt2lab.tracking.addresses import default_uri
from gpt2lab.tracking.follower import Delivery, Follower, links, sync
from gpt2lab.tracking.mlflow import MlflowTracker, artifacts_elsewhere

Sinks = Callable[[], MlflowTracker]


def once(lab: Lab, sinks: Sinks, over: bool = False) -> int:
    """A follower's life: a fresh sink, one pass, then forgotten as a crash would."""
    return Delivery(lab.store, lab.record, sinks()).send_new(over)


def test_a_study_is_one_parent_with_one_child_per_run(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    lab.train_all()
    assert sync(lab.store, "posenc", sink_factory) == 20
    (parent,) = look.parents()
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["gpt2lab.study"] == "posenc@nano"
    assert "Which position encoding?" in parent.data.tags["mlflow.note.content"]
    children = look.children()
    assert {c.data.tags["gpt2lab.run_id"] for c in children} == {run.id for run in lab.store.runs()}
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    (child,) = look.children(lab.run("rotary", 1))
    expected = {
        "mlflow.runName": "rotary seed 1",
        "gpt2lab.arm": "rotary",
        "gpt2lab.seed": "1",
        "gpt2lab.role": "seed",
        "mlflow.runColor": "#0072b2",
        "mlflow.source.git.commit": "c0ffee",
        "gpt2lab.status": "finished",
    }
    assert expected.items() <= child.data.tags.items()
    assert not [tag for tag in child.data.tags if "position" in tag or "norm" in tag]  # parameters have them
    assert child.data.params == {"model.n_layer": "4", "model.norm": "layernorm", "optim.lr": "4e-3", "seed": "0"}
    assert child.info.status == "FINISHED"
    points = look.points(lab.run("rotary", 1))
    assert [(p.step, p.value) for p in points] == [(step, 5.0 - step / 10) for step in range(5)]
    assert [p.timestamp - child.info.start_time for p in points] == [0, 125, 250, 375, 500]
    assert [p.value for p in look.points(lab.run("rotary", 1), "tokens")] == [0, 64, 128, 192, 256]
    assert child.data.metrics["tokens_per_second"] == 900.0
    assert child.data.metrics["mfu"] == 0.4
    assert [a.path for a in look.client.list_artifacts(child.info.run_id)] == ["config.yaml"]
    assert Path(child.info.artifact_uri.removeprefix("file://")).is_relative_to(lab.store.root / "mlartifacts")
    known = links(lab.store, "posenc@nano")
    assert known
    assert known["parent_run_id"] == parent.info.run_id
    assert known["runs"][lab.run("rotary", 1).id] == child.info.run_id
    assert sync(lab.store, lab.record, sink_factory) == 0  # another command: nothing is there twice
    assert len(look.runs()) == 5 and look.steps(lab.run()) == [0, 1, 2, 3, 4]
    assert len(look.points(lab.run(), "tokens_per_second")) == 1


def test_a_pass_with_nothing_new_writes_nothing(lab: Lab, sink_factory: Sinks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made at every poll, for every run."""
    lab.train_all()
    running = lab.begin(lab.store.run("f" * 16))
    lab.record["arms"]["rotary"]["runs"]["2"] = running.id
    lab.run().write_evaluation({"key": "val-1", "metrics": {"val/loss": 2.5}})
    sink = sink_factory()
    with running.lock():
        delivery = Delivery(lab.store, lab.record, sink)
        delivery.send_new()
        calls: list[str] = []
        for name in ("log_batch", "update_run", "set_terminated", "search_runs", "get_run"):
            monkeypatch.setattr(sink._connect(), name, lambda *_, name=name, **__: calls.append(name))
        assert delivery.send_new() == 0
    assert calls == []


def test_what_was_delivered_is_not_opened_again_before_something_changes(
    lab: Lab, sink_factory: Sinks, look: Look, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = lab.store.root / "mlflow.db"

    def done() -> bool:
        return Delivery(lab.store, lab.record, sink_factory()).is_done()

    def changed_with(change: Callable[[], Any]) -> None:
        assert done()
        change()
        assert not done()
        sync(lab.store, lab.record, sink_factory)

    def lose_a_point() -> None:
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("delete from metrics where rowid = (select max(rowid) from metrics)")

    assert not done()
    lab.train_all()
    assert not done()
    sync(lab.store, lab.record, sink_factory)
    changed_with(lambda: lab.run().write_evaluation({"key": "late", "metrics": {"val/loss": 2.5}}))
    changed_with(lambda: lab.record.update(question="Another question?"))
    changed_with(lambda: look.client.delete_run(look.children(lab.run())[0].info.run_id))
    changed_with(lambda: look.client.delete_run(look.parents()[0].info.run_id))
    changed_with(lambda: look.client.set_tag(look.children(lab.run())[0].info.run_id, "mine", "a note"))
    changed_with(lambda: lab.record["arms"]["rotary"]["runs"].update({"2": lab.train(lab.store.run("f" * 16)).id}))
    assert done()
    with monkeypatch.context() as patch:  # it is asked for nothing
        patch.setattr(MlflowTracker, "open_study", lambda *_: pytest.fail("opened"))
        follower = Follower(lab.store, lab.record, sink_factory)
        follower.poll()
        assert follower.close() == 0
    lose_a_point()
    assert not done()
    shutil.copy(template, database)
    assert not done()
    database.unlink()
    assert not done()


@pytest.mark.parametrize("cut", ["after the first batch", "between the runs"])
def test_a_crash_between_storing_and_knowing_repeats_nothing(
    lab: Lab, sink_factory: Sinks, look: Look, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """The rows are in MLflow, the follower dies before it knows; meanwhile the run resumes and writes them again, with
    other `seconds`, as resumed runs do: MLflow's own comparison of points would not recognise them."""
    run = lab.begin(lab.run())
    lab.write(run, [row(step) for step in range(4)])
    log = MlflowTracker.log

    def log_and_die(self: MlflowTracker, run: Any, points: Any) -> None:
        log(self, run, points[:2] if cut == "after the first batch" else points)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "log", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            once(lab, sink_factory)
    assert look.steps(run) == ([0, 1] if cut == "after the first batch" else [0, 1, 2, 3])
    run.metrics.unlink()
    lab.write(run, [row(0)] + [row(step, seconds=step * 9.0) for step in range(1, 7)])
    once(lab, sink_factory)
    assert look.steps(run) == list(range(7))
    assert look.steps(run, "tokens") == list(range(7))


def test_two_followers_at_once_store_each_point_once(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    """Both ask how far the copy got before either sends: equal points at equal times are then one point."""
    run = lab.begin(lab.run())
    lab.write(run, [row(0)])
    both = [Delivery(lab.store, lab.record, sink_factory()) for _ in range(2)]
    for delivery in both:
        delivery.send_new()
    lab.write(run, [row(step) for step in range(1, 4)])
    assert [delivery.send_new() for delivery in both] == [3, 3]
    assert look.steps(run) == [0, 1, 2, 3]
    assert len(look.parents()) == 1


def test_a_killed_run_is_closed_and_opened_again(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    run = lab.begin(lab.run())
    lab.write(run, [row(0)])
    with run.lock():
        once(lab, sink_factory)
        (child,) = look.children(run)
        assert child.info.status == "RUNNING"
        assert {"gpt2lab.host", "gpt2lab.pid", "gpt2lab.heartbeat"} <= child.data.tags.keys()
    sync(lab.store, lab.record, sink_factory)  # follower and run were killed, MLflow still says RUNNING
    assert look.children(run)[0].info.status == "KILLED"
    assert look.parents()[0].info.status == "KILLED"
    with run.lock():
        once(lab, sink_factory)
        assert look.children(run)[0].info.status == "RUNNING"
        assert look.parents()[0].info.status == "RUNNING"
    run.fail({"reason": "out of memory", "phase": "training", "step": 0, "at": "2026-01-02T04:00:00+00:00"})
    sync(lab.store, lab.record, sink_factory)
    (child,) = look.children(run)
    assert child.info.status == "FAILED"
    assert child.data.tags["gpt2lab.reason"] == "out of memory"


def test_what_is_not_finite_is_tagged(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    run = lab.begin(lab.run())
    lab.write(run, [row(0), row(1, **{"train/loss": math.inf}), row(2, **{"train/loss": math.nan, "x y*": 1.0})])
    lab.finish(run, "diverged", reason="loss is not finite at step 2")
    once(lab, sink_factory)
    (child,) = look.children(run)
    assert child.data.tags["gpt2lab.nonfinite.train/loss"] == "inf first at step 1"
    assert child.data.tags["gpt2lab.status"] == "diverged"
    assert child.data.tags["gpt2lab.reason"] == "loss is not finite at step 2"
    assert child.info.status == "FAILED"
    assert math.isnan(look.points(run)[2].value)
    assert child.data.metrics["x y_"] == 1.0
    lab.write(run, [row(3, **{"train/loss": math.nan})])
    once(lab, sink_factory)
    assert look.children(run)[0].data.tags["gpt2lab.nonfinite.train/loss"] == "inf first at step 1"


def test_a_run_deleted_in_the_ui_gets_a_new_copy_and_one_note(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    run = lab.begin(lab.run())
    lab.write(run, [row(0)])
    said: list[str] = []
    delivery = Delivery(lab.store, lab.record, sink_factory(), said.append)
    delivery.send_new()
    (first,) = look.children(run)
    look.client.delete_run(first.info.run_id)
    lab.write(run, [row(1)])
    delivery.send_new()
    lab.write(run, [row(2)])
    delivery.send_new()
    assert said == ["the MLflow run of learned seed 0 was deleted; its rows go to a new one"]
    (second,) = look.children(run)
    assert second.data.tags["gpt2lab.replaces"] == first.info.run_id
    assert look.steps(run) == [0, 1, 2]


def test_a_deleted_study_gets_a_new_parent_and_new_children(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    for arm in ("learned", "rotary"):
        lab.write(lab.begin(lab.run(arm)), [row(0)])
    delivery = Delivery(lab.store, lab.record, sink_factory())
    delivery.send_new()
    for run in look.runs():
        look.client.delete_run(run.info.run_id)
    lab.write(lab.run("rotary"), [row(1)])
    delivery.send_new()
    delivery.send_new()
    (parent,) = look.parents()
    assert {c.data.tags["mlflow.parentRunId"] for c in look.children()} == {parent.info.run_id}
    assert look.steps(lab.run("learned")) == [0]
    assert look.steps(lab.run("rotary")) == [0, 1]


def test_an_evaluation_that_comes_later_is_sent_once(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    run = lab.train(lab.run())
    delivery = Delivery(lab.store, lab.record, sink_factory())
    delivery.send_new()
    run.write_evaluation({"key": "val-1", "metrics": {"val/loss": 2.5}, "contexts": {"0.5": 2.75, "2": None}})
    delivery.send_new()
    delivery.send_new()
    assert [p.value for p in look.points(run, "val-final/loss")] == [2.5]
    assert [p.value for p in look.points(run, "val-final/context_0.5")] == [2.75]
    assert look.points(run, "val-final/context_2") == []


def test_a_config_cut_short_is_completed_and_long_values_fit(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    run = lab.begin(lab.run())
    run.write_config("".join(f"key{index}: {index}\n" for index in range(250)) + f"long: {'x' * 7000}\nlist: [a, b]\n")
    sink = sink_factory()
    parent = sink.open_study(lab.record)
    log_batch = look.client.__class__.log_batch
    calls: list[int] = []

    def die_at_the_second(self: Any, *args: Any, **options: Any) -> None:
        calls.append(1)
        if options.get("params") and len(calls) > 1:
            raise KeyboardInterrupt
        log_batch(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look.client.__class__, "log_batch", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            sink.open_run(lab.record, parent, "learned", "0", run)
    assert len(look.children(run)[0].data.params) == 100
    sink.open_run(lab.record, parent, "learned", "0", run)
    (child,) = look.children(run)
    assert len(child.data.params) == 252
    assert child.data.params["long"] == "x" * 6000
    assert child.data.params["list"] == '["a", "b"]'


def test_a_report_is_kept_with_the_parent(lab: Lab, sink_factory: Sinks, look: Look, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("<p>done</p>")
    lab.train_all()
    sync(lab.store, lab.record, sink_factory)
    sink_factory().log_report(lab.record, tmp_path / "page")
    (parent,) = look.parents()
    assert [a.path for a in look.client.list_artifacts(parent.info.run_id, "report")] == ["report/report.html"]
    assert parent.info.status == "FINISHED"


def test_parameters_are_what_can_change_a_weight_and_the_data_is_a_dataset(
    lab: Lab, sink_factory: Sinks, look: Look
) -> None:
    run = lab.begin(lab.run())
    run.write_config(
        "model: {n_layer: 4, stack: []}\ndata: {corpus: {name: several, corpora: {a: x}}, tokenizer: bytes}\n"
        "training: {steps: 9, device: auto, rank_timeout_seconds: 120.0, micro_batch_sequences: null}\n"
        "evaluation: {tokens: 64}\nseed: 3\nbranch: null\n"
    )
    training = {"steps": 9, "micro_batch_sequences": None}
    identity = {"settings": {"model": {"n_layer": 4, "stack": []}, "training": training}, "data": "0123456789" * 6}
    run.write_identity({"id": run.id, "seed": 3, "repeat": 0, "created": CREATED, "identity": identity})
    for _ in range(2):
        once(lab, sink_factory)
    (child,) = look.children(run)
    corpus = {"data.corpus.name": "several", "data.corpus.corpora.a": "x", "data.tokenizer": "bytes"}
    assert child.data.params == {"model.n_layer": "4", **corpus, "training.steps": "9", "seed": "3"}
    (kept,) = child.inputs.dataset_inputs
    assert (kept.dataset.name, kept.dataset.digest) == ("several", ("0123456789" * 6)[:36])


def verdicts_of(difference: float, **more: Any) -> dict[str, Any]:
    contrast = {"arm": "rotary", "against": "learned", "word": "better", "difference": difference, "low": -0.3,
                "high": -0.1, "p_holm": 0.01, "n_arm": 2, "n_against": 2, **more}  # fmt: skip
    arms = [{"name": name, "n": 2, "mean": 4.5, "sd": 0.1, "failed": 0} for name in ("learned", "rotary")]
    return {"contrasts": [contrast], "arms": arms}


def report(lab: Lab, sinks: Sinks, page: Path, verdicts: dict[str, Any]) -> None:
    """As `run` and `sync` do at their end."""
    page.mkdir(exist_ok=True)
    (page / "verdicts.json").write_text(json.dumps(verdicts))
    sync(lab.store, lab.record, sinks)
    sinks().log_report(lab.record, page)


def test_the_study_carries_its_verdicts_and_a_new_report_replaces_them(
    lab: Lab, sink_factory: Sinks, look: Look, tmp_path: Path
) -> None:
    lab.train_all()
    for _ in range(2):
        report(lab, sink_factory, tmp_path / "page", verdicts_of(-0.2))
    (parent,) = look.parents()
    name = "rotary vs learned"
    expected = {"difference": -0.2, "low": -0.3, "high": -0.1, "p": 0.01, "n": 2.0, "n_against": 2.0}
    assert parent.data.metrics == {f"{name}/{key}": value for key, value in expected.items()}
    assert len(look.client.get_metric_history(parent.info.run_id, f"{name}/p")) == 1
    assert "| rotary | learned | better |" in parent.data.tags["mlflow.note.content"]
    table = json.loads(Path(look.client.download_artifacts(parent.info.run_id, "verdicts.json")).read_text())
    assert table["columns"] == ["arm", "against", "verdict", *expected]
    assert table["data"] == [["rotary", "learned", "better", *expected.values()]]
    once(lab, sink_factory)
    assert look.parents()[0].data.tags == parent.data.tags
    report(lab, sink_factory, tmp_path / "page", verdicts_of(0.0, arm="none|<b>", p_holm=None))
    (parent,) = look.parents()
    stale = {key: value for key, value in parent.data.metrics.items() if key.startswith(name)}
    assert len(stale) == 6 and all(map(math.isnan, stale.values()))
    assert (
        parent.data.metrics["none__b_ vs learned/difference"] == 0
        and "none__b_ vs learned/p" not in parent.data.metrics
    )
    assert "none/<b>" in parent.data.tags["mlflow.note.content"]


def test_links_open_curves_by_arm_with_validation_first(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    for _ in range(2):
        once(lab, sink_factory)
    tags, (parent,) = look.client.get_experiment(look.experiment).tags, look.parents()
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags[f"mlflow.sharedViewState.{parent.info.run_id}"])
    assert [part["name"] for part in view["compareRunSections"]] == ["val", "train", "val-final"]
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "gpt2lab.arm"}]
    lab.train_all()
    sync(lab.store, lab.record, sink_factory)
    assert len(look.client.search_runs([look.experiment], view["searchFilter"])) == 4
    look.client.set_experiment_tag(look.experiment, "mlflow.experimentKind", "regression")  # a user's own choice
    once(lab, sink_factory)
    assert look.client.get_experiment(look.experiment).tags["mlflow.experimentKind"] == "regression"


@pytest.mark.parametrize("name", ["moved", "st?x=1 %41#"])
def test_a_store_that_was_moved_keeps_its_artifacts_in_itself(
    lab: Lab, sink_factory: Sinks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lab.train_all()
    sync(lab.store, "posenc", sink_factory)
    lab.store.root.rename(tmp_path / name)
    store = Store(tmp_path / name)
    tracker = MlflowTracker(default_uri(store.root), "gpt2lab", store.root / "mlartifacts")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("42")
    database, artifacts = store.root / "mlflow.db", store.root / "mlartifacts"
    assert artifacts_elsewhere(database, artifacts) == [(lab.store.root / "mlartifacts").as_uri()]
    tracker.log_report(lab.record, tmp_path / "page")
    assert artifacts_elsewhere(database, artifacts) == []
    look = Look(tracker)
    (parent,) = look.parents()
    for run, files in ((parent, ["report"]), (look.children(lab.run("rotary", 1))[0], ["config.yaml"])):
        assert [a.path for a in look.client.list_artifacts(run.info.run_id)] == files
    assert len(list((store.root / "mlartifacts").rglob("index.html"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "page"])
    assert tracker.notes == []


def test_artifacts_that_cannot_be_kept_do_not_hold_up_metrics(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    shutil.rmtree(lab.store.root / "mlartifacts", ignore_errors=True)
    (lab.store.root / "mlartifacts").write_text("a file in the way")
    run = lab.train(lab.run())
    said: list[str] = []
    Delivery(lab.store, lab.record, sink_factory(), said.append).send_new()
    assert len(said) == 1 and "takes no artifacts" in said[0]
    assert look.steps(run) == [0, 1, 2, 3, 4]


def test_a_deleted_experiment_is_said_in_one_line(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    look.client.delete_experiment(look.experiment)
    with pytest.raises(EnvironmentFault, match="experiment 'gpt2lab' was deleted") as caught:
        sync(lab.store, lab.record, sink_factory)
    assert "restore" in str(caught.value.hint)


def test_a_new_database_is_whole_and_in_write_ahead_mode(template: Path) -> None:
    connection = sqlite3.connect(template)
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    assert connection.execute("select count(*) from experiments").fetchone() == (1,)
    connection.close()
    names = {path.name for path in template.parent.iterdir()}
    assert not [name for name in names if name.endswith((".partial", "-wal", "-shm"))]


def test_what_was_measured_afterwards_follows_once_and_what_was_measured_anew_is_the_newer_point(
    lab: Lab, sink_factory: Sinks, look: Look
) -> None:
    lab.train_all()
    once(lab, sink_factory)
    run = lab.run("rotary", 1)
    record = {"key": "task-piqa-1", "task": "piqa", "measured_at": "2026-01-03T00:00:00+00:00"}
    run.write_evaluation({**record, "values": {"piqa/acc": 0.5, "piqa/acc_stderr": 0.1}})
    for _ in range(2):
        once(lab, sink_factory)
    [point] = look.points(run, "val-measured/piqa/acc")
    assert (point.value, point.step) == (0.5, 4)
    assert [one.value for one in look.points(run, "val-measured/piqa/acc_stderr")] == [0.1]
    later = {**record, "key": "task-piqa-2", "measured_at": "2026-01-04T00:00:00+00:00"}
    run.write_evaluation({**later, "values": {"piqa/acc": 0.25}})
    delivery = Delivery(lab.store, lab.record, sink_factory())
    for _ in range(2):
        delivery.send_new()
    assert [one.value for one in look.points(run, "val-measured/piqa/acc")] == [0.5, 0.25]
    (child,) = look.children(run)
    assert child.data.metrics["val-measured/piqa/acc"] == 0.25


def test_a_call_that_was_made_again_after_its_answer_was_lost_leaves_one_run(
    lab: Lab, sink_factory: Sinks, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As urllib3 does; and as a follower does whose call failed although it was carried out."""
    create = look.client.__class__.create_run
    calls: list[str] = []

    def twice(self: Any, *args: Any, **options: Any) -> Any:
        create(self, *args, **options)
        calls.append("")
        if len(calls) == 1:
            raise ConnectionError("the answer is lost")
        return create(self, *args, **options)

    monkeypatch.setattr(look.client.__class__, "create_run", twice)
    lab.train_all()
    delivery = Delivery(lab.store, lab.record, sink_factory())
    with pytest.raises(ConnectionError):
        delivery.send_new()
    assert delivery.send_new(over=True) == 20
    assert len(calls) == 5 and len(look.parents()) == 1 and len(look.children()) == 4
    assert {run.info.status for run in look.runs()} == {"FINISHED"}
    assert all(look.steps(run) == [0, 1, 2, 3, 4] for run in lab.store.runs())


def test_children_follow_when_their_parent_alone_is_deleted(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    lab.train_all()
    delivery = Delivery(lab.store, lab.record, sink_factory())
    delivery.send_new()
    children = {child.info.run_id for child in look.children()}
    (first,) = look.parents()
    look.client.delete_run(first.info.run_id)
    lab.record["arms"]["rotary"]["runs"]["2"] = "f" * 16  # so that the study's status changes
    lab.train(lab.store.run("f" * 16))
    once(lab, sink_factory, over=True)
    (parent,) = look.parents()
    assert parent.info.status == "FINISHED"
    assert len(look.children()) == 5 and children < {child.info.run_id for child in look.children()}
    assert {child.data.tags["mlflow.parentRunId"] for child in look.children()} == {parent.info.run_id}


def test_a_parent_that_is_missed_at_the_end_is_replaced_in_the_same_pass(
    lab: Lab, sink_factory: Sinks, look: Look
) -> None:
    lab.train_all()
    lab.record["arms"]["rotary"]["runs"]["2"] = "f" * 16
    delivery = Delivery(lab.store, lab.record, sink_factory())
    delivery.send_new()
    look.client.delete_run(look.parents()[0].info.run_id)
    delivery.send_new(over=True)
    assert [parent.info.status for parent in look.parents()] == ["KILLED"] and len(look.children()) == 4


def test_a_store_that_comes_back_empty_gets_everything_again(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    """Also the rows of runs that had ended, in the same pass."""
    for arm, seed in (("learned", 0), ("rotary", 0), ("learned", 1)):
        lab.train(lab.run(arm, seed))
    live = lab.begin(lab.run("rotary", 1))
    lab.write(live, [row(0)])
    with live.lock():
        delivery = Delivery(lab.store, lab.record, sink_factory())
        delivery.send_new()
        for run in look.runs():
            look.client._tracking_client.store._hard_delete_run(run.info.run_id)
        lab.write(live, [row(1)])
        delivery.send_new()
    assert look.steps(live) == [0, 1]
    assert all(look.steps(run) == [0, 1, 2, 3, 4] for run in lab.store.runs() if run.id != live.id)
    assert len(look.parents()) == 1


def test_an_experiment_goes_by_its_name_whatever_its_number_was(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    """A server may come back with another database, in which another experiment has that number."""
    sink = sink_factory()
    parent = sink.open_study(lab.record)
    look.client.rename_experiment(sink.experiment_id, "theirs")
    sink.open_run(lab.record, parent, "learned", "0", lab.begin(lab.run()))
    assert look.client.get_experiment_by_name("theirs").experiment_id == look.experiment
    assert look.children() == []  # in theirs
    assert len(look.client.search_runs([sink.experiment_id])) == 1 and sink.experiment_id != look.experiment


def test_a_database_in_trouble_prints_no_trace(
    lab: Lab, sink_factory: Sinks, look: Look, capfd: pytest.CaptureFixture[str]
) -> None:
    lab.train_all()
    connection = sqlite3.connect(lab.store.root / "mlflow.db")
    connection.execute("drop table tags")
    connection.close()
    capfd.readouterr()
    with pytest.raises(EnvironmentFault, match="tracking does not work"):
        sync(lab.store, lab.record, sink_factory)
    assert capfd.readouterr() == ("", "")
