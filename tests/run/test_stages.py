"""Studies in several stages: rates or settings first, looks one after another, other budgets, ladders, noise."""

from __future__ import annotations

import json
import math
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from workers import command, replace_in, wait_until

from gpt2lab import api
from gpt2lab.analysis import Contrast
from gpt2lab.analysis.studies import judge
from gpt2lab.store import Store, read_json, write_json

Call = Callable[..., tuple[int, str]]


def rewrite(file: Path, text: str) -> None:
    """The tiny ablation with other arms, seeds and designs."""
    head = file.read_text().partition("baseline:")[0]
    file.write_text(head + text)


RARELY = ("every_steps: 8", "every_steps: 100"), ("checkpoint_every_steps: 6", "checkpoint_every_steps: 100")
"""Evaluations and checkpoints on the way cost more than the steps between them."""


@pytest.fixture
def learner(tiny: Path) -> Path:
    """The tiny ablation with a recipe that gets below the unigram floor, so that its runs do not count as failed."""
    longer = ("steps: 24, batch_tokens: 64", "steps: 100, batch_tokens: 256")
    replace_in(tiny.parent / "tiny.yaml", longer, ("n_layer: 2", "n_layer: 1"), *RARELY)
    return tiny


def study(root: Path, name: str = "tiny") -> dict[str, Any]:
    return Store(root / "runs").study(name)


def contrasts(root: Path) -> dict[str, Contrast]:
    return {contrast.arm: contrast for contrast in judge(study(root), Store(root / "runs")).contrasts}


def report(root: Path) -> str:
    return (root / "reports/tiny@tiny/report.md").read_text()


def run_study(gpt2lab: Call, file: Path, *more: str) -> str:
    code, printed = gpt2lab("run", str(file), "--no-tracking", *more)
    assert code == 0, printed
    return printed


