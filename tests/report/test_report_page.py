"""The page: what it says, that nothing in it can run or load, and that it can be made from incomplete results."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_study import KEY, MEANS, run_id, write
from page_reader import HOSTILE, Reader, assert_harmless, assert_same_files, assert_shown_as_text, assert_twin, part_of
from rich.console import Console

from gpt2lab.analysis import compare
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.reports import page, study
from gpt2lab.reports.read import read_study
from gpt2lab.reports.sections import health
from gpt2lab.reports.sections import runs as sections_runs
from gpt2lab.reports.sections.verdicts import verdict_table
from gpt2lab.reports.study import terminal_summary, write_report
from gpt2lab.store import Store

MakeStudy = Callable[..., dict[str, Any]]


def report(root: Path, name: str = "posenc") -> tuple[str, str, Reader]:
    """Write the report -> (HTML, Markdown, the HTML read)."""
    index = write_report(read_study(name, root / "runs"), root / "reports")
    source = index.read_text()
    return source, (index.parent / "report.md").read_text(), Reader(source)


def study_page(root: Path) -> page.Page:
    return study.build(read_study("posenc", root / "runs"))


def test_the_page_answers_in_order(finished: Path) -> None:
    source = (finished / "reports/posenc@nano/index.html").read_text()
    shown = Reader(source).text
    parts = [
        "Which position encoding reaches the lowest", "early training: sign only", "0.253 nats",
        "Verdicts", "model.position = rotary", "Figures", "Beyond the training context", "What it costs", "Sensitivity",
        "Recipe", "Runs", run_id("learned", 0), "gpt2lab run ablations/posenc.yaml --scale nano", "git commit 0123abc",
    ]  # fmt: skip
    place = shown.index(parts[0])
    for part in parts[1:]:
        place = shown.index(part, place)
    for expected in ("1.9046", "better; EleutherAI: −0.05 at 125M", "at the shared rate", "826 k", "−1.9 %", "5.20 M"):
        assert expected in shown
    assert_harmless(source)
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_a_clean_study_has_no_warning_and_no_bigram_remark(finished: Path) -> None:
    shown = Reader((finished / "reports/posenc@nano/index.html").read_text()).text
    unwanted = r"No verdict yet|incomplete|failed\.|attention switches on|\bNaN\b|\bnan\b|= None|Without a curve"
    assert not re.search(unwanted, shown)


def test_verdicts_json_and_results_csv_hold_the_numbers(finished: Path) -> None:
    folder = finished / "reports/posenc@nano"
    record = json.loads((folder / "verdicts.json").read_text())
    assert {c["arm"]: c["word"] for c in record["contrasts"]}["rotary"] == "better"
    assert record["caveat"] == "early training: sign only"
    assert record["missing"] == []
    again = compare(folder / "results.csv", baseline="learned", smallest_effect=0.05)
    assert [c.difference for c in again.contrasts] == [c["difference"] for c in record["contrasts"]]
    with (folder / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9


def test_the_twin_says_what_the_page_says(finished: Path) -> None:
    figures = assert_twin(finished / "reports/posenc@nano")
    assert figures == ["contexts", "differences", "seeds", "training", "training-flops", "training-seconds"]


def test_anchors_are_unique_and_every_link_leads_somewhere(finished: Path) -> None:
    folder = finished / "reports/posenc@nano"
    read = Reader((folder / "index.html").read_text())
    ids = [str(a["id"]) for _, a in read.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    places = [link.removeprefix("#") for link in read.links() if link.startswith("#")]
    assert len(places) > 10 and set(places) <= set(ids)
    files = [link for link in read.links() if not link.startswith("#")]
    assert {"report.md", "verdicts.json"} <= set(files) and all((folder / file).exists() for file in files)


def test_published_pages_have_no_links_to_this_machine(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "reports/posenc@nano", tmp_path / "posenc@nano")
    for file, link in (
        ("index.html", '<a href="http://127.0.0.1:5000/#/x">run</a>'),
        ("report.md", "[run](http://localhost:5000/#/x)"),
    ):
        (folder / file).write_text((folder / file).read_text() + link)
    published = page.publish(folder, tmp_path / "published")
    for file in ("index.html", "report.md"):
        text_ = (published / file).read_text()
        assert text_.endswith("run") and "127.0.0.1" not in text_ and "localhost" not in text_


@pytest.mark.slow
def test_writing_twice_gives_equal_files(finished: Path, tmp_path: Path) -> None:
    read = read_study("posenc@nano", finished / "runs")
    one, other = (write_report(read, tmp_path / name, images=True).parent for name in ("one", "other"))
    assert_same_files(one, other)
    names = {ending: sorted(path.stem for path in one.glob(f"figures/*.{ending}")) for ending in ("svg", "png", "pdf")}
    assert names["svg"] == names["png"] == names["pdf"] != []


def test_hostile_names_are_shown_as_text(make_study: MakeStudy, tmp_path: Path) -> None:
    means = {"learned": 2.15, **dict.fromkeys(HOSTILE, 1.9)}
    study = make_study(
        means, question=f"Is {HOSTILE[0]} {HOSTILE[1]} | good?\x1b\ud800", caveat=HOSTILE[0], reproduce=HOSTILE[0]
    )
    for arm, entry in study["arms"].items():
        entry |= {"expected": arm, "changes": {arm: arm}, "exploratory": arm}
    study["scope"]["data"], study["stack"]["platform"] = HOSTILE[0], HOSTILE[1]
    write(tmp_path / "runs/studies/posenc@nano.json", study)
    failed = tmp_path / "runs" / run_id(HOSTILE[0], 0)
    (failed / "result.json").unlink()
    write(failed / "failure.json", {"reason": HOSTILE[0] + "\x1b[31m", "phase": HOSTILE[1], "step": 3})
    report(tmp_path)
    assert_shown_as_text(tmp_path / "reports/posenc@nano")


@pytest.mark.usefixtures("no_figures")
def test_removing_the_escape_is_noticed(make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study({"learned": 2.15, HOSTILE[0]: 1.9})
    real = page._environment
    monkeypatch.setattr(page, "_environment", lambda *, autoescape: real(autoescape=False))
    monkeypatch.setattr(page, "escape", str)
    source, _, _ = report(tmp_path)
    with pytest.raises(AssertionError):
        assert_harmless(source)


def test_incomplete_results_build_and_say_so(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study(means={"learned": 2.15, "rotary": 1.89, "none": 2.2, "alibi": 1.95})
    runs = tmp_path / "runs"
    shutil.rmtree(runs / run_id("rotary", 0))
    result = runs / run_id("none", 0) / "result.json"
    write(
        result, json.loads(result.read_text()) | {"status": "diverged", "reason": "nan loss at step 12", "metrics": {}}
    )
    (runs / run_id("none", 0) / "metrics.jsonl").write_text(
        '{"step": 0, "tokens": 0, "seconds": 0.0, "metrics": {"val/loss": NaN}}\n'
    )
    (runs / run_id("alibi", 1) / "metrics.jsonl").unlink()
    (runs / run_id("alibi", 2) / "metrics.jsonl").write_text("not json\n" * 2)
    source, twin, read = report(tmp_path)
    assert_harmless(source)
    told = [
        "This study is incomplete.", "3 of 12 declared runs have no final value (1 absent, 2 damaged)", "1 run failed.",
        "1 of none", "nan loss at step 12", "not started", "unstable", "alibi seed 2 (damaged: ",
        f"{run_id('alibi', 1)}/metrics.jsonl: is missing from a run that has ended (try: mv ",
    ]  # fmt: skip
    for expected in told:
        assert expected in read.text, expected
        assert expected in twin.replace("\\", ""), expected
    record = json.loads((tmp_path / "reports/posenc@nano/verdicts.json").read_text())
    words = {c["arm"]: c["word"] for c in record["contrasts"]}
    assert words["rotary"] == "exploratory"
    assert words["none"].startswith("unstable")
    assert [m["arm"] for m in record["missing"]] == ["rotary", "alibi", "alibi"]


@pytest.mark.usefixtures("no_figures")
def test_of_very_many_runs_those_with_a_remark_are_listed(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study()
    shutil.rmtree(tmp_path / "runs" / run_id("rotary", 0))
    monkeypatch.setattr(sections_runs, "MOST_ROWS", 5)
    listed = part_of(report(tmp_path)[1], "Runs")
    assert "1 of 9 runs" in listed and run_id("rotary", 0) in listed and run_id("learned", 0) not in listed


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("kept", "arms"), [([], 3), (["learned"], 3), (["learned"], 1)])
def test_no_verdict_before_two_arms_have_results(
    make_study: MakeStudy, tmp_path: Path, kept: list[str], arms: int
) -> None:
    study = make_study(dict(list(MEANS.items())[:arms]))
    for arm, entry in study["arms"].items():
        for run in entry["runs"].values() if arm not in kept else ():
            shutil.rmtree(tmp_path / "runs" / run)
    source, twin, read = report(tmp_path)
    assert "No verdict yet." in read.text
    assert health.NOTHING in read.text
    assert "Where the difference comes from" not in read.text or kept
    assert "is better than" not in source + twin
    assert_harmless(source)


def test_single_points_and_single_seeds(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(seeds=1)
    for entry in study["arms"].values():
        folder = tmp_path / "runs" / entry["runs"]["0"]
        (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().partition("\n")[0] + "\n")
        result = json.loads((folder / "result.json").read_text())
        write(folder / "result.json", result | {"steps": 0, "metrics": {}})
    _, _, read = report(tmp_path)
    assert "exploratory" in read.text
    assert "fewer than 3 seeds" in read.text
    assert "too few to say how small a difference" in read.text


@pytest.mark.usefixtures("no_figures")
def test_a_contrast_between_two_arms_names_both(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study(contrasts=[["rotary", "none"]])
    _, _, read = report(tmp_path)
    assert "against none; model.position = rotary" in read.text
    assert "not judged" in read.text


@pytest.mark.parametrize(("learned", "said"), [(2.22, False), (2.26, True), (2.6, True)])
@pytest.mark.usefixtures("no_figures")
def test_a_baseline_near_the_bigram_floor_is_said(
    make_study: MakeStudy, tmp_path: Path, learned: float, said: bool
) -> None:
    make_study(means={"learned": learned, "rotary": 1.89})
    assert ("attention switches on" in report(tmp_path)[2].text) is said


@pytest.mark.usefixtures("no_figures")
def test_a_verdict_against_what_was_expected_is_marked(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    for said, against in (("worse, somebody said", True), ("better, somebody said", False)):
        study["arms"]["rotary"]["expected"] = said
        write(tmp_path / "runs/studies/posenc@nano.json", study)
        assert any(said in remark.text for remark in study_page(tmp_path).warnings) is against
        rows = {row.cells[0].text: row.cells[-1] for row in verdict_table(read_study("posenc", tmp_path / "runs")).rows}
        assert ("broken" in rows["rotary"].chip) is against


def test_better_within_the_zone_too_small_to_matter_looks_different(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study(smallest_effect=0.5)
    rows = {row.cells[0].text: row.cells for row in verdict_table(read_study("posenc", tmp_path / "runs")).rows}
    [chip] = [cell for cell in rows["rotary"] if cell.text.startswith("better")]
    assert chip.chip == "better slight" and chip.text != "better"


@pytest.mark.usefixtures("no_figures")
def test_the_recipe_is_that_of_the_baselines_runs(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    settings = {
        "model": {"n_layer": 5, "n_head": 3, "n_embd": 96, "block_size": 128, "vocab_size": 777, "dropout": 0.25},
        "optim": {
            "lr": 0.0123, "warmup_steps": 44, "grad_clip": 1.5, "optimizer": {"name": "lion", "weight_decay": 0.3},
            "schedule": {"name": "cosine", "final_fraction": 0.1},
        },
        "training": {"steps": 440, "batch_tokens": 1024, "precision": "bf16"},
    }  # fmt: skip
    run = tmp_path / "runs" / study["arms"]["learned"]["runs"]["0"] / "run.json"
    record = json.loads(run.read_text())
    write(run, record | {"identity": record["identity"] | {"settings": settings}})
    [recipe] = [part for part in study_page(tmp_path).sections if part.title == "Recipe"]
    told = " ".join(value for _, value in recipe.facts)
    for value in ("5 layers", "3 heads", "96", "777", "0.25", "0.0123", "44", "1.5", "lion", "0.3", "cosine", "bf16",
                  "8 sequences", "a processor", "shakespeare (bytes)"):  # fmt: skip
        assert value in told, value


@pytest.mark.usefixtures("no_figures")
def test_a_metric_in_bits_knows_no_floor_in_nats(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study(metric="val/bits_per_byte")
    _, _, read = report(tmp_path)
    assert "bits per byte" in read.text
    assert "failed" not in read.text


@pytest.mark.usefixtures("no_figures")
def test_a_failing_render_leaves_the_old_report(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study()
    report(tmp_path)
    folder = tmp_path / "reports/posenc@nano"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def broken(*_: object) -> str:
        raise RuntimeError("template")

    for where, step in ((page, "render_html"), (page, "render_markdown"), (study, "_csv"), (study, "_json")):
        with monkeypatch.context() as patch:
            patch.setattr(where, step, broken)
            with pytest.raises(RuntimeError):
                report(tmp_path)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.usefixtures("no_figures")
def test_a_failing_write_leaves_the_old_page(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    old = report(tmp_path)[0]
    write(tmp_path / "runs/studies/posenc@nano.json", study | {"question": "Another?"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(EnvironmentFault):
            report(tmp_path)
    assert (tmp_path / "reports/posenc@nano/index.html").read_text() == old
    assert "Another?" in report(tmp_path)[0]


@pytest.mark.usefixtures("no_figures")
def test_a_figure_that_is_no_longer_drawn_is_removed(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    report(tmp_path)
    for entry in study["arms"].values():
        for run in entry["runs"].values():
            file = tmp_path / "runs" / run / "evaluations" / f"{KEY}.json"
            write(file, json.loads(file.read_text()) | {"contexts": {}})
    _, twin, _ = report(tmp_path)
    assert "contexts.svg" not in twin
    assert not (tmp_path / "reports/posenc@nano/figures/contexts.svg").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_record_cannot_lead_out_of_the_folder(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    write(tmp_path / "runs/studies/posenc@nano.json", study | {"name": "../../escape"})
    with pytest.raises(DataFault, match="escape"):
        report(tmp_path)
    with pytest.raises(ConfigError):
        report(tmp_path, "../posenc@nano")
    assert not (tmp_path / "reports").exists()


def test_the_terminal_says_every_verdict_and_where_the_page_lies(
    finished: Path, make_study: MakeStudy, tmp_path: Path
) -> None:
    def shown(root: Path) -> str:
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(terminal_summary(read_study("posenc", root / "runs"), root / "reports"), soft_wrap=True)
            return console.export_text()

    told = shown(finished)
    assert re.search(r"rotary .*better", told)
    assert str(finished / "reports/posenc@nano/index.html") in told
    make_study({"learned": 2.15, "[red]x[/red]": 1.9})
    shutil.rmtree(tmp_path / "runs" / run_id("learned", 2))
    told = shown(tmp_path)
    assert "[red]x[/red]" in told
    assert "1 run without a value" in told
    assert "gpt2lab report posenc@nano" in told


@pytest.mark.usefixtures("no_figures")
def test_nan_never_ranks(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    for seed in range(3):
        file = tmp_path / "runs" / run_id("rotary", seed) / "evaluations" / f"{KEY}.json"
        write(file, json.loads(file.read_text()) | {"metrics": {"val/loss": math.nan}})
    _, _, read = report(tmp_path)
    assert "rotary is better" not in read.text
    assert "unstable" in read.text
    assert "3 of rotary" in read.text


@pytest.mark.usefixtures("no_figures")
def test_samples_of_the_arms_stand_side_by_side(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    store = Store(tmp_path / "runs")
    store.run(run_id("rotary", 0)).write_samples({"The ": "king & <b>"})
    store.run(run_id("learned", 0)).write_samples({"The ": "queen"})
    source, _, read = report(tmp_path)
    assert "king & <b>" in read.text and "queen" in read.text
    assert_harmless(source)
