"""Checkpoints: exact resume, damage, other architectures, full disks, kills, and files that want to run code."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import fresh, training

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.store import sweep_leftovers
from gpt2lab.training import TrainState, checkpoints, load_latest, prune, save
from gpt2lab.training.checkpoints import best_step, join_tree, split_tree, write_manifest
from gpt2lab.training.precision import loss_scaler

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def train(state: TrainState, to: int, micro: int | None = None) -> list[float]:
    """Go on to that step of twelve; -> losses."""
    return [r.metrics["train/loss"] for r in training(state, steps=12, stop_at=to, micro_batch_sequences=micro)]


def everything(state: TrainState) -> dict[str, Any]:
    """All that a state holds, ready for comparison bit by bit; without the seconds."""
    content = state.state_dict()
    moments = [
        (place, index, name, value.tolist())
        for place, optimizer in enumerate(content["optimizers"])
        for index, values in optimizer["state"].items()
        for name, value in values.items()
    ]
    groups = [optimizer["param_groups"] for optimizer in content["optimizers"]]
    weights = {name: tensor.tolist() for name, tensor in content["model"].items()}
    return {"weights": weights, "moments": moments, "groups": groups, "step": state.step, "tokens": state.tokens}


def small(**changes: Any) -> TrainState:
    """A new training state of a very small model."""
    return fresh(**{"n_layer": 1, "n_head": 1, "n_embd": 4, **changes})


@pytest.fixture
def trained() -> TrainState:
    """A very small model; with `folder`, at step 6."""
    return small()


@pytest.fixture
def folder(tmp_path: Path, trained: TrainState) -> Path:
    """Checkpoints of its steps 2, 4 and 6."""
    for step in (2, 4, 6):
        train(trained, step)
        save(tmp_path / "checkpoints", trained, extra={"run": "abc", "at": step})
    return tmp_path / "checkpoints"


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("micro", [None, 2])
def test_resume_is_exact(tmp_path: Path, micro: int | None) -> None:
    """12 steps with dropout at once, and 5 + 7 through a checkpoint in a fresh model: the same bits."""
    whole = fresh(dropout=0.1)
    losses = train(whole, 12, micro=micro)
    first = fresh(dropout=0.1)
    assert train(first, 5, micro=micro) == losses[:5]
    save(tmp_path, first)

    torch.manual_seed(999)
    second = fresh(seed=2, dropout=0.1)
    loaded = load_latest(tmp_path, second)
    assert loaded is not None
    assert (loaded.step, loaded.lost_steps, str(loaded)) == (5, 0, "continuing from step 5")
    assert everything(second) == everything(first)
    assert second.seconds == first.seconds
    assert train(second, 12, micro=micro) == losses[5:]
    assert everything(second) == everything(whole)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_saved_while_the_next_step_is_under_way_resumes_exactly(tmp_path: Path, precision: str) -> None:
    """As on a GPU: the record of a step comes when forward and backward of the next are done already."""
    how: dict[str, Any] = {"steps": 12, "precision": precision, "late": True}
    whole, second = (fresh(seed=seed, dropout=0.1) for seed in (1, 2))
    for state in (whole, second):
        state.scaler = loss_scaler(how["precision"], torch.device("cpu"))
    for record in training(whole, **how):
        if record.step == 5:
            save(tmp_path, whole)
    assert load_latest(tmp_path, second) is not None
    assert [record.step for record in training(second, **how)] == list(range(6, 13))
    assert everything(second) == everything(whole)
    assert second.state_dict()["scaler"] == whole.state_dict()["scaler"]
    assert second.guard.state_dict() == whole.guard.state_dict()


@pytest.mark.parametrize("lost", ["weights", "optimizer", "step", "dropout seed"])
def test_resume_needs_every_part(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exactness test would see if one part were not saved or seeded: it must be able to fail."""
    whole = fresh(dropout=0.1)
    train(whole, 12)
    first, second = fresh(dropout=0.1), fresh(seed=2, dropout=0.1)
    train(first, 5)
    save(tmp_path, first)
    if lost == "dropout seed":
        monkeypatch.setattr("gpt2lab.training.loop.reseed", lambda *where: None)
    assert load_latest(tmp_path, second) is not None
    if lost == "weights":
        second.model.load_state_dict(fresh(seed=2).model.state_dict())
    elif lost == "optimizer":
        second.optimizers[0].state.clear()
    elif lost == "step":
        second.step = 4
    train(second, 12)
    assert everything(second)["weights"] != everything(whole)["weights"]


