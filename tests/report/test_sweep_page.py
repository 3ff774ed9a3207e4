"""The page of a sweep: what it says first, what it holds, that nothing in it can run, and that any record gives one."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import made_up_sweep
import pytest
from made_up_study import declare
from made_up_sweep import (
    LR,
    NORM,
    hopeless,
    keep,
    ladder,
    run_id,
    search,
    sweep,
    trial,
    variants,
    wide,
)
from page_reader import HOSTILE, Reader, assert_harmless, assert_same_files, assert_shown_as_text, assert_twin, part_of
from rich.console import Console

from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.reports.index import write_index
from gpt2lab.reports.read import SweepRead, read_sweep
from gpt2lab.reports.sweep import terminal_sweep, write_sweep_report


@pytest.fixture(scope="session")
def lr_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a page over one learning rate; to be read only."""
    root = tmp_path_factory.mktemp("lr")
    keep(root / "runs", sweep())
    return write_sweep_report(read_sweep("lr", root / "runs"), root / "reports").parent


def report(root: Path, record: dict[str, Any]) -> tuple[Path, str, str, Reader]:
    """-> (folder, HTML, Markdown, the HTML read)"""
    keep(root / "runs", record)
    index = write_sweep_report(read_sweep(record["name"], root / "runs"), root / "reports")
    source = index.read_text()
    return index.parent, source, (index.parent / "report.md").read_text(), Reader(source)


def said(record: dict[str, Any], label: str = "lr") -> str:
    """How the analysis begins to tell of a search; that it finds what is there, its own tests hold."""
    told = str(made_up_sweep.read(record).searches[label].optima["optim.lr"])
    assert told.startswith("Best learning rate")
    return told.partition(";")[0]


def test_the_page_opens_with_the_answer_and_goes_on_in_order(lr_page: Path) -> None:
    source = (lr_page / "index.html").read_text()
    shown = Reader(source).text
    parts = [
        "Which learning rate reaches the lowest", "early training: sign only", said(sweep()),
        "one loses less than 0.05 nats", "24 trials, 1 seed each: 11 finished, 11 pruned, 2 diverged.",
        "at 842 k parameters", "is a biased estimate of what its settings reach",
        "Best settings", "inside", "Figures", "Loss against optim.lr",
        "The winning config", "extends: nano optim.lr: 0.004899", "Trials", run_id("lr", 2),
        "nan loss", "optuna-dashboard sqlite:////data/runs/sweeps/optuna.db", "How it was done",
        "gpt2lab sweep sweeps/lr.yaml --scale nano", "tpe",
    ]  # fmt: skip
    places, start = [], 0
    for part in parts:
        start = shown.index(part, start)
        places.append(start)
    assert_harmless(source)
    for unwanted in (r"\bNaN\b", r"\bnan\b(?! loss)", r"\bNone\b", "incomplete"):
        assert not re.search(unwanted, shown), unwanted


def test_the_twin_says_what_the_page_says(lr_page: Path) -> None:
    assert assert_twin(lr_page) == ["against-0"]


@pytest.mark.slow
def test_writing_twice_gives_equal_files(lr_page: Path, tmp_path: Path) -> None:
    assert_same_files(write_sweep_report(read_sweep("lr", lr_page.parents[1] / "runs"), tmp_path).parent, lr_page)


