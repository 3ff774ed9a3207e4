"""Stores of one study become one: by copying folders, and by `gpt2lab pull` from a folder or over ssh."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2lab import api
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
SSH = """#!/bin/sh
[ "$2" = far ] || { echo "ssh: no host $2" >&2; exit 255; }
exec sh -c "$3"
"""


@pytest.fixture
def halves(tiny: Path, inline: list[str]) -> tuple[Path, Path, Path]:
    """A store with all runs of a study, and two with half of them each."""
    whole, *parts = (tiny.parent / name for name in ("whole", "one", "two"))
    api.run_ablation(tiny, runs=whole, tracking=False)
    for number, part in enumerate(parts):
        shutil.copytree(whole, part)
        for run in inline[number::2]:
            shutil.rmtree(part / run)
    inline.clear()
    return whole, *parts


def verdicts(tiny: Path, root: Path) -> str:
    result = api.run_ablation(tiny, runs=root, tracking=False)
    assert result.found == 4
    return repr((result.verdicts, result.losses.to_dict()))


def test_stores_merge_by_copying_folders(halves: tuple[Path, Path, Path], tiny: Path, inline: list[str]) -> None:
    whole, one, two = halves
    shutil.copytree(two, one, dirs_exist_ok=True)
    assert verdicts(tiny, one) == verdicts(tiny, whole) and not inline


def test_a_study_is_pulled_from_a_folder_and_from_a_host(
    halves: tuple[Path, Path, Path],
    tiny: Path,
    inline: list[str],
    gpt2lab: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, one, two = halves
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    [first, second] = sorted(run.id for run in Store(two).runs() if not (one / run.id).exists())
    (two / second / "result.json").unlink()
    with Store(two).run(second).lock():
        code, said = gpt2lab("pull", "tiny", "--from", f"far:{two}", "--runs", str(one), "--json")
    pulled = json.loads(said.splitlines()[-1] if said.startswith("tiny") else said.splitlines()[0])
    assert code == 0 and first in pulled["copied"] and len(pulled["there"]) == 2 and not pulled["missing"]
    with Store(two).run(second).lock():
        code, said = gpt2lab("pull", "tiny", "--from", str(two), "--runs", str(tmp_path / "new"))
    assert (
        code == 0 and "1 run copied, 0 finished here before, 1 still training" in said and "2 not started there" in said
    )
    code, said = gpt2lab("pull", "tiny", "--from", str(whole), "--runs", str(one))
    assert code == 0 and verdicts(tiny, one) == verdicts(tiny, whole) and not inline
    for source, what in (("near:/runs", "no host near"), ("nowhere", "no such folder"), (str(whole), "unknown study")):
        code, said = gpt2lab("pull", "other" if source == str(whole) else "tiny", "--from", source)
        assert code in (2, 3) and what in said and "Traceback" not in said
