"""Old runs and new code: what differs is named, and runs are kept only if the new code trains the same bits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from workers import replace_in

from gpt2lab.data.prepared import list_prepared
from gpt2lab.reuse import adopt as adopting
from gpt2lab.reuse.adopt import _recipe, same_bits
from gpt2lab.runner import Job, StopRequest, execute
from gpt2lab.store import RunFolder, Store, file_lock
from gpt2lab.training.checkpoints import MODEL, OPTIMIZER, save, write_manifest

Call = Callable[..., tuple[int, str]]

PART = """
from torch import nn
from gpt2lab.components import mlp


@mlp.register("mine", source="a test")
class Mine(nn.Module):
    \"\"\"One hidden layer.\"\"\"

    def __init__(self, site):
        super().__init__()
        width = site.dims.n_embd
        self.c_fc = site.linear(width, 2 * width)
        self.c_proj = site.linear(2 * width, width, "residual_out")

    def forward(self, x, step):
        return ACTIVATE
"""
RELU = "self.c_proj(self.c_fc(x).relu())"
SAME = "self.c_proj(nn.functional.relu(self.c_fc(x)))"
OTHER = "self.c_proj(nn.functional.gelu(self.c_fc(x)))"


@pytest.fixture
def mine(tiny: Path) -> Path:
    """The tiny ablation with an arm of a plug-in's; -> the plug-in."""
    plugin = tiny.parent / "mine.py"
    plugin.write_text(PART.replace("ACTIVATE", RELU))
    replace_in(tiny, ("rotary: {model.position: rotary}", "mine: {model.mlp: mine}"))
    replace_in(tiny.parent / "tiny.yaml", ("steps: 24", "steps: 40"))
    return plugin


