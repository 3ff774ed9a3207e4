"""The command that judges tables: its options reach the judgement, and what cannot mean anything is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = {"a": [2.1, 2.12, 2.11, 2.1, 2.13], "b": [2.0, 2.01, 2.02, 2.0, 2.01], "c": [2.1, 2.11, 2.13, 2.12, 2.1]}
    rows = ["arm,seed,value", *(f"{arm},{i},{v}" for arm, own in values.items() for i, v in enumerate(own))]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


def verdicts(gpt2lab: Call, *words: str) -> dict[str, Any]:
    answer = gpt2lab("compare", "table.csv", "-b", "a", "-x", "0.05", "--json", *words)
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def test_looks_share_the_error_rate_and_settle_arms(table: Path, gpt2lab: Call) -> None:
    [b, c] = verdicts(gpt2lab, "--looks", "3,5")["contrasts"]
    assert b["look"] == 3 and b["word"].startswith("better") and b["alpha"] < 0.05
    assert {c["look"]} <= {3, 5}
    assert verdicts(gpt2lab)["contrasts"][0]["look"] is None


def test_named_contrasts_take_the_place_of_the_baselines(table: Path, gpt2lab: Call) -> None:
    found = verdicts(gpt2lab, "--contrast", "b,c", "--contrast", "c,a")["contrasts"]
    assert [(c["arm"], c["against"]) for c in found] == [("b", "c"), ("c", "a")]


def test_a_unigram_floor_counts_failures(table: Path, gpt2lab: Call) -> None:
    words = {c["arm"]: c["word"] for c in verdicts(gpt2lab, "--unigram", "2.1")["contrasts"]}
    assert all(word.startswith("unstable") for word in words.values())


WRONG = {
    "looks": (("--looks", "3;5"), 2, "no list of numbers such as 3,5,8"),
    "falling looks": (("--looks", "5,3"), 2, "looks"),
    "one arm": (("--contrast", "b"), 2, "is not two arms"),
    "an unknown arm": (("--contrast", "b,d"), 2, "--contrast: unknown arm 'd'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_mean_nothing(case: str, table: Path, gpt2lab: Call) -> None:
    words, code, said = WRONG[case]
    answer = gpt2lab("compare", "table.csv", "-b", "a", "-x", "0.05", *words)
    assert answer.code == code and said in answer.err, answer.err


def test_an_experiment_that_is_not_there(table: Path, gpt2lab: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    answer = gpt2lab("compare", "mlflow:posenc", "-b", "a", "-x", "0.05")
    assert answer.code == 2 and "there is no such MLflow database" in answer.err