def test_what_a_checkpoint_holds(folder: Path, trained: TrainState) -> None:
    assert names(folder) == ["step_000002", "step_000004", "step_000006"]
    newest = folder / "step_000006"
    assert names(newest) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert load_file(newest / "model.safetensors").keys() == trained.model.state_dict().keys()
    written = json.loads((newest / "state.json").read_text())
    assert (written["step"], written["tokens"], written["extra"]) == (6, 6 * 64, {"run": "abc", "at": 6})
    assert written["guard"] == trained.guard.state_dict()
    assert written["scaler"] is None
    assert written["random"].startswith("not stored: every micro-step seeds it")
    moments = load_file(newest / "optimizer.safetensors")
    first = trained.optimizers[0].state_dict()["state"][0]
    assert torch.equal(moments["optimizers.0.state.0.exp_avg"], first["exp_avg"])
    assert len(moments) == 3 * len(list(trained.model.parameters()))  # step, exp_avg, exp_avg_sq


def test_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / ".step_000009.0a1b2c3d.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_latest(tmp_path, small()) is None
    assert load_latest(tmp_path / "missing", small()) is None


@pytest.mark.parametrize("file", FILES)
def test_damage_falls_back_and_says_what_was_lost(folder: Path, file: str) -> None:
    target = folder / "step_000006" / file
    flip(target, bit=8 * (target.stat().st_size // 2))
    (folder / "step_000004" / file).unlink()
    state = small()
    loaded = load_latest(folder, state)
    assert loaded is not None and (loaded.step, state.step, loaded.lost_steps, loaded.extra["at"]) == (2, 2, 4, 2)
    assert [Path(p.where).name for p in loaded.damaged] == ["step_000006", "step_000004"]
    assert all(file in p.what for p in loaded.damaged)
    assert str(loaded).endswith("Continuing from step 2: 4 steps are trained again")


def test_all_damaged_is_never_a_silent_fresh_start(folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path / "model.safetensors", 10)
    state = small()
    before = everything(state)
    with pytest.raises(DataFault) as caught:
        load_latest(folder, state)
    assert caught.value.exit_code == 4
    assert [Path(p.where).name for p in caught.value.problems] == ["step_000006", "step_000004", "step_000002"]
    assert "model.safetensors has 10 bytes, not" in str(caught.value)
    assert everything(state) == before


def test_300_flipped_bits_and_50_truncations_are_all_detected(folder: Path) -> None:
    for step in (2, 4):
        shutil.rmtree(folder / f"step_{step:06d}")
    files = sorted((folder / "step_000006").iterdir())
    state = small()
    sizes = np.array([file.stat().st_size for file in files])
    draw = np.random.default_rng(0)
    for trial in range(350):
        file = files[trial // 2 % len(files)] if trial % 2 else files[draw.choice(len(files), p=sizes / sizes.sum())]
        whole = file.read_bytes()
        if trial < 300:
            flip(file, bit=int(draw.integers(8 * len(whole))))
        else:
            os.truncate(file, int(draw.integers(len(whole))))
        with pytest.raises(DataFault):
            load_latest(folder, state)
        file.write_bytes(whole)
    assert load_latest(folder, state) is not None


def test_another_architecture_shows_the_difference(folder: Path) -> None:
    state = small(n_embd=8, position=["rotary"], head="untied")
    before = everything(state)
    with pytest.raises(ConfigError) as caught:
        load_latest(folder, state)
    text = caught.value.render()
    assert "step_000006: belongs to another architecture" in text
    assert "lm_head.weight: (29, 8) in the model, missing in the checkpoint" in text
    assert "wpe.weight: (8, 4) in the checkpoint, missing in the model" in text
    assert "wte.weight: (29, 4) in the checkpoint, (29, 8) in the model" in text
    assert caught.value.exit_code == 2
    assert everything(state) == before


def test_another_optimizer_layout_is_refused(folder: Path) -> None:
    state = small()
    state.optimizers = [torch.optim.SGD(state.model.parameters(), lr=1.0)]
    with pytest.raises(ConfigError, match=r"optim.optimizer: parameters in each group: \[\[.*\]\] in the checkpoint"):
        load_latest(folder, state)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_load(folder: Path, trained: TrainState, prefix: str) -> None:
    file = folder / "step_000006" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    write_manifest(file.parent, 6)
    state = small(seed=5)
    loaded = load_latest(folder, state)
    assert loaded is not None and loaded.step == 6
    assert everything(state) == everything(trained)


def test_a_wrapped_model_saves_plain_names(tmp_path: Path) -> None:
    state = small()
    wrapped = TrainState(torch.nn.ModuleDict({"_orig_mod": state.model}), state.optimizers)
    path = save(tmp_path, wrapped)
    assert load_file(path / "model.safetensors").keys() == state.model.state_dict().keys()


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = torch.nn.Embedding(5, 3)
            self.lm_head = torch.nn.Linear(3, 5, bias=False)
            self.lm_head.weight = self.wte.weight

    first, second = Tied(), Tied()
    path = save(tmp_path, TrainState(first, []))
    assert list(load_file(path / "model.safetensors")) == ["wte.weight"]
    load_latest(tmp_path, TrainState(second, []))
    assert torch.equal(second.lm_head.weight, first.wte.weight)
    second.lm_head.weight = torch.nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ConfigError, match=r"lm_head\.weight: \(5, 3\) in the model"):
        load_latest(tmp_path, TrainState(second, []))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["GPT2LAB_TEST_BOMB"]),)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_that_would_run_code_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Also with a manifest that fits, and both as torch writes it and as a bare pickle."""
    sign = tmp_path / "it-ran"
    monkeypatch.setenv("GPT2LAB_TEST_BOMB", str(sign))
    torch.save([Bomb()], folder / "step_000006" / file)
    (folder / "step_000004" / file).write_bytes(pickle.dumps(Bomb(), protocol=2))
    for step in (4, 6):
        write_manifest(folder / f"step_{step:06d}", step)
    loaded = load_latest(folder, small())
    assert loaded is not None and loaded.step == 2
    assert ["damaged: cannot be read" in p.what for p in loaded.damaged] == [True, True]
    assert not sign.exists()
    pickle.loads(pickle.dumps(Bomb(), protocol=2))  # the bomb is one
    assert sign.exists()


def test_a_checkpoint_of_an_earlier_version_is_refused_in_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had a pickle in it, which is not even opened."""
    monkeypatch.setenv("GPT2LAB_TEST_BOMB", str(tmp_path / "it-ran"))
    for path in folder.iterdir():
        (path / "optimizer.safetensors").unlink()
        torch.save([Bomb()], path / "optimizer.pt")
        write_manifest(path, int(path.name.removeprefix("step_")))
    with pytest.raises(DataFault, match=r"written by an earlier version, with optimizer\.pt, which is no longer read"):
        load_latest(folder, small())
    assert not (tmp_path / "it-ran").exists()


