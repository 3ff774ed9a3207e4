"""Run folders, study records and locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, LockHeld
from gpt2lab.records import ArmRecord, Evaluation, SearchRecord, StudyRecord, SweepRecord, TrialRecord, best_trial
from gpt2lab.store import RunFolder, Store, file_lock, temporary_beside, write_json

RUN = "0123456789abcdef"

HOLD = """
import os, sys, time
from gpt2lab.store import Store
from gpt2lab.errors import LockHeld
print("ready", flush=True)
sys.stdin.readline()
try:
    with Store(sys.argv[1]).run("0123456789abcdef").lock():
        print("won", flush=True)
        sys.stdin.readline()
except LockHeld as error:
    print("lost:", error, flush=True)
    sys.exit(error.exit_code)
"""


def start(root: Path) -> subprocess.Popen[str]:
    """A process that takes the lock when it gets a line, says whether it won, and holds it until the next line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-S", "-c", HOLD, str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(starter: subprocess.Popen[str], line: str = "") -> str:
    """Send a line, if any, and read one back."""
    assert starter.stdin
    assert starter.stdout
    if line:
        starter.stdin.write(line)
        starter.stdin.flush()
    return starter.stdout.readline()


def row(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "tokens": 64 * step, "seconds": 0.5 * step, "metrics": metrics}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return Store(tmp_path).run(RUN)


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "0123456789ABCDEF", RUN + "\n", RUN[:-1], "", "studies", "..", RUN + "/x"]
)
def test_only_a_run_id_is_a_run_id(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a run id"):
        Store(tmp_path).run(name)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\n"])
def test_names_stay_inside_their_folder(tmp_path: Path, run: RunFolder, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        run.write_evaluation({"key": name})
    with pytest.raises(ConfigError, match="cannot be"):
        run.evaluation(name)
    with pytest.raises(ConfigError, match="cannot be"):
        Store(tmp_path).write_study(study(name))
    assert not list(tmp_path.iterdir())


def test_no_record_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    store, outside = Store(tmp_path / "runs"), tmp_path / "outside"
    outside.mkdir()
    store.root.mkdir()
    (store.root / "studies").symlink_to(outside)
    with pytest.raises(ConfigError, match="symbolic link"):
        store.write_study(study("posenc@nano"))
    assert not list(outside.iterdir())


def test_status_follows_the_life_of_a_run(tmp_path: Path, run: RunFolder) -> None:
    assert run.status() == "absent"
    with run.lock():
        assert run.status() == "running"
        assert run.holder()["pid"] == os.getpid()
    assert run.status() == "absent"
    assert run.holder() == {}
    run.write_identity({"id": RUN, "seed": 0})
    assert run.status() == "partial"
    run.fail({"reason": "out of memory", "phase": "training", "step": 3, "at": "now"})
    assert run.status() == "failed"
    with run.lock():
        assert run.status() == "running"
    run.finish({"status": "finished", "steps": 4})
    assert run.status() == "damaged" and "metrics.jsonl: is missing" in str(run.damage())
    run.metrics.write_text(row(4))
    run.write_config("seed: 0")
    run.finish({"status": "finished", "steps": 4})
    assert run.status() == "finished"
    assert run.failure() is None
    run.finish({"status": "diverged", "steps": 4})
    assert run.status() == "diverged"
    with pytest.raises(ValueError, match="failed"):
        run.finish({"status": "failed"})
    assert [r.id for r in Store(tmp_path).runs()] == [RUN]


def test_records_come_back_as_written(run: RunFolder) -> None:
    assert [run.identity(), run.result(), run.failure(), run.config()] == [None] * 4
    run.write_identity({"id": RUN})
    run.write_config("seed: 1\n")
    run.write_evaluation({"key": "val-1", "metrics": {"val/loss": 2.5}})
    assert run.identity() == {"id": RUN}
    assert run.config() == "seed: 1\n"
    assert run.evaluation("val-1") == {"key": "val-1", "metrics": {"val/loss": 2.5}}
    assert run.evaluation("val-2") is None


@pytest.mark.parametrize("tail", ['{"step": 3, "tok', '{"step": 3}', "\x00" * 40, '{"step": 3, "tok\n', "\x00\x00\n"])
def test_rows_leave_out_a_torn_last_line(run: RunFolder, tail: str) -> None:
    run.path.mkdir()
    run.metrics.write_text(row(1, **{"train/loss": float("nan")}) + row(2, **{"train/loss": float("inf")}) + tail)
    rows = run.rows()
    assert [r["step"] for r in rows] == [1, 2]
    assert rows[0]["metrics"]["train/loss"] != rows[0]["metrics"]["train/loss"]
    assert rows[1]["metrics"]["train/loss"] == float("inf")


def test_rows_refuse_damage_before_the_last_line(run: RunFolder) -> None:
    run.path.mkdir()
    run.metrics.write_text(row(1) + '{"step": 2, "to\n' + row(3))
    with pytest.raises(DataFault, match="line 2 is damaged"):
        run.rows()


def test_a_lock_names_its_holder(run: RunFolder) -> None:
    with run.lock():
        since = run.holder()["since"]
        with pytest.raises(LockHeld, match=f"process {os.getpid()} on .*, since {since[:10]}") as caught, run.lock():
            pass
        assert caught.value.exit_code == 6
    with run.lock():
        pass


def test_a_stale_lock_file_blocks_no_run(run: RunFolder) -> None:
    """Not even when its process id lives: here it is our own."""
    run.path.mkdir()
    (run.path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "since": "long ago"}))
    assert run.status() == "absent"
    with run.lock():
        assert run.holder()["host"] != "elsewhere"