def test_the_numbers_beside_the_page(lr_page: Path) -> None:
    with (lr_page / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = json.loads((lr_page / "sweep.json").read_text())
    assert len(rows) == 24
    finished = [row for row in rows if row["outcome"] == "finished"]
    best = min(finished, key=lambda row: float(row["value"]))
    concluded = record["searches"]["lr"]
    assert (best["slot"], float(best["optim.lr"])) == ("2", concluded["best"]["settings"]["optim.lr"])
    assert concluded["outcomes"] == {"finished": 11, "pruned": 11, "diverged": 2}
    low, high = concluded["optima"]["optim.lr"]["interval"]
    assert low < concluded["optima"]["optim.lr"]["vertex"] < high
    assert low < 0.006 < high  # where the losses were made to be lowest
    assert record["record"]["name"] == "lr@nano"
    assert record["answer"][0].startswith(said(sweep()))


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    bad = HOSTILE[0]
    space = (LR | {"name": bad}, NORM | {"name": HOSTILE[1], "choices": HOSTILE})
    trials = [
        trial(i, {bad: 0.001 * (i + 1), HOSTILE[1]: HOSTILE[i % 4]}, 2.0 + 0.1 * i, outcome=outcome)
        for i, outcome in enumerate(["finished", "finished", "pruned", "diverged", "failed", "finished"])
    ]
    trials[4]["reason"] = trials[3]["reason"] = f"{bad}\x1b[31m | x"
    one = search(space=space, trials=1, changes={HOSTILE[2]: bad}) | {"trials": trials, "slots": 6}
    one["importance"] = {"method": bad, "values": {bad: 0.7, HOSTILE[1]: 0.3}}
    searches = {HOSTILE[0]: one, HOSTILE[3]: search(space=(NORM,), trials=1)}
    record = sweep(searches, question=f"{bad} | good?\x1b", caveat=bad, reproduce=f"{bad} 'x")
    assert_shown_as_text(report(tmp_path, record)[0])


def test_all_diverged_says_so_first_and_what_to_try(tmp_path: Path) -> None:
    folder, source, twin, read = report(tmp_path, hopeless())
    first = read.text.index("No answer. None of 8 trials has a final value.")
    assert first < read.text.index("No trial finished") < read.text.index("Best settings")
    assert "8 diverged. Even the lowest optim.lr that was tried, 1.03, diverged" in read.text
    assert "optim.lr: {low: 0.01, high: 1, log: true}" in read.text
    assert not list(folder.glob("best*.yaml"))
    assert "The winning config" not in read.text
    assert "no estimate" not in twin
    assert (folder / "figures/against-0.svg").exists()
    assert_harmless(source)


@pytest.mark.parametrize("outcome", ["pruned", "failed", "waiting", "running"])
@pytest.mark.usefixtures("no_figures")
def test_nothing_finished_in_other_ways(tmp_path: Path, outcome: str) -> None:
    trials = [trial(i, {"optim.lr": 0.001 * (i + 1)}, 2.5, outcome=outcome, until=88) for i in range(3)]
    record = sweep({"lr": search(trials=3) | {"trials": trials}})
    _, source, _, read = report(tmp_path, record)
    assert f"3 {outcome}" in read.text
    assert "No answer." in read.text
    assert ("out of memory" in read.text) == (outcome == "failed")
    assert ("3 of 3 trials are open" in read.text) == (outcome in ("waiting", "running"))
    assert_harmless(source)


@pytest.mark.usefixtures("no_figures")
def test_an_unfinished_sweep_says_how_many_trials_are_open(tmp_path: Path) -> None:
    one = search()
    one["trials"] = one["trials"][:10]
    record = sweep({"lr": one}, stopped="the time budget of 60 s was used up")
    _, _, _, read = report(tmp_path, record)
    assert "14 of 24 trials are open; the same command continues them." in read.text
    assert "the time budget of 60 s was used up." in read.text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("seeds", "near"), [([100], 3), ([100, 101, 102, 103], 2)])
def test_how_many_trials_cannot_be_told_from_the_best(tmp_path: Path, seeds: list[int], near: int) -> None:
    # two standard errors of a difference: 2 * sqrt(2 / n) * 0.01 = 0.0283 for one seed, 0.0141 for four
    values = [2.0, 2.01, 2.0141, 2.028, 2.0285, 2.2]
    trials = [trial(i, {"optim.lr": 0.002 * (i + 1)}, value) for i, value in enumerate(values)]
    noise = {"sd": 0.01, "low": 0.005, "high": 0.02, "df": 4, "runs": 5, "scale": "nano", "created": "2026-11-22"}
    one = search(trials=6) | {"trials": trials, "seeds": seeds}
    _, _, _, read = report(tmp_path, sweep({"lr": one}, noise=noise))
    assert f"{near} other trials lie within noise of the best" in read.text


@pytest.mark.usefixtures("no_figures")
def test_several_settings_have_best_values_edges_and_importance(tmp_path: Path) -> None:
    folder, _, _, read = report(tmp_path, wide())
    assert "The best of 17 finished trials reached val/loss 2.0144 with optim.lr 0.00807" in read.text
    assert "optim.lr explains most of the variation between trials (71 %)" in read.text
    assert "No best value lies at an edge" in read.text
    assert (folder / "best.yaml").exists()


