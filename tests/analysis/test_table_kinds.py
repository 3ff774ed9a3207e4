"""Tables as people have them: other separators, words for missing values, steps, wide exports, copies, orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpt2lab.analysis import Verdicts, compare
from gpt2lab.errors import ConfigError

Read = Callable[..., Verdicts]
BASE, NEW = (2.15, 2.16, 2.14), (2.0, 2.01, 2.02)
PLAIN = "arm,seed,value\n" + "".join(
    f"{arm},{seed},{value}\n" for arm, values in (("base", BASE), ("new", NEW)) for seed, value in enumerate(values)
)


def rows(base: Sequence[Any] = BASE, new: Sequence[Any] = NEW, **more: Any) -> list[dict[str, Any]]:
    arms = (("base", base), ("new", new))
    return [{"arm": arm, "seed": seed, "value": v, **more} for arm, values in arms for seed, v in enumerate(values)]


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

    def of(text: str, **terms: Any) -> Verdicts:
        (tmp_path / "r.csv").write_text(text)
        return judged(tmp_path / "r.csv", **terms)

    return of


# Files.


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace(",", ";").replace(".", ","),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "\t").replace(".", ","),
        PLAIN.replace("value\n", "value\n\n").replace("new,0", "# once more\n\nnew,0") + "# new,3,9.9\n",
        "# from the cluster\n" + PLAIN.replace(",value", ", value , ") + ",,,\n",
    ],
)
def test_separators_comments_and_blank_lines(read: Read, text: str) -> None:
    assert str(read(text)) == str(judged(rows()))


def test_words_for_no_value_and_for_failures(read: Read) -> None:
    text = "arm,seed,value\nbase,0,2.1\nbase,1,NA\nbase,2,-\nbase,3,null\nbase,4,None\nbase,5,n/a\nbase,6,\n"
    text += "new,0,2.0\nnew,1,crashed\nnew,2,Failed\nnew,3,NaN\nnew,4,inf\nnew,5,diverged\nnew,6,-inf\n"
    assert [(arm.n, arm.missing, arm.failed) for arm in read(text).arms] == [(1, 6, 0), (1, 0, 6)]


def test_columns_that_have_one_name_are_refused(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"r\.csv: two columns are called 'value'"):
        read("arm,seed,value,value\nbase,0,2.15,9\n")
    with pytest.raises(ConfigError, match="table: two columns are called 'value'"):
        judged(pd.DataFrame([["base", 0, 2.1, 9.0]], columns=["arm", "seed", "value", "value"]))


def test_a_line_number_counts_comments_and_blank_lines(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"r\.csv:5: column 'value': a number is expected, not 'two'"):
        read("# a\narm,seed,value\n\n# b\nbase,0,two\n")


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


def test_runs_of_unequal_length_are_not_comparable() -> None:
    table = curves({"base": 300, "new": 600})
    assert str(judged(table)) == "new against base: not comparable: its runs end at step 600, those of base at 300"
    named = curves({"base": 300, "new": 600}, metric="val/loss")
    assert judged(named).contrasts[0].word == "not comparable"
    forced = judged(table, force_exploratory=True).contrasts[0]
    assert forced.word == "exploratory" and "its runs end at step 600" in forced.verdict and "-0.140" in forced.verdict


def test_final_metrics_are_final_wherever_they_stand() -> None:
    table = curves({"base": 300, "new": 600}, metric="val/loss")
    ends = [row | {"metric": "final/val/loss"} for row in table if row["step"] == {"base": 300, "new": 600}[row["arm"]]]
    assert judged(table + ends).contrasts[0].word == "better"


def test_arms_that_failed_early_are_unstable_not_unequal() -> None:
    early = [row | {"value": float("nan")} if row["step"] == 200 else row for row in curves({"base": 200, "new": 200})]
    broken = [row for row in early if row["arm"] == "new"]
    whole = [row for row in curves({"base": 300, "new": 300}) if row["arm"] == "base"]
    assert judged(whole + broken).contrasts[0].word == "unstable (3 of 3 failed)"


def test_a_column_of_tokens_may_belong_to_whole_runs() -> None:
    assert str(judged([row | {"tokens": 10 + (row["arm"] == "new")} for row in rows()])) == str(judged(rows()))


@pytest.mark.parametrize("seed", ["step", "_step", "Epoch", "iteration", "tokens", "global_step"])
def test_steps_are_no_seeds(seed: str) -> None:
    table = [{"arm": row["arm"], seed: 100 * row["seed"], "value": row["value"]} for row in rows()]
    with pytest.raises(ConfigError, match=f"the steps of a run are no seeds: '{seed}' tells no runs apart"):
        judged(table, seed=seed)
    with pytest.raises(ConfigError, match=rf"no column tells the runs of an arm apart; .* \('{seed}'\) are no seeds"):
        judged(table)


# Weights & Biases.


def test_charts_with_a_column_for_each_run(read: Read) -> None:
    runs = [f"{arm}-seed{seed}" for arm in ("base", "new") for seed in range(3)]
    heads = [
        f'"{run} - {metric}"' for run in runs for metric in ("_step", "val/loss", "val/loss__MIN", "val/loss__MAX")
    ]
    lines = [",".join(f"{step},{loss + (300 - step) / 300},0,9" for loss in (*BASE, *NEW)) for step in (100, 200, 300)]
    table = "\n".join([",".join(["Step", *heads]), *(f"{100 * i},{line}" for i, line in enumerate(lines, 1))])
    assert str(read(table)) == str(judged(rows())) and read(table).metric == "val/loss"
    plain = (
        "step," + ",".join(run.replace("-seed", "_s") for run in runs) + "\n300," + ",".join(map(str, (*BASE, *NEW)))
    )
    assert str(read(plain)) == str(judged(rows())) and read(plain, metric="val/loss").metric == "val/loss"
    with pytest.raises(ConfigError, match="column 'lively-sun - loss': the name of the run does not end in its seed"):
        read("Step,lively-sun - loss\n1,2.0\n")


def test_runs_by_their_state(read: Read) -> None:
    states = ["running", "preempted", "pending", "crashed", "failed", "killed", "finished"]
    lines = [f"new-{i},{state},new,{i},2.{i}" for i, state in enumerate(states)]
    table = "\n".join(["Name,State,arm,seed,val/loss", "b,finished,base,0,2.1", *lines])
    arm = read(table).arms[1]
    assert (arm.n, arm.missing, arm.failed) == (1, 3, 3)


# Copies.


def test_runs_that_agree_in_all_digits_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"row 4: seed 1 of arm 'new' has the value of seed 0 in row 3, digit for digit"
    ):
        judged(rows(new=(2.0123456, 2.0123456, 2.05)))
    copied = rows(new=(2.0123456, 2.0123456, 2.05))
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
    constant = judged(rows(base=(0.1,) * 3, new=(0.1,) * 4)).contrasts[0].verdict
    assert ", 0 nats (n = 4, 3)" in constant


def test_0_and_0_0_are_one_seed() -> None:
    with pytest.raises(ConfigError, match=r"row 6: arm 'base' has seed 0 already, in row 0"):
        judged([*rows(), {"arm": "base", "seed": "0.0", "value": 2.2}])


def test_runs_of_one_seed_are_refused_by_their_names_too() -> None:
    table = [row | {"run": f"r{i}", "seed": 0} for i, row in enumerate(rows())]
    with pytest.raises(
        ConfigError, match=r"row 1: arm 'base' has seed 0 already, in row 0: by 'seed' they are one seed"
    ):
        judged(table, seed="run")


@pytest.mark.parametrize("factor", [1e200, 1e-200])
def test_sizes_that_cannot_be_squared_are_refused_in_one_line(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"no size that can be judged .* \(and 5 more such rows\)"):
        judged(rows([v * factor for v in BASE], [v * factor for v in NEW]))
    for possible in (1e45, 1e-45):
        table = rows([v * possible for v in BASE], [v * possible for v in NEW])
        assert judged(table, smallest_effect=0.05 * possible).contrasts[0].word == "better"


# Order.


def test_looks_take_seeds_by_number_not_by_place() -> None:
    table = rows(base=(2.15, 2.16, 2.14, 2.15), new=(2.2, 2.21, 2.19, 1.0))
    by_value = sorted(table, key=lambda row: row["value"])
    assert str(judged(by_value, looks=(3,))) == str(judged(table, looks=(3,)))
    assert judged(by_value, looks=(3,)).contrasts[0].mean_arm == pytest.approx(2.2)


def test_looks_over_seeds_without_an_order_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="looks: which seeds came first is not known: seed 'a0' of arm 'base'"
    ) as error:
        judged([row | {"seed": f"a{row['seed']}"} for row in rows()], looks=(3,))
    assert error.value.hint and error.value.hint.startswith("number the seeds")
    assert judged([row | {"seed": f"a{row['seed']}"} for row in rows()]).contrasts[0].word == "better"