def test_asking_for_the_status_never_takes_the_lock_from_a_starter(run: RunFolder) -> None:
    """`is_locked` holds a shared lock for an instant; hold one for 0.1 s and start."""
    run.write_identity({})
    (run.path / "lock").touch()
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); print(flush=True); "
        "time.sleep(.1)"
    )
    probe = subprocess.Popen([sys.executable, "-S", "-c", script, run.path / "lock"], stdout=subprocess.PIPE)
    assert probe.stdout is not None
    probe.stdout.readline()
    with run.lock():
        pass
    probe.wait()
    probe.stdout.close()


def test_of_several_starters_one_wins(tmp_path: Path) -> None:
    starters = [start(tmp_path / "runs") for _ in range(6)]
    assert [answer(starter) for starter in starters] == ["ready\n"] * 6
    for starter in starters:
        assert starter.stdin
        starter.stdin.write("go\n")
        starter.stdin.flush()
    said = [answer(starter) for starter in starters]
    for starter in starters:
        starter.communicate()
    assert sorted(starter.returncode for starter in starters) == [0] + [6] * 5
    winner = next(s.pid for s, text in zip(starters, said, strict=True) if text == "won\n")
    assert all(f"process {winner} on" in text for text in said if text != "won\n")


def test_a_killed_holder_frees_its_lock_and_leaves_are_swept(tmp_path: Path, run: RunFolder) -> None:
    holder = start(tmp_path)
    assert answer(holder) == "ready\n"
    assert answer(holder, "go\n") == "won\n"
    assert run.status() == "running"
    temporary_beside(run.path / "result.json").write_text("half")
    temporary_beside(run.checkpoints / "step_000100").mkdir(parents=True)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with run.lock():
        assert [p.name for p in run.checkpoints.iterdir()] == []
        assert {p.name for p in run.path.iterdir()} == {"lock", "checkpoints"}