@pytest.mark.usefixtures("no_figures")
def test_an_edge_is_said_with_what_to_widen(tmp_path: Path) -> None:
    narrow = LR | {"low": 2e-4, "high": 0.004}
    _, _, _, read = report(tmp_path, sweep({"lr": search(space=(narrow,), trials=12, prune=False)}))
    assert re.search(r"The optimum lies at the upper edge \(0\.0\d+\): widen to 0\.01", read.text)
    assert "at the high edge" in read.text
    two = search("two", space=(narrow, NORM), trials=30, prune=False)
    _, _, _, read = report(tmp_path, sweep({"two": two}, name="two@nano"))
    assert re.search(r"optim\.lr is best at the high edge of the space: widen it to 0\.0002 to 0\.01", read.text)


@pytest.mark.usefixtures("no_figures")
def test_searches_beside_each_other(tmp_path: Path) -> None:
    folder, source, _, read = report(tmp_path, variants())
    assert_harmless(source)
    assert f"standard: {said(variants(), 'standard')}" in read.text
    assert f"mup: {said(variants(), 'mup')}" in read.text
    assert "not to call one search better than another" in read.text
    assert sorted(p.name for p in folder.glob("best*")) == ["best-mup.yaml", "best-standard.yaml"]
    assert "search mup" in (folder / "best-mup.yaml").read_text()


def test_the_winning_config_is_that_of_the_record(lr_page: Path, tmp_path: Path) -> None:
    from gpt2lab.config import load_config

    assert load_config(lr_page / "best.yaml") == load_config("nano", ["optim.lr=0.004899"])
    assert "# The best trial of lr@nano (trial" in (lr_page / "best.yaml").read_text()


@pytest.mark.usefixtures("no_figures")
def test_the_same_sweep_at_other_scales(tmp_path: Path) -> None:
    names = ladder(tmp_path / "runs")
    keep(tmp_path / "runs", sweep({"lr": search(optimum=0.05)}, name="lr@tuned", part_of="x@nano"))
    index = write_sweep_report(read_sweep(names[1], tmp_path / "runs"), tmp_path / "reports")
    read = Reader(index.read_text())
    lines = part_of((index.parent / "report.md").read_text(), "Across size").splitlines()
    optima = [float(line.split("|")[3].partition(";")[0]) for line in lines if re.match(r"\| (nano|micro|mini) ", line)]
    assert optima == pytest.approx([0.006, 0.003, 0.0015], rel=0.2)  # as the losses were made
    assert "x@nano" not in read.text


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.usefixtures("no_figures")
def test_one_and_two_trials(tmp_path: Path, kept: int) -> None:
    one = search()
    one["trials"] = one["trials"][:kept]
    _, source, _, read = report(tmp_path, sweep({"lr": one | {"slots": kept}}))
    assert ("Only one trial finished" in read.text) == (kept == 1)
    assert_harmless(source)


def test_unknown_numbers_are_drawn_around(tmp_path: Path) -> None:
    one = search(trials=8, prune=False)
    for entry in one["trials"][::2]:
        entry["curve"] = [[step, tokens, None] for step, tokens, _ in entry["curve"]]
        entry["value"] = None
    one["trials"][1]["settings"] = {}
    one["importance"] = {"method": "fanova", "values": {"optim.lr": None}}
    record = sweep({"lr": one | {"base": {}, "flops_per_token": None}}, floors=None, smallest_effect=0.05)
    assert_harmless(report(tmp_path, record)[1])


@pytest.mark.slow
def test_two_hundred_trials_are_drawn_in_time(tmp_path: Path) -> None:
    record = wide(200)
    keep(tmp_path, record)
    started = time.process_time()
    write_sweep_report(read_sweep(record["name"], tmp_path), tmp_path / "reports")
    assert time.process_time() - started < 5  # 2 s on a processor of 2026


@pytest.mark.usefixtures("no_figures")
def test_higher_may_be_better(tmp_path: Path) -> None:
    trials = [trial(i, {"optim.lr": 0.001 * (i + 1)}, 0.3 - 0.01 * (i - 3) ** 2) for i in range(7)]
    record = sweep({"lr": search(trials=7) | {"trials": trials}}, metric="hellaswag/acc", direction="maximize")
    folder, _, _, read = report(tmp_path, record)
    assert json.loads((folder / "sweep.json").read_text())["searches"]["lr"]["best"]["slot"] == 3
    assert "higher is better" in read.text


