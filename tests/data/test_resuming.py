"""What a kill, a full disk or a lost network leaves, the same command continues, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import faults
from gpt2lab.data import encode as encoding
from gpt2lab.data import shards
from gpt2lab.data.prepared import Prepared, list_prepared
from gpt2lab.data.shards import DataConfig, prepare, unfinished
from gpt2lab.errors import ConfigError, EnvironmentFault

Play = Callable[..., str]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that little text passes many places."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    yield
    faults.arm("")


@pytest.fixture
def wanted(tmp_path: Path, play: Play) -> dict[str, DataConfig]:
    """A stream of eighty documents in two files, and a listed corpus of twelve."""
    lines = [json.dumps({"text": play(f"d{i}", lines=2 + i % 7)}) + "\n" for i in range(80)]
    lines[11] = json.dumps({"text": play("long", lines=100)}) + "\n"  # over several shards
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_text("".join(lines[40 * i : 40 * i + 40]))
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(play(f"work {i}", lines=60))
    rest = {"validation_fraction": 0.2, "tokenizer": {"name": "bpe", "vocab_size": 300}}
    chosen = {"documents": {"paths": [str(tmp_path / "*.jsonl")]}, "text": {"paths": [str(tmp_path / "*.txt")]}}
    return {name: DataConfig.model_validate({"corpus": {"name": name, **options}, **rest})
            for name, options in chosen.items()}  # fmt: skip


def contents(made: Prepared) -> dict[str, Any]:
    """Every byte of a folder, but for when it was made."""
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest.pop("created"), manifest.pop("sha256")
    return {path.name: path.read_bytes() for path in made.path.iterdir() if path.name != "manifest.json"} | manifest


@pytest.mark.parametrize("name", ["documents", "text"])
@pytest.mark.parametrize("spec", ["raise@data.state:2", "raise@data.shard:5", "full@data.state:2"])
def test_what_is_interrupted_continues_to_the_same_bytes(
    wanted: dict[str, DataConfig], name: str, spec: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at that point of each attempt, until it is done."""
    made = prepare(wanted[name], shard_tokens=500)
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "again"))
    places: list[int] = []
    hints: set[str | None] = set()
    again: Prepared | None = None
    while again is None:
        faults.arm(spec)
        try:
            again = prepare(wanted[name], shard_tokens=500)
        except faults.InjectedFault:
            pass
        except EnvironmentFault as full:
            hints.add(full.hint)
        else:
            break
        ((folder, state),) = unfinished()
        assert folder.name == f".{made.path.name}.partial"
        assert state["config"]["corpus"]["name"] == name and list_prepared() == []
        places.append(state["done"])
        assert 0 < state["done"] <= state["size"] and places == sorted(set(places))
    assert len(places) > 2
    assert hints == ({"free some space; the same command then continues"} if spec.startswith("full") else set())
    assert contents(again) == contents(made)
    assert [p.name for p in (tmp_path / "again" / "prepared").iterdir() if p.suffix != ".lock"] == [made.path.name]


def interrupted(config: DataConfig) -> Path:
    """The folder of an attempt that was interrupted at its third note."""
    faults.arm("raise@data.state:3")
    with pytest.raises(faults.InjectedFault):
        prepare(config, shard_tokens=1500)
    faults.arm("")
    ((folder, _),) = unfinished()
    return folder


def test_what_lies_behind_the_note_is_cut_off_and_damage_begins_anew(
    wanted: dict[str, DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(wanted["documents"], shard_tokens=1500)

    def torn(folder: Path) -> None:
        (folder / "train_900.bin").write_bytes(b"left")
        (folder / "state.json.new").write_text("{")
        with next(iter(sorted(folder.glob("validation_*.bin"), reverse=True))).open("ab") as file:
            file.write(b"more than was noted")

    def short(folder: Path) -> None:
        (folder / "train_000.bin").write_bytes(b"ab")

    def gone(folder: Path) -> None:
        (folder / "train_000.bin").unlink()

    def flipped(folder: Path) -> None:
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text.replace('"done": ', '"done": 1'))

    for number, damage in enumerate((torn, short, gone, flipped)):
        monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / f"home{number}"))
        damage(interrupted(wanted["documents"]))
        assert contents(prepare(wanted["documents"], shard_tokens=1500)) == contents(made)


def test_others_leave_what_can_be_continued_and_bad_text_leaves_nothing(
    wanted: dict[str, DataConfig], tmp_path: Path
) -> None:
    folder = interrupted(wanted["documents"])
    prepare(wanted["text"], shard_tokens=1500)
    assert folder.exists()
    (tmp_path / "0.txt").write_bytes((tmp_path / "0.txt").read_bytes() + b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        prepare(wanted["text"], shard_tokens=1500)
    assert [path for path, _ in unfinished()] == [folder]


def test_a_disk_that_is_too_small_is_told_before_writing(
    wanted: dict[str, DataConfig], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    usage = type("Usage", (), {"free": 3_000})
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EnvironmentFault, match=r"the tokens need about 0\.0 GB, and 0\.0 GB are free"):
        prepare(wanted["documents"], shard_tokens=1500)
    assert not list((home / "prepared").glob(".*.partial"))


SCRIPT = """
import json, sys
from gpt2lab.data import encode as encoding, shards
encoding.BATCH_CHARACTERS = 20_000
shards.STATE_SECONDS = 0.05
shards.POOL_BYTES = 0
config = shards.DataConfig.model_validate(json.loads(sys.argv[1]))
print(shards.prepare(config, shard_tokens=30_000, processes=2).path)
"""


@pytest.mark.slow
def test_twelve_real_kills_end_in_the_same_bytes(tmp_path: Path, play: Play) -> None:
    for i in range(4):
        rows = [json.dumps({"text": play(f"{i} {j}", lines=3 + j % 60)}) + "\n" for j in range(700)]
        (tmp_path / f"{i}.jsonl").write_text("".join(rows))
    config = {"corpus": {"name": "documents", "paths": [str(tmp_path / "*.jsonl")]}, "tokenizer": "gpt2"}

    def start(home: str) -> subprocess.Popen[str]:
        environment = os.environ | {"GPT2LAB_DATA": str(tmp_path / home)}
        command = [sys.executable, "-c", SCRIPT, json.dumps(config)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    clean = start("clean").communicate()[0].strip()
    rng, kills, places = random.Random(0), 0, set()
    while kills < 12:
        process = start("killed")
        partial = tmp_path / "killed" / "prepared"
        before = [p.read_bytes() for p in partial.glob(".*.partial/state.json")]
        while process.poll() is None:  # at least one new note each time, so that it gets on
            time.sleep(0.01)
            now = [p.read_bytes() for p in partial.glob(".*.partial/state.json")]
            if now != before and now:
                time.sleep(rng.random() * 0.1)
                break
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        places |= {json.loads(p.read_text())["done"] for p in partial.glob(".*.partial/state.json")}
    killed = start("killed").communicate()[0].strip()
    assert kills >= 4 and len(places) > 3
    one, two = (contents(Prepared(Path(path), {}, None, None)) for path in (clean, killed))  # type: ignore[arg-type]
    assert one == two