def started(tiny: Path, *words: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, since code that was imported stays as it was."""
    command = [sys.executable, "-c", "from gpt2lab.cli import main; main()", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tiny.parent)


def said_by(process: subprocess.Popen[str], code: int = 0) -> str:
    said = process.communicate(timeout=180)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    return " ".join(said.split())


def call(tiny: Path, *words: str, code: int = 0) -> str:
    return said_by(started(tiny, *words), code)


def last_line(said: str) -> str:
    """What a command said of the whole study; without a kept run, in the words of one that kept some."""
    return said[said.rindex("tiny@tiny: ") :].replace("nothing to keep", "0 runs kept")


def contents(root: Path) -> dict[str, bytes]:
    """Every file of every run but locks, which processes write their names into."""
    files = (path for run in Store(root).runs() for path in run.path.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != "lock"}


@pytest.mark.slow
def test_runs_are_kept_if_and_only_if_the_new_code_trains_the_same_bits(tiny: Path, mine: Path, gpt2lab: Call) -> None:
    study = (str(tiny), "--plugin", str(mine))
    call(tiny, "run", *study, "--no-tracking", "--jobs", "2")
    store = Store(tiny.parent / "runs")
    old = store.study("tiny")["arms"]["mine"]["runs"]
    assert (store.run(old["0"]).replay / "step_000020").is_dir() and not store.run(old["1"]).replay.exists()

    # written otherwise, the same in every bit
    mine.write_text(PART.replace("ACTIVATE", SAME))
    before = contents(store.root)
    both = [started(tiny, "adopt", *study) for _ in range(2)]  # at the same time: each run is kept once
    answers = [said_by(process) for process in both]
    assert sum(int(line.partition(" kept")[0].split()[-2]) for line in map(last_line, answers)) == 2, answers
    assert before.items() <= contents(store.root).items()
    assert len(store.runs()) == 6
    said = call(tiny, "run", *study, "--no-tracking")
    assert "4 runs found finished, 0 trained now" in said
    new = store.study("tiny")["arms"]["mine"]["runs"]
    assert set(new.values()).isdisjoint(old.values())
    record = store.run(new["1"]).identity()
    assert record is not None and record["adopted_from"] == old["1"] and record["id"] == new["1"]
    assert f"taken over from {old['1']}" in (tiny.parent / "reports/tiny@tiny/report.md").read_text()
    assert store.run(new["1"]).rows() == store.run(old["1"]).rows()

    # in effect another activation: refused, at the first step that shows it
    mine.write_text(PART.replace("ACTIVATE", OTHER))
    said = call(tiny, "adopt", *study, code=1)
    assert "mine: refused: step 1: train/loss is" in said
    assert len(store.runs()) == 6

    # and why the first and the kept ones are different runs
    _, said = gpt2lab("why", old["0"], new["0"])
    said = " ".join(said.split())
    assert "code of mlp=mine: plugin.Mine changed" in said
    assert "- return self.c_proj(self.c_fc(x).relu())" in said
    assert "+ return self.c_proj(nn.functional.relu(self.c_fc(x)))" in said


# The same in this process: runs are trained by the code that is there, and then it is said to be another one.


@pytest.fixture
def recoded(
    tiny: Path, gpt2lab: Call, inline: list[str], once: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Store]:
    """Train the tiny ablation in so many steps, then let the core's code have another hash; -> the store."""

    def train(steps: int = 40, *words: str) -> Store:
        pairs = ("steps: 24", f"steps: {steps}"), ("checkpoint_every_steps: 6", "checkpoint_every_steps: 20")
        replace_in(tiny.parent / "tiny.yaml", *pairs)

        def first() -> None:
            code, said = gpt2lab("run", str(tiny), "--no-tracking", *words)
            assert code == 0, said

        once(f"adopt {steps} {words}", tiny.parent, first)
        monkeypatch.setattr("gpt2lab.identity.core_code", lambda: "c" * 64)
        return Store(tiny.parent / "runs")

    return train


def old_run(store: Store, arm: str = "learned", seed: str = "0") -> RunFolder:
    return store.run(store.study("tiny")["arms"][arm]["runs"][seed])


def test_kept_runs_are_whole_share_their_weights_and_leave_the_old_ones_alone(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store], inline: list[str]
) -> None:
    store = recoded()
    before, first = contents(store.root), old_run(store)
    first.write_evaluation({"key": "another-0123"})
    code, said = gpt2lab("adopt", str(tiny), "--dry-run")
    assert code == 0 and said.count("differs in code alone") == 4 and f"{first.id} can be replayed" in said
    assert contents(store.root).keys() - before.keys() == {str(first.path / "evaluations" / "another-0123.json")}
    code, said = gpt2lab("adopt", str(tiny))
    assert code == 0 and "tiny@tiny: 4 runs kept" in said, said
    assert before.items() <= contents(store.root).items()
    del inline[:]
    code, said = gpt2lab("run", str(tiny), "--no-tracking")
    assert "4 runs found finished, 0 trained now" in said and not inline
    new = old_run(store)
    assert new.id != first.id and new.status() == "finished" and new.rows() == first.rows()
    assert {path.name for path in (new.path / "evaluations").glob("*.json")} == {
        f"{store.study('tiny')['evaluation']['key']}.json"  # what was not repeated is not taken over
    }
    for inside in ("checkpoints/step_000040", "replay/step_000020"):
        assert (new.path / inside / MODEL).samefile(first.path / inside / MODEL)
    assert not new.metrics.samefile(first.metrics)
    record, old = new.identity(), first.identity()
    assert record is not None and old is not None and record["identity"]["core"] == "c" * 64
    assert record["adopted_from"] == first.id and record["first_created"] == old["created"]
    assert not list(store.root.glob(".*.partial"))
    code, said = gpt2lab("adopt", str(tiny))
    assert code == 0 and "nothing to keep" in said


def edit_rows(run: RunFolder, step: int, metric: str) -> None:
    """The next floating-point number in the place of one that was logged, with the sum that a worker would write."""
    rows, result = run.rows(), run.result() or {}
    metrics = next(row["metrics"] for row in rows if row["step"] == step)
    metrics[metric] = math.nextafter(metrics[metric], math.inf)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.finish(result)


def without_config(run: RunFolder) -> None:
    """As a run of an older version, which kept no sums, from which somebody removed the config."""
    result = run.result() or {}
    (run.path / "result.json").write_text(json.dumps({k: v for k, v in result.items() if not k.endswith("sha256")}))
    (run.path / "config.yaml").unlink()


def edit_tensor(run: RunFolder, file: str, name: str) -> None:
    """The last bit of a weight, or of a number of the optimizer's state."""
    [folder] = run.checkpoints.iterdir()
    tensors = load_file(folder / file)
    tensors[name].view(torch.int32).reshape(-1)[3] ^= 1
    save_file(tensors, folder / file, metadata={"format": "pt"})
    write_manifest(folder, 40)


