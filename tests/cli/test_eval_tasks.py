"""Tasks put to runs, studies and folders of weights: what is asked, kept, read again, shown, mirrored and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.evaluation import task
from gpt2lab.evaluation.tasks import TOKENS_AT_ONCE
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.pretrained import save_gpt2
from gpt2lab.store import Store

Call = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_plugins_after", "no_tasks_after")

OWN = '''
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
def no_tasks_after() -> Iterator[None]:
    before = dict(task._components)
    yield
    task._components = before


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "my_tasks.py"
    file.write_text(OWN)
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
        patch.setattr("gpt2lab.evaluation.runs.answer_task", lambda *_, **__: pytest.fail("computed twice"))
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
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        task._components.pop("letters", None)
        answer = gpt2lab("eval", run, "--plugin", file, "--tasks", "letters", "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)  # type: ignore[no-any-return]

    assert asked("first", OWN)["reused"] == 0
    assert asked("moved", OWN.replace("Which is a word?", "Which one is a word?"))["reused"] == 1
    edited = asked("edited", OWN.replace("], 0),", "], 1),"))
    assert edited["reused"] == 0 and edited["tasks"][0]["figures"]["acc"]["value"] == 0.0
    assert asked("more", OWN.replace('"speak")', '"speak", "of")'))["reused"] == 0


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
    monkeypatch.setattr("gpt2lab.cli.eval.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 1)  # a line in each pass; the wrong answers share the longest
    answer = gpt2lab("eval", folder, "--tasks", "letters", "--plugin", plugin)
    told = [int(done) for done in re.findall(rf"letters of {folder}: (\d+) of 12\n", answer.err)]
    assert told == sorted(told) and told[0] == 6 and told[-1] == 12


def test_a_folder_is_measured_on_other_text(gpt2lab: Call, folder: Path, text: Path) -> None:
    answer = gpt2lab("eval", folder, "--corpus", text, "--json")
    assert answer.code == 0, answer.err
    values = json.loads(answer.out)["values"]
    assert list(values) == ["loss", "perplexity", "bits_per_byte"]
    assert values["loss"] == pytest.approx(10.82, abs=0.1)  # of weights that learned nothing: ln 50257
    plain = gpt2lab("eval", folder, "--corpus", text, "--metric", "loss").out
    assert plain == f"loss: {values['loss']:.6g}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "piqa"], "one run, or one study, is expected"),
        (["zzz", "--tasks", "pica"], "--tasks: unknown task 'pica'; did you mean 'piqa'"),
        (["zzz", "--tasks", "arc_easy:spilt=test"], "unknown option of task arc_easy 'spilt'; did you mean 'split'"),
        (["zzz", "--tasks", "piqa"], "neither a run in runs begins with 'zzz', nor"),
        (["zzz", "--tasks", "piqa", "--metric", "loss"], "--tasks stands by itself"),
        (["zzz", "--limit", "3"], "--limit is about --tasks"),
        (["--study", "tiny", "--corpus", "shakespeare"], "--corpus is about one model"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(gpt2lab: Call, words: list[str], said: str) -> None:
    answer = gpt2lab("eval", *words)
    assert answer.code == 2 and answer.out == ""
    assert re.fullmatch(rf"gpt2lab: error \[CONFIG\] .*{said}.*\ntry: .*\n", answer.err), answer.err


def test_asking_on_the_way_changes_no_bit(gpt2lab: Call, ablation: Path, plugin: Path, tmp_path: Path) -> None:
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
