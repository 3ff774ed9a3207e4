"""A sweep in the tracker: a child per trial and seed, that come over time and say how their trials ended."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from servers import free_ports
from small_study import Lab, Look, Recorder, row, sweep_record, trial

from gpt2lab.cli import manage, results
from gpt2lab.errors import ConfigError
from gpt2lab.store import RunFolder
from gpt2lab.tracking.follower import Delivery, Follower, as_study, links, sync, tracked_records
from gpt2lab.tracking.mlflow import MlflowTracker, read_experiment

Sinks = Callable[[], MlflowTracker]


def run_of(lab: Lab, one: Mapping[str, Any], seed: int = 100) -> RunFolder:
    return lab.store.run(one["runs"][str(seed)])


def child_of(look: Look, run: RunFolder) -> Any:
    (child,) = look.children(run)
    return child


def begin(lab: Lab, one: Mapping[str, Any], steps: int, seed: int = 100) -> RunFolder:
    """A trial's run that has got so far and can go on."""
    run = lab.begin(run_of(lab, one, seed))
    lab.write(run, [row(step) for step in range(steps)])
    return run


def test_trials_are_arms() -> None:
    other = {"trials": [trial(11, "pruned", begun=False, **{"model.norm": "rmsnorm", "optim.optimizer": "lion"})]}
    record = as_study(sweep_record(trial(0, seeds=(100, 101)), trial(7, "running"), slots=3, rotary=other))
    assert list(record["arms"]) == ["lr trial 000", "lr trial 007", "rotary trial 011"]
    first, _, last = record["arms"].values()
    assert first["runs"] == {"100": f"{0:08x}{100:08x}", "101": f"{0:08x}{101:08x}"} and last["runs"] == {}
    assert first["tags"] == {"gpt2lab.outcome": "finished", "gpt2lab.slot": "0", "gpt2lab.search": "lr"}
    assert last["tags"]["gpt2lab.stopped_at"] == "2" and last["tags"]["gpt2lab.search"] == "rotary"
    assert first["params"] == {"optim.lr": 1e-3}
    assert record["open"] == 6 - 2  # a pruned trial has ended; one that runs has not, nor have four never begun
    assert list(as_study(sweep_record(trial(0)))["arms"]) == ["trial 000"]


