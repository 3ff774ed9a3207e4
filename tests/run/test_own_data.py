"""Arms with data of their own, and studies with other metrics than the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_text
from workers import replace_in, rows_of

from gpt2lab.analysis.results import collect, load_results, until
from gpt2lab.analysis.studies import judge
from gpt2lab.errors import ConfigError, Preempted
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.runner.training import Training
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
BPE = "{data.tokenizer: {name: bpe, vocab_size: 280}, model.vocab_size: 280}"
HEAD = "metric: val/bits_per_byte\nsmallest_effect: 0.05\n"


def changed(tiny: Path, arm: str, head: str, evaluate: str = "{tokens: all}") -> Path:
    """The tiny ablation with another arm, metric and evaluation."""
    replace_in(
        tiny,
        ("rotary: {model.position: rotary}", f"other: {arm}"),
        ("evaluate: {contexts: [0.5, 1, 2]}", f"evaluate: {evaluate}\n{head}"),
        ("seeds: 2", "seeds: 3"),
    )
    return tiny


def test_tokenizers_are_judged_by_the_bytes_of_one_text(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    code, said = gpt2lab("run", str(changed(tiny, BPE, HEAD)), "--no-tracking")
    assert code == 0, said
    store = Store("runs")
    study = store.study("tiny")
    assert study.metric == "val/bits_per_byte" and study.validation_text
    runs = collect(study, store)
    text = write_text(tiny.parent / "again.txt").read_bytes()
    scored = len(text) - int(len(text) * 0.8)
    by_arm = {run.arm: run for run in runs}
    assert len({run.identity["data"] for run in runs}) == 2
    for arm, run in by_arm.items():
        metrics, targets = run.evaluation["metrics"], run.evaluation["targets"]
        bits = metrics["val/loss"] * targets / math.log(2) / metrics["val/bits_per_byte"]
        assert run.value == metrics["val/bits_per_byte"]
        assert 0 < scored - bits < 8, arm  # all bytes but those of the first token
    verdicts = judge(study, store)
    [contrast] = verdicts.contrasts
    assert contrast.word != "not comparable" and "bits per byte" in contrast.verdict
    assert (verdicts.unit, verdicts.higher_is_better) == ("bits per byte", False)
    page = (tiny.parent / "reports/tiny@tiny/index.html").read_text()
    assert "in final val/bits_per_byte, bits per byte; lower is better" in page
    assert "all of the same validation text" in page and "Where the difference comes from" not in page


@pytest.mark.parametrize(
    ("arm", "head", "evaluate", "problem"),
    [
        (BPE, "", "{tokens: all}", "all arms are trained and judged on the same tokens, unless"),
        (BPE, HEAD, "{tokens: 200}", "has other data than the baseline, so all of one text must be scored"),
        ("{model.norm: rmsnorm}", "metric: val/bits_per_byte", "{}", "one in the unit of val/bits_per_byte is"),
        ("{model.norm: rmsnorm}", "metric: val/perplexity", "{}", "val/loss, val/bits_per_byte, task/NAME/MEASURE"),
        ("{model.norm: rmsnorm}", "metric: {tokens_to: none}\nsmallest_effect: 1", "{}", "with a loss above 0"),
        ("{model.norm: rmsnorm}", "metric: task/piqa/acc\nsmallest_effect: 1", "{}", "its task is not evaluated"),
        ("{model.norm: rmsnorm}", "metric: val/bits_per_byte\nsmallest_effect: {nano: 1}", "{}", "none for tiny"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tiny: Path, arm: str, head: str, evaluate: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_ablation(changed(tiny, arm, head, evaluate))
    assert problem in str(caught.value)


def test_other_validation_text_is_refused(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    other = tiny.parent / "other.txt"
    other.write_text("another text " * 900)
    arm = f"{{data.corpus: {{name: text, paths: ['{other}']}}}}"
    code, said = gpt2lab("run", str(changed(tiny, arm, HEAD)), "--no-tracking")
    assert code == 2 and "arm other: its validation text (2,340 bytes) is not the baseline's" in said
    assert inline == []


def test_arms_may_differ_in_batches_and_share_all_else(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    ablation = changed(tiny, "{data.batches: easy_first}", "")
    assert gpt2lab("run", str(ablation), "--no-tracking")[0] == 0
    store = Store("runs")
    study = store.study("tiny")
    [contrast] = judge(study, store).contrasts
    assert contrast.word not in ("not comparable", "exploratory")
    assert study.arms["other"].components["batches"] == "easy_first"
    plain, easy = (store.run(study.arms[arm].runs["0"]) for arm in ("learned", "other"))
    losses = [[row["metrics"].get("train/loss") for row in run.rows()] for run in (plain, easy)]
    assert losses[0] != losses[1] and plain.rows()[-1]["tokens"] == easy.rows()[-1]["tokens"]
    ramp = load_ablation(tiny.parent / "ablation.yaml", overrides=[])
    assert ramp.moves_rate("other") == {}
    replace_in(ablation, ("easy_first", "batch_ramp"))
    assert list(load_ablation(ablation).moves_rate("other")) == ["data.batches"]


def test_a_training_with_changing_batches_continues_exactly(
    tiny: Path, gpt2lab: Call, inline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("--set", "data.batches=[batch_ramp, short_to_long, easy_first]")
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *parts, "--runs", "whole")[0] == 0
    save = Training.save_if_due

    def stop_at_13(training: Training, record: Any, journal: Any) -> None:
        save(training, record, journal)
        if record.step == 13:
            raise Preempted("stopped", hint="the same command")

    monkeypatch.setattr(Training, "save_if_due", stop_at_13)
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *parts, "--runs", "stopped")[0] != 0
    monkeypatch.setattr(Training, "save_if_due", save)
    code, said = gpt2lab("train", "tiny.yaml", "--no-tracking", *parts, "--runs", "stopped")
    assert code == 0 and "continuing from step 12" in said
    (whole,), (stopped,) = Store("whole").runs(), Store("stopped").runs()
    rows = rows_of(whole)
    assert rows == rows_of(stopped) and [row["tokens"] for row in whole.rows()][:4] == [0, 16, 48, 80]


def test_a_ramp_that_ranks_cannot_share_is_refused_before_it_runs(tiny: Path, gpt2lab: Call) -> None:
    words = ("train", "tiny.yaml", "--dry-run", "--nproc", "2", "--set", "data.batches=batch_ramp")
    code, said = gpt2lab(*words)
    assert code == 2 and "cannot be divided evenly among 2 ranks" in said


def test_tokens_to_a_loss_are_read_off_the_curve(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    head = "metric: {tokens_to: 4.9}\nsmallest_effect: 64"
    assert gpt2lab("run", str(changed(tiny, "{optim.lr: 1e-5}", head, "{}")), "--no-tracking")[0] == 0
    store = Store("runs")
    study = store.study("tiny")
    assert study.metric == "tokens to val/loss 4.9"
    reached = {run.arm: run for run in collect(study, store) if run.seed == 0}
    value = reached["learned"].value
    assert value is not None
    curve = load_results("tiny").query("arm == 'learned' and seed == 0 and metric == 'val/loss'")
    before, after = curve[curve.value > 4.9].iloc[-1], curve[curve.value <= 4.9].iloc[0]
    assert 64 * before.step < value <= 64 * after.step
    assert math.isnan(reached["other"].value or 0) and reached["other"].reason == "val/loss never reached 4.9"
    verdicts = judge(study, store)
    assert verdicts.unit == "tokens" and "unstable (3 of 3 failed)" in verdicts.contrasts[0].verdict
    assert "val/loss never reached 4.9" in (tiny.parent / "reports/tiny@tiny/index.html").read_text()


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [([5, 4, 3], 150.0), ([3, 5, 2], 0.0), ([5, 4, 3.6], math.nan), ([5, 3.5, 3.4], 100.0)],
)
def test_the_first_time_counts(losses: list[float], wanted: float) -> None:
    rows: list[dict[str, Any]] = [
        {"tokens": 100 * i, "step": 10 * i, "metrics": {"val/loss": loss}} for i, loss in enumerate(losses)
    ]
    last = {"tokens": 999, "step": 99, "metrics": {}}
    assert until("tokens", 3.5, [*rows, last]) == pytest.approx(wanted, nan_ok=True)
    assert until("steps", 3.5, [*rows, last]) == pytest.approx(wanted / 10, nan_ok=True)


def test_a_share_of_right_answers_is_better_when_higher(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    assert gpt2lab("run", str(changed(tiny, "{model.norm: rmsnorm}", "", "{}")), "--no-tracking")[0] == 0
    store = Store("runs")
    study = store.study("tiny").with_(metric="task/made_up/acc", smallest_effect=0.01)
    for entry in study.arms.values():
        for run in entry.runs.values():
            assert store.run(run).result() is not None
    assert {run.status for run in collect(study, store)} == {"unevaluated"}
    verdicts = judge(study, store)
    assert (verdicts.unit, verdicts.higher_is_better) == ("accuracy", True)
