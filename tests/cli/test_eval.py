"""Metrics and tasks of finished runs, studies and folders of weights: what is computed, kept, read again, refused."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from gpt2lab.analysis.calibration import nominal_level
from gpt2lab.evaluation.metrics import metric
from gpt2lab.evaluation.tasks import TOKENS_AT_ONCE, task
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.store import Store

Call = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_plugins_after")

METRIC = '''
from gpt2lab import metric


@metric.register("sharpness", source="a test")
def sharpness(subject, *, power: float = 1.0):
    """Mean largest probability, which no shipped metric tells.

    power: that each is raised to.
    """
    total = sum(rows.logits.softmax(-1).max(-1).values.double().pow(power).sum().item() for rows in subject.rows())
    return {"mean": total / subject.total, "targets": subject.total}
'''


def with_plugin(gpt2lab: Call, file: Path, text: str, *words: str) -> dict[str, Any]:
    """The JSON of `eval` with a plug-in of this text."""
    file.write_text(text)
    answer = gpt2lab("eval", *words, "--plugin", file, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)  # type: ignore[no-any-return]


def test_a_run_is_measured_once_on_its_own_validation_tokens(
    gpt2lab: Call, trained: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Store(tmp_path / "runs").run(trained("--seeds", 2, steps=120)["learned"]["0"])
    before = (run.path / "result.json").read_bytes()
    [judged] = [json.loads(file.read_text()) for file in (run.path / "evaluations").glob("*.json")]
    answer = gpt2lab("eval", run.id[:9], "--json")
    assert answer.code == 0, answer.err
    assert f"top1 of {run.id}" in answer.err  # progress
    found = json.loads(answer.out)
    assert found["run"] == run.id and found["reused"] == 0
    assert found["values"]["loss"] == pytest.approx(judged["metrics"]["val/loss"], rel=1e-12)
    assert found["values"]["bits_per_byte"] == pytest.approx(judged["metrics"]["val/bits_per_byte"], rel=1e-12)
    assert {name.partition("/")[0] for name in found["values"]} == set(metric.names())
    kept = sorted(file.name for file in (run.path / "evaluations").glob("*-*.json"))
    assert [name.rpartition("-")[0] for name in kept] == sorted(metric.names())

    monkeypatch.setattr("gpt2lab.reuse.measure.apply", lambda *_: pytest.fail("measured twice"))
    again = json.loads(gpt2lab("eval", run.id, "--json").out)
    assert again == {**found, "reused": len(metric.names())}
    plain = gpt2lab("eval", run.id, "--metric", "loss").out
    assert plain == f"loss: {found['values']['loss']:.6g}\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    other = json.loads(gpt2lab("eval", run.id, "--json", "--metric", "calibration,bins=3").out)
    assert other["reused"] == 0 and list(other["values"]) == ["calibration(bins=3)"]
    assert (run.path / "result.json").read_bytes() == before
    assert gpt2lab("report", "tiny").code == 0  # whose evaluation is the declared one still


def test_losses_by_part_are_kept_by_a_run(gpt2lab: Call, trained: Call, tmp_path: Path) -> None:
    run = Store(tmp_path / "runs").run(trained("--seeds", 2, steps=120)["learned"]["0"])
    [key] = run.evaluation_keys()
    record = run.evaluation(key)
    kept = run.parts(key)
    assert (
        record is not None
        and kept is not None
        and kept["key"] == key
        and list(kept["parts"]) == ["position", "frequency"]
    )
    for part in kept["parts"].values():
        total = sum(loss * targets for loss, targets in zip(part["losses"], part["targets"], strict=True))
        assert total / record["targets"] == pytest.approx(record["metrics"]["val/loss"], abs=1e-6)


def test_a_study_is_described_and_not_judged(gpt2lab: Call, trained: Call, tmp_path: Path) -> None:
    runs = trained("--seeds", 3, steps=120)
    answer = gpt2lab("eval", "--study", "tiny", "--metric", "top1", "--metric", "loss", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["study"], found["missing"], found["reused"]) == ("tiny@preset", [], 0)
    store = Store(tmp_path / "runs")
    learned, rotary = (
        [store.run(i).evaluation(store.study("tiny")["evaluation"]["key"])["metrics"]["val/loss"] for i in own.values()]  # type: ignore[index]
        for own in (runs["learned"], runs["rotary"])
    )
    arm = next(one for one in found["metrics"]["loss"]["arms"] if one["arm"] == "learned")
    assert list(arm["values"].values()) == pytest.approx(learned, rel=1e-12)
    assert (arm["n"], arm["sd"]) == (3, pytest.approx(statistics.stdev(learned)))
    [contrast] = found["metrics"]["loss"]["contrasts"]
    sure = 1 - float(nominal_level(0.04, (3, 3)))  # a fifth of alpha is kept back for seeds that may be added
    interval = stats.ttest_ind(rotary, learned, equal_var=False).confidence_interval(sure)
    assert [contrast["low"], contrast["high"]] == pytest.approx([interval.low, interval.high], rel=1e-6)
    assert contrast["difference"] == pytest.approx(statistics.mean(rotary) - statistics.mean(learned))
    assert (contrast["word"], contrast["n"]) == ("exploratory", [3, 3])
    assert contrast["reason"] == "measured after the fact, not declared"

    shown = gpt2lab("eval", "--study", "tiny", "--metric", "top1", "--metric", "loss").out
    number = r"[+-]\d\.\d+"
    assert re.search(rf"  rotary - learned: {number} \[{number}, {number}\] \(n = 3, 3\), exploratory\n", shown)
    assert "0 values measured now, 12 read from the store" in shown
    assert not re.search("better|worse|no difference|inconclusive", shown)


def test_runs_that_cannot_be_measured_are_named_and_cost_no_others(
    gpt2lab: Call, trained: Call, tmp_path: Path
) -> None:
    runs = trained("--seeds", 2, steps=120)
    store = Store(tmp_path / "runs")
    gone, diverged = store.run(runs["learned"]["1"]), store.run(runs["rotary"]["0"])
    shutil.rmtree(gone.checkpoints)
    diverged.finish({**(diverged.result() or {}), "status": "diverged", "reason": "the loss is nan"})
    found = json.loads(gpt2lab("eval", "--study", "tiny", "--metric", "top1", "--json").out)
    assert [(one["arm"], one["seed"], one["status"]) for one in found["missing"]] == [
        ("learned", 1, "damaged"),
        ("rotary", 0, "diverged"),
    ]
    arms = {one["arm"]: one for one in found["metrics"]["top1"]["arms"]}
    assert (arms["learned"]["n"], arms["learned"]["missing"]) == (1, 1)
    assert (arms["rotary"]["n"], arms["rotary"]["failed"]) == (1, 1)
    answer = gpt2lab("eval", gone.id, "--metric", "loss")
    assert answer.code == 4 and "checkpoints: no checkpoint: the final weights are gone\n" in answer.err
    answer = gpt2lab("eval", diverged.id)
    assert answer.code == 2 and "it diverged: there are no final weights\n" in answer.err
    left = store.run(runs["learned"]["0"])
    [weights] = left.checkpoints.glob("*/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    answer = gpt2lab("eval", left.id, "--metric", "loss")
    assert answer.code == 4 and "model.safetensors is not what was written" in answer.err
    (left.path / "config.yaml").unlink()
    assert "config.yaml: is missing from a run that has ended" in gpt2lab("eval", left.id).err
    (left.path / "result.json").unlink()
    answer = gpt2lab("eval", left.id)
    assert answer.code == 2 and f"{left.id}: partial: only finished runs can be measured" in answer.err
    for told in (answer.err, gpt2lab("eval", gone.id, "--metric", "loss").err):
        assert "Traceback" not in told and told.count("\n") == 2


def test_runs_that_learned_nothing_count_as_failed_where_arms_are_compared(gpt2lab: Call, trained: Call) -> None:
    run = trained("--seeds", 1, steps=4)["learned"]["0"]
    answer = gpt2lab("eval", "--study", "tiny", "--metric", "top1")
    assert answer.code == 2 and "tiny@preset: no run can be measured (learned seed 0: it learned nothing" in answer.err
    assert gpt2lab("eval", run, "--metric", "top1").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one run, or one study, is expected"),
        (["abc", "--study", "tiny"], "one run, or one study, is expected"),
        (["zzz"], r"unknown run 'zzz' \(known: none\)"),
        (["--study", "nosuch"], r"unknown study 'nosuch' \(known: none\)"),
        (["zzz", "--metric", "top"], "--metric top: unknown metric 'top'; did you mean 'top1'"),
        (["zzz", "--metric", "calibration,bin=3"], "unknown option of metric calibration 'bin'; did you mean 'bins'"),
        (["zzz", "--metric", "calibration,bins=few"], "'few' does not fit"),
        (["zzz", "--tasks", "pica"], "--tasks: unknown task 'pica'; did you mean 'piqa'"),
        (["zzz", "--tasks", "arc_easy:spilt=test"], "unknown option of task arc_easy 'spilt'; did you mean 'split'"),
        (["zzz", "--tasks", "piqa"], "neither a run in runs begins with 'zzz', nor"),
        (["zzz", "--tasks", "piqa", "--metric", "loss"], "--tasks cannot be combined"),
        (["zzz", "--limit", "3"], "--limit applies to --tasks only"),
        (["--study", "tiny", "--corpus", "shakespeare"], "--corpus evaluates one model"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(gpt2lab: Call, words: list[str], said: str) -> None:
    answer = gpt2lab("eval", *words)
    assert answer.code == 2 and answer.out == ""
    assert re.fullmatch(rf"gpt2lab: error \[CONFIG\] .*{said}.*\ntry: .*\n", answer.err), answer.err


def test_a_metric_of_ones_own_is_measured_and_measured_again_when_it_is_edited(
    gpt2lab: Call, trained: Call, tmp_path: Path
) -> None:
    run = trained("--seeds", 2, steps=120)["learned"]["0"]

    def measured(name: str, text: str) -> dict[str, Any]:
        metric._components.pop("sharpness", None)
        return with_plugin(gpt2lab, tmp_path / f"{name}.py", text, run, "--metric", "sharpness,power=2")

    first = measured("first", METRIC)
    assert first["reused"] == 0 and 0 < first["values"]["sharpness(power=2.0)/mean"] < 1
    assert first["values"]["sharpness(power=2.0)/targets"] == 128
    assert measured("moved", METRIC.replace("Mean largest", "The mean largest"))["reused"] == 1
    edited = measured("edited", METRIC.replace(".max(-1).values", ".min(-1).values"))
    assert edited["reused"] == 0 and edited["values"] != first["values"]


TASK = '''
from gpt2lab import Task, choose, task, written


@task.register("letters", source="a test")
def letters(*, wrong: str = "zq") -> Task:
    """Which is a word?

    wrong: letters of the other.
    """
    rows = [{"word": word} for word in ("noble", "queen", "night", "sword", "love", "speak")]
    return Task(
        protocol="letters, a test",
        documents=lambda: written(rows),
        ask=lambda row: choose("and the", [row["word"], wrong * 3], 0),
    )
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "my_tasks.py"
    file.write_text(TASK)
    return file


def test_a_runs_tasks_are_computed_once_and_kept_below_it(
    gpt2lab: Call, trained: Call, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Store(tmp_path / "runs").run(trained()["learned"]["0"])
    before = (run.path / "result.json").read_bytes()
    words = ("eval", run.id[:9], "--tasks", "letters", "--plugin", plugin)
    answer = gpt2lab(*words, "--json")
    assert answer.code == 0, answer.err
    assert f"letters of {run.id}" in answer.err  # progress
    found = json.loads(answer.out)
    assert (found["source"], found["run"], found["limit"], found["reused"]) == (run.id, run.id, None, 0)
    [letters] = found["tasks"]
    assert (letters["task"], letters["protocol"], letters["questions"]) == ("letters", "letters, a test", 6)
    assert letters["figures"]["acc"]["value"] == 1.0 and letters["figures"]["acc"]["stderr"] == 0.0
    assert letters["figures"]["acc_norm"]["how"] == "highest sum of log-likelihoods per character of the choice"
    [kept] = (run.path / "evaluations").glob("task-letters-*.json")
    assert json.loads(kept.read_text())["values"]["letters/acc"] == 1.0
    with monkeypatch.context() as patch:
        patch.setattr("gpt2lab.reuse.evaluate.answer_task", lambda *_, **__: pytest.fail("computed twice"))
        assert json.loads(gpt2lab(*words, "--json").out) == {**found, "reused": 1}
        shown = gpt2lab(*words)
    assert re.search(r"letters +acc +1\.0000 +0\.0000 +6 *\n +acc_norm +1\.0000 +0\.0000", shown.out)
    assert "letters: letters, a test. acc: highest sum of log-likelihoods; acc_norm:" in shown.out
    other = json.loads(gpt2lab(*words, "--limit", "2", "--json").out)
    assert (other["reused"], other["tasks"][0]["questions"], other["limit"]) == (0, 2, 2)
    option = json.loads(gpt2lab("eval", run.id, "--tasks", "letters:wrong=e", "--plugin", plugin, "--json").out)
    assert option["tasks"][0]["task"] == "letters(wrong=e)" and option["reused"] == 0
    assert (run.path / "result.json").read_bytes() == before
    assert gpt2lab("report", "tiny").code == 0  # whose evaluation is the declared one still


def test_an_edited_task_is_asked_again_and_a_moved_one_is_not(gpt2lab: Call, trained: Call, tmp_path: Path) -> None:
    run = trained()["learned"]["0"]

    def asked(name: str, text: str) -> dict[str, Any]:
        task._components.pop("letters", None)
        return with_plugin(gpt2lab, tmp_path / f"{name}.py", text, run, "--tasks", "letters")

    assert asked("first", TASK)["reused"] == 0
    assert asked("moved", TASK.replace("Which is a word?", "Which one is a word?"))["reused"] == 1
    edited = asked("edited", TASK.replace("], 0),", "], 1),"))
    assert edited["reused"] == 0 and edited["tasks"][0]["figures"]["acc"]["value"] == 0.0
    assert asked("more", TASK.replace('"speak")', '"speak", "of")'))["reused"] == 0


def test_a_study_is_described_by_arm(gpt2lab: Call, trained: Call, plugin: Path) -> None:
    trained("--seeds", "2", steps=120)  # fewer, and they learned nothing that may be compared
    words = ("eval", "--study", "tiny", "--tasks", "letters", "--plugin", plugin)
    found = json.loads(gpt2lab(*words, "--json").out)
    assert (found["study"], found["missing"], found["reused"]) == ("tiny@preset", [], 0)
    assert list(found["metrics"]) == ["letters/acc", "letters/acc_norm"]
    arms = found["metrics"]["letters/acc"]["arms"]
    assert [(one["arm"], one["n"]) for one in arms] == [("learned", 2), ("rotary", 2)]
    assert found["metrics"]["letters/acc"]["contrasts"][0]["word"] == "exploratory"
    assert "0 values measured now, 4 read from the store" in gpt2lab(*words).out
    first = found["tasks"][0]
    assert (first["task"], first["arm"], first["runs"], first["questions"]) == ("letters/acc", "rotary", [2, 2], 6)
    assert first["word"] == "" and first["reason"].startswith("no smallest effect was declared before")
    declared = (*words, "--limit", "5", "--smallest-effect", "0.1")
    assert "letters/acc, rotary against learned: exploratory (fewer than 3 seeds), " in gpt2lab(*declared).out
    other = json.loads(gpt2lab(*declared[:-1], "0.2", "--json").out)
    assert other["tasks"][0]["reason"].startswith("no smallest effect was declared before")


def test_two_models_are_compared_on_the_same_questions(
    gpt2lab: Call, folder: Path, plugin: Path, tmp_path: Path
) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 50257}
    other = save_gpt2(build_model(ModelConfig.model_validate(sizes)), tmp_path / "other")
    words = ("eval", folder, "--against", other, "--tasks", "letters:wrong=of", "--plugin", plugin)
    found = json.loads(gpt2lab(*words, "--json").out)
    acc = found["contrasts"][0]
    values = [one["tasks"][0]["figures"]["acc"]["value"] for one in (found, found["against"])]
    assert acc["difference"] == pytest.approx(values[0] - values[1]) and acc["questions"] == 6
    assert list(acc["halfwidths"]) == ["questions"] and "training noise is not in the interval" in acc["reason"]
    assert "training noise is not in the interval" in " ".join(gpt2lab(*words).out.split())
    assert "apply to --tasks only" in gpt2lab("eval", folder, "--against", other, "--corpus", "shakespeare").err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights in Hugging Face's layout with GPT-2's vocabulary."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 50257}
    return save_gpt2(build_model(ModelConfig.model_validate(sizes)), tmp_path / "weights")


def test_a_folder_of_weights_is_asked_and_nothing_is_kept(gpt2lab: Call, folder: Path, plugin: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    for _ in range(2):
        answer = gpt2lab("eval", folder, "--tasks", "letters:wrong=zqzq", "--plugin", plugin, "--limit", "3", "--json")
        assert answer.code == 0, answer.err
        found = json.loads(answer.out)
        assert (found["run"], found["reused"], found["tasks"][0]["questions"]) == (None, 0, 3)
        assert found["tasks"][0]["cut"] == 3  # of 8 tokens
    assert sorted(path.name for path in folder.iterdir()) == before
    shown = gpt2lab("eval", folder, "--tasks", "letters:wrong=zqzq", "--plugin", plugin).out
    assert "6 of 6 questions are longer than the context and lose their beginning" in shown


def test_a_long_task_tells_how_far_it_is(
    gpt2lab: Call, folder: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.data.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 1)  # a line in each pass; the wrong answers share the longest
    answer = gpt2lab("eval", folder, "--tasks", "letters", "--plugin", plugin)
    told = [int(done) for done in re.findall(rf"letters of {folder}: (\d+) of 12(?:, \d+:\d\d left)?\n", answer.err)]
    assert told == sorted(told) and told[0] == 6 and told[-1] == 12


def test_a_folder_is_measured_on_other_text(gpt2lab: Call, folder: Path, text: Path) -> None:
    answer = gpt2lab("eval", folder, "--corpus", text, "--json")
    assert answer.code == 0, answer.err
    values = json.loads(answer.out)["values"]
    assert list(values) == ["loss", "perplexity", "bits_per_byte"]
    assert values["loss"] == pytest.approx(10.82, abs=0.1)  # of weights that learned nothing: ln 50257
    plain = gpt2lab("eval", folder, "--corpus", text, "--metric", "loss").out
    assert plain == f"loss: {values['loss']:.6g}\n"


def test_asking_on_the_way_changes_no_bit(
    gpt2lab: Call, ablation: Path, plugin: Path, tmp_path: Path, inline: list[str]
) -> None:
    preset = ablation.with_name("preset.yaml")
    config = preset.read_text().replace("n_embd: 16,", "n_embd: 16, dropout: 0.1,")
    weights, rows = [], []
    for number, more in enumerate(("", "tasks: [letters], task_documents: 4, ")):
        preset.write_text(config.replace("evaluation: {", f"evaluation: {{{more}"))
        runs = tmp_path / f"runs{number}"
        answer = gpt2lab("train", preset, "--no-tracking", "--plugin", plugin, "--runs", runs)
        assert answer.code == 0, answer.err
        [run] = Store(runs).runs()
        [file] = run.checkpoints.glob("*/model.safetensors")
        weights.append((run.id, file.read_bytes()))
        rows.append({row["step"]: row["metrics"] for row in run.rows()})
    assert weights[0] == weights[1]
    plain, asked = rows
    assert {step: {k: v for k, v in one.items() if not k.startswith("task/")} for step, one in asked.items()} == plain
    added = {step: sorted(one.keys() - plain[step].keys()) for step, one in asked.items()}
    evaluated = {step for step, one in plain.items() if "val/loss" in one}
    assert evaluated == {0, 1, 2, 3, 4}
    assert added == {step: ["task/letters/acc", "task/letters/acc_norm"] for step in evaluated}
