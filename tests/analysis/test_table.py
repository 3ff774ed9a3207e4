"""Tables as `mlflow.search_runs` makes them, columns by other names, and what is refused in them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gpt2lab.analysis import Verdicts, compare
from gpt2lab.errors import ConfigError

VALUES = {
    "learned": (2.151, 2.149, 2.162, 2.147),
    "rotary": (1.893, 1.902, 1.887, 1.899),
    "none": (2.148, 2.152, 2.160, 2.150),
}


def plain() -> pd.DataFrame:
    """Columns arm, seed, value, seed after seed as they are trained."""
    rows = [{"arm": arm, "seed": s, "value": VALUES[arm][s]} for s in range(4) for arm in VALUES]
    return pd.DataFrame(rows)


def tracked(own: bool = False) -> pd.DataFrame:
    """The same runs as MLflow lists them: newest first, everything but metrics as text."""
    rows = []
    for number, row in enumerate(plain().to_dict("records")):
        arm, seed = row["arm"], str(row["seed"])
        names = {"params.arm": arm, "params.seed": seed, "params.lr": "4e-3", "metrics.loss": row["value"]}
        if own:
            names = {
                "tags.gpt2lab.study": "posenc@nano", "tags.gpt2lab.arm": arm, "tags.gpt2lab.seed": seed,
                "tags.gpt2lab.status": "finished", "tags.mlflow.parentRunId": "p", "params.seed": seed,
                "metrics.val/loss": row["value"] + 0.3, "metrics.val-final/loss": row["value"],
            }  # fmt: skip
        started = pd.Timestamp("2026-01-02", tz="UTC") + pd.Timedelta(seconds=number)
        rows.append({"run_id": f"{number:032x}", "status": "FINISHED", "start_time": started, **names})
    if own:
        rows.append({"run_id": "p", "status": "FINISHED", "tags.gpt2lab.study": "posenc@nano"})
    return pd.DataFrame(rows[::-1])


def verdicts(source: Any = None, **terms: Any) -> Verdicts:
    chosen: dict[str, Any] = {"baseline": "learned", "smallest_effect": 0.05} | terms
    return compare(tracked() if source is None else source, **chosen)


def changed(at: int, frame: pd.DataFrame | None = None, **cells: Any) -> pd.DataFrame:
    """The table with other cells in the run that was begun as number `at`."""
    frame = tracked() if frame is None else frame
    for name, cell in cells.items():
        column = name.replace("__", ".")
        frame[column] = frame[column].astype(object) if column in frame else None
        frame.loc[frame["run_id"] == f"{at:032x}", column] = cell
    return frame


# Columns.


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("looks", [None, (3, 4)])
def test_runs_from_mlflow_are_judged_as_any_table(own: bool, looks: tuple[int, ...] | None) -> None:
    assert str(verdicts(tracked(own), looks=looks)) == str(verdicts(plain(), looks=looks))
    assert verdicts(tracked(own)).metric == ("val-final/loss" if own else "loss")


def test_looks_count_runs_in_the_order_in_which_they_were_begun() -> None:
    worse_later = changed(10, metrics__loss=2.9)  # rotary, seed 3
    assert plain().to_dict("records")[10]["arm"] == "rotary"
    assert verdicts(worse_later, looks=(3, 4)).contrasts[0].word == "better"
    assert verdicts(changed(1, metrics__loss=2.9), looks=(3, 4)).contrasts[0].word != "better"


def test_a_csv_of_the_table_says_the_same(tmp_path: Path) -> None:
    for own in (False, True):
        tracked(own).to_csv(tmp_path / "runs.csv", index=False)
        assert str(verdicts(tmp_path / "runs.csv")) == str(verdicts(plain()))
        assert str(verdicts(pd.read_csv(tmp_path / "runs.csv"))) == str(verdicts(plain()))


@pytest.mark.parametrize(
    "names",
    [
        {"arm": "params.model"},
        {"arm": "model"},
        {"arm": "model", "seed": "seed", "metric": "loss"},
        {"arm": "params.model", "seed": "params.seed", "metric": "metrics.loss"},
        {"arm": "model", "value": "metrics.loss"},
        {"arm": "model", "value": "loss"},
        {"arm": "model", "seed": "run_id"},
    ],
)
def test_columns_are_named_with_or_without_their_prefix(names: dict[str, str]) -> None:
    frame = tracked().rename(columns={"params.arm": "params.model"}).assign(**{"metrics.speed": 9.0})
    terms = {"metric": "loss"} if not {"metric", "value"} & names.keys() else {}
    assert str(verdicts(frame, **names, **terms)) == str(verdicts(plain()))


def test_arm_and_seed_may_be_tags_and_without_a_seed_every_run_counts() -> None:
    frame = tracked().rename(columns={"params.arm": "tags.arm", "params.seed": "tags.seed"})
    assert list(verdicts(frame).arms[0].values) == ["0", "1", "2", "3"]
    assert next(iter(verdicts(frame.drop(columns="tags.seed")).arms[0].values)) == f"{0:032x}"
    assert str(verdicts(frame.drop(columns="tags.seed"))) == str(verdicts(plain()))


def test_any_table_may_have_other_names() -> None:
    frame = plain().rename(columns={"arm": "model", "seed": "dice", "value": "nll"})
    assert str(verdicts(frame, arm="model", seed="dice", value="nll")) == str(verdicts(plain()))
    with pytest.raises(ConfigError, match=r"unknown column 'mdel'; did you mean 'model'\?"):
        verdicts(frame, arm="mdel", seed="dice", value="nll")
    with pytest.raises(ConfigError, match="'nll' and 'dice' are both columns"):
        verdicts(frame, arm="model", seed="dice", value="dice", metric="nll")
    bits = verdicts(frame.rename(columns={"nll": "bits_per_byte"}), arm="model", seed="dice", value="bits_per_byte")
    assert bits.unit == "bits per byte" and bits.metric == "bits_per_byte"


def test_a_long_table_may_have_other_names_too() -> None:
    long = plain().assign(metric="val/loss", step=800)
    more = pd.concat([long, long.assign(metric="train/loss", value=0.0), long.assign(step=400, value=9.0)])
    renamed = more.rename(columns={"arm": "model", "seed": "dice", "value": "number"})
    names = {"arm": "model", "seed": "dice", "value": "number"}
    assert str(verdicts(renamed, **names, metric="val/loss")) == str(verdicts(plain()))


def test_the_final_evaluation_of_our_mirror_goes_by_both_its_names() -> None:
    for metric in ("final/val/loss", "val-final/loss", "metrics.val-final/loss"):
        assert str(verdicts(tracked(own=True), metric=metric)) == str(verdicts(plain()))
    assert verdicts(tracked(own=True), metric="val/loss").arms[0].mean == pytest.approx(
        0.3 + sum(VALUES["learned"]) / 4
    )


# Status.


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_ended_badly_failed_whatever_it_logged(status: str) -> None:
    assert verdicts(changed(1, status=status)).contrasts[0].word == "unstable (1 of 4 failed)"


@pytest.mark.parametrize("status", ["RUNNING", "SCHEDULED"])
def test_a_run_that_is_not_over_has_no_value_yet(status: str) -> None:
    result = verdicts(changed(1, status=status))
    assert (result.arms[1].n, result.arms[1].missing, result.arms[1].failed) == (3, 1, 0)
    assert result.contrasts[0].word == "exploratory"


@pytest.mark.parametrize("value", [math.nan, math.inf, sys.float_info.max, -sys.float_info.max])
def test_infinity_as_mlflow_writes_it_is_a_failure_and_so_is_nan(value: float) -> None:
    assert verdicts(changed(1, metrics__loss=value)).arms[1].failed == 1


@pytest.mark.parametrize(
    ("status", "own", "counts"),
    [
        ("FAILED", "diverged", (3, 1, 0)),
        ("FAILED", "failed", (3, 0, 1)),  # it broke, and the same command trains it again
        ("KILLED", "partial", (3, 0, 1)),
        ("RUNNING", "running", (3, 0, 1)),
    ],
)
def test_our_own_runs_count_as_in_their_report(status: str, own: str, counts: tuple[int, ...]) -> None:
    result = verdicts(changed(1, tracked(own=True), status=status, tags__gpt2lab__status=own))
    assert (result.arms[1].n, result.arms[1].failed, result.arms[1].missing) == counts


def test_our_own_run_whose_final_evaluation_is_to_come_has_no_value_yet() -> None:
    result = verdicts(changed(1, tracked(own=True), **{"metrics__val-final/loss": math.nan}))
    assert (result.arms[1].failed, result.arms[1].missing) == (0, 1)


# Runs of no arm.


def test_studies_trials_and_other_budgets_of_ours_are_not_runs_of_an_arm() -> None:
    frame = tracked(own=True)
    extra = frame[frame["tags.gpt2lab.seed"] == "0"]
    trials = extra.assign(**{"tags.gpt2lab.seed": "1000 lr x0.5", "metrics.val-final/loss": 9.0, "params.seed": "1000"})
    curve = extra.assign(**{"tags.gpt2lab.seed": "0 0.25x", "metrics.val-final/loss": 9.0})
    more = pd.concat([trials, frame, curve])
    more["run_id"] = [f"r{i}" for i in range(len(more))]
    assert str(verdicts(more)) == str(verdicts(plain()))
    assert str(verdicts(more, arm="tags.gpt2lab.arm", seed="run_id")) == str(verdicts(plain()))


def test_a_run_that_only_holds_others_is_no_run_of_an_arm() -> None:
    frame = tracked().assign(**{"tags.mlflow.parentRunId": "sweep"})
    parent = pd.DataFrame([{"run_id": "sweep", "status": "FINISHED"}])
    assert str(verdicts(pd.concat([frame, parent]))) == str(verdicts(plain()))


def test_any_other_run_without_an_arm_is_refused_not_dropped() -> None:
    with pytest.raises(ConfigError, match=r"run stray: column 'params\.arm' is empty"):
        verdicts(pd.concat([tracked(), pd.DataFrame([{"run_id": "stray", "status": "FINISHED"}])]))
    with pytest.raises(ConfigError, match="no run of an arm is among the runs"):
        verdicts(tracked(own=True).query("run_id == 'p'"))


def test_several_studies_are_never_mixed() -> None:
    other = tracked(own=True).assign(**{"tags.gpt2lab.study": "posenc@micro"})
    with pytest.raises(ConfigError, match="runs of several studies: posenc@micro, posenc@nano") as error:
        verdicts(pd.concat([tracked(own=True), other]))
    assert error.value.hint == "keep one: frame[frame['tags.gpt2lab.study'] == 'posenc@micro']"


# What is refused.


@pytest.mark.parametrize(
    ("frame", "terms", "sentence"),
    [
        (tracked().drop(columns="params.arm"), {}, r"no column tells the arm .*\(columns: metrics.loss, params.lr, pa"),
        (tracked(), {"arm": "params.modl"}, r"unknown column 'params.modl'.*\(known: metrics.loss, params.arm, params"),
        (tracked(), {"seed": "sed"}, r"unknown column 'sed'"),
        (tracked(), {"value": "params.loss"}, r"unknown column 'params.loss'; did you mean 'params.lr'"),
        (tracked(), {"metric": "los"}, r"unknown metric 'los'; did you mean 'loss'\? \(known: loss\)"),
        (tracked(), {"metric": "loss", "value": "metrics.loss"}, "metric and value both name what is compared"),
        (tracked().assign(**{"metrics.b": 1.0}), {}, r"which metric\? The table holds b, loss"),
        (tracked().drop(columns="metrics.loss"), {}, "no run has any metric"),
        (changed(3, params__seed="0"), {}, "run 0+3: arm 'learned' has seed 0 already, in run 0+:"),
        (changed(3, params__seed=None), {}, "run 0+3: column 'params.seed' is empty"),
        (changed(3, metrics__loss="low"), {}, "run 0+3: column 'metrics.loss': a number is expected, not 'low'"),
    ],
)  # fmt: skip
def test_tables_of_mlflow_that_cannot_be_read_say_where(
    frame: pd.DataFrame, terms: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        verdicts(frame, **terms)


@pytest.mark.parametrize("seed", [None, "run_id", "tags.mlflow.runName"])
def test_runs_of_one_seed_are_no_seeds_whatever_tells_the_runs_apart(seed: str | None) -> None:
    frame = tracked().assign(**{"params.seed": "42"})
    frame["tags.mlflow.runName"] = frame["run_id"]
    with pytest.raises(ConfigError, match=r"has seed 42 already, in run 0+1?: .* \(and 8 more such rows\)") as error:
        verdicts(frame, seed=seed)
    assert error.value.hint == "keep one run of each arm and seed"


def test_a_run_twice_in_joined_frames_is_refused_though_its_label_is_the_same() -> None:
    with pytest.raises(ConfigError, match="row 0: arm 'learned' has seed 0 already"):
        verdicts(pd.concat([plain(), plain().iloc[:1]]))


@pytest.mark.parametrize("looks", [(5, 3), (3, 3), (2, 4)])
def test_looks_that_are_none_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="looks: rising numbers of seeds are expected, from 3 on, not"):
        verdicts(looks=looks)


def test_a_table_may_say_why_an_arm_cannot_be_compared() -> None:
    frame = plain().assign(not_comparable=None)
    frame.loc[1, "not_comparable"] = "other tokenizer"
    assert [c.word for c in verdicts(frame).contrasts] == ["not comparable", "no difference larger than 0.05"]
    shown = verdicts(frame, force_exploratory=True).contrasts[0]
    assert shown.word == "exploratory" and shown.difference == pytest.approx(-0.257)
    assert verdicts(frame, not_comparable={"rotary": "mine"}).contrasts[0].verdict.count("mine") == 1
