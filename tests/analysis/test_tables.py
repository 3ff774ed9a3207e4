"""Tables of trackers and tables as people have them; metrics known by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpt2lab.analysis import Verdicts, compare, in_words
from gpt2lab.analysis.metric_names import metric_spec
from gpt2lab.errors import ConfigError

VALUES = {
    "learned": (2.151, 2.149, 2.162, 2.147),
    "rotary": (1.893, 1.902, 1.887, 1.899),
    "none": (2.148, 2.152, 2.160, 2.150),
}


def plain() -> pd.DataFrame:
    """Columns arm, seed, value, seed after seed as they are trained."""
    return pd.DataFrame([{"arm": arm, "seed": s, "value": VALUES[arm][s]} for s in range(4) for arm in VALUES])


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


# MLflow.


@pytest.mark.parametrize("own", [False, True])
def test_runs_from_mlflow_are_judged_as_any_table(own: bool, tmp_path: Path) -> None:
    tracked(own).to_csv(tmp_path / "runs.csv", index=False)
    for source in (tracked(own), tmp_path / "runs.csv", pd.read_csv(tmp_path / "runs.csv")):
        assert str(verdicts(source)) == str(verdicts(plain()))
    assert verdicts(tracked(own)).metric == ("val-final/loss" if own else "loss")
    assert str(verdicts(tracked(own), looks=(3, 4))) == str(verdicts(plain(), looks=(3, 4)))


def test_looks_count_runs_in_the_order_in_which_they_were_begun() -> None:
    worse_later = changed(10, metrics__loss=2.9)  # rotary, seed 3
    assert verdicts(worse_later, looks=(3, 4)).contrasts[0].word == "better"
    assert verdicts(changed(1, metrics__loss=2.9), looks=(3, 4)).contrasts[0].word != "better"


@pytest.mark.parametrize("names", [
    {"arm": "params.model", "metric": "loss"},
    {"arm": "model", "seed": "seed", "metric": "loss"},
    {"arm": "params.model", "seed": "params.seed", "metric": "metrics.loss"},
    {"arm": "model", "value": "metrics.loss"},
    {"arm": "model", "value": "loss"},
    {"arm": "model", "seed": "run_id", "value": "loss"},
])  # fmt: skip
def test_columns_are_named_with_or_without_their_prefix(names: dict[str, str]) -> None:
    frame = tracked().rename(columns={"params.arm": "params.model"}).assign(**{"metrics.speed": 9.0})
    assert str(verdicts(frame, **names)) == str(verdicts(plain()))


def test_arm_and_seed_may_be_tags_and_without_a_seed_every_run_counts() -> None:
    frame = tracked().rename(columns={"params.arm": "tags.arm", "params.seed": "tags.seed"})
    assert list(verdicts(frame).arms[0].values) == ["0", "1", "2", "3"]
    assert next(iter(verdicts(frame.drop(columns="tags.seed")).arms[0].values)) == f"{0:032x}"
    assert str(verdicts(frame.drop(columns="tags.seed"))) == str(verdicts(plain()))


def test_the_final_evaluation_of_our_mirror_goes_by_both_its_names() -> None:
    for metric in ("final/val/loss", "val-final/loss", "metrics.val-final/loss"):
        assert str(verdicts(tracked(own=True), metric=metric)) == str(verdicts(plain()))
    mean = verdicts(tracked(own=True), metric="val/loss").arms[0].mean
    assert mean == pytest.approx(0.3 + sum(VALUES["learned"]) / 4)


OWN = "tags__gpt2lab__status"


@pytest.mark.parametrize(("own", "cells", "counts"), [
    (False, {"status": "FAILED"}, (3, 1, 0)),
    (False, {"status": "KILLED"}, (3, 1, 0)),
    (False, {"status": "RUNNING"}, (3, 0, 1)),
    (False, {"status": "SCHEDULED"}, (3, 0, 1)),
    *((False, {"metrics__loss": value}, (3, 1, 0)) for value in (math.nan, math.inf, sys.float_info.max,
                                                                  -sys.float_info.max)),  # infinity as MLflow writes it
    (True, {"status": "FAILED", OWN: "diverged"}, (3, 1, 0)),
    (True, {"status": "FAILED", OWN: "failed"}, (3, 0, 1)),  # it broke, and the same command trains it again
    (True, {"status": "KILLED", OWN: "partial"}, (3, 0, 1)),
    (True, {"status": "RUNNING", OWN: "running"}, (3, 0, 1)),
    (True, {"metrics__val-final/loss": math.nan}, (3, 0, 1)),  # its final evaluation is to come
])  # fmt: skip
def test_the_status_of_a_run_counts(own: bool, cells: dict[str, Any], counts: tuple[int, ...]) -> None:
    result = verdicts(changed(1, tracked(own), **cells))
    assert (result.arms[1].n, result.arms[1].failed, result.arms[1].missing) == counts
    assert result.contrasts[0].word == ("unstable (1 of 4 failed)" if counts[1] else "exploratory")


def test_studies_trials_and_other_budgets_of_ours_are_not_runs_of_an_arm() -> None:
    frame = tracked(own=True)
    extra = frame[frame["tags.gpt2lab.seed"] == "0"]
    trials = extra.assign(**{"tags.gpt2lab.seed": "1000 lr x0.5", "metrics.val-final/loss": 9.0, "params.seed": "1000"})
    curve = extra.assign(**{"tags.gpt2lab.seed": "0 0.25x", "metrics.val-final/loss": 9.0})
    more = pd.concat([trials, frame, curve])
    more["run_id"] = [f"r{i}" for i in range(len(more))]
    assert str(verdicts(more)) == str(verdicts(plain()))
    assert str(verdicts(more, arm="tags.gpt2lab.arm", seed="run_id")) == str(verdicts(plain()))
    grouped = tracked().assign(**{"tags.mlflow.parentRunId": "sweep"})
    parent = {"run_id": "sweep", "status": "FINISHED"}
    assert str(verdicts(pd.concat([grouped, pd.DataFrame([parent])]))) == str(verdicts(plain()))


def test_several_studies_are_never_mixed() -> None:
    other = tracked(own=True).assign(**{"tags.gpt2lab.study": "posenc@micro"})
    with pytest.raises(ConfigError, match="runs of several studies: posenc@micro, posenc@nano") as error:
        verdicts(pd.concat([tracked(own=True), other]))
    assert error.value.hint == "keep one: frame[frame['tags.gpt2lab.study'] == 'posenc@micro']"


STRAY = pd.concat([tracked(), pd.DataFrame([{"run_id": "stray", "status": "FINISHED"}])])


@pytest.mark.parametrize(
    ("frame", "terms", "sentence"),
    [
        (STRAY, {}, r"run stray: column 'params\.arm' is empty"),
        (tracked(own=True).query("run_id == 'p'"), {}, "no run of an arm is among the runs"),
        (tracked().drop(columns="params.arm"), {}, r"no column has the arm .*\(columns: metrics.loss, params.lr, pa"),
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


# Files and other plain tables.

Read = Callable[..., Verdicts]
BASE, NEW = (2.15, 2.16, 2.14), (2.0, 2.01, 2.02)
PLAIN = "arm,seed,value\n" + "".join(
    f"{arm},{seed},{value}\n" for arm, values in (("base", BASE), ("new", NEW)) for seed, value in enumerate(values)
)


def rows(base: Sequence[Any] = BASE, new: Sequence[Any] = NEW, name: str = "value") -> list[dict[str, Any]]:
    arms = (("base", base), ("new", new))
    return [{"arm": arm, "seed": seed, name: v} for arm, values in arms for seed, v in enumerate(values)]


def curves(ends: dict[str, int], column: str = "step", value: str = "value", **more: Any) -> list[dict[str, Any]]:
    """Three seeds of each arm, a value every 100 steps."""
    return [
        {"arm": arm, "seed": seed, column: step, value: final + seed / 100 + (end - step) / 300, **more}
        for (arm, end), final in zip(ends.items(), (2.15, 2.01), strict=True)
        for seed in range(3)
        for step in range(100, end + 1, 100)
    ]


def judged(source: Any, **terms: Any) -> Verdicts:
    return compare(source, **{"baseline": "base", "smallest_effect": 0.05, **terms})


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Judge the text of a file."""

    def of(text: str | bytes, **terms: Any) -> Verdicts:
        (tmp_path / "r.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return judged(tmp_path / "r.csv", **terms)

    return of


@pytest.mark.parametrize("text", [
    PLAIN,
    PLAIN.replace(",", ";").replace(".", ","),
    PLAIN.replace(",", ";"),
    PLAIN.replace(",", "\t"),
    PLAIN.replace(",", "\t").replace(".", ","),
    PLAIN.replace("value\n", "value\n\n").replace("new,0", "# once more\n\nnew,0") + "# new,3,9.9\n",
    "# from the cluster\n" + PLAIN.replace(",value", ", value , ") + ",,,\n",
])  # fmt: skip
def test_separators_comments_and_blank_lines(read: Read, text: str) -> None:
    assert str(read(text)) == str(judged(rows()))


def test_words_for_no_value_and_for_failures(read: Read) -> None:
    text = "arm,seed,value\nbase,0,2.1\nbase,1,NA\nbase,2,-\nbase,3,null\nbase,4,None\nbase,5,n/a\nbase,6,\n"
    text += "new,0,2.0\nnew,1,crashed\nnew,2,Failed\nnew,3,NaN\nnew,4,inf\nnew,5,diverged\nnew,6,-inf\n"
    assert [(arm.n, arm.missing, arm.failed) for arm in read(text).arms] == [(1, 6, 0), (1, 0, 6)]


@pytest.mark.parametrize(("text", "sentence"), [
    ("arm,seed,value\na,0,2.1\na,1,two\n", r"r.csv:3: column 'value': a number is expected, not 'two'"),
    ("# a\narm,seed,value\n\n# b\nbase,0,two\n", r"r.csv:5: column 'value': a number is expected, not 'two'"),
    ("arm,seed,value\na,0,2.1\nb,0,2\na,0,2.2\n", r"r.csv:4: arm 'a' has seed 0 already, in .*r.csv:2"),
    ("arm,seed,value\na,0,2,15\n", r"r.csv:2: more cells than columns: \['15'\]"),
    ("arm,seed,value\n,0,2\n", r"r.csv:2: column 'arm' is empty"),
    ("arm,seed,value,value\nbase,0,2.15,9\n", r"r\.csv: two columns are called 'value'"),
    ("arm,sead,value\na,0,2\n", r"unknown column 'run'"),
    ("arm,seed,values\na,0,2\n", r"unknown column 'value'; did you mean 'values'\?"),
    ("arm,seed,acc,val_loss\na,0,2,2\n", r"which metric\? The table holds acc, val_loss"),
    ("Step,lively-sun - loss\n1,2.0\n", "column 'lively-sun - loss': the name of the run does not end in its seed"),
    ("arm,seed,value\n", "no rows"),
    ("", "no rows"),
    (b"arm,seed,value\na,0,\xff\n", "not a CSV file in UTF-8"),
    ('arm,seed,value\n"a,0,2\n', "not a CSV file in UTF-8"),
])  # fmt: skip
def test_files_that_cannot_be_read_say_where(read: Read, text: str | bytes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(text)


def test_all_bad_cells_are_reported_together_by_row() -> None:
    frame = plain().astype({"value": object})
    frame.loc[2, "value"], frame.loc[5, "value"] = "two", True
    with pytest.raises(ConfigError) as error:
        verdicts(frame)
    assert [(p.where, p.what) for p in error.value.problems] == [
        ("row 2", "column 'value': a number is expected, not 'two'"),
        ("row 5", "column 'value': a number is expected, not True"),
    ]


@pytest.mark.parametrize("source", [3, "missing.csv", Path("missing"), [1, 2], None])
def test_things_that_are_no_table(source: Any) -> None:
    with pytest.raises(ConfigError):
        judged(source)


def test_columns_of_a_frame_that_have_one_name_and_a_run_that_is_there_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="table: two columns are called 'value'"):
        judged(pd.DataFrame([["base", 0, 2.1, 9.0]], columns=["arm", "seed", "value", "value"]))
    with pytest.raises(ConfigError, match="row 0: arm 'learned' has seed 0 already"):  # joined frames: two rows 0
        verdicts(pd.concat([plain(), plain().iloc[:1]]))
    with pytest.raises(ConfigError, match=r"row 6: arm 'base' has seed 0 already, in row 0"):
        judged([*rows(), {"arm": "base", "seed": "0.0", "value": 2.2}])
    named = [row | {"run": f"r{i}", "seed": 0} for i, row in enumerate(rows())]
    said = r"row 1: arm 'base' has seed 0 already, in row 0: by 'seed' they are one seed"
    with pytest.raises(ConfigError, match=said):
        judged(named, seed="run")


def test_any_table_may_have_other_names() -> None:
    frame = plain().rename(columns={"arm": "model", "seed": "dice", "value": "nll"})
    assert str(verdicts(frame, arm="model", seed="dice", value="nll")) == str(verdicts(plain()))
    with pytest.raises(ConfigError, match=r"unknown column 'mdel'; did you mean 'model'\?"):
        verdicts(frame, arm="mdel", seed="dice", value="nll")
    with pytest.raises(ConfigError, match="'nll' and 'dice' are both columns"):
        verdicts(frame, arm="model", seed="dice", value="dice", metric="nll")
    bits = verdicts(frame.rename(columns={"nll": "bits_per_byte"}), arm="model", seed="dice", value="bits_per_byte")
    assert bits.unit == "bits per byte" and bits.metric == "bits_per_byte"


def test_a_table_may_say_why_an_arm_cannot_be_compared() -> None:
    frame = plain().assign(not_comparable=None)
    frame.loc[1, "not_comparable"] = "other tokenizer"
    assert [c.word for c in verdicts(frame).contrasts] == ["not comparable", "no difference larger than 0.05"]
    shown = verdicts(frame, force_exploratory=True).contrasts[0]
    assert shown.word == "exploratory" and shown.difference == pytest.approx(-0.257)
    assert verdicts(frame, not_comparable={"rotary": "mine"}).contrasts[0].verdict.count("mine") == 1


# Steps.


@pytest.mark.parametrize("column", ["step", "_step", "Step", "global_step", "iteration", "epoch", "tokens"])
def test_the_last_step_counts(column: str) -> None:
    verdicts = judged(curves({"base": 300, "new": 300}, column))
    assert str(verdicts).startswith("new against base: better, -0.140 nats [-0.1")
    assert verdicts.read_as == "value at the last step, lower is better, unit nats"


def test_the_last_step_of_a_named_metric_counts_though_other_steps_are_blank() -> None:
    table = curves({"base": 300, "new": 300}, value="val_loss")
    table += [{"arm": "new", "seed": s, "step": 350, "train_loss": 1.0} for s in range(3)]
    assert judged(table, metric="val_loss").contrasts[0].difference == pytest.approx(-0.14)


def long_table() -> pd.DataFrame:
    """As `load_results` gives it: curves and, at the last step, the final evaluation."""
    long = pd.concat([plain().assign(step=s, metric="val/loss") for s in (0, 400, 800)], ignore_index=True)
    long["value"] += 1 - long["step"] / 800
    return pd.concat([long, plain().assign(step=800, metric="final/val/loss")], ignore_index=True)


def test_the_table_of_load_results_counts_at_the_last_step_on_the_final_evaluation() -> None:
    long = long_table()
    assert str(verdicts(long)) == str(verdicts(plain())) and verdicts(long).metric == "final/val/loss"
    assert str(verdicts(long[long.metric == "val/loss"])) == str(verdicts(plain()))
    renamed = long.rename(columns={"arm": "model", "seed": "dice", "value": "number"})
    names = {"arm": "model", "seed": "dice", "value": "number"}
    assert str(verdicts(renamed, **names, metric="val/loss")) == str(verdicts(plain()))
    with pytest.raises(ConfigError, match=r"unknown metric 'val/los'; did you mean 'val/loss'\?"):
        verdicts(long, metric="val/los")


def test_a_run_that_stopped_early_is_failed_or_waiting_never_dropped_or_ranked() -> None:
    long = long_table()
    stopped = long[~((long.arm == "rotary") & (long.seed == 0) & (long.step == 800))]
    assert verdicts(stopped).contrasts[0].word == "exploratory"
    broken = {"arm": "rotary", "seed": 0, "step": 500, "metric": "train/loss", "value": np.nan}
    assert verdicts(pd.concat([stopped, pd.DataFrame([broken])])).contrasts[0].word == "unstable (1 of 4 failed)"


def test_runs_of_unequal_length_are_not_comparable_unless_they_failed_or_their_metric_is_final() -> None:
    table = curves({"base": 300, "new": 600})
    assert str(judged(table)) == "new against base: not comparable: its runs end at step 600, those of base at 300"
    named = curves({"base": 300, "new": 600}, metric="val/loss")
    assert judged(named).contrasts[0].word == "not comparable"
    forced = judged(table, force_exploratory=True).contrasts[0]
    assert forced.word == "exploratory" and "its runs end at step 600" in forced.verdict and "-0.140" in forced.verdict
    ends = [row | {"metric": "final/val/loss"} for row in named if row["step"] == {"base": 300, "new": 600}[row["arm"]]]
    assert judged(named + ends).contrasts[0].word == "better"
    early = [row | {"value": math.nan} if row["step"] == 200 else row for row in curves({"base": 200, "new": 200})]
    whole = [row for row in table if row["arm"] == "base"]
    assert judged(whole + [row for row in early if row["arm"] == "new"]).contrasts[0].word == "unstable (3 of 3 failed)"


def test_a_column_of_tokens_may_belong_to_whole_runs() -> None:
    assert str(judged([row | {"tokens": 10 + (row["arm"] == "new")} for row in rows()])) == str(judged(rows()))


@pytest.mark.parametrize("seed", ["step", "_step", "Epoch", "iteration", "tokens", "global_step"])
def test_steps_are_no_seeds(seed: str) -> None:
    table = [{"arm": row["arm"], seed: 100 * row["seed"], "value": row["value"]} for row in rows()]
    with pytest.raises(ConfigError, match=f"the steps of a run are not seeds: '{seed}' does not distinguish runs"):
        judged(table, seed=seed)
    with pytest.raises(
        ConfigError, match=rf"no column distinguishes the runs of an arm; .* \('{seed}'\) are not seeds"
    ):
        judged(table)


# Weights & Biases.


def test_charts_with_a_column_for_each_run(read: Read) -> None:
    runs = [f"{arm}-seed{seed}" for arm in ("base", "new") for seed in range(3)]
    measured = ("_step", "val/loss", "val/loss__MIN", "val/loss__MAX")
    heads = [f'"{run} - {metric}"' for run in runs for metric in measured]
    lines = [",".join(f"{step},{loss + (300 - step) / 300},0,9" for loss in (*BASE, *NEW)) for step in (100, 200, 300)]
    table = "\n".join([",".join(["Step", *heads]), *(f"{100 * i},{line}" for i, line in enumerate(lines, 1))])
    assert str(read(table)) == str(judged(rows())) and read(table).metric == "val/loss"
    names, values = ",".join(run.replace("-seed", "_s") for run in runs), ",".join(map(str, (*BASE, *NEW)))
    bare = f"step,{names}\n300,{values}\n"
    assert str(read(bare)) == str(judged(rows())) and read(bare, metric="val/loss").metric == "val/loss"


def test_runs_by_their_state(read: Read) -> None:
    states = ["running", "preempted", "pending", "crashed", "failed", "killed", "finished"]
    lines = [f"new-{i},{state},new,{i},2.{i}" for i, state in enumerate(states)]
    arm = read("\n".join(["Name,State,arm,seed,val/loss", "b,finished,base,0,2.1", *lines])).arms[1]
    assert (arm.n, arm.missing, arm.failed) == (1, 3, 3)


# Values and their order.


def test_runs_that_agree_in_all_digits_are_refused() -> None:
    copied = rows(new=(2.0123456, 2.0123456, 2.05))
    said = r"row 4: seed 1 of arm 'new' has the value of seed 0 in row 3, digit for digit"
    with pytest.raises(ConfigError, match=said):
        judged(copied)
    assert judged([{**row, "acc": row["value"]} for row in copied], metric="acc").contrasts[0].word == "worse"


def test_few_digits_may_agree_and_that_is_told() -> None:
    said = "2 of 3 values of new occur more than once: rounded, or one run written down twice?"
    assert said in judged(rows(new=(2.01, 2.01, 2.02))).contrasts[0].notes
    single = pd.DataFrame(rows(new=(2.01, 2.01, 2.02))).astype({"value": "float32"})
    assert said in judged(single).contrasts[0].notes
    assert judged(rows(new=(2.1 + 0.3, 2.4, 2.02))).contrasts[0].notes == (said,)
    many = [round(float(v), 4) for v in np.random.default_rng(0).normal(2.0, 0.002, 50)]
    assert len(set(many)) < 50 and not judged(rows(new=many), sensitivity=False).contrasts[0].notes


def test_an_arm_that_is_its_baseline_is_told() -> None:
    notes = judged(rows(new=BASE)).contrasts[0].notes
    assert "identical to base at every seed: did the change reach the model?" in notes
    assert ", 0 nats (n = 4, 3)" in judged(rows(base=(0.1,) * 3, new=(0.1,) * 4)).contrasts[0].verdict


@pytest.mark.parametrize("factor", [1e200, 1e-200])
def test_sizes_that_cannot_be_squared_are_refused_in_one_line(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"no size that can be judged .* \(and 5 more such rows\)"):
        judged(rows([v * factor for v in BASE], [v * factor for v in NEW]))
    possible = 1e45 if factor > 1 else 1e-45
    table = rows([v * possible for v in BASE], [v * possible for v in NEW])
    assert judged(table, smallest_effect=0.05 * possible).contrasts[0].word == "better"


def test_looks_take_seeds_by_number_not_by_place() -> None:
    table = rows(base=(2.15, 2.16, 2.14, 2.15), new=(2.2, 2.21, 2.19, 1.0))
    by_value = sorted(table, key=lambda row: row["value"])
    assert str(judged(by_value, looks=(3,))) == str(judged(table, looks=(3,)))
    assert judged(by_value, looks=(3,)).contrasts[0].mean_arm == pytest.approx(2.2)
    named = [row | {"seed": f"a{row['seed']}"} for row in rows()]
    assert judged(named).contrasts[0].word == "better"
    with pytest.raises(ConfigError, match="which seeds came first is not known: seed 'a0' of arm 'base'") as error:
        judged(named, looks=(3,))
    assert error.value.problems[0].where == "looks" and str(error.value.hint).startswith("number the seeds")


# Metrics.

LOW, HIGH = (0.412, 0.418, 0.409), (0.458, 0.463, 0.455)


def read_as_metric(name: str = "value", base: Any = LOW, new: Any = HIGH, **terms: Any) -> Verdicts:
    return judged(rows(base, new, name), **{"smallest_effect": 0.01} | terms)


@pytest.mark.parametrize(("names", "higher", "unit"), [
    ("loss|val/loss|final/val/loss/position/1-1|eval_loss|Val Loss|loss/train|val_loss_best", False, "nats"),
    ("val-final/bits_per_byte", False, "bits per byte"),
    ("val_ppl|word_perplexity,none", False, "perplexity"),
    ("acc|acc_norm,none|eval/accuracy", True, "accuracy"),
    ("acc_pct|Accuracy (%)", True, "percentage points"),
    ("error_rate_percent", False, "percentage points"),
    ("logprob", True, "nats"),
    ("f1_score", True, "f1"),
])  # fmt: skip
def test_metrics_known_by_name(names: str, higher: bool, unit: str) -> None:
    for name in names.split("|"):
        found = metric_spec(name)
        assert found and (found.higher_is_better, found.unit) == (higher, unit), name


@pytest.mark.parametrize("name", ["quality", "acc_stderr", "loss_scale", "lr", "score", "accuracy_gap", "mem", ""])
def test_metrics_of_no_known_direction(name: str) -> None:
    assert metric_spec(name) is None


def test_better_is_a_positive_difference_where_higher_is_better() -> None:
    verdicts = read_as_metric("accuracy")
    contrast = verdicts.contrasts[0]
    assert (contrast.word, verdicts.higher_is_better, verdicts.unit) == ("better", True, "accuracy")
    assert contrast.difference == pytest.approx(0.0456667) and contrast.low > 0
    assert "new is better than base by 0.046 accuracy (95 % interval 0.0" in in_words(verdicts)
    assert read_as_metric("accuracy", HIGH, LOW).contrasts[0].word == "worse"
    assert verdicts.to_json()["higher_is_better"] is True


@pytest.mark.parametrize(("terms", "word", "read_as"), [
    ({}, "worse", "value, lower is better, unit nats"),
    ({"higher_is_better": True}, "better", "value, higher is better, unit value"),
    ({"unit": "points"}, "worse", "value, lower is better, unit points"),
    ({"name": "loss"}, "worse", "loss, lower is better, unit nats"),
    ({"name": "val/bits_per_byte"}, "worse", "val/bits_per_byte, lower is better, unit bits per byte"),
    ({"name": "accuracy"}, "better", "accuracy, higher is better, unit accuracy"),
    ({"name": "quality", "higher_is_better": True}, "better", "quality, higher is better, unit quality"),
    ({"name": "quality", "higher_is_better": False, "unit": "points"}, "worse",
     "quality, lower is better, unit points"),
])  # fmt: skip
def test_direction_and_unit(terms: dict[str, Any], word: str, read_as: str) -> None:
    found = read_as_metric(**terms, metric=terms.get("name"))
    assert (found.contrasts[0].word, found.read_as) == (word, read_as)
    assert found.unit in found.contrasts[0].verdict


def test_an_unknown_direction_is_refused_with_the_ways_out() -> None:
    with pytest.raises(ConfigError, match="whether a higher or a lower 'quality' is better is not known") as error:
        read_as_metric("quality", metric="quality")
    assert error.value.hint == "higher_is_better=True or higher_is_better=False"


def test_the_unigram_floor_is_for_losses_in_nats() -> None:
    for terms in ({"name": "accuracy"}, {"name": "bits_per_byte"}, {"higher_is_better": True}):
        with pytest.raises(ConfigError, match="unigram: it bounds a loss in nats"):
            read_as_metric(unigram=3.3, **terms)
    assert read_as_metric("val/loss", metric="val/loss", unigram=0.3).arms[0].failed == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_what_is_no_number_failed_in_both_directions(name: str, value: float) -> None:
    assert read_as_metric(name, new=(*HIGH, value)).contrasts[0].word == "unstable (1 of 4 failed)"


def test_the_value_column_is_the_one_known_metric() -> None:
    table = [row | {"acc_stderr": 0.1, "lr": 1} for row in rows(name="acc")]
    assert judged(table, smallest_effect=0.01).metric == "acc"