def test_state_that_could_not_be_read_back_is_refused_when_saving(tmp_path: Path) -> None:
    state = small()
    state.optimizers[0].param_groups[0]["note"] = Path("x")
    with pytest.raises(ConfigError, match=r"optimizers\.0\.param_groups\.0\.note, a PosixPath, without code"):
        save(tmp_path, state)
    assert names(tmp_path) == []


def test_any_nested_state_comes_back_as_it_was() -> None:
    """Types, keys that are no text, names that look like our own marks, floats that are not finite, shared tensors."""
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": shared.T}, 7: {"m": shared}, (1, "a"): None},
        "betas": (0.9, 0.95, (1, [True])),
        "marks": [{"tensor": "x"}, {"tuple": [1]}, {"items": []}, {"tensor": "x", "other": {}}],
        "odd": [0.1 + 0.2, -0.0, math.inf, 2**70],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "": shared,
    }
    plain, tensors = split_tree(tree)
    assert [name for name in tensors if tensors[name].equal(shared)] == ["state.7.m"]
    back = join_tree(json.loads(json.dumps(plain)), tensors)

    def comparable(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, comparable(v)) for key, v in value.items()]
        if isinstance(value, (list, tuple)):
            return type(value), [comparable(v) for v in value]
        return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else repr(value)

    assert comparable(back) == comparable(tree)


def test_pruning_keeps_the_newest_good_ones(folder: Path) -> None:
    assert [p.name for p in prune(folder, keep=2)] == ["step_000002"]
    assert names(folder) == ["step_000004", "step_000006"]
    assert prune(folder, keep=2) == []


def placeholders(folder: Path, steps: range) -> None:
    """Copies of step 2 under other numbers, sound for whoever only asks for that."""
    for step in steps:
        path = folder / f"step_{step:06d}"
        if not path.exists():
            shutil.copytree(folder / "step_000002", path)
            write_manifest(path, step)


def test_pruning_spares_the_best_and_milestones(folder: Path) -> None:
    placeholders(folder, range(1, 13))
    deleted = prune(folder, keep=2, best=7, milestone_every_steps=5)
    assert [p.name for p in deleted] == [f"step_{step:06d}" for step in (9, 8, 6, 4, 3, 2, 1)]
    assert names(folder) == [f"step_{step:06d}" for step in (5, 7, 10, 11, 12)]
    assert prune(folder, keep=2, best=7, milestone_every_steps=5) == []
    assert [p.name for p in prune(folder, keep=1, best=12)] == [f"step_{step:06d}" for step in (11, 10, 7, 5)]
    assert names(folder) == ["step_000012"]


