"""Nothing that is read can run code, and nothing is written or deleted outside a run's folder."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import saving

import gpt2lab
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.noise import Floor, floors, write_floor
from gpt2lab.planning.probes import MicroBatch, micro_batch, recorded
from gpt2lab.reuse.why import keep_sources
from gpt2lab.store import Store, sweep_leftovers
from gpt2lab.sweep.storage import default_address
from gpt2lab.tracking import open_tracker
from gpt2lab.tracking.journal import Journal
from gpt2lab.training import load_latest, prune, save

PACKAGE = Path(gpt2lab.__file__).parent
RUN = "0123456789abcdef"
RUNS_CODE = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def names_used(tree: ast.AST) -> set[str]:
    """Modules imported and functions called, dotted as far as they are written."""
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {name.split(".")[0] for name in imported} | called


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_reads_what_could_run_code(path: Path) -> None:
    """torch.load is for one of our own temporary files and for weights of others, and refuses code by itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = names_used(tree)
    assert not used & RUNS_CODE
    assert not used & {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}
    if str(path.relative_to(PACKAGE)) not in ("testing/checks.py", "pretrained/files.py"):
        assert "torch.load" not in used
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert "shell" not in options and options.get("weights_only") != "False"
        assert ast.unparse(call.func) != "torch.load" or options["weights_only"] == "True"
        if ast.unparse(call.func) == "yaml.load":
            assert options["Loader"] == "yaml.BaseLoader"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a sound checkpoint and a file, which must stay as they are."""
    folder = save(tmp_path / "outside", saving.state(2))
    (folder.parent / "precious.txt").write_text("precious")
    return folder.parent


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "linked", ["", "checkpoints", "replay", "evaluations", "evaluations/windows", "evaluations/parts"]
)
def test_a_run_whose_folder_is_a_link_is_not_worked_on(tmp_path: Path, outside: Path, linked: str) -> None:
    run = Store(tmp_path / "runs").run(RUN)
    (run.path / linked).parent.mkdir(parents=True, exist_ok=True)
    (run.path / linked).symlink_to(outside)
    before = content(outside)
    record = {"key": "a"}
    for write in (run.lock().__enter__, lambda: run.write_config("seed: 1"), lambda: run.write_evaluation(record)):
        with pytest.raises(ConfigError, match="symbolic link"):
            write()
    assert content(outside) == before


HERE = Machine("cpu", "a processor", 1, 1, 1e9, "a test")
FLOOR = Floor(
    scale="nano", sd=0.1, low=0.1, high=0.1, df=2, values={}, runs=(), failed=0, same_seed={}, parameters=1, tokens=1,
    data="data", evaluation="key", stack={"torch": "2", "device": "cpu"}, created="",
)  # fmt: skip
WRITERS: dict[str, Callable[[Store], object]] = {
    "code": lambda store: keep_sources([load_config("nano")], store),
    "noise": lambda store: write_floor(FLOOR, store),
    "throughput": lambda store: recorded(store.root, {"a": load_config("nano")}, HERE),
    "probes": lambda store: micro_batch(load_config("nano"), HERE, store.root),
    "sweeps": lambda store: default_address(store.root),
    "artifacts": lambda store: open_tracker(store.root, "an experiment"),
}
"""Folder of a store -> what writes there. Those of studies and copies in a tracker are tested beside their writers."""


@pytest.mark.parametrize("name", WRITERS)
def test_no_folder_of_a_store_is_written_through_a_link(
    tmp_path: Path, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.planning.probes.search", lambda *_: MicroBatch(1, 1, 1, 1.0, 1.0))
    store = Store(tmp_path / "runs")
    store.root.mkdir()
    (store.root / name).symlink_to(outside)
    before = content(outside)
    with pytest.raises(ConfigError, match=f"{name}: is a symbolic link"):
        WRITERS[name](store)
    assert content(outside) == before


def test_a_noise_floor_that_was_edited_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    write_floor(replace(FLOOR, created="2026-01-01"), store)
    (path,) = (store.root / "noise").iterdir()
    whole = json.loads(path.read_text())
    del whole["seal"]
    for change in ({}, {"scale": 7}, {"created": ["x"]}, {"created": "yesterday"}, {"runs": 1}):
        path.write_text(json.dumps({**whole, **change}))
        assert len(list(floors(store))) == (not change), change


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl"])
def test_files_that_are_written_in_place_are_not_written_through_a_link(
    tmp_path: Path, outside: Path, name: str
) -> None:
    run = Store(tmp_path / "runs").run(RUN)
    run.path.mkdir(parents=True)
    (run.path / name).symlink_to(outside / "precious.txt")
    before = content(outside)
    with pytest.raises(EnvironmentFault, match="symbolic link"), run.lock():
        Journal(run.metrics)
    assert content(outside) == before


def test_files_that_are_replaced_replace_a_link(tmp_path: Path, outside: Path) -> None:
    run = Store(tmp_path / "runs").run(RUN)
    run.path.mkdir(parents=True)
    run.metrics.touch()
    run.write_identity({"id": RUN})
    run.write_config("seed: 0")
    (run.path / "result.json").symlink_to(outside / "precious.txt")
    before = content(outside)
    run.finish({"status": "finished"})
    assert (run.result() or {})["status"] == "finished"
    assert content(outside) == before


def test_a_checkpoint_that_is_a_link_is_read_and_let_go_of_but_never_followed_to_delete(
    tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step_000002").symlink_to(outside / "step_000002")
    loaded = load_latest(folder, saving.state(0))
    assert loaded is not None and loaded.step == 2
    (folder / "step_000003").symlink_to(outside / "step_000002")  # damaged: its manifest is of another step
    before = content(outside)
    save(folder, saving.state(3))
    assert not (folder / "step_000003").is_symlink()
    assert [path.name for path in prune(folder, keep=1)] == ["step_000002"]
    sweep_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["step_000003"]
    assert content(outside) == before


@pytest.mark.parametrize("name", ["step_..", "step_1e5", "step_-00001", "step_０００００１"])
def test_only_numbered_folders_are_checkpoints(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoints" / name
    path.mkdir(parents=True)
    assert load_latest(tmp_path / "checkpoints", saving.state(0)) is None
    assert prune(tmp_path / "checkpoints", keep=1) == []
    assert path.is_dir()
