"""`benchmarks ablation`: the same runs packed and one after another, with nothing left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import ablation
from benchmarks.ablation import Packing, Way, show_packing
from gpt2lab.basics.cores import usable_cores

Call = Callable[..., tuple[int, str, str]]
PRESET = """
model: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256, dropout: 0}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: 100000, batch_tokens: 64, threads: 1, checkpoint_every_steps: 6, device: cpu}}
evaluation: {{every_steps: 8, tokens: 256, context_tokens: 64}}
scale: {{smallest_effect: 0.05}}
"""
ABLATION = """
ablation: tiny
question: Does rotary help a tiny model?
base: {base}
baseline: learned
arms:
  learned: {{}}
  rotary: {{model.position: rotary}}
  none: {{model.position: none}}
seeds: 2
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    dice = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(dice.choice(["noble", "queen", "night", "sword"]) for _ in range(2000)))
    (tmp_path / "tiny.yaml").write_text(PRESET.format(text=text))
    file = tmp_path / "ablation.yaml"
    file.write_text(ABLATION.format(base=tmp_path / "tiny.yaml"))
    return file


@pytest.mark.slow
def test_both_ways_train_the_same_runs_and_leave_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(ablation, "PAIRS", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    words = ("--scale", str(tmp_path / "tiny.yaml"), "--arms", "learned,none", "--seeds", "1", "--steps", "5", "--json")
    code, out, err = call("ablation", str(tiny), *words)
    assert code == 0, err
    found = json.loads(out)
    assert "Traceback" not in err and "none" in err
    cores = usable_cores()
    assert (found["arms"], found["runs"], found["steps"]) == (["learned", "none"], 2, 5)
    assert (found["packed"]["jobs"], found["packed"]["threads"]) == (cores, 1)
    assert (found["serial"]["jobs"], found["serial"]["threads"]) == (1, cores)
    assert found["ratio"] == pytest.approx(found["serial"]["seconds"] / found["packed"]["seconds"])
    assert all(found[way]["training_seconds"] > 0 for way in ("packed", "serial"))
    assert 0 < found["start_up"]["warm"] < found["start_up"]["cold"]
    assert sorted(tmp_path.iterdir()) in (before, sorted([*before, tmp_path / "data-home"]))
    assert not list((tmp_path / "temporary").glob("gpt2lab-*"))


@pytest.mark.slow
def test_a_run_that_fails_is_told_in_a_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("GPT2LAB_FAULT", "raise@step:2")
    words = ("--scale", str(tmp_path / "tiny.yaml"), "--arms", "learned,none", "--seeds", "1", "--steps", "5")
    code, _, said = call("ablation", str(tiny), *words)
    assert code == 3
    assert "benchmarks ablation: a run did not get to its end: InjectedFault: injected at step" in said
    assert "Traceback" not in said


def test_the_table_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    packed = Way(jobs=2, threads=1, seconds=100.0, training_seconds=150.0)
    serial = Way(jobs=1, threads=2, seconds=125.0, training_seconds=90.0)
    start_up = {"cold": 2.5, "warm": 0.05}
    show_packing(
        Packing(ablation="a@b", arms=("x",), runs=9, steps=440, packed=packed, serial=serial, start_up=start_up)
    )
    said = capsys.readouterr().out
    assert "a@b: 9 runs of 440 steps are done 1.25 times as fast packed" in said
    assert "after 0.05 s, in a process from scratch after 2.50 s" in said