def test_the_best_checkpoint_is_a_good_one(folder: Path) -> None:
    assert best_step(folder, {}) is None
    assert best_step(folder, {2: 3.0, 4: 2.0, 6: 2.5, 5: 1.0}) == 4
    assert best_step(folder, {2: 2.0, 4: 2.0, 6: math.nan}) == 4
    flip(folder / "step_000004" / "model.safetensors", bit=900)
    assert best_step(folder, {2: 3.0, 4: 2.0, 6: 2.5}) == 6
    assert best_step(folder, {4: 2.0}) is None


def test_damaged_checkpoints_never_push_out_good_ones(folder: Path) -> None:
    (folder / "step_000006" / "optimizer.safetensors").unlink()
    assert prune(folder, keep=2) == []
    assert [p.name for p in prune(folder, keep=1)] == ["step_000002"]
    assert names(folder) == ["step_000004", "step_000006"]
    (folder / "step_000004" / "state.json").write_text("{}")
    assert prune(folder, keep=1) == []  # no good one at all: nothing is deleted


def test_saving_a_step_again(folder: Path, trained: TrainState) -> None:
    """A damaged checkpoint of the same step is replaced; a good one stays as it is."""
    model = folder / "step_000006" / "model.safetensors"
    good = model.read_bytes()
    flip(model, bit=4000)
    save(folder, trained, extra={"again": True})
    assert model.read_bytes() == good
    loaded = load_latest(folder, small())
    assert loaded is not None and loaded.extra == {"again": True}
    before = model.stat().st_mtime_ns, model.stat().st_ino
    save(folder, trained, extra={"again": False})
    assert (model.stat().st_mtime_ns, model.stat().st_ino) == before
    assert names(folder) == ["step_000002", "step_000004", "step_000006"]


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_leaves_the_older_checkpoint_and_no_debris(
    folder: Path, trained: TrainState, file: str, monkeypatch: pytest.MonkeyPatch, file_limit: Any
) -> None:
    """Whichever of the files is the first that does not fit."""
    train(trained, 7)
    limit = file_limit((folder / "step_000006" / file).stat().st_size - 100)
    if file in ("state.json", "manifest.json"):  # they are the smallest: let the large ones through
        name = "write_text" if file == "state.json" else "write_bytes"
        real = getattr(Path, name)

        def limited(path: Path, *args: Any, **options: Any) -> Any:
            with file_limit(10) if path.name == file else nullcontext():
                return real(path, *args, **options)

        monkeypatch.setattr(Path, name, limited)
        limit = nullcontext()
    with limit, pytest.raises(EnvironmentFault, match=r"[\d,]+ bytes needed, [\d,]+ free"):
        save(folder, trained)
    assert names(folder) == ["step_000002", "step_000004", "step_000006"]
    loaded = load_latest(folder, small())
    assert loaded is not None and (loaded.step, loaded.damaged) == (6, ())


def test_a_folder_that_cannot_be_made_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault):
        save(tmp_path / "file" / "checkpoints", small())


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs, not even clean-up."""


@pytest.mark.parametrize("replaces_damaged", [False, True])
def test_a_kill_at_any_file_operation_leaves_a_verified_checkpoint(
    folder: Path, trained: TrainState, monkeypatch: pytest.MonkeyPatch, replaces_damaged: bool
) -> None:
    if replaces_damaged:
        flip(folder / "step_000006" / "model.safetensors", bit=999)
    else:
        train(trained, 7)
    operations: list[tuple[Any, str]] = [
        (os, name) for name in ("mkdir", "open", "replace", "fsync", "rmdir", "unlink")
    ]
    operations += [(Path, "open"), (checkpoints, "save_file")]
    left, dead, kills = 0, False, 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal left, dead
            left -= 1
            if left < 0 or dead:
                dead = True
                raise Killed
            return real(*args, **options)

        return operation

    for limit in range(100):
        trial = folder.parent / f"trial-{limit}"
        shutil.copytree(folder, trial)
        left, dead = limit, False
        with monkeypatch.context() as patched:
            for owner, name in operations:
                patched.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(trial, trained)
            except Killed:
                kills += 1
        loaded = load_latest(trial, small())
        assert loaded is not None
        assert loaded.step >= (4 if replaces_damaged else 6)
        assert not loaded.damaged or replaces_damaged  # what a kill leaves is not taken for a checkpoint
        sweep_leftovers(trial)
        assert all(re.fullmatch(r"step_\d{6}", name) for name in names(trial))
        if not dead:
            assert (loaded.step, loaded.damaged) == (trained.step, ())
            break
    assert 15 <= kills < 100


def test_a_kill_in_the_middle_of_pruning_leaves_no_half_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def dying(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", dying)
        with pytest.raises(Killed):
            prune(folder, keep=2)
    sweep_leftovers(folder)
    assert names(folder) == ["step_000004", "step_000006"]
