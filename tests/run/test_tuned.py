"""Ablations whose arms are tuned, from the first trial to the report: searches, fresh seeds, stops, lost arms."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workers import command, wait_until

from gpt2lab.results import judge
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]

TUNE = "tune: {space: {optim.lr: {low: 0.25, high: 32, log: true, relative: true}}, trials: 4, sampler: qmc}\n"


@pytest.fixture
def learner(tiny: Path) -> Path:
    """A tiny ablation of two arms, with a recipe that gets below the unigram floor: its runs do not count as failed."""
    preset = tiny.parent / "tiny.yaml"
    preset.write_text(preset.read_text().replace("steps: 24, batch_tokens: 64", "steps: 60, batch_tokens: 256"))
    head = tiny.read_text().partition("baseline:")[0]
    tiny.write_text(head + "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 3\n" + TUNE)
    return tiny


def study(root: Path) -> dict[str, Any]:
    return Store(root / "runs").study("tiny")


@pytest.mark.slow
def test_every_arm_is_tuned_and_then_judged_on_fresh_seeds(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    code, said = gpt2lab("run", str(learner), "--dry-run")
    assert code == 0 and "4 trials each first, then 6 to 12 runs" in " ".join(said.split()) and not inline
    code, said = gpt2lab("run", str(learner), "--no-tracking")
    assert code == 0, said
    record, store = study(tmp_path), Store(tmp_path / "runs")
    sweep = store.sweep("tiny@tiny")
    assert sweep["part_of"] == "tiny@tiny" and sweep["searches"].keys() == {"a", "b"}
    for name, arm in record["arms"].items():
        trials = sweep["searches"][name]["trials"]
        assert [trial["outcome"] for trial in trials] == ["finished"] * 4
        assert all(trial["runs"].keys() == {"100"} for trial in trials)
        best = min(trials, key=lambda trial: trial["value"])
        assert arm["tuned"]["settings"] == best["settings"] and arm["tuned"]["value"] == best["value"]
        [tuned_run] = best["runs"].values()
        evaluation = store.run(tuned_run).evaluation(record["evaluation"]["key"])
        assert evaluation is not None and evaluation["metrics"]["val/loss"] == best["value"]
        assert arm["runs"].keys() == arm["shared"]["runs"].keys() == {"0", "1", "2"}
        for runs, lr in ((arm["runs"], best["settings"]["optim.lr"]), (arm["shared"]["runs"], 0.01)):
            configs = {str(store.run(run).config()) for run in runs.values()}
            assert all(f"lr: {lr!r}" in text or f"lr: {lr:g}" in text for text in configs), (lr, configs)
        assert not set(arm["runs"].values()) & set(arm["shared"]["runs"].values())
    rates = [[t["settings"]["optim.lr"] for t in sweep["searches"][name]["trials"]] for name in ("a", "b")]
    assert rates[0] == rates[1]  # the same budget in the same places
    assert len(inline) == len(set(inline)) == 2 * (4 + 3 + 3)
    verdict = judge(record, store).contrasts[0]
    assert "at each arm's own best learning rate" in verdict.verdict
    report = (tmp_path / "reports/tiny@tiny/report.md").read_text()
    assert "## Each arm tuned" in report and "b against a: " in said and "at the shared rate" in said

    trained = len(inline)  # and once more: nothing is left to do, and no date or hash moves
    code, said = gpt2lab("run", str(learner), "--no-tracking")
    assert code == 0 and len(inline) == trained
    assert study(tmp_path)["created"] == record["created"] and study(tmp_path)["earlier"] == []


@pytest.mark.slow
def test_an_arm_that_diverges_everywhere_costs_nobody_else(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    """The centre of one arm lies where nothing can be trained."""
    learner.write_text(learner.read_text().replace("trials: 4", "centre: {b: {optim.lr: 1e35}}, trials: 4"))
    code, said = gpt2lab("run", str(learner), "--no-tracking")
    assert code == 0, said
    record = study(tmp_path)
    assert record["arms"]["b"]["tuned"]["diverged"] == 4 and record["arms"]["b"]["runs"] == {}
    assert len(record["arms"]["a"]["runs"]) == 3
    [contrast] = judge(record, Store(tmp_path / "runs")).contrasts
    assert contrast.word == "not comparable" and "no trial of its search finished (4 diverged)" in contrast.verdict
    report = (tmp_path / "reports/tiny@tiny/report.md").read_text()
    assert "1 arm cannot be compared." in report
    code, said = gpt2lab("run", str(learner), "--no-tracking", "--force-exploratory")
    assert code == 0 and "none of them is a finding" in (tmp_path / "reports/tiny@tiny/report.md").read_text()


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_with_the_same_command(learner: Path, tmp_path: Path) -> None:
    record = tmp_path / "runs/sweeps/tiny@tiny.json"

    def finished() -> int:
        searches = json.loads(record.read_text())["searches"].values() if record.exists() else ()
        return sum(trial["outcome"] == "finished" for search in searches for trial in search["trials"])

    words = ("run", str(learner), "--no-tracking", "--jobs", "1")
    with command(tmp_path, *words) as first:
        wait_until(lambda: finished() >= 2 or first.poll() is not None, 240)
        first.send_signal(signal.SIGINT)
        assert first.wait(120) not in (0, 1)
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    with command(tmp_path, *words) as second:
        assert second.wait(300) == 0, (tmp_path / "log.txt").read_text()
    sweep = Store(tmp_path / "runs").sweep("tiny@tiny")
    for search in sweep["searches"].values():
        assert [trial["outcome"] for trial in search["trials"]] == ["finished"] * 4
        assert all(trial["retries"] == 0 for trial in search["trials"])
    assert all(len(arm["runs"]) == 3 for arm in study(tmp_path)["arms"].values())
