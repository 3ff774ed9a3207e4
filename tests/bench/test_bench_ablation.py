"""`benchmarks ablation`: the same runs packed and one after another, with nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_ablation

from benchmarks import ablation
from benchmarks.ablation import Packing, Way, show_packing
from gpt2lab.basics.cores import usable_cores
from gpt2lab.config import load_config
from gpt2lab.data.shards import prepare

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command, for two runs of five steps."""
    tiny = ["ablation", str(write_ablation(tmp_path)), "--scale", str(tmp_path / "tiny.yaml")]
    return [*tiny, "--arms", "learned,rotary", "--seeds", "1", "--steps", "5"]


@pytest.mark.slow
def test_both_ways_train_the_same_runs_and_leave_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(ablation, "PAIRS", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = call(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "Traceback" not in err and "rotary" in err
    cores = usable_cores()
    assert (found["arms"], found["runs"], found["steps"]) == (["learned", "rotary"], 2, 5)
    assert (found["packed"]["jobs"], found["packed"]["threads"]) == (cores, 1)
    assert (found["serial"]["jobs"], found["serial"]["threads"]) == (1, cores)
    assert found["ratio"] == pytest.approx(found["serial"]["seconds"] / found["packed"]["seconds"])
    assert all(found[way]["training_seconds"] > 0 for way in ("packed", "serial"))
    assert 0 < found["start_up"]["warm"] < found["start_up"]["cold"]
    assert sorted(tmp_path.iterdir()) in (before, sorted([*before, tmp_path / "data-home"]))
    assert not list((tmp_path / "temporary").glob("gpt2lab-*"))


@pytest.mark.slow
def test_a_run_that_fails_is_told_in_a_line(words: list[str], monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setenv("GPT2LAB_FAULT", "raise@step:2")
    code, _, said = call(*words)
    assert code == 3
    assert "benchmarks ablation: a run did not get to its end: InjectedFault: injected at step" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "train.py: there is no such file"),
        ("raise SystemExit('no such option')", "train.py failed: no such option"),
    ],
)
def test_a_checkout_that_cannot_train_is_named(
    script: str | None, said: str, words: list[str], tmp_path: Path, call: Call
) -> None:
    if script is not None:
        (tmp_path / "train.py").write_text(script)
    code, _, err = call(*words, "--nanogpt", str(tmp_path))
    assert code == (2 if script is None else 3) and said in err and "Traceback" not in err


@pytest.mark.slow
def test_nanogpts_script_gets_the_same_sizes_and_text(words: list[str], tmp_path: Path, call: Call) -> None:
    given, tokens = tmp_path / "given.txt", tmp_path / "tokens.txt"
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        f"open({str(given)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "folder = dict(word[2:].split('=') for word in sys.argv[1:])['dataset']\n"
        f"open({str(tokens)!r}, 'w').write(str(os.path.getsize(f'{{folder}}/train.bin') // 2))\n"
    )
    code, out, err = call(*words, "--nanogpt", str(tmp_path), "--json")
    assert code == 0, err
    found, config = json.loads(out), load_config(tmp_path / "tiny.yaml")
    assert found["nanogpt_ratio"] == pytest.approx(found["nanogpt"]["seconds"] / found["packed"]["seconds"])
    assert (found["nanogpt"]["jobs"], found["nanogpt"]["threads"]) == (1, usable_cores())
    runs = [dict(word[2:].split("=") for word in line.split()) for line in given.read_text().splitlines()]
    assert len(runs) == 2 and runs[0] == runs[1]
    sizes = [int(runs[0][name]) for name in ("n_layer", "n_embd", "block_size", "max_iters")]
    assert sizes == [config.model.n_layer, config.model.n_embd, config.model.block_size, 5]
    assert int(runs[0]["batch_size"]) * config.model.block_size == config.training.batch_tokens
    assert int(tokens.read_text()) == len(prepare(config.data).train)


def test_the_table_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    packed = Way(jobs=2, threads=1, seconds=100.0, training_seconds=150.0)
    serial = Way(jobs=1, threads=2, seconds=125.0, training_seconds=90.0)
    start_up = {"cold": 2.5, "warm": 0.05}
    show_packing(
        Packing(ablation="a@b", arms=("x",), runs=9, steps=440, packed=packed, serial=serial, start_up=start_up)
    )
    said = capsys.readouterr().out
    assert "a@b: 9 runs of 440 steps are done 1.25 times as fast packed as one after another\n" in said
    assert "nanoGPT" not in said
    script = Way(jobs=1, threads=2, seconds=150.0)
    show_packing(
        Packing(
            ablation="a@b", arms=("x",), runs=9, steps=440, packed=packed, serial=serial, nanogpt=script,
            start_up=start_up,
        )
    )  # fmt: skip
    assert "as one after another, 1.50 times as fast as by nanoGPT's script\n" in capsys.readouterr().out
    assert "after 0.05 s, in a process from scratch after 2.50 s" in said
