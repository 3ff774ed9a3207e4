"""Studies and their earlier declarations."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from rich.console import Console

from gpt2lab.analysis.results import load_results
from gpt2lab.basics import shipped
from gpt2lab.basics.progress import PlainLines, Progress, RunProgress, drawn
from gpt2lab.config import load_config
from gpt2lab.experiments.single import beside_presets
from gpt2lab.store import Store
from gpt2lab.store.listing import Row, selected

Call = Callable[..., Any]


def test_a_study_declared_otherwise_keeps_record_runs_and_page_of_the_first(
    gpt2lab: Call, trained: Callable[..., Any], ablation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = trained()
    page = tmp_path / "reports" / "tiny@preset"
    assert gpt2lab("report", "tiny").code == 0
    before = (page / "index.html").read_bytes()
    plan = json.loads(gpt2lab("run", ablation, "--seeds", "2", "--dry-run", "--json").out)
    assert plan["replaces"] == "tiny@preset#1" and plan["new_hypotheses"] == []
    other = gpt2lab("run", ablation, "--set", "optim.lr=2e-2", "--dry-run").out
    assert "1 contrast counts as a new hypothesis of this store (2); the same declaration again does not" in other
    again = gpt2lab("run", ablation, "--dry-run")
    assert again.code == 0 and "declared otherwise" not in again.out
    monkeypatch.setattr("gpt2lab.cli.plan.MOST_JUDGED", 1)
    many = gpt2lab("run", ablation, "--dry-run").out
    many = " ".join(many.split())
    assert "2 runs of this study so far; for open contrasts see: gpt2lab report" in many
    answer = gpt2lab("run", ablation, "--no-tracking", "--seeds", "2")
    assert answer.code == 0, answer.err
    assert "stays as tiny@preset#1; --name NAME" in " ".join(answer.out.split())
    assert "earlier declarations: tiny@preset#1" in answer.out
    assert (tmp_path / "reports" / "tiny@preset~1" / "index.html").read_bytes() == before
    assert (page / "index.html").read_bytes() != before
    older = gpt2lab("report", "tiny@preset#1")
    assert older.code == 0 and "reports/tiny@preset~1/index.html" in older.out
    csv = (tmp_path / "reports" / "tiny@preset~1" / "results.csv").read_text()
    assert all(run in csv for arm in runs.values() for run in arm.values()) and csv.count("\n") == 3
    rows = json.loads(gpt2lab("studies", "--json").out)["studies"]
    assert [(row["name"], row["runs"], row["finished"]) for row in rows] == [
        ("tiny@preset#1", 2, 2), ("tiny@preset", 4, 4),
    ]  # fmt: skip
    assert [row["page"] for row in rows] == ["reports/tiny@preset~1/index.html", "reports/tiny@preset/index.html"]
    store = Store(tmp_path / "runs")
    store.write_study(store.study("tiny").with_(hash="6f" * 8, seeds=[0, 1, 2]))
    rows = json.loads(gpt2lab("studies", "--json").out)["studies"]
    assert [(row["name"], row["page"]) for row in rows[1:]] == [
        ("tiny@preset#2", "reports/tiny@preset/index.html"), ("tiny@preset", None),
    ]  # fmt: skip
    assert gpt2lab("report", "--all").code == 0
    assert "tiny@preset/index.html" not in (tmp_path / "reports" / "index.html").read_text()
    listed = gpt2lab("studies")
    assert "tiny@preset#1" in listed.out and "1 study, 0 sweeps in runs" in listed.out
    other = gpt2lab("report", "tiny#7")
    assert other.code == 2 and "unknown earlier study 'tiny@preset#7'" in other.err and "gpt2lab studies" in other.err


def test_a_plan_tells_arms_apart_from_what_they_are_compared_with(gpt2lab: Call, ablation: Path) -> None:
    parts = "{rotary: {model.position: rotary}, norm: {model.norm: rmsnorm}, mlp: {model.mlp: relu2}}"
    text = ablation.read_text().partition("baseline:")[0] + "seeds: 1\n"
    for design, said in (
        ("cumulative", ("start baseline", "rotary model.position = rotary", "rotary, and model.norm = rmsnorm",
                        "norm, and model.mlp = relu2")),
        ("leave_one_out", ("all model.position = rotary,", "without rotary without model.position = rotary",
                           "without mlp without model.mlp = relu2")),
    ):  # fmt: skip
        ablation.write_text(f"{text}{design}: {parts}\n")
        shown = " ".join(gpt2lab("run", ablation, "--dry-run", "--untuned").out.split())
        assert all(words in shown for words in said) and "has no `tune`, so --untuned has no effect" in shown
        arms = json.loads(gpt2lab("run", ablation, "--dry-run", "--json").out)["arms"]
        assert max(len(arm["changes"]) for arm in arms) == 3


def test_a_variant_with_a_name_of_its_own_replaces_nothing(
    gpt2lab: Call, trained: Callable[..., Any], ablation: Path, tmp_path: Path
) -> None:
    trained()
    answer = gpt2lab("run", ablation, "--no-tracking", "--seeds", "2", "--name", "twice")
    assert answer.code == 0 and "declared otherwise" not in answer.out
    names = [row["name"] for row in json.loads(gpt2lab("studies", "--json").out)["studies"]]
    assert names == ["tiny@preset", "twice@preset"]
    assert (tmp_path / "reports" / "twice@preset" / "index.html").is_file()
    record = json.loads((tmp_path / "runs" / "studies" / "twice@preset.json").read_text())
    assert "--name twice" in record["reproduce"]
    assert "--name: a name of letters" in gpt2lab("run", ablation, "--name", "a/b", "--dry-run").err


def test_a_training_of_weeks_stops_without_a_terminal_to_ask(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    """As `run FILE` without --scale may be one of GPT-2 124M."""
    long = ("--set", "training.steps=100000000000")
    for words in (("run", ablation), ("train", tmp_path / "preset.yaml")):
        answer = gpt2lab(*words, *long, "--no-tracking")
        assert answer.code == 3 and "days here, more than 7 days" in answer.err, answer.err
        assert "try: a smaller --scale" in answer.err and "--max-days" in answer.err
    assert not list((tmp_path / "runs").glob("?" * 16))
    plan = gpt2lab("run", ablation, *long, "--dry-run")
    assert plan.code == 0 and plan.out.startswith("2 runs, 0 finished; about ")


def ids(answer: Any) -> list[str]:
    assert answer.code == 0, answer.err
    return [row["id"] for row in json.loads(answer.out)["runs"]]


def test_a_loss_that_is_no_number_is_on_neither_side(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": name, "val_loss": loss} for name, loss in (("a", 1.5), ("b", 2.5), ("c", math.nan))]
    found = {sign: [row["id"] for row in selected(rows, f"val{sign}2", Store(tmp_path))] for sign in ("<", ">", ">=")}
    assert found == {"<": ["a"], ">": ["b"], ">=": ["b"]}


def test_runs_are_filtered_sorted_limited_and_printed_as_csv(gpt2lab: Call, store: Path) -> None:
    everything = json.loads(gpt2lab("runs", "--json").out)["runs"]
    by_arm = {arm: [row for row in everything if row["arm"] == arm] for arm in ("learned", "rotary", "none")}
    rotary = sorted(by_arm["rotary"], key=lambda row: -row["val_loss"])
    found = ids(gpt2lab("runs", "--where", "arm=rotary and val<9", "--sort", "-val", "--limit", "2", "--json"))
    assert "2 of 9 runs, 1 study" in gpt2lab("runs", "--limit", "2").out
    assert found == [row["id"] for row in rotary[:2]]
    assert set(ids(gpt2lab("runs", "--where", "position != rotary and study=posenc", "--json"))) == {
        row["id"] for row in everything if row["arm"] != "rotary"
    }
    assert ids(gpt2lab("runs", "--where", "seed>=2 and arm~LEARN", "--json")) == [
        row["id"] for row in by_arm["learned"] if row["seed"] == "2"
    ]
    rows = list(csv.DictReader(io.StringIO(gpt2lab("runs", "--csv", "--sort", "val").out)))
    assert [row["id"] for row in rows] == [row["id"] for row in sorted(everything, key=lambda row: row["val_loss"])]
    assert rows[0]["arm"] == "rotary" and json.loads(rows[0]["changes"]) == {"model.position": "rotary"}
    for words, said in (
        (("--where", "arms=x"), "did you mean 'arm'?"), (("--where", "arm"), "is not KEY=VALUE"),
        (("--where", "arm=rotary or arm=none"), "joined by 'and' only"),
        (("--sort", "vall"), "did you mean 'val'?"),
    ):  # fmt: skip
        answer = gpt2lab("runs", *words)
        assert answer.code == 2 and said in answer.err


@pytest.mark.parametrize(
    "repeats",
    [
        "gpt2lab run a.yaml --set optim.lr=0.01 --scale nano",
        "gpt2lab.run_ablation({...}, scale='nano', overrides=('optim.lr=0.01',))",
    ],
)
def test_settings_of_a_command_and_of_python_are_among_the_changes(repeats: str, gpt2lab: Call, store: Path) -> None:
    record = Store(store).study("posenc")
    Store(store).write_study(record.with_(reproduce=repeats))
    run = record.arms["rotary"].runs["0"]
    [row] = [row for row in json.loads(gpt2lab("runs", "--json").out)["runs"] if row["id"] == run]
    assert row["changes"] == {"optim.lr": "0.01", "model.position": "rotary"}
    assert "changes   optim.lr=0.01, model.position=rotary\n" in gpt2lab("show", run).out


def test_a_config_made_in_python_is_told_by_the_nearest_preset() -> None:
    config = load_config("nano", ["model.position=rotary", "model.scores.qk_norm=true"])
    assert beside_presets(config.model_copy(update={"seed": 3})) == {
        "preset": "nano", "model.position": "rotary", "model.scores": {"name": "plain", "qk_norm": True},
    }  # fmt: skip


def test_tags_and_notes_find_a_run_again(gpt2lab: Call, store: Path) -> None:
    run = Store(store).runs()[0].id
    assert gpt2lab("tag", run[:6], "keep", "odd").out == f"{run}: #keep #odd\n"
    assert gpt2lab("tag", run[:6], "--", "-odd").out == f"{run}: #keep\n"
    assert gpt2lab("note", run, "the bump at step 60").code == 0
    assert ids(gpt2lab("runs", "--where", "tags=keep", "--json")) == [run]
    assert gpt2lab("note", run).out == f"{run}: the bump at step 60\n"
    assert "\ntags      #keep\nnote      the bump at step 60\n" in gpt2lab("show", run).out


def test_two_runs_are_compared_by_settings_and_curve(gpt2lab: Call, store: Path) -> None:
    one, two = Store(store).runs()[:2]
    one.write_config("model: {position: learned, n_layer: 4}\n")
    two.write_config("model: {position: rotary, n_layer: 4}\n")
    found = json.loads(gpt2lab("diff", one.id, two.id, "--json").out)
    assert found["settings"] == [{"key": "model.position", "a": "learned", "b": "rotary"}]
    assert len(found["curve"]) > 10 and found["curve"][0]["step"] == 0
    shown = gpt2lab("diff", one.id, two.id)
    assert shown.code == 0 and "model.position" in shown.out and "second - first" in shown.out


def test_clean_deletes_what_was_named_after_asking(gpt2lab: Call, store: Path, tmp_path: Path) -> None:
    kept, orphan = Store(store).runs()[0], Store(store).run("0" * 16)
    orphan.write_config("seed: 0\n")
    kept.checkpoints.mkdir()
    (kept.checkpoints / "weights").write_bytes(b"1" * 2048)
    assert "--orphans, --where or --older" in gpt2lab("clean").err
    planned = gpt2lab("clean", "--orphans", "--dry-run")
    assert "0" * 16 in planned.out and "would delete 1 run, " in planned.out and orphan.path.is_dir()
    refused = gpt2lab("clean", "--orphans")  # without a terminal
    assert refused.code == 3 and "--yes" in refused.err and orphan.path.is_dir()
    assert gpt2lab("clean", "--orphans", "--yes").code == 0 and not orphan.path.exists()
    only = gpt2lab("clean", "--where", f"id={kept.id}", "--checkpoints", "-y")
    assert only.code == 0 and "the checkpoints of 1 run, 2.0 KiB" in only.out
    assert not kept.checkpoints.exists() and kept.status() == "finished"
    assert gpt2lab("clean", "--older", "1000d").out == "nothing to delete\n"
    wrong = gpt2lab("clean", "--older", "long")
    assert wrong.code == 2 and "'--older'" in wrong.err and kept.path.is_dir()
    working = Store(store).run("1" * 16)
    with working.lock():
        assert gpt2lab("clean", "--orphans", "-y").out == "nothing to delete\n"
        assert "1" * 16 in gpt2lab("status").out
        [row] = json.loads(gpt2lab("status", "--json").out)["running"]
    assert row["holder"]["pid"] == os.getpid() and gpt2lab("status").out == "no run is training in runs\n"


def test_curves_are_written_as_csv(gpt2lab: Call, store: Path, tmp_path: Path) -> None:
    answer = gpt2lab("curves", "posenc", "curves.csv")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "curves.csv").read_text())))
    assert {row["arm"] for row in rows} == {"learned", "rotary", "none"} and "val/loss" in {r["metric"] for r in rows}
    assert "a file .csv or .parquet is expected" in gpt2lab("curves", "posenc", "curves.xls").err


def test_curves_are_read_by_tensorboard(gpt2lab: Call, store: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # the second time in place of the first
        answer = gpt2lab("curves", "posenc", "board")
        assert answer.code == 0 and answer.out.startswith("board: "), answer.err
    frame = load_results("posenc", store)
    frame = frame[~frame["metric"].str.startswith("final/")]
    places = sorted(path.relative_to(tmp_path / "board").parts for path in (tmp_path / "board").glob("*/*"))
    assert places == sorted({(row.arm, f"seed {row.seed}") for row in frame.itertuples()})
    for (arm, seed), rows in frame.groupby(["arm", "seed"]):
        read = accumulator.EventAccumulator(str(tmp_path / "board" / arm / f"seed {seed}"), {"scalars": 0}).Reload()
        found = [(event.step, tag, event.value) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)]
        expected = [(row.step, row.metric, row.value) for row in rows.itertuples()]
        assert [f[:2] for f in sorted(found)] == [e[:2] for e in sorted(expected)]
        assert [f[2] for f in sorted(found)] == pytest.approx([e[2] for e in sorted(expected)], rel=1e-6)


def test_without_tensorboard_it_says_what_to_install(
    gpt2lab: Call, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    answer = gpt2lab("curves", "posenc", "board")
    assert answer.code == 3 and "pip install 'gpt2lab[tensorboard]'" in answer.err


def test_the_version_is_printed(gpt2lab: Call) -> None:
    assert gpt2lab("--version").out.startswith("gpt2lab 0.")


def test_shipped_ablations_and_sweeps_are_run_by_name_from_any_folder(gpt2lab: Call, tmp_path: Path) -> None:
    answer = gpt2lab("check", "posenc", "ablations/tied_head.yaml", "lr", "--scale", "nano")
    assert answer.code == 0, answer.err
    assert (
        answer.out.startswith("posenc: 6 arms (learned, rotary") and "\nlr: 1 search of 24 trials at nano" in answer.out
    )
    assert "did you mean 'posenc'?" in gpt2lab("check", "posnec").err
    (tmp_path / "posenc").write_text("ablation: mine\n")  # a file of the user's comes first
    assert "question" in gpt2lab("check", "posenc").err


def test_installed_they_are_found_by_the_list_of_installed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed(PurePosixPath):
        def locate(self) -> Path:
            return tmp_path / self

    (tmp_path / "share" / "gpt2lab" / "ablations").mkdir(parents=True)
    file = tmp_path / "share" / "gpt2lab" / "ablations" / "mine.yaml"
    file.write_text("ablation: mine\n")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "site-packages" / "gpt2lab" / "basics" / "shipped.py"))
    listed = [Installed("gpt2lab/cli.py"), Installed("share/gpt2lab/ablations/mine.yaml")]
    monkeypatch.setattr(shipped, "files", lambda name: listed)
    shipped.shipped_folder.cache_clear()
    try:
        assert shipped.found("mine") == shipped.found("ablations/mine.yaml") == file
        assert shipped.shipped_names() == ["mine"]
        assert shipped.found("../mine") == Path("../mine") and shipped.found("other") == Path("other")
    finally:
        shipped.shipped_folder.cache_clear()


@pytest.mark.usefixtures("no_plugins_after")
def test_a_project_file_has_options_that_need_not_be_typed(
    gpt2lab: Call, ablation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "parts.py").write_text(
        "from gpt2lab.components.norm import LayerNorm, norm\n"
        "@norm.register('mine', source='here')\nclass Mine(LayerNorm):\n    'My norm.'\n"
    )
    (tmp_path / "gpt2lab.toml").write_text("plugins = ['parts.py']\nscale = 'nano'\nruns = 'elsewhere'\n")
    inside = tmp_path / "work"
    inside.mkdir()
    monkeypatch.chdir(inside)
    answer = gpt2lab("check", "tied_head")
    assert answer.code == 0 and "at nano: no mistakes" in answer.out
    assert "at micro" in gpt2lab("check", "tied_head", "--scale", "micro").out
    assert str(tmp_path / "elsewhere") in gpt2lab("runs").err
    for text, said in (
        ("scal = 'x'", "did you mean 'scale'?"),
        ("jobs = 'two'", "another type"),
        ("=", "cannot be read"),
    ):
        (tmp_path / "gpt2lab.toml").write_text(text)
        answer = gpt2lab("check", "tied_head")
        assert answer.code == 2 and said in answer.err and "gpt2lab.toml" in answer.err


def test_names_that_others_use_are_answered_with_ours(gpt2lab: Call, ablation: Path) -> None:
    answer = gpt2lab(
        "check", ablation, "--set", "learning_rate=1", "--set", "model.position=rope", "--set", "d_model=8"
    )
    for name in ("optim.lr", "rotary", "model.n_embd"):
        assert f"did you mean '{name}'?" in answer.err
    assert gpt2lab("check", ablation, "--arms", "rotary").err.endswith("try: --arms learned,rotary\n")


def test_two_seeds_are_called_few_and_memory_has_a_size(gpt2lab: Call, ablation: Path) -> None:
    answer = gpt2lab("run", ablation, "--seeds", "2", "--dry-run")
    assert (
        "2 seeds per arm: verdicts are likely better or likely worse at most" in answer.out
        and "0.0 GiB" not in answer.out
    )
    assert "likely better" not in gpt2lab("run", ablation, "--seeds", "3", "--dry-run").out


def test_a_log_has_a_line_when_a_run_starts_or_ends_and_summaries_ever_further_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def logged(count: int) -> list[str]:
        nonlocal now
        console = Console(file=io.StringIO(), width=140)
        runs = [RunProgress("rotary", str(seed), str(seed), 800) for seed in range(count)]
        with PlainLines(console) as listener:
            for run in runs:
                run.status = "running"
                for run.step in range(0, 801, 8):
                    now, run.val_loss = now + 6.0, 2.0 + run.step % 3 if run.step else math.nan
                    listener(Progress("posenc@nano", tuple(runs), 1))
                run.status = "finished"
                listener(Progress("posenc@nano", tuple(runs), 1))
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    lines = logged(6)  # an hour of training
    assert [line.split()[3] for line in lines if line.startswith("rotary")] == ["running", "finished"] * 6
    assert all(("800/800" in line and "val 4.0" in line) or "val" not in line for line in lines if line[0] == "r")
    assert 9 < len(lines) - 12 < 16 and any("rotary seed 1 " in line for line in lines if line[0] != "r")
    assert sum("val" in line for line in logged(1)) > 100


def test_the_live_table_fits_80_by_24_with_its_summary() -> None:
    console = Console(width=80, height=24, force_terminal=True, color_system=None, file=io.StringIO(), record=True)
    runs = [
        RunProgress(f"an_arm_with_a_long_name_{i}", "0", f"{i:016d}", 100_000, "running" if i == 44 else "waiting",
                    12_345, 12_345_000, 900.0, 3.2, 3.3, 123_456.0)
        for i in range(45)
    ]  # fmt: skip
    console.print(drawn(Progress("posenc@nano: " + "Which one is best? " * 9, tuple(runs), 2), 80, 24))
    lines = console.export_text().splitlines()
    assert len(lines) <= 23 and all(len(line) <= 80 for line in lines)
    assert "44 waiting, 1 running" in lines[-1] and sum("running" in line for line in lines) == 2
