"""Judging what MLflow holds: anybody's experiment, and our own, as the same numbers in a CSV file would be."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2lab.analysis import compare
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.tracking.experiments import read_experiment

LOSSES = {
    "relu": [3.1, 3.12, 3.09],
    "gelu": [2.9, 2.91, 2.93],
    "broken": [3.0, math.nan, 3.02],
}


@pytest.fixture
def uri(tmp_path: Path, template: Path) -> str:
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def experiment(uri: str, tmp_path: Path) -> str:
    """A user's experiment, logged as MLflow's own pages show it: arm and seed as parameters, the loss at every step."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    where = client.create_experiment("mine", artifact_location=str(tmp_path / "artifacts"))
    for arm, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            run = client.create_run(where).info.run_id
            client.log_param(run, "activation", arm)
            client.log_param(run, "seed", seed)
            client.log_metric(run, "loss", 9.0, step=0)
            client.log_metric(run, "loss", loss, step=100)
            client.set_terminated(run, "FINISHED")
    killed = client.create_run(where).info.run_id
    client.log_param(killed, "activation", "gelu")
    client.log_param(killed, "seed", 3)
    client.log_metric(killed, "loss", 5.0)
    client.set_terminated(killed, "KILLED")
    deleted = client.create_run(where).info.run_id
    client.log_param(deleted, "activation", "relu")
    client.delete_run(deleted)
    return uri


def csv(folder: Path, losses: dict[str, list[float]]) -> Path:
    lines = [f"{arm},{seed},{value}" for arm, values in losses.items() for seed, value in enumerate(values)]
    file = folder / "same.csv"
    file.write_text("\n".join(["arm,seed,value", *lines]) + "\n")
    return file


def test_an_experiment_is_judged_as_the_same_numbers_in_a_table(experiment: str, tmp_path: Path) -> None:
    rows = read_experiment("mine", experiment)
    judged = compare(rows, baseline="relu", smallest_effect=0.05, arm="activation", metric="loss")
    losses = {arm: list(values) for arm, values in LOSSES.items()}
    losses["gelu"].append(math.nan)  # killed
    same = compare(csv(tmp_path, losses), baseline="relu", smallest_effect=0.05)
    assert sorted(str(judged).splitlines()) == sorted(str(same).splitlines())
    assert {c.arm: c.word for c in judged.contrasts} == {
        "gelu": "unstable (1 of 4 failed)",
        "broken": "unstable (1 of 3 failed)",
    }


def test_the_frame_of_search_runs_is_taken_as_it_is(experiment: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(experiment)
    frame = mlflow.search_runs(experiment_names=["mine"])
    frame = frame[(frame["params.activation"] != "broken") & (frame["status"] == "FINISHED")]
    judged = compare(frame, baseline="relu", smallest_effect=0.05, arm="params.activation", metric="metrics.loss")
    [contrast] = judged.contrasts
    assert contrast.word == "better" and (contrast.n_arm, contrast.n_against) == (3, 3)
    assert contrast.difference == pytest.approx(sum(LOSSES["gelu"]) / 3 - sum(LOSSES["relu"]) / 3)


def test_what_cannot_be_found_is_said_with_what_there_is(experiment: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown MLflow experiment 'mien'; did you mean 'mine'\?"):
        read_experiment("mien", experiment)
    rows = read_experiment("mine", experiment)
    with pytest.raises(ConfigError, match=r"unknown metric 'lost'.*loss"):
        compare(rows, baseline="relu", smallest_effect=0.05, arm="activation", metric="lost")
    with pytest.raises(ConfigError, match=r"unknown column 'activation2'.*params\.activation"):
        compare(rows, baseline="relu", smallest_effect=0.05, arm="activation2", metric="loss")
    with pytest.raises(ConfigError, match="there is no such MLflow database"):
        read_experiment("mine", f"sqlite:///{tmp_path}/nowhere.db")
    (tmp_path / "torn.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EnvironmentFault, match="MLflow cannot be read"):
        read_experiment("mine", f"sqlite:///{tmp_path}/torn.db")


def test_columns_of_any_table_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    rows = ["model,replica,nll", *(f"{arm},{i},{v}" for arm in ("relu", "gelu") for i, v in enumerate(LOSSES[arm]))]
    file.write_text("\n".join(rows) + "\n")
    judged = compare(file, baseline="relu", smallest_effect=0.05, arm="model", seed="replica", value="nll")
    assert [c.word for c in judged.contrasts] == ["better"]


def test_our_own_runs_come_back_as_the_store_has_them(lab: object, sink_factory: Callable[[], object]) -> None:
    """Runs of the study alone: not its parent, and final losses rather than those on the way."""
    from small_study import Lab, row

    from gpt2lab.tracking.delivery import Delivery
    from gpt2lab.tracking.mlflow import MlflowSink

    assert isinstance(lab, Lab)
    finals = {"learned": [2.5, 2.52], "rotary": [2.1, 2.13]}
    for arm, losses in finals.items():
        for seed, loss in enumerate(losses):
            run = lab.begin(lab.run(arm, seed))
            lab.write(run, [row(step) for step in range(5)])
            run.write_evaluation({"key": "val-1", "metrics": {"val/loss": loss}, "contexts": {}})
            lab.finish(run)
    sink = sink_factory()
    assert isinstance(sink, MlflowSink)
    Delivery(lab.store, lab.record, sink).once(over=True)
    rows = read_experiment("gpt2lab", f"sqlite:///{lab.store.root}/mlflow.db")
    judged = compare(rows, baseline="learned", smallest_effect=0.05)
    assert {arm.name: sorted(arm.values.values()) for arm in judged.arms} == finals