@pytest.mark.usefixtures("no_figures")
def test_stale_files_go(tmp_path: Path) -> None:
    folder = report(tmp_path, variants())[0]
    report(tmp_path, sweep(name="width@nano"))
    assert sorted(p.name for p in folder.glob("best*")) == ["best.yaml"]


@pytest.mark.usefixtures("no_figures")
def test_a_record_cannot_lead_out_of_the_folder_or_be_half_there(tmp_path: Path) -> None:
    path = keep(tmp_path / "runs", sweep())
    path.write_text(json.dumps(sweep() | {"name": "../../escape"}))
    with pytest.raises(DataFault, match="escape"):
        write_sweep_report(read_sweep("lr@nano", tmp_path / "runs"), tmp_path / "reports")
    broken = sweep()
    del broken["searches"]["lr"]["trials"][0]["settings"]
    path.write_text(json.dumps(broken))
    with pytest.raises(DataFault, match="settings"):
        write_sweep_report(read_sweep("lr@nano", tmp_path / "runs"), tmp_path / "reports")
    with pytest.raises(ConfigError, match="unknown sweep 'wd'"):
        write_sweep_report(read_sweep("wd", tmp_path / "runs"), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def shown(read: SweepRead, out: Path) -> str:
    with open("/dev/null", "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(terminal_sweep(read, out), soft_wrap=True)
        return console.export_text()


def test_the_terminal_says_the_answer_the_best_five_and_where_the_page_lies(lr_page: Path, tmp_path: Path) -> None:
    told = shown(read_sweep("lr", lr_page.parents[1] / "runs"), lr_page.parent)
    assert told.startswith(said(sweep()))
    rows = [line.split() for line in told.splitlines() if re.fullmatch(r"\s*\d+\s+[\d.]+\s+[\d.]+\s*", line)]
    assert rows[0] == ["2", "2.0175", "0.004899"]
    assert len(rows) == 5
    assert str(lr_page / "index.html") in told
    assert str(lr_page / "best.yaml") in told
    told = shown(made_up_sweep.read(hopeless()), tmp_path)
    assert "No answer." in told
    assert "gpt2lab report lr@nano" in told
    told = shown(made_up_sweep.read(sweep({"[red]x[/red]": search()})), tmp_path)
    assert "Best learning rate" in told


@pytest.mark.usefixtures("no_figures")
def test_the_page_across_studies_lists_sweeps_but_not_those_of_an_ablation(tmp_path: Path) -> None:
    folder = report(tmp_path, sweep())[0]
    keep(tmp_path / "runs", sweep(name="posenc@nano", part_of="posenc@nano", question="Not by itself?"))
    keep(tmp_path / "runs", hopeless() | {"name": "high@nano", "question": HOSTILE[0]})
    (tmp_path / "runs/sweeps/broken@nano.json").write_text('{"name": "broken@nano"}')
    index = write_index(tmp_path / "runs", tmp_path / "reports")
    read, twin = Reader(index.read_text()), index.with_suffix(".md").read_text()
    assert said(sweep()) in read.text
    assert "No trial finished" in read.text
    assert "Not by itself?" not in read.text
    assert "broken@nano cannot be read" in read.text
    assert "Nothing is recorded" not in read.text
    assert [link for link in read.links() if link.endswith(".html")] == ["lr%40nano/index.html"]
    assert f"[lr@nano]({folder.name.replace('@', '%40')}/index.html)" in twin
    assert "<script" not in index.read_text() + twin
    entries = json.loads(index.with_suffix(".json").read_text())["sweeps"]
    assert {entry["name"] for entry in entries} == {"lr@nano", "high@nano"}


@pytest.mark.usefixtures("no_figures")
def test_the_command_takes_the_name_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2lab.cli import results

    def run(name: str, **options: bool) -> str:
        given = {"all_": False, "force_exploratory": False, "publish": False} | options
        results.report(name, runs=tmp_path / "runs", out=tmp_path / "reports", **given)
        return capsys.readouterr().out

    keep(tmp_path / "runs", sweep())
    assert said(sweep()) in run("lr", publish=True)
    assert (tmp_path / "reports/published/lr@nano/best.yaml").exists()
    declare(tmp_path / "runs")
    keep(tmp_path / "runs", sweep(name="posenc@nano", part_of="posenc@nano"))
    assert "rotary" in run("posenc")  # the study, which shows the sweep that it rests on
    with pytest.raises(ConfigError, match=r"unknown study or sweep 'nosuch' \(known: lr@nano, posenc@nano"):
        run("nosuch")