def test_a_forked_child_does_not_keep_its_parents_lock(run: RunFolder) -> None:
    reader, writer = os.pipe()
    with run.lock():
        child = os.fork()
        if child == 0:
            os.write(writer, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(reader, 1)
    try:
        with run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_lock_file_removed_meanwhile_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock, someone removes the folder and another process locks a new file of that name."""
    import fcntl

    path = tmp_path / "lock"
    flock = fcntl.flock
    removed: list[bool] = []

    def remove_once(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with file_lock(path):
        assert path.exists()
        with pytest.raises(LockHeld), file_lock(path, 0.0):
            pass


def test_an_output_folder_that_cannot_be_made_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(EnvironmentFault, match="cannot write"), Store(tmp_path / "runs").run(RUN).lock():
        pass


def study(name: str) -> StudyRecord:
    return StudyRecord(
        name=name, ablation=name.partition("@")[0], scale="nano", question="?", baseline="a", arms={}, contrasts=[],
        seeds=[], smallest_effect=0.05, alpha=0.05, evaluation=Evaluation(key="k"),
    )  # fmt: skip


def test_a_damaged_record_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_study(study("posenc@nano"))
    write_json(path, {**store.study("posenc").plain(), "baseline": 7})
    with pytest.raises(DataFault, match=r"the record is damaged: baseline: .*string"):
        store.study("posenc")


def test_a_sweeps_record_is_typed_read_by_key_and_opens_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    trial = {"slot": 3, "outcome": "finished", "settings": {"optim.lr": 0.01}, "value": 2.5, "curve": [[8, 512, 3.0]]}
    search = {"slots": 4, "trials": [trial], "added later": 1}
    record = {"name": "lr@nano", "sweep": "lr", "scale": "nano", "trials": 4, "evaluation": {"key": "k"}}
    path = tmp_path / "sweeps" / "lr@nano.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record | {"searches": {"lr": search}}))
    sweep = store.sweep("lr")
    found = sweep.searches["lr"]
    assert (found.count, found.trials[0].index, found.trials[0].curve) == (4, 3, [(8, 512, 3.0)])
    assert found["slots"] == 4 and found["trials"][0]["slot"] == 3 and "slot" in found["trials"][0]
    assert {**found.trials[0]}["slot"] == 3 and found.get("slot") is None and found["added later"] == 1
    assert best_trial(found.trials, "minimize") == found.trials[0] and best_trial([], "minimize") is None
    store.write_sweep(sweep)
    [written] = [json.loads(path.read_text())["searches"]["lr"]]
    assert written["slots"] == 4 and written["added later"] == 1 and trial.items() <= written["trials"][0].items()
    assert store.sweep("lr@nano") == sweep
    trial["slot"] = "third"
    write_json(path, record | {"searches": {"lr": search}})
    with pytest.raises(DataFault, match=r"the record is damaged: searches\.lr\.trials\.0\.slot: .*integer"):
        store.sweep("lr")


def test_studies_are_found_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.studies() == []
    with pytest.raises(ConfigError, match="known: none"):
        store.study("posenc")
    for name in ("posenc@nano", "norm@nano", "norm@micro"):
        store.write_study(study(name))
    temporary_beside(tmp_path / "studies" / "x.json").write_text("half")
    assert store.studies() == ["norm@micro", "norm@nano", "posenc@nano"]
    assert store.study("posenc@nano") == store.study("posenc") == study("posenc@nano")
    with pytest.raises(ConfigError, match="did you mean 'posenc@nano'"):
        store.study("posecn@nano")
    with pytest.raises(ConfigError, match="several scales: norm@micro, norm@nano"):
        store.study("norm")
    with pytest.raises(ConfigError, match="unknown study"):
        store.study("../studies/norm@nano")


def test_a_record_that_another_replaces_stays_under_a_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = study("posenc@nano").with_(hash="1", arms={"a": ArmRecord(runs={"0": "f" * 16})})
    store.write_study(first)
    more = first.with_(arms={"a": ArmRecord(runs={"0": "f" * 16, "1": "e" * 16})})
    assert store.replaced_by(more) is None  # the same declaration, further on
    store.write_study(more)
    other_code = first.with_(arms={"a": ArmRecord(runs={"0": "d" * 16})})
    assert store.replaced_by(other_code) == "posenc@nano#1"
    for record in (other_code, other_code, other_code.with_(hash="2")):
        store.write_study(record)
    assert store.earlier("posenc@nano") == store.earlier() == ["posenc@nano#1", "posenc@nano#2"]
    assert store.studies() == ["posenc@nano"]
    assert store.study("posenc#1") == store.study("posenc@nano#1") == more.with_(name="posenc@nano#1")
    assert store.study("posenc@nano#2").hash == "1" and store.study("posenc").hash == "2"
    assert [store.declaration(f"posenc@nano{n}") for n in ("#1", "#2", "")] == [1, 2, 3]
    assert store.kind("posenc@nano#2") == "study"
    with pytest.raises(ConfigError, match="unknown earlier study 'posenc@nano#3'; did you mean"):
        store.study("posenc#3")


def test_a_kill_between_keeping_a_record_and_replacing_it_keeps_it_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_study(study("posenc@nano").with_(hash="1"))
    before = path.read_bytes()
    store.write_study(study("posenc@nano").with_(hash="2"))
    path.write_bytes(before)
    store.write_study(study("posenc@nano").with_(hash="2"))
    assert store.earlier() == ["posenc@nano#1"] and store.study("posenc").hash == "2"


def test_a_record_of_single_runs_grows_and_loses_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = study("train@nano").with_(design="one run", hash="1", arms={"nano": ArmRecord(runs={"0": "f" * 16})})
    two = one.with_(hash="2", arms={"nano": ArmRecord(runs={"0": "f" * 16, "1": "e" * 16})})
    for record in (one, two):
        store.write_study(record)
    assert store.earlier() == []
    store.write_study(two.with_(arms={"nano": ArmRecord(runs={"0": "d" * 16, "1": "e" * 16})}))
    assert store.earlier() == ["train@nano#1"]


def test_a_sweep_over_another_space_leaves_the_record_of_the_first(tmp_path: Path) -> None:
    store, trial = Store(tmp_path), TrialRecord(slot=0, outcome="finished", settings={"optim.lr": 0.01})
    sweep = SweepRecord(
        name="lr@nano", sweep="lr", scale="nano", trials=4, evaluation=Evaluation(key="k"),
        searches={"lr": SearchRecord(study="lr/lr/1", trials=[trial])},
    )  # fmt: skip
    store.write_sweep(sweep)
    store.write_sweep(sweep)
    assert store.earlier() == []
    other = sweep.with_(searches={"lr": SearchRecord(study="lr/lr/2", trials=[])})
    assert store.replaced_by(other) == "lr@nano#1"
    store.write_sweep(other)
    assert store.sweep("lr#1").searches["lr"].trials == [trial] and store.declaration("lr@nano", "sweep") == 2


def test_a_folder_that_another_process_replaces_meanwhile_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, replaced = os.open, list[str]()

    def replacing(path: str | Path, *more: int) -> int:
        if Path(path).name == "lock" and not replaced:
            replaced.append(str(path))
            Path(path).parent.rmdir()
        return real(path, *more)

    monkeypatch.setattr(os, "open", replacing)
    with file_lock(tmp_path / "run" / "lock"):
        assert replaced and (tmp_path / "run" / "lock").exists()