def edit_evaluation(run: RunFolder, windows: bool = False) -> None:
    [key] = run.evaluation_keys()
    record = (run.windows(key) if windows else run.evaluation(key)) or {}
    if windows:
        record["losses"][0] += 1e-7
        run.write_windows(record)
    else:
        record["metrics"]["val/loss"] = math.nextafter(record["metrics"]["val/loss"], 0)
        run.write_evaluation(record)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda run: edit_rows(run, 1, "train/loss"), "step 1: train/loss is"),
        (lambda run: edit_rows(run, 40, "train/grad_norm"), "step 40: train/grad_norm is"),
        (lambda run: edit_rows(run, 13, "train/lr"), "step 13: train/lr is"),  # a step that is not trained again
        (lambda run: edit_tensor(run, MODEL, "wte.weight"), "after step 40 model.wte.weight differs in 1 of"),
        (
            lambda run: edit_tensor(run, OPTIMIZER, "optimizers.0.state.0.exp_avg"),
            "after step 40 optimizers.0.state.0.exp_avg differs in 1 of",
        ),
        (edit_evaluation, "the final evaluation gives other metrics"),
        (lambda run: edit_evaluation(run, windows=True), "other losses of single windows"),
        (lambda run: shutil.rmtree(run.checkpoints), "its final weights are gone"),
        (without_config, "its config is gone"),
    ],
    ids=["first loss", "last norm", "rate", "weight", "moment", "evaluation", "window", "no weights", "no config"],
)
def test_one_bit_that_differs_refuses_the_arm_and_no_other(
    edit: Callable[[RunFolder], Any], told: str, tiny: Path, gpt2lab: Call, recoded: Callable[..., Store]
) -> None:
    """The old run is edited rather than the code: a replay cannot tell one from the other."""
    store = recoded(40, "--seeds", "1")
    edit(old_run(store))
    code, said = gpt2lab("adopt", str(tiny), "--seeds", "1")
    assert code == 1 and "Traceback" not in said
    [refused] = [line for line in said.splitlines() if line.startswith("learned: refused: ")]
    assert told in refused
    assert "rotary: 1 run kept" in said and len(store.runs()) == 3


def test_a_short_run_is_replayed_whole_without_a_checkpoint(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store]
) -> None:
    store = recoded(12)
    assert not any(run.replay.exists() for run in store.runs())
    edit_rows(old_run(store), 9, "train/loss")
    code, said = gpt2lab("adopt", str(tiny))
    assert code == 1 and "rotary: 2 runs kept" in said
    assert "learned: refused: step 9: train/loss is" in said and "apart)" in said