@pytest.mark.slow
def test_rates_are_bracketed_first_and_arms_are_judged_on_fresh_seeds(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    rewrite(
        learner,
        "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 3\ntune: {grid: {optim.lr: [0.25x, 0.5x, 1x]}}\n",
    )
    run_study(gpt2lab, learner)
    record = study(tmp_path)
    store = Store(tmp_path / "runs")
    for name, arm in record["arms"].items():
        losses = {}
        for trial in arm["bracket"]["trials"]:
            evaluation = store.run(trial["run"]).evaluation(record["evaluation"]["key"])
            assert evaluation is not None and trial["seed"] == 100
            assert trial["lr"] == pytest.approx(1e-2 * trial["factor"])
            losses[trial["factor"]] = evaluation["metrics"]["val/loss"]
        best = min(losses, key=lambda factor: losses[factor])
        assert arm["bracket"]["best"] == best and best > 0.25
        # at a higher rate than the tiny preset's own, 24 steps get further: the bracket was widened
        assert len(losses) > 3 and max(losses) == pytest.approx(2 * best), (name, losses)
        assert arm["lr"] == pytest.approx(1e-2 * best)
        assert not set(arm["runs"]) & {"100"} and len(arm["runs"]) == 3
        configs = {store.run(run).config() for run in arm["runs"].values()}
        assert all(f"lr: {arm['lr']!r}" in str(text) or f"lr: {arm['lr']:g}" in str(text) for text in configs)
    verdict = judge(record, store).contrasts[0]
    assert verdict.word not in ("exploratory", "not comparable") and "at the shared rate" not in verdict.verdict
    trained = len(inline)
    run_study(gpt2lab, learner)
    assert len(inline) == trained


def test_a_best_rate_at_the_edge_makes_an_arm_not_comparable(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.planning.tuning.EXTENSIONS", 0)
    replace_in(tmp_path / "tiny.yaml", ("steps: 100", "steps: 60"))
    rewrite(
        learner,
        "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 3\ntune: {grid: {optim.lr: [0.1x, 0.2x, 1x]}}\n",
    )
    run_study(gpt2lab, learner)
    contrast = judge(study(tmp_path), Store(tmp_path / "runs")).contrasts[0]
    assert contrast.word == "not comparable"
    assert "best learning rate lies at the edge of the bracket (x1)" in contrast.verdict
    forced = judge(study(tmp_path), Store(tmp_path / "runs"), force_exploratory=True).contrasts[0]
    assert forced.word == "exploratory" and "nats" in forced.verdict


def test_arms_that_are_decided_stop_at_their_look(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    """`numb` drops most of what it computes: worse beyond doubt at the first look. The control is never decided."""
    rewrite(
        learner,
        "baseline: a\narms: {a: {}, numb: {model.dropout: 0.45}, twin: {control: true}}\nlooks: [4, 5]\n"
        "smallest_effect: 0.0001\n",
    )
    run_study(gpt2lab, learner)
    record = study(tmp_path)
    counts = {name: len(arm["runs"]) for name, arm in record["arms"].items()}
    assert counts == {"a": 5, "numb": 4, "twin": 5}
    assert record["history"]["looks"] == [4, 5] and record["history"]["undeclared"] is None
    verdicts = {c.arm: c for c in judge(record, Store(tmp_path / "runs")).contrasts}
    assert verdicts["numb"].look == 4 and verdicts["twin"].look == 5
    assert verdicts["numb"].alpha == verdicts["twin"].alpha < 0.05
    assert len(inline) == 14


@pytest.mark.slow
def test_seeds_are_added_one_by_one_until_every_contrast_is_decided(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    arms = "baseline: a\narms: {a: {}, numb: {model.dropout: 0.45}, twin: {control: true}}\nsmallest_effect: 0.0001\n"
    rewrite(learner, arms)
    run_study(gpt2lab, learner, "--until", "decided", "--seeds", "5")
    record, trained = study(tmp_path), len(inline)
    counts = {name: len(arm["runs"]) for name, arm in record["arms"].items()}
    assert counts["a"] == counts["twin"] == 5 and counts["numb"] in (3, 4)
    assert record["looks"] == record["history"]["looks"] == [3, 4, 5] and trained == sum(counts.values())
    assert "one by one, from 3 to at most 5 per arm" in report(tmp_path)
    run_study(gpt2lab, learner, "--until", "decided", "--budget", "10h")
    again = study(tmp_path)
    assert (again["hash"], again["created"], len(inline)) == (record["hash"], record["created"], trained)


@pytest.mark.slow
def test_seeds_added_after_a_verdict_count_at_the_looks_that_every_study_has(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    """Three seeds were declared. What they decided stays; of a contrast that is still open the fourth counts nothing,
    and six are judged."""
    rewrite(
        learner,
        "baseline: a\narms: {a: {}, numb: {model.dropout: 0.6}, twin: {control: true}}\nseeds: 3\n"
        "smallest_effect: 0.0001\n",
    )
    judged = {}
    for seeds in (3, 4, 6):
        run_study(gpt2lab, learner, "--seeds", str(seeds))
        judged[seeds] = contrasts(tmp_path)
    numb, twin = ([judged[n][arm] for n in (3, 4, 6)] for arm in ("numb", "twin"))
    assert [contrast.n_arm for contrast in twin] == [3, 3, 6]
    assert (twin[0].difference, twin[0].low) == (twin[1].difference, twin[1].low)
    assert twin[0].alpha == twin[1].alpha == pytest.approx(0.8 * 0.05)
    assert twin[2].alpha < 0.2 * 0.05 and "judged again at 6 seeds" in twin[2].verdict
    assert all(contrast.word.startswith("inconclusive") for contrast in twin)
    assert all(contrast.word == "worse" for contrast in numb)
    assert len({(c.look, c.difference, c.low, c.high, c.p_holm) for c in numb}) == 1 and numb[0].look == 3
    page = report(tmp_path)
    assert "Seeds were added after 3 had results." in page and "declared differently 2 times before" in page
    assert len(inline) == 18


@pytest.mark.slow
def test_a_choice_among_seeds_with_results_claims_nothing_and_fresh_seeds_do(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    def judged(seeds: str) -> Contrast:
        rewrite(learner, f"baseline: a\narms: {{a: {{}}, numb: {{model.dropout: 0.45}}}}\nseeds: {seeds}\n")
        run_study(gpt2lab, learner)
        return judge(study(tmp_path), Store(tmp_path / "runs")).contrasts[0]

    assert judged("3").word.startswith("worse")
    chosen, reason = judged("[0, 2, 3]"), "seed 1 has results and is left out"
    assert chosen.word == "exploratory" and reason in chosen.verdict
    assert f"No claims are made: {reason}." in report(tmp_path)
    fresh = judged("[4, 5, 6]")
    assert fresh.word.startswith("worse") and fresh.alpha == pytest.approx(0.8 * 0.05)


@pytest.mark.slow
def test_what_is_declared_after_results_does_not_change_what_was_declared_before(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    """Looks, a larger X and fewer contrasts, written down once the results of three seeds were there."""
    arms = "a: {}, numb: {model.dropout: 0.45}, twin: {control: true}"
    rewrite(learner, f"baseline: a\narms: {{{arms}}}\nseeds: 3\nsmallest_effect: 0.0001\n")
    run_study(gpt2lab, learner)
    store = Store(tmp_path / "runs")
    before = contrasts(tmp_path)
    rewrite(
        learner,
        "baseline: a\narms: {a: {}, numb: {model.dropout: 0.45}}\nlooks: [3, 5]\nsmallest_effect: 9\nalpha: 0.2\n",
    )
    run_study(gpt2lab, learner)
    [after] = judge(study(tmp_path), store).contrasts
    assert (after.word, after.alpha, after.n_arm) == (before["numb"].word, before["numb"].alpha, 3)
    assert after.p_holm == pytest.approx(2 * after.p) == before["numb"].p_holm  # the twin is still in the family
    page = " ".join(report(tmp_path).replace("\\", "").split())
    for told in (
        "`looks` were written down after 3 seeds had results, and do not count as declared.",
        "The smallest effect of interest was changed to 9 after results were there; it counts as 0.0001.",
        "alpha was changed to 0.2 after results were there; it counts as 0.05.",
        "1 contrast with results left out, still counted in the family: twin against a.",
    ):
        assert told in page, told


@pytest.mark.slow
def test_other_budgets_are_runs_on_their_own_schedules(
    tiny: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    rewrite(
        tiny,
        "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 3\nbudget_curve: [0.5, 1, 2]\n",
    )
    run_study(gpt2lab, tiny)
    record, store = study(tmp_path), Store(tmp_path / "runs")
    curve = {point["budget"]: point for point in record["arms"]["a"]["curve"]}
    assert curve.keys() == {0.5, 2} and record["arms"]["b"]["curve"] == []
    assert curve[2]["tokens"] == 2 * 24 * 64
    [first, *_] = curve[0.5]["runs"].values()
    rows = store.run(first).rows()
    assert rows[-1]["step"] == 12
    rates = [row["metrics"]["train/lr"] for row in rows if "train/lr" in row["metrics"]]
    assert max(rates) == rates[1] and rates[-1] < 0.2 * max(rates)  # 2 steps of warm-up, and decayed at its own end
    assert len(inline) == 6 + 6


@pytest.mark.slow
def test_a_ladder_is_one_study_for_each_size(tiny: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]) -> None:
    replace_in(tmp_path / "tiny.yaml", *RARELY)
    large = tmp_path / "larger.yaml"
    large.write_text("extends: tiny.yaml\nmodel: {n_embd: 24}\n")
    rewrite(
        tiny,
        "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 1\ntokens_per_parameter: 1\n"
        f"scales: [{tmp_path / 'tiny.yaml'}, {large}]\n",
    )
    run_study(gpt2lab, tiny)
    store = Store(tmp_path / "runs")
    assert store.studies() == ["tiny@larger-1tpp", "tiny@tiny-1tpp"]
    for name in store.studies():
        scope = store.study(name)["scope"]
        assert scope["tokens"] / scope["parameters"] == pytest.approx(1, abs=64 / scope["parameters"])
    assert len(inline) == 4


@pytest.mark.slow
def test_a_factorial_is_judged_by_its_effects(learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]) -> None:
    rewrite(
        learner,
        "factors:\n  rate:\n    usual: {}\n    slow: {optim.lr: 5e-3}\n  model.norm: [layernorm, rmsnorm]\nseeds: 3\n",
    )
    run_study(gpt2lab, learner)
    effects = contrasts(tmp_path)
    assert effects.keys() == {"rate=slow", "norm=rmsnorm", "rate=slow with norm=rmsnorm"}
    assert effects["rate=slow"].difference > 0.5
    verdicts = json.loads((tmp_path / "reports/tiny@tiny/verdicts.json").read_text())
    assert len(verdicts["contrasts"]) == 3


@pytest.mark.slow
def test_a_noise_floor_is_measured_stored_and_lent(
    learner: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    preset = str(tmp_path / "tiny.yaml")
    code, said = gpt2lab("noise", preset, "--seeds", "10", "--no-tracking", "--json")
    assert code == 0, said
    [floor] = json.loads(said[said.index('{"schema"') :].splitlines()[0])["floors"]
    values = [floor["values"][str(seed)] for seed in range(200, 210)]
    assert floor["sd"] == pytest.approx(statistics.stdev(values))
    assert floor["low"] == pytest.approx(floor["sd"] * math.sqrt(9 / stats.chi2.ppf(0.975, 9)))
    assert floor["high"] == pytest.approx(floor["sd"] * math.sqrt(9 / stats.chi2.ppf(0.025, 9)))
    assert floor["same_seed"] == {"runs": 2, "identical": True, "sd": 0.0}
    assert len(inline) == 11
    code, said = gpt2lab("noise")
    assert code == 0 and "same bits" in said and "today" in said
    assert gpt2lab("noise", preset, "--seeds", "10", "--no-tracking")[0] == 0
    assert len(inline) == 11  # nothing trained twice

    # two seeds can now be judged, by the noise of the repeats
    rewrite(learner, "baseline: a\narms: {a: {}, numb: {model.dropout: 0.5}}\nseeds: 2\n")
    assert "noise floor: sd" in run_study(gpt2lab, learner)
    contrast = judge(study(tmp_path), Store(tmp_path / "runs")).contrasts[0]
    assert contrast.word.startswith("likely worse"), contrast.verdict
    assert "10 repeats of the recipe at tiny" in report(tmp_path)

    # another software stack asks for a new one
    [file] = (tmp_path / "runs/noise").iterdir()
    kept = read_json(file)
    write_json(file, kept | {"stack": kept["stack"] | {"torch": "1.0"}})
    code, said = gpt2lab("run", str(learner), "--dry-run")
    assert code == 0 and "another software stack" in " ".join(said.split())


def test_too_few_runs_that_learned_anything_make_no_floor(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    code, said = gpt2lab("noise", str(tiny.parent / "tiny.yaml"), "--seeds", "3", "--no-tracking")
    assert code == 2 and "0 of 3 runs ended with a loss that means something" in said
    code, said = gpt2lab("noise")
    assert code == 0 and "no noise floor has been measured" in said


TUNE = "tune: {space: {optim.lr: {low: 0.25, high: 32, log: true, relative: true}}, trials: 4, sampler: qmc}\n"


@pytest.fixture
def tuned(tiny: Path) -> Path:
    """A tiny ablation of two arms, with a recipe that gets below the unigram floor: its runs do not count as failed."""
    preset = tiny.parent / "tiny.yaml"
    preset.write_text(preset.read_text().replace("steps: 24, batch_tokens: 64", "steps: 60, batch_tokens: 256"))
    head = tiny.read_text().partition("baseline:")[0]
    tiny.write_text(head + "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\nseeds: 3\n" + TUNE)
    return tiny


@pytest.mark.slow
def test_every_arm_is_tuned_and_then_judged_on_fresh_seeds(
    tuned: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    code, said = gpt2lab("run", str(tuned), "--dry-run")
    assert code == 0 and "4 trials each first, then 6 to 12 runs" in " ".join(said.split()) and not inline
    code, said = gpt2lab("run", str(tuned), "--no-tracking")
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
    code, said = gpt2lab("run", str(tuned), "--no-tracking")
    assert code == 0 and len(inline) == trained
    assert study(tmp_path)["created"] == record["created"] and study(tmp_path)["earlier"] == []


@pytest.mark.slow
def test_an_arm_that_diverges_everywhere_leaves_the_others_as_they_are(
    tuned: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    """The centre of one arm lies where nothing can be trained."""
    tuned.write_text(tuned.read_text().replace("trials: 4", "centre: {b: {optim.lr: 1e35}}, trials: 4"))
    code, said = gpt2lab("run", str(tuned), "--no-tracking")
    assert code == 0, said
    record = study(tmp_path)
    assert record["arms"]["b"]["tuned"]["diverged"] == 4 and record["arms"]["b"]["runs"] == {}
    assert len(record["arms"]["a"]["runs"]) == 3
    [contrast] = judge(record, Store(tmp_path / "runs")).contrasts
    assert contrast.word == "not comparable" and "no trial of its search finished (4 diverged)" in contrast.verdict
    report = (tmp_path / "reports/tiny@tiny/report.md").read_text()
    assert "1 arm cannot be compared." in report
    code, said = gpt2lab("run", str(tuned), "--no-tracking", "--force-exploratory")
    assert code == 0 and "none of them is a finding" in (tmp_path / "reports/tiny@tiny/report.md").read_text()


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_with_the_same_command(tuned: Path, tmp_path: Path) -> None:
    record = tmp_path / "runs/sweeps/tiny@tiny.json"

    def finished() -> int:
        searches = json.loads(record.read_text())["searches"].values() if record.exists() else ()
        return sum(trial["outcome"] == "finished" for search in searches for trial in search["trials"])

    words = ("run", str(tuned), "--no-tracking", "--jobs", "1")
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


def test_the_best_arms_of_a_screen_are_judged_on_fresh_seeds_in_a_study_of_their_own(
    tiny: Path, gpt2lab: Call, tmp_path: Path, inline: list[str]
) -> None:
    replace_in(tiny.parent / "tiny.yaml", *RARELY)
    arms = "{a: {}, b: {model.norm: rmsnorm}, c: {model.mlp: relu}, d: {model.bias: false}}"
    rewrite(tiny, f"baseline: a\narms: {arms}\nseeds: 2\nscreen: true\nconfirm: {{best: 2, seeds: 3}}\n")
    assert "then the best 2 on 3 fresh seeds: tiny-confirm" in run_study(gpt2lab, tiny, "--dry-run")
    run_study(gpt2lab, tiny)
    store = Store(tmp_path / "runs")
    screen, record = store.study("tiny@tiny"), store.study("tiny-confirm@tiny")
    means = {arm: statistics.fmean(store.run(run).result()["metrics"]["val/loss"] for run in entry.runs.values())  # type: ignore[index]
             for arm, entry in screen.arms.items() if arm != "a"}  # fmt: skip
    best = sorted(means, key=means.__getitem__)[:2]
    assert set(record.arms) == {"a", *best} and record.seeds == [2, 3, 4] and not record.screen
    assert record.screened is not None and record.screened.declaration == screen.hash
    assert (record.screened.arms, record.screened.seeds) == (["b", "c", "d"], [0, 1])
    [campaign] = api.campaigns(store.root).values()
    numbers = {(one.study, one.arm): one.number for one in campaign.hypotheses}
    assert {numbers["tiny@tiny", arm] for arm in "bcd"} == {None}
    assert {numbers["tiny-confirm@tiny", arm] for arm in best} == {1, 2}
    page = (tmp_path / "reports/tiny-confirm@tiny/report.md").read_text()
    assert "the best 2 of the 3 arms of tiny@tiny (2 seeds), on seeds that the screen did not use" in page
    assert "its best 2 by mean val/loss are judged on 3 fresh seeds in tiny-confirm" in report(tmp_path)
    trained = len(inline)
    run_study(gpt2lab, tiny)  # again: nothing is left to train, and the same arms are confirmed
    assert len(inline) == trained and store.study("tiny-confirm@tiny").hash == record.hash
