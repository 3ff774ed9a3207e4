"""Judging what is in MLflow: our own mirror and a plain user's experiment, in a real SQLite store."""

from __future__ import annotations

import csv
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_study import Lab, row

from gpt2lab.analysis import Verdicts, compare
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.tracking import mlflow as mlflow_tracker
from gpt2lab.tracking.follower import sync
from gpt2lab.tracking.mlflow import MlflowTracker, read_experiment

LOSSES = {
    "learned": (2.151, 2.149, 2.162),
    "rotary": (1.893, 1.902, 1.887),
    "none": (2.148, 2.152, math.nan),
    "alibi": (2.139, 2.144, 2.150),
}


def verdicts(source: Any, **terms: Any) -> Verdicts:
    return compare(source, **{"baseline": "learned", "smallest_effect": 0.05, **terms})


def table(path: Path, losses: dict[str, tuple[float | None, ...]]) -> Path:
    """A CSV file of the same results, seed after seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arm", "seed", "value"))
        seeds = range(max(map(len, losses.values())))
        writer.writerows((arm, s, values[s]) for s in seeds for arm, values in losses.items() if s < len(values))
    return path


@pytest.fixture
def uri(lab: Lab, template: Path) -> Iterator[str]:
    """A database in the lab's store, and the fluent client of this process pointed at it."""
    import mlflow

    shutil.copy(template, lab.store.root / "mlflow.db")
    uri = f"sqlite:///{lab.store.root}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # which mlflow sets for the processes that it starts


@pytest.fixture
def study(lab: Lab, uri: str) -> Lab:
    """posenc@nano in MLflow: four arms, one run of them diverged, with trials of rates and runs of another budget."""
    arms = lab.record["arms"] = {
        arm: {"components": {"position": arm}, "runs": {str(s): f"{i:08x}{s:08x}" for s in range(3)}}
        for i, arm in enumerate(LOSSES)
    }
    arms["rotary"]["bracket"] = {"trials": [{"seed": 1000, "factor": 0.5, "lr": 0.1, "run": "a" * 16}]}
    arms["rotary"]["curve"] = [{"budget": 0.25, "tokens": 100, "runs": {"0": "b" * 16}}]
    for seed in range(3):
        for number, (arm, losses) in enumerate(LOSSES.items()):
            train(lab, arms[arm]["runs"][str(seed)], losses[seed], minute=10 * seed + number)
    for extra in ("a" * 16, "b" * 16):
        train(lab, extra, 9.0)
    lab.declare()
    mirror(lab, uri)
    return lab


def train(lab: Lab, run_id: str, loss: float, minute: int = 0) -> None:
    run = lab.begin(lab.store.run(run_id))
    run.write_identity({"id": run.id, "seed": 0, "repeat": 0, "created": f"2026-01-02T03:{minute:02}:05+00:00"})
    lab.write(run, [row(step) for step in range(2)])
    lab.finish(run, "diverged" if math.isnan(loss) else "finished")
    if not math.isnan(loss):
        run.write_evaluation({"key": "val-1", "metrics": {"val/loss": loss, "val/bits_per_byte": loss / math.log(2)}})


def mirror(lab: Lab, uri: str) -> None:
    sync(lab.store, lab.record, sinks(lab, uri))


def sinks(lab: Lab, uri: str) -> Callable[[], MlflowTracker]:
    return lambda: MlflowTracker(uri, "posenc", lab.store.root / "artifacts")


def log_users_runs(experiment: str, losses: dict[str, tuple[float | None, ...]] = LOSSES) -> None:
    """As anybody logs runs: seed after seed, arm and seed as parameters, an epoch of losses, a parent above them."""
    import mlflow

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="all"):
        for seed in range(3):
            for arm, values in losses.items():
                with mlflow.start_run(nested=True):
                    mlflow.log_params({"arm": arm, "seed": seed})
                    mlflow.log_metric("loss", 5.0, step=0)
                    if values[seed] is not None:
                        mlflow.log_metric("loss", float(values[seed] or 0), step=1)


