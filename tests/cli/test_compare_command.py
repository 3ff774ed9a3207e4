"""`gpt2lab compare`: its options, and runs that MLflow holds."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.analysis import compare
from gpt2lab.analysis.results import final_values
from gpt2lab.store import Store
from gpt2lab.tracking.follower import sync
from gpt2lab.tracking.mlflow import MlflowTracker

Call = Callable[..., Any]
MEANS = {"learned": 2.15, "rotary": 1.89, "none": 2.152, "post": 2.95}
NOISE = (-0.011, 0.003, 0.012, -0.004, 0.007, -0.008, 0.002, 0.005)


def write_table(path: Path, names: str = "arm,seed,value", more: str = "", n: int = 5) -> Path:
    rows = [f"{arm},{seed},{mean + NOISE[seed]:.4f}{more}" for seed in range(n) for arm, mean in MEANS.items()]
    path.write_text("\n".join([names, *rows]) + "\n")
    return path


def verdicts(out: str) -> list[str]:
    """The lines of an answer but for the last, which says how values were read."""
    *lines, last = out.splitlines()
    assert last.startswith("read as: ")
    return lines


@pytest.fixture
def judged(gpt2lab: Call, tmp_path: Path) -> Call:
    """Compare results.csv with the baseline `learned`."""
    write_table(tmp_path / "results.csv")

    def call(*words: str, table: str = "results.csv") -> Any:
        return gpt2lab("compare", table, "-b", "learned", "-x", "0.05", *words)

    return call


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with the study posenc@nano of the made-up store, and a user's own experiment `mine`."""
    from made_up_study import declare  # type: ignore[import-not-found]

    root = tmp_path_factory.mktemp("tracked")
    declare(root / "runs")
    store, uri = Store(root / "runs"), f"sqlite:///{root}/runs/mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's own, at its import
        sync(store, "posenc", lambda: MlflowTracker(uri, "posenc", root / "artifacts"))
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiment = client.create_experiment("mine", artifact_location=(root / "artifacts").as_uri())
        for number, line in enumerate(write_table(root / "results.csv").read_text().splitlines()[1:]):
            arm, seed, value = line.split(",")
            run = client.create_run(experiment, start_time=1_767_000_000_000 + number)
            client.log_param(run.info.run_id, "model", arm)
            client.log_param(run.info.run_id, "dice", seed)
            client.log_metric(run.info.run_id, "loss", float(value))
            client.log_metric(run.info.run_id, "speed", 9.0)
            client.set_terminated(run.info.run_id)
    return root / "runs" / "mlflow.db"


# Tables of files.


def test_contrasts_take_the_place_of_every_arm_against_the_baseline(judged: Call) -> None:
    answer = judged("--contrast", "rotary,none", "--contrast", "post, learned")
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == [
        "rotary against none",
        "post against learned",
        "read as",
    ]
    assert answer.code == 0 and answer.err == ""


def test_names_in_a_table_cannot_control_the_terminal(judged: Call, tmp_path: Path) -> None:
    table = next(tmp_path.glob("*.csv"))
    table.write_text(table.read_text().replace("rotary", "\x1b[2Jrotary"))
    answer = judged()
    assert "[2Jrotary against" in answer.out and "\x1b" not in answer.out


def test_looks_judge_at_their_own_level(judged: Call) -> None:
    answer = judged("--looks", "3,5", "--json")
    contrasts = {c["arm"]: c for c in json.loads(answer.out)["contrasts"]}
    assert contrasts["rotary"]["look"] == 3 and contrasts["rotary"]["word"] == "better"
    assert "look 1 of 2 (n = 3), each at alpha 0.0" in str(contrasts["rotary"])
    assert json.loads(judged("--json").out)["contrasts"][0]["look"] is None


def test_alpha_changes_the_level(judged: Call) -> None:
    narrow, wide = (json.loads(judged("--alpha", a, "--json").out) for a in ("0.2", "0.001"))
    assert (narrow["alpha"], wide["alpha"]) == (0.2, 0.001)
    assert narrow["contrasts"][1]["high"] < wide["contrasts"][1]["high"]


def test_runs_that_learned_nothing_failed(judged: Call) -> None:
    assert "unstable (5 of 5 failed" in judged("--unigram", "2.97").out.splitlines()[2]
    assert "unstable" not in judged("--unigram", "3.3").out


def test_an_arm_that_the_table_bars_is_shown_only_when_forced(judged: Call, tmp_path: Path) -> None:
    text = write_table(tmp_path / "barred.csv", "arm,seed,value,not_comparable", ",").read_text()
    (tmp_path / "barred.csv").write_text(text.replace("rotary,0,1.8790,", "rotary,0,1.8790,other tokenizer"))
    assert "other tokenizer" in (tmp_path / "barred.csv").read_text()
    line, other, *_ = judged(table="barred.csv").out.splitlines()
    assert line == "rotary against learned: not comparable: other tokenizer" and "no difference" in other
    forced = judged("--force-exploratory", table="barred.csv").out.splitlines()[0]
    assert forced.startswith("rotary against learned: exploratory") and "-0.26" in forced