def test_code_that_fails_or_builds_another_model_is_refused_in_a_line(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recoded(40, "--seeds", "1")
    shutil.rmtree(old_run(store, "rotary").replay)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("gpt2lab.reuse.adopt.build_model", broken)
    code, said = gpt2lab("adopt", str(tiny), "--seeds", "1")
    assert code == 1 and "Traceback" not in said
    assert "learned: refused: it fails with RuntimeError: no such kernel" in said
    assert "rotary: refused: no run of this kind kept a checkpoint to replay from" in said
    assert "nothing to keep" in said and len(store.runs()) == 2


def test_what_is_killed_while_it_keeps_a_run_leaves_nothing_and_can_be_repeated(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recoded(12, "--seeds", "1")
    share, left = adopting._share, iter(range(3))

    def killed(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        share(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("gpt2lab.reuse.adopt._share", killed)
        patched.setattr("gpt2lab.reuse.adopt.shutil.rmtree", lambda *_, **__: None)  # a kill tidies nothing up
        assert gpt2lab("adopt", str(tiny), "--seeds", "1")[0] == 130
    assert len(list(store.root.glob(".*.partial"))) == 1
    assert [run.status() for run in store.runs()].count("absent") == 1
    code, said = gpt2lab("adopt", str(tiny), "--seeds", "1")
    assert code == 0 and "2 runs kept" in said
    assert not list(store.root.glob(".*.partial"))
    assert [run.status() for run in store.runs()] == ["finished"] * 4


def test_a_run_that_another_process_works_on_or_began_is_left_to_it(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recoded(12, "--seeds", "1")
    taken = adopting.groups

    def meanwhile(plan: Any, inside: Store) -> Any:
        found = taken(plan, inside)
        for group in found:
            for candidate in group.candidates:
                if candidate.new.arm == "learned":
                    target = inside.run(candidate.new.id).path
                    stack.append(file_lock(target / "lock"))
                    stack[-1].__enter__()
                else:
                    inside.run(candidate.new.id).write_config("begun")
        return found

    stack: list[Any] = []
    monkeypatch.setattr("gpt2lab.reuse.adopt.groups", meanwhile)
    code, said = gpt2lab("adopt", str(tiny), "--seeds", "1")
    for lock in stack:
        lock.__exit__(None, None, None)
    assert code == 0 and said.count(": another process was there first") == 2
    assert len(stack) == 1 and sum(run.status() == "finished" for run in store.runs()) == 2
    assert "rotary: 1 due, already begun under its new id" in gpt2lab("adopt", str(tiny), "--seeds", "1")[1]


def test_arms_without_old_runs_are_told(tiny: Path, gpt2lab: Call, recoded: Callable[..., Store]) -> None:
    recoded(12)
    replace_in(tiny, ("seeds: 2", "  plain: {model.norm: rmsnorm}\nseeds: 2"))
    code, said = gpt2lab("adopt", str(tiny), "--dry-run")
    assert code == 0 and "plain: 2 due, no finished run differs in code alone" in said


@pytest.mark.slow
def test_studies_in_stages_are_adopted_stage_by_stage(
    tiny: Path, gpt2lab: Call, recoded: Callable[..., Store], inline: list[str]
) -> None:
    """Rates are found first, then come all looks; a replayed run of the last stage speaks for the trials too."""
    head = tiny.read_text().partition("baseline:")[0]
    arms = "baseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\n"
    tiny.write_text(head + arms + "seeds: 4\nlooks: [3, 4]\ntune: {grid: {optim.lr: [0.5x, 1x, 2x]}}\n")
    replace_in(tiny.parent / "tiny.yaml", ("batch_tokens: 64", "batch_tokens: 256"))
    store = recoded(100)
    trained = len(inline)
    assert max(len(arm["runs"]) for arm in store.study("tiny")["arms"].values()) == 4  # the second look was needed
    del inline[:]
    code, said = gpt2lab("adopt", str(tiny))
    assert code == 0 and f"tiny@tiny: {trained} runs kept" in said, said
    code, said = gpt2lab("run", str(tiny), "--no-tracking")
    assert code == 0 and not inline, said
    assert len(store.runs()) == 2 * trained


def test_the_checkpoint_to_replay_from_survives_a_kill_at_its_own_step(
    tiny: Path, recoded: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both checkpoints are due at step 20; who continues from the ordinary one does not come by again."""
    store = recoded(40, "--seeds", "1")
    old = old_run(store)
    identity, config = old.identity(), old.config()
    assert identity is not None and config is not None
    [data] = [path for path, one in list_prepared() if getattr(one, "fingerprint", "") == identity["identity"]["data"]]
    job = Job(str(tmp_path / "again"), old.id, config, identity["identity"], str(data), 1.0, 1, replayable=True)

    def killed(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gpt2lab.runner.training.save", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(job, StopRequest())
    assert execute(job, StopRequest())
    again = Store(tmp_path / "again").run(old.id)
    manifests = [(run.replay / "step_000020" / MODEL).read_bytes() for run in (old, again)]
    assert manifests[0] == manifests[1]
    assert [path.name for path in again.checkpoints.iterdir()] == ["step_000040"]


def test_one_replay_speaks_for_other_seeds_and_rates_and_for_nothing_else() -> None:
    identity: dict[str, Any] = {
        "settings": {"model": {"n_layer": 2}, "optim": {"lr": 1e-2, "warmup_steps": 4}, "training": {"steps": 24}},
        "seed": 0, "repeat": 0, "data": "d", "torch": "2", "device": "cpu", "threads": 1, "core": "c",
        "components": {"mlp=mine": "m"},
    }  # fmt: skip
    faster = {**identity["settings"], "optim": {"lr": 2e-2, "warmup_steps": 8}}
    assert _recipe({**identity, "seed": 3, "repeat": 1, "settings": faster}) == _recipe(identity)
    deeper = {**identity["settings"], "model": {"n_layer": 3}}
    others: list[dict[str, Any]] = [
        {"torch": "3"}, {"threads": 2}, {"device": "cuda"}, {"data": "e"}, {"core": "b"}, {"settings": deeper},
    ]  # fmt: skip
    assert all(_recipe(identity | other) != _recipe(identity) for other in others)


def test_bits_are_compared_not_values() -> None:
    x = torch.tensor([0.0, 1.0])
    assert same_bits(x, x.clone()) and same_bits({"lr": 0.1}["lr"], 0.1)
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(x, torch.tensor([-0.0, 1.0]))
    assert not same_bits(x, x.double()) and not same_bits(x, x.reshape(2, 1)) and not same_bits(1, 1.0)
