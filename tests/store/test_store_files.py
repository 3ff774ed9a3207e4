"""Files are old or new, never a mixture; what is full, read-only or damaged is said in plain words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.store import (
    disk_fault,
    from_json,
    publish_folder,
    read_json,
    sweep_leftovers,
    temporary_beside,
    to_json,
    write_atomically,
    write_json,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The order of fsync and rename, each with the name of the file or folder it touches."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        seen.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return seen


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_atomically(tmp_path / "a.json", "new")
    kinds = [kind for kind, _ in calls]
    assert kinds == ["fsync", "replace", "fsync"]
    assert calls[0][1].endswith(".partial")
    assert calls[1:] == [("replace", "a.json"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_published_folder_is_on_the_disk_with_everything_in_it(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    final = tmp_path / "step_000800"
    temporary = temporary_beside(final)
    (temporary / "inner").mkdir(parents=True)
    (temporary / "weights").write_bytes(b"w")
    (temporary / "inner" / "state").write_bytes(b"s")
    publish_folder(temporary, final)
    names = ["state", "inner", "weights", temporary.name]
    assert sorted(calls[:4]) == sorted(("fsync", name) for name in names)
    assert calls.index(("fsync", "state")) < calls.index(("fsync", "inner")) < calls.index(("fsync", temporary.name))
    assert calls[4:] == [("replace", "step_000800"), ("fsync", tmp_path.name)]
    assert (final / "inner" / "state").read_bytes() == b"s"
    assert not temporary.exists()


def test_a_published_folder_never_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "new").mkdir()
    with pytest.raises(EnvironmentFault, match="exists already"):
        publish_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "new").is_dir()


def test_a_failed_write_keeps_the_old_file_and_removes_the_temporary(tmp_path: Path, file_limit: Any) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with file_limit(1000), pytest.raises(EnvironmentFault) as caught:
        write_atomically(path, "x" * 5000)
    assert "5,000 bytes needed" in str(caught.value)
    assert " free" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_before_the_rename_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom gpt2lab import store\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_atomically(Path(sys.argv[1]), 'new')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    swept = sweep_leftovers(tmp_path)
    assert len(swept) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_is_swept_before_its_writer_has_the_lock_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, swept = fcntl.flock, list[str]()

    def sweep_first(file: IO[bytes], how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        swept.extend(sweep_leftovers(tmp_path))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    write_atomically(tmp_path / "a.json", "new")
    assert len(swept) == 1 and (tmp_path / "a.json").read_text() == "new"


def test_sweeping_spares_living_writers_and_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".hidden", "a.partial", "notes.partial.txt"):
        (tmp_path / name).write_text("keep")
    dead = temporary_beside(tmp_path / "checkpoint")
    dead.mkdir()
    (dead / "half").write_text("")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    temporary_beside(tmp_path / "link").symlink_to(outside)
    replace = os.replace
    swept: list[str] = []

    def replace_during_sweep(source: Path, target: Path) -> None:
        swept.extend(sweep_leftovers(tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_during_sweep)
    write_atomically(tmp_path / "a.json", "new")
    assert len(swept) == 2
    assert dead.name in swept
    assert (outside / "precious").exists()
    assert {p.name for p in tmp_path.iterdir()} == {".hidden", "a.partial", "notes.partial.txt", "outside", "a.json"}


def test_a_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    fault = disk_fault(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "not" / "there", 1234)
    free = shutil.disk_usage(tmp_path).free
    assert "the disk is full: 1,234 bytes needed" in str(fault)
    assert str(fault).endswith(" free")
    assert abs(int(str(fault).split()[-2].replace(",", "")) - free) < 10 * 2**30
    assert fault.exit_code == 3


def test_what_is_used_up_other_than_space_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = disk_fault(OSError(errno.EFBIG, "File too large"), tmp_path / "a", 1234)
    assert "the file size limit of this process is reached: 1,234 bytes needed" in str(fault)
    assert fault.hint and fault.hint.startswith("ulimit -f unlimited")
    assert "the disk quota is used up" in str(disk_fault(OSError(errno.EDQUOT, "quota"), tmp_path / "a"))
    full = SimpleNamespace(f_files=4096, f_favail=0, f_bavail=1, f_bfree=1, f_blocks=2, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    fault = disk_fault(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "a")
    assert "the disk holds as many files as it can (4,096)" in str(fault)
    assert fault.hint and fault.hint.startswith("delete some files")


def test_a_folder_that_cannot_be_made_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_atomically(tmp_path / "file" / "inner" / "a.json", "x")


def test_json_keeps_what_is_not_finite_and_refuses_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"loss": float("inf"), "text": "ü"})
    assert read_json(path) == {"loss": float("inf"), "text": "ü"}
    for damaged in ('{"loss": 1', "[1]", "\x00\x00"):
        path.write_text(damaged)
        with pytest.raises(DataFault, match=r"a\.json"):
            read_json(path)


def strict(text: str | bytes) -> Any:
    """What a parser of the standard alone reads (RFC 8259): Python's is more generous."""

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refused)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, '"NaN"'),
        ([math.inf, -math.inf, 1.5], '["Infinity", "-Infinity", 1.5]'),
        ({"NaN": {"a": "NaN", "b": "'Infinity", "c": "nan", "d": "NaN!"}},
         """{"NaN": {"a": "'NaN", "b": "''Infinity", "c": "nan", "d": "NaN!"}}"""),
        ({"a": [0.1, None, True, "x"], "b": {"c": 10**20}},
         '{"a": [0.1, null, true, "x"], "b": {"c": 100000000000000000000}}'),
    ],
)  # fmt: skip
def test_any_plain_data_becomes_strict_json_and_comes_back(value: Any, text: str) -> None:
    assert to_json(value) == text
    strict(text)
    assert repr(from_json(text)) == repr(from_json(text.encode())) == repr(value)  # NaN equals nothing


def test_numbers_that_are_not_finite_are_sealed_and_those_of_older_versions_are_read(tmp_path: Path) -> None:
    record = {"metrics": {"val/loss": math.nan, "a": math.inf}, "name": "NaN"}
    write_json(tmp_path / "new.json", record)
    strict((tmp_path / "new.json").read_bytes())
    assert repr(read_json(tmp_path / "new.json", sealed=True)) == repr(record)
    seal = hashlib.sha256(b'{"a":NaN}').hexdigest()[:32]
    (tmp_path / "old.json").write_text(json.dumps({"a": math.nan, "seal": seal}))  # as Python's json writes it
    assert repr(read_json(tmp_path / "old.json", sealed=True)) == "{'a': nan}"
    (tmp_path / "new.json").write_text((tmp_path / "new.json").read_text().replace("Infinity", "-Infinity"))
    with pytest.raises(DataFault, match="does not agree with its seal"):
        read_json(tmp_path / "new.json")