def test_columns_may_have_other_names(judged: Call, tmp_path: Path) -> None:
    write_table(tmp_path / "other.csv", "model,dice,nll")
    said = judged("--arm", "model", "--seed", "dice", "--metric", "nll", table="other.csv")
    assert said.code == 0 and verdicts(said.out) == verdicts(judged().out)
    assert said.out.endswith("read as: nll, lower is better, unit nats\n")
    wrong = judged("--arm", "modl", "--seed", "dice", "--metric", "nll", table="other.csv")
    assert wrong.code == 2 and "unknown column 'modl'; did you mean 'model'? (known: dice, model, nll)" in wrong.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--looks", "3,five"], r"invalid value for '--looks'.*no list of numbers such as 3,5,8"),
        (["--looks", ""], r"invalid value for '--looks'"),
        (["--looks", "5,3"], r"looks: rising numbers of seeds are expected, from 3 on, not \(5, 3\)"),
        (["--contrast", "rotary"], r"invalid value for '--contrast'.*not two arms such as rotary,learned"),
        (["--contrast", "none,none"], r"invalid value for '--contrast'"),
        (["--contrast", "rotry,none"], r"--contrast: unknown arm 'rotry'; did you mean 'rotary'"),
        (["--contrast", "rotary,none", "--contrast", "none,rotary"], r"contrasts: none and rotary are compared twice"),
        (["--alpha", "0.7"], r"alpha: a level between 0 and 0.5 is expected, not 0.7"),
        (["--metric", "los"], r"unknown column 'los'"),
    ],
)
def test_options_that_mean_nothing_are_refused(judged: Call, words: list[str], said: str) -> None:
    answer = judged(*words)
    assert answer.code == 2 and answer.out == "" and len(answer.err.splitlines()) == 2
    assert re.search(said, answer.err), answer.err


def test_the_direction_is_known_by_name_or_told(judged: Call, tmp_path: Path) -> None:
    text = write_table(tmp_path / "named.csv", "arm,seed,accuracy").read_text()
    known = judged(table="named.csv").out
    assert known.startswith("rotary against learned: worse, -0.260 accuracy")
    assert known.endswith("read as: accuracy, higher is better, unit accuracy\n")
    (tmp_path / "named.csv").write_text(text.replace("accuracy", "quality"))
    unknown = judged("--metric", "quality", table="named.csv")
    assert unknown.code == 2 and unknown.err.splitlines() == [
        "gpt2lab: error [CONFIG] whether a higher or a lower 'quality' is better is not known",
        "try: --higher-is-better or --lower-is-better",
    ]
    told = judged("--metric", "quality", "--higher-is-better", "--unit", "points", table="named.csv").out
    assert told.startswith("rotary against learned: worse, -0.260 points") and "higher is better" in told
    assert "better, -0.260 quality" in judged("--metric", "quality", "--lower-is-better", table="named.csv").out
    record = json.loads(judged("--metric", "quality", "--higher-is-better", "--json", table="named.csv").out)
    assert (record["metric"], record["higher_is_better"], record["unit"]) == ("quality", True, "quality")


# MLflow.


def test_a_study_in_mlflow_says_what_its_runs_say(gpt2lab: Call, database: Path) -> None:
    study = ("-b", "learned", "-x", "0.05", "--unigram", "3.33", "--runs", str(database.parent))
    results = final_values(Store(database.parent).study("posenc"), Store(database.parent))
    expected = str(compare(results, baseline="learned", smallest_effect=0.05, unigram=3.33))
    assert "rotary against learned: better" in expected
    for name in ("mlflow:posenc", "mlflow:posenc@nano"):
        answer = gpt2lab("compare", name, *study)
        assert (answer.code, answer.err) == (0, "")
        assert sorted(verdicts(answer.out)) == sorted(expected.splitlines())
    bits = gpt2lab("compare", "mlflow:posenc", *study[:4], *study[6:], "--metric", "val-final/bits_per_byte")
    assert "lower is better, unit bits per byte\n" in bits.out and "nats" not in bits.out


def test_a_users_experiment_says_what_its_table_says(judged: Call, database: Path) -> None:
    where = ("--tracking-uri", f"sqlite:///{database}")
    named = ("--arm", "model", "--seed", "params.dice", "--metric", "loss")
    for words in ((), ("--looks", "3,5"), ("--contrast", "none,post", "--json")):
        in_mlflow = judged(*where, *named, *words, table="mlflow:mine")
        expected = judged(*words).out.replace('"metric": null', '"metric": "loss"').replace("as: value", "as: loss")
        assert (in_mlflow.code, in_mlflow.err, in_mlflow.out) == (0, "", expected)
    unasked = judged(*where, "--arm", "model", table="mlflow:mine")
    assert unasked.code == 2 and "which metric? The table holds loss, speed" in unasked.err
    assert unasked.err.endswith("try: --metric NAME\n")


def test_the_address_of_mlflow_may_come_from_the_environment(
    judged: Call, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    named = ("--arm", "model", "--seed", "params.dice", "--metric", "loss")
    assert verdicts(judged(*named, table="mlflow:mine").out) == verdicts(judged().out)


def test_what_is_not_in_mlflow_is_one_line(judged: Call, database: Path) -> None:
    where = ("--tracking-uri", f"sqlite:///{database}")
    unknown = judged(*where, table="mlflow:posnc")
    assert unknown.code == 2 and len(unknown.err.splitlines()) == 2
    assert "unknown MLflow experiment 'posnc'; did you mean 'posenc'? (known: Default, mine, posenc)" in unknown.err
    no_arm = judged(*where, table="mlflow:mine")
    assert no_arm.code == 2 and "(columns: metrics.loss, metrics.speed, params.dice, params.model, " in no_arm.err
    assert no_arm.err.endswith("try: --arm COLUMN\n")
    nothing = judged(table="mlflow:posenc")
    assert nothing.code == 2 and "runs/mlflow.db: there is no such MLflow database" in nothing.err
    dead = judged("--tracking-uri", "http://127.0.0.1:9", table="mlflow:posenc")
    assert dead.code == 3 and "[ENVIRONMENT] http://127.0.0.1:9: MLflow cannot be read: no server listens" in dead.err