def users_run(arm: str, seed: int) -> str:
    """The id of one of them."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=["mine"], filter_string=f"params.arm = '{arm}' and params.seed = '{seed}'"
    )
    return str(found["run_id"].item())


# Verdicts.


def test_our_own_mirror_says_what_the_same_results_say_as_csv(study: Lab, uri: str, tmp_path: Path) -> None:
    import mlflow

    expected = verdicts(table(tmp_path / "results.csv", LOSSES))
    assert "unstable (1 of 3 failed)" in str(expected) and "rotary against learned: better" in str(expected)
    rows = read_experiment("posenc", uri)
    assert len(rows) == 15  # the study, 12 runs, a trial and a run of a quarter of the tokens
    frame = mlflow.search_runs(experiment_names=["posenc"])
    for source in (rows, frame):
        assert str(verdicts(source)) == str(expected)
        assert [arm.values for arm in verdicts(source).arms] == [arm.values for arm in expected.arms]
        assert verdicts(source).metric == "val-final/loss"
        assert str(verdicts(source, arm="gpt2lab.arm")) == str(expected)
    bits = {arm: tuple(loss / math.log(2) for loss in losses) for arm, losses in LOSSES.items()}
    said = str(verdicts(table(tmp_path / "bits.csv", bits), unit="bits per byte"))
    assert str(verdicts(rows, metric="final/val/bits_per_byte")) == said


def test_a_users_experiment_says_what_the_same_results_say_as_csv(uri: str, tmp_path: Path) -> None:
    import mlflow

    log_users_runs("mine")
    expected = str(verdicts(table(tmp_path / "results.csv", LOSSES)))
    assert str(verdicts(read_experiment("mine", uri))) == expected
    assert str(verdicts(mlflow.search_runs(experiment_names=["mine"]))) == expected


def test_statuses_count_as_mlflow_has_them(uri: str, tmp_path: Path) -> None:
    import mlflow

    log_users_runs("mine")
    client = mlflow.MlflowClient()
    waiting, killed = users_run("alibi", 2), users_run("rotary", 1)
    client.update_run(waiting, "RUNNING")
    client.set_terminated(killed, "KILLED")
    as_csv = {
        **LOSSES, "alibi": (*LOSSES["alibi"][:2], None), "rotary": (LOSSES["rotary"][0], math.nan, LOSSES["rotary"][2])
    }  # fmt: skip
    expected = str(verdicts(table(tmp_path / "results.csv", as_csv)))
    assert str(verdicts(read_experiment("mine", uri))) == expected
    assert str(verdicts(mlflow.search_runs(experiment_names=["mine"]))) == expected


def test_infinity_in_mlflow_is_a_failed_run(uri: str) -> None:
    log_users_runs("mine", {**LOSSES, "rotary": (1.893, math.inf, 1.887)})
    assert verdicts(read_experiment("mine", uri)).arms[1].failed == 1


def test_what_was_never_logged_differs_from_nan(uri: str) -> None:
    import mlflow

    mlflow.set_experiment("mine")
    for seed, loss in enumerate((2.1, math.nan, None)):
        with mlflow.start_run():
            mlflow.log_params({"arm": "a", "seed": seed})
            if loss is not None:
                mlflow.log_metric("loss", loss)
    (arm,) = compare(read_experiment("mine", uri), baseline="a", smallest_effect=0.1).arms
    assert (arm.n, arm.failed, arm.missing) == (1, 1, 1)


def test_a_run_whose_program_broke_waits_as_in_the_report(study: Lab, uri: str) -> None:
    broken, unfinished = _two_more(study)
    broken.fail({"reason": "no memory", "phase": "training", "step": 1, "at": "2026-01-02T04:00:00+00:00"})
    assert (broken.status(), unfinished.status()) == ("failed", "partial")
    mirror(study, uri)
    rotary = verdicts(read_experiment("posenc", uri)).arms[1]
    assert (rotary.n, rotary.failed, rotary.missing) == (3, 0, 2)


def _two_more(lab: Lab) -> tuple[Any, Any]:
    """Two further seeds of rotary, begun."""
    runs = []
    for seed, digit in (("3", "c"), ("4", "d")):
        lab.record["arms"]["rotary"]["runs"][seed] = digit * 16
        run = lab.begin(lab.store.run(digit * 16))
        lab.write(run, [row(step) for step in range(2)])
        runs.append(run)
    return runs[0], runs[1]


def test_one_study_of_several_is_asked_for_by_its_name(study: Lab, uri: str) -> None:
    said = str(verdicts(read_experiment("posenc", uri)))
    micro = {**study.record, "name": "posenc@micro"}
    sync(study.store, micro, sinks(study, uri))
    with pytest.raises(ConfigError, match="it holds several studies: posenc@micro, posenc@nano") as error:
        read_experiment("posenc", uri)
    assert error.value.hint == "mlflow:posenc@micro"
    assert str(verdicts(read_experiment("posenc@nano", uri))) == said
    with pytest.raises(ConfigError, match=r"unknown study 'posenc@nan'; did you mean 'posenc@nano'\?"):
        read_experiment("posenc@nan", uri)


# Reading.


def test_every_page_is_read(study: Lab, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_experiment("posenc", uri)
    monkeypatch.setattr(mlflow_tracker, "RUNS_PER_PAGE", 4)
    assert read_experiment("posenc", uri) == whole


def test_deleted_runs_are_not_read(uri: str) -> None:
    import mlflow

    log_users_runs("mine")
    mlflow.MlflowClient().delete_run(users_run("rotary", 0))
    (rotary,) = [arm for arm in verdicts(read_experiment("mine", uri)).arms if arm.name == "rotary"]
    assert list(rotary.values) == ["1", "2"]


def test_the_error_of_an_unknown_experiment_lists_the_known_ones(study: Lab, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown MLflow experiment 'posnc'; did you mean 'posenc'\?") as error:
        read_experiment("posnc", uri)
    assert str(error.value).count("\n") == 0 and "(known: Default, posenc)" in str(error.value)
    with pytest.raises(ConfigError, match="MLflow experiment 'Default': there are no runs in it"):
        read_experiment("Default", uri)


def test_the_error_of_a_deleted_experiment_restores_it(uri: str) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ConfigError, match="the MLflow experiment 'gone' was deleted") as error:
        read_experiment("gone", uri)
    assert (error.value.hint or "").startswith("mlflow experiments restore --experiment-id ")


def test_where_there_is_no_mlflow_it_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such MLflow database"):
        read_experiment("posenc", f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.glob("none*")) == []
    (tmp_path / "text.db").write_text("this is no database, but a text that is long enough to be taken for one\n" * 9)
    with pytest.raises(EnvironmentFault, match="MLflow cannot be read: "):
        read_experiment("posenc", f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(EnvironmentFault, match="MLflow cannot be read: no server listens there"):
        read_experiment("posenc", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="file store is no longer supported"):
        read_experiment("posenc", str(tmp_path))