def test_each_trial_is_a_child_that_says_how_it_ended(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    trials = [trial(0), trial(1, "pruned"), trial(2, "diverged"), trial(3, "failed")]
    for one in trials:
        begin(lab, one, 3)
    lab.finish(run_of(lab, trials[0]))
    lab.finish(run_of(lab, trials[2]), "diverged", reason="loss is nan")
    run_of(lab, trials[3]).fail({"reason": "killed by SIGKILL", "at": "2026-01-02T04:00:00+00:00"})
    assert sync(lab.store, as_study(sweep_record(*trials)), sink_factory) == 12
    (parent,) = look.parents()
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.runName"] == "sweep lr@nano"
    assert parent.data.tags["gpt2lab.sweep"] == "lr@nano" and "gpt2lab.study" not in parent.data.tags
    children = [child_of(look, run_of(lab, one)) for one in trials]
    assert [child.info.status for child in children] == ["FINISHED", "KILLED", "FAILED", "FAILED"]
    names = ["trial 000", "trial 001", "trial 002", "trial 003"]
    assert [child.data.tags["mlflow.runName"] for child in children] == names
    outcomes = [child.data.tags["gpt2lab.outcome"] for child in children]
    assert outcomes == ["finished", "pruned", "diverged", "failed"]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert children[1].data.tags["gpt2lab.stopped_at"] == "2"
    found = links(lab.store, "lr@nano", "sweep")
    assert found and found["parent_run_id"] == parent.info.run_id


def test_what_is_tried_can_be_sorted_by(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    """As numbers: MLflow's parameters are text, by which 9e-05 would be greater than 0.002."""
    rates = [0.002, 9e-5, 0.01]
    trials = [trial(slot, **{"optim.lr": rate}) for slot, rate in enumerate(rates)]
    trials[2] = trial(2, seeds=(100, 101), **trials[2]["settings"])
    for run in {run for one in trials for run in one["runs"].values()}:
        lab.train(lab.store.run(run))
    record = sweep_record(lr={"seeds": [100, 101], "trials": trials})
    sync(lab.store, as_study(record), sink_factory)
    ordered = look.client.search_runs(
        [look.experiment], "metrics.`trial/optim.lr` > 0", order_by=["metrics.`trial/optim.lr` ASC"]
    )
    assert [run.data.metrics["trial/optim.lr"] for run in ordered] == sorted([*rates, 0.01])
    names = {run.data.tags["mlflow.runName"] for run in ordered}
    assert names >= {"trial 000 seed 100", "trial 002 seed 100", "trial 002 seed 101"}
    view = look.client.get_experiment(look.experiment).tags[f"mlflow.sharedViewState.{look.parents()[0].info.run_id}"]
    (chart,) = json.loads(view)["compareRunCharts"]
    assert chart["selectedMetrics"] == ["trial/optim.lr", "val-final/loss"] and "groupBy" not in view


def test_the_parent_runs_until_all_trials_have_ended(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    def parent() -> str:
        (found,) = look.parents()
        return str(found.info.status)

    delivery = Delivery(lab.store, as_study(sweep_record(slots=2)), sink_factory())
    delivery.send_new()
    assert parent() == "RUNNING"
    first, second = trial(0), trial(1, "running")
    lab.train(run_of(lab, first))
    with begin(lab, second, 2).lock():
        delivery.update(as_study(sweep_record(first, second, slots=2)))
        delivery.send_new(over=True)  # another process is at it
        assert parent() == "RUNNING" and child_of(look, run_of(lab, second)).info.status == "RUNNING"
    delivery.send_new(over=True)
    assert parent() == "KILLED"
    delivery.update(as_study(sweep_record(first, trial(1, "pruned"), slots=2)))
    delivery.send_new(over=True)
    assert parent() == "FINISHED"
    child = child_of(look, run_of(lab, second))
    assert (child.info.status, child.data.tags["gpt2lab.outcome"]) == ("KILLED", "pruned")
    with run_of(lab, second).lock():  # a study trains it to its end: the trial was pruned all the same
        delivery.send_new(over=True)
    lab.finish(run_of(lab, second))
    delivery.send_new(over=True)
    assert parent() == "FINISHED" and child_of(look, run_of(lab, second)).info.status == "KILLED"


def test_a_run_of_two_trials_and_a_study_has_a_copy_in_each(lab: Lab, sink_factory: Sinks, look: Look) -> None:
    lab.train_all()
    shared = lab.run()
    trials = [{**trial(slot), "runs": {"100": shared.id}} for slot in (0, 1)]
    sweep = sweep_record(*trials, name=lab.record["name"])  # an ablation that tunes its arms has such a sweep
    sync(lab.store, lab.record, sink_factory)
    assert sync(lab.store, as_study(sweep), sink_factory) == 10
    assert len(look.children(shared)) == 3 and len(look.parents()) == 2
    of_sweep = {
        child.data.tags["mlflow.runName"] for child in look.children(shared) if "gpt2lab.sweep" in child.data.tags
    }
    assert of_sweep == {"trial 000", "trial 001"}
    ours = [links(lab.store, lab.record["name"], kind) for kind in ("study", "sweep")]
    assert all(ours) and ours[0] != ours[1]
    assert sync(lab.store, lab.record, sink_factory) == sync(lab.store, as_study(sweep), sink_factory) == 0


def test_trials_are_no_arms_to_be_judged(lab: Lab, sink_factory: Sinks) -> None:
    one = trial(0)
    lab.train(run_of(lab, one))
    sync(lab.store, as_study(sweep_record(one)), sink_factory)
    uri = f"sqlite:///{lab.store.root}/mlflow.db"
    with pytest.raises(ConfigError, match="only sweeps, whose trials are not arms"):
        read_experiment("gpt2lab", uri)
    lab.train_all()
    sync(lab.store, lab.record, sink_factory)
    rows = read_experiment("gpt2lab", uri)
    assert {row["tags.gpt2lab.study"] for row in rows} == {"posenc@nano"} and len(rows) == 5


def test_trials_that_come_later_are_followed_by_the_same_sender(lab: Lab) -> None:
    tracker, said, made = Recorder(), list[str](), list[Recorder]()

    def factory() -> Recorder:
        made.append(tracker)
        return tracker

    trials = [trial(slot, "running") for slot in range(3)]
    follower = Follower(lab.store, as_study(sweep_record(slots=3)), factory, said.append)
    assert follower.poll() == []
    sender = follower._sender
    for number, one in enumerate(trials):
        begin(lab, one, 2)
        follower.update(as_study(sweep_record(*trials[: number + 1], slots=3)))
        (news,) = follower.poll()
        assert (news.arm, news.seed, news.run_id) == (f"trial {number:03d}", "100", one["runs"]["100"])
        assert follower.poll() == []  # those from before are not told again
    assert follower.close() == 0
    assert follower._sender is sender and made == [tracker] and said == []
    assert [tracker.steps(run_of(lab, one)) for one in trials] == [[0, 1]] * 3
    assert tracker.tags[trials[2]["runs"]["100"]]["gpt2lab.outcome"] == "running"


def test_what_is_left_behind_counts_trials_that_the_sender_has_not_seen(lab: Lab) -> None:
    tracker, said = Recorder(), list[str]()
    release = threading.Event()

    def hang(call: str) -> None:
        release.wait(20)

    tracker.trouble = hang
    follower = Follower(lab.store, as_study(sweep_record()), lambda: tracker, said.append)
    follower.poll()
    one = trial(0, "running")
    begin(lab, one, 3)
    follower.update(as_study(sweep_record(one)))
    assert follower.close(timeout=0.1) == 3
    assert "`gpt2lab sync lr@nano` sends it later" in said[0]
    release.set()


def test_a_run_whose_worker_is_starting_waits_until_its_config_is_there(
    lab: Lab, sink_factory: Sinks, look: Look
) -> None:
    """Or its settings would never be told: they are sent when the copy is made."""
    one = trial(0, "running")
    run = run_of(lab, one)
    run.path.mkdir(parents=True)
    (run.path / "run.log").touch()
    delivery = Delivery(lab.store, as_study(sweep_record(one)), sink_factory())
    delivery.send_new()
    assert look.children() == []
    begin(lab, one, 1)
    delivery.send_new()
    assert child_of(look, run).data.params["optim.lr"] == "4e-3"


def test_studies_and_sweeps_are_found_by_name_with_or_without_scale(lab: Lab) -> None:
    lab.store.write_sweep(sweep_record())
    lab.store.write_sweep(sweep_record(name="lr@micro"))
    lab.store.write_sweep(sweep_record(name="posenc@nano"))

    def names(asked: str | None) -> list[tuple[str, str]]:
        return [(one.get("kind", "study"), one["name"]) for one in tracked_records(lab.store, asked)]

    assert names("lr@nano") == [("sweep", "lr@nano")]
    assert names("lr") == [("sweep", "lr@micro"), ("sweep", "lr@nano")]
    assert names("posenc") == [("study", "posenc@nano"), ("sweep", "posenc@nano")]
    assert len(names(None)) == 4
    with pytest.raises(ConfigError, match="unknown study or sweep 'rl'"):
        tracked_records(lab.store, "rl")


def test_sync_and_runs_know_sweeps(
    lab: Lab, sink_factory: Sinks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    one = trial(0)
    lab.train(run_of(lab, one))
    lab.store.write_sweep(sweep_record(one))
    page = tmp_path / "reports" / "lr@nano"
    page.mkdir(parents=True)
    for file in ("index.html", "sweep.json"):
        (page / file).write_text("{}")
    for sent in (5, 0):
        results.sync("lr", lab.store.root, page.parent)
        assert capsys.readouterr().out == f"lr@nano: {sent} rows sent\n"
    sink = MlflowTracker(f"sqlite:///{lab.store.root}/mlflow.db", "lr", lab.store.root / "artifacts")
    (parent,) = Look(sink).parents()
    listed = Look(sink).client.list_artifacts(parent.info.run_id, "report")
    assert [artifact.path for artifact in listed] == ["report/index.html", "report/sweep.json"]
    manage.runs(runs=lab.store.root)
    out = capsys.readouterr().out
    assert re.search(r"trial 000 +100 .*lr@nano", out)
    assert out.endswith(f"1 run, 1 study, 1 sweep in {lab.store.root}\n")


def test_the_user_interface_links_to_a_sweep_and_says_how_to_open_optunas(
    lab: Lab, sink_factory: Sinks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: None)  # it would take the place of this process
    one = trial(0)
    lab.train(run_of(lab, one))
    for name, storage in (("lr", None), ("wd", None), ("pg", "postgresql://me:***@host/db")):
        lab.store.write_sweep(sweep_record(one, name=f"{name}@nano", storage=storage))
    sync(lab.store, as_study(lab.store.sweep("lr")), sink_factory)
    [port] = free_ports(1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # whether it is installed here or not
    results.ui(port, runs=lab.store.root)
    lines = capsys.readouterr().out.splitlines()
    found = links(lab.store, "lr@nano", "sweep")
    assert found and lines[1].startswith(f"lr@nano: http://127.0.0.1:{port}/#/experiments/")
    assert found["parent_run_id"] in lines[1]
    assert lines[2:] == [
        "lr@nano, wd@nano: optuna-dashboard sqlite:////data/runs/sweeps/optuna.db",
        "pg@nano: optuna-dashboard 'postgresql://me:***@host/db'",
        "*** replaces the password, which is never stored",
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert results.dashboards(lab.store)[-1].endswith("pip install 'gpt2lab[dashboard]'")
