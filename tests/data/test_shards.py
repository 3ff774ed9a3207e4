"""Preparing: what is written, once, and never by halves; what is interrupted continues to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from gpt2lab.basics import faults
from gpt2lab.data import encode, shards
from gpt2lab.data.corpora import corpus
from gpt2lab.data.prepared import Prepared, floors, list_prepared
from gpt2lab.data.shards import DataConfig, prepare, prepared_key, unfinished
from gpt2lab.data.tokenizers import ByteTable, TokenizerSite, tokenizer
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.store import file_lock

Make = Callable[..., DataConfig]
Play = Callable[..., str]
Contents = Callable[[Path], dict[str, Any]]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that little text passes many places."""
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    yield
    faults.arm("")


def folders(home: Path) -> list[str]:
    """What lies below `prepared`, locks aside."""
    return sorted(p.name for p in (home / "prepared").iterdir() if p.suffix != ".lock")


def test_defaults_and_written_forms() -> None:
    assert (str(DataConfig().corpus), str(DataConfig().tokenizer)) == ("shakespeare", "gpt2")
    written = {"corpus": {"name": "text", "paths": ["a"]}, "tokenizer": {"name": "bpe", "vocab_size": "300"}}
    assert DataConfig.model_validate(written).tokenizer.full() == {"name": "bpe", "vocab_size": 300}
    for wrong in ({"tokenizer": "bype"}, {"validation_fraction": "0.5"}, {"validation_fraction": 0}, {"corpsu": "x"}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_shards_hold_the_text(config: Make, texts: Path, home: Path, name: str) -> None:
    made = prepare(config({"name": "bpe", "vocab_size": 280} if name == "bpe" else name), shard_tokens=1000)
    separator = made.tokenizer.separator
    record = made.manifest["splits"]
    chosen = {split: [d["name"] for d in record[split]["documents"]] for split in ("train", "validation")}
    assert sorted(chosen["train"] + chosen["validation"]) == sorted(p.name for p in texts.iterdir())
    for split, tokens in (("train", made.train), ("validation", made.validation)):
        text = [(texts / file).read_bytes().decode() for file in chosen[split]]
        ids = [made.tokenizer.encode(t).tolist() + ([] if separator is None else [separator]) for t in text]
        assert tokens[:].tolist() == [i for document in ids for i in document]
        assert [d["tokens"] for d in record[split]["documents"]] == [len(i) for i in ids]
        assert [d["bytes"] for d in record[split]["documents"]] == [len(t.encode()) for t in text]
        assert record[split]["bytes"] == int(made.byte_lengths[tokens[:]].sum())
        sizes = [s["tokens"] for s in record[split]["shards"]]
        assert sizes[:-1] == [1000] * (len(sizes) - 1)
        assert sum(sizes) == len(tokens) == record[split]["tokens"]
    assert len(record["train"]["shards"]) > 1
    assert made.vocab_size == made.tokenizer.vocab_size
    whole = floors(made.train[:], made.validation[:], made.vocab_size, 10**9)
    assert made.floors == pytest.approx(whole)
    assert set(made.manifest["files"]) == ({"tokenizer.json"} if name == "bpe" else set())
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["corpus"]["source"].startswith("12 text files, ") and manifest["fingerprint"] == made.fingerprint
    assert str(texts.parent) not in json.dumps(manifest["corpus"])


@pytest.mark.usefixtures("no_plugins_after")
def test_little_endian_and_as_wide_as_needed(config: Make) -> None:
    made = prepare(config("gpt2"))
    raw = (made.path / "train_000.bin").read_bytes()
    first = int(made.train[:1][0])
    assert (made.manifest["dtype"], raw[:2]) == ("<u2", first.to_bytes(2, "little"))

    def wide(site: TokenizerSite) -> ByteTable:
        """Bytes, moved up by 70,000."""
        return ByteTable([b"x"] * 71_000, None, lambda text: np.frombuffer(text.encode(), np.uint8) + np.int64(70_000))

    tokenizer.register("wide", source="test")(wide)
    made = prepare(config("wide"))
    assert (made.manifest["dtype"], int(made.train[:].min()) > 70_000) == ("<u4", True)
    assert (made.path / "train_000.bin").stat().st_size == 4 * len(made.train)


@pytest.mark.usefixtures("no_plugins_after")
@pytest.mark.parametrize("bad", [100, 65_535, 65_536 + 7, -1])  # in 16 bits, the third would read as a good 7
def test_an_id_outside_the_vocabulary_is_refused_while_preparing(config: Make, home: Path, bad: int) -> None:
    def loose(site: TokenizerSite) -> ByteTable:
        """One good id per byte, and a bad one for the third."""

        def encode(text: str) -> NDArray[np.int64]:
            return np.array([7, 7, bad, *[7] * (len(text.encode()) - 3)])

        return ByteTable([b"x"] * 100, None, encode)

    tokenizer.register("loose", source="test")(loose)
    with pytest.raises(
        DataFault, match=rf"train_000\.bin: token id {bad} at offset 2 is outside the vocabulary of 100"
    ):
        prepare(config("loose"))
    assert folders(home) == []


def test_found_again_without_tokenizing(config: Make, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(config())
    monkeypatch.setattr(shards, "_Preparation", None)  # would raise if it were called
    again = prepare(config())
    assert (again.path, again.fingerprint) == (made.path, made.fingerprint)
    texts.rename(texts.with_name("elsewhere"))
    moved = {"name": "text", "paths": [str(texts.with_name("elsewhere") / "*.txt")]}
    assert prepare(config(corpus=moved)).path == made.path


def test_whatever_changes_the_tokens_changes_the_folder(config: Make, texts: Path) -> None:
    def key(settings: DataConfig) -> str:
        return prepared_key(settings, corpus.build(settings.corpus))

    keys = [
        key(config()),
        key(config("gpt2")),
        key(config({"name": "bpe", "vocab_size": 300})),
        key(config({"name": "bpe", "vocab_size": 301})),
        key(config(validation_fraction=0.21)),
        key(config(paths="play0*.txt")),
    ]
    (texts / "play11.txt").write_text("other")
    assert len({*keys, key(config())}) == 7


def test_the_fingerprint_is_of_the_tokens_and_their_split(config: Make, texts: Path) -> None:
    first = prepare(config())
    assert prepare(config(validation_fraction=0.4)).fingerprint != first.fingerprint
    (texts / "play00.txt").write_bytes((texts / "play00.txt").read_bytes()[:-1] + b"!")
    assert prepare(config()).fingerprint != first.fingerprint


@pytest.mark.usefixtures("no_plugins_after")
def test_few_files_are_split_by_position_and_the_tokenizer_sees_training_text_only(config: Make, texts: Path) -> None:
    seen: list[str] = []

    def spy(site: TokenizerSite) -> ByteTable:
        """Bytes; keeps the training text."""
        assert site.text is not None
        seen.append("".join(site.text()))
        built = tokenizer.build(tokenizer.read("bytes"), site)
        assert isinstance(built, ByteTable)
        return built

    tokenizer.register("spy", source="test")(spy)
    for paths in ("play0[1-3].txt", "*.txt"):
        made = prepare(config("spy", paths))
        assert seen.pop().encode() == made.train[:].astype(np.uint8).tobytes()
    few = prepare(config(paths="play0[1-3].txt"))
    for i, part in enumerate(few.manifest["splits"]["validation"]["documents"], 1):
        whole = (texts / f"play0{i}.txt").stat().st_size
        assert part["bytes"] == pytest.approx(0.2 * whole, abs=4)


@pytest.mark.parametrize("content", ["", "a", "ab"])
def test_a_corpus_without_enough_text_is_refused(config: Make, texts: Path, home: Path, content: str) -> None:
    (texts / "tiny.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"needs 2 tokens, has \d"):
        prepare(config(paths="tiny.txt"))
    assert folders(home) == []


def test_progress_counts_bytes_to_the_end(config: Make, texts: Path) -> None:
    said: list[tuple[int, int, str]] = []
    prepare(config({"name": "bpe", "vocab_size": 280}), progress=lambda *now: said.append(now))
    total = sum(p.stat().st_size for p in texts.iterdir())
    assert list(dict.fromkeys(what for _, _, what in said)) == [
        "training the tokenizer",
        "writing tokens",
        "counting unigrams and bigrams",
    ]
    assert [done for done, _, what in said if what == "writing tokens"][-1] == total
    assert all(0 <= done <= among for done, among, _ in said)


def test_files_are_on_disk_before_the_name_is_and_the_name_before_we_return(
    config: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real_fsync, real_replace = os.fsync, os.replace
    inside: set[int] = set()

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(old: Path, new: Path) -> None:
        if old.is_dir():
            inside.update(p.stat().st_ino for p in (old, *old.iterdir()))
            assert inside <= set(synced)
            synced.clear()
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    prepare(config({"name": "bpe", "vocab_size": 280}))
    assert len(inside) == 5  # the folder, two shards, tokenizer and manifest
    assert (home / "prepared").stat().st_ino in synced


SCRIPT = """
import sys, time
from pathlib import Path
from gpt2lab.data.corpora import Corpus, Document, corpus
from gpt2lab.data.shards import DataConfig, prepare

room, mode = Path(sys.argv[1]), sys.argv[2]

@corpus.register("plays", source="test")
def plays() -> Corpus:
    "Twenty documents."
    def documents():
        with open(room / "made", "a") as file:
            file.write("made\\n")
        end = time.monotonic() + 20
        while mode == "race" and time.monotonic() < end:  # until the other one waits, or makes it too
            if (room / "waiting").exists() or (room / "made").read_text().count("made") > 1:
                break
            time.sleep(0.01)
        texts = [f"play {i} " * 500 for i in range(20)]
        return [Document(f"d{i}", len(text), lambda text=text: iter([text])) for i, text in enumerate(texts)]
    return Corpus("test", "plays 1", documents)

def progress(done, total, what):
    if what.startswith("waiting"):
        (room / "waiting").touch()

print(prepare(DataConfig(corpus="plays", tokenizer="bytes"), progress=progress, shard_tokens=5000).fingerprint)
"""


def start(room: Path, home: Path, mode: str = "", fault: str = "") -> subprocess.Popen[str]:
    room.mkdir(exist_ok=True)
    environment = os.environ | {"GPT2LAB_DATA": str(home), "GPT2LAB_FAULT": fault}
    command = [sys.executable, "-c", SCRIPT, str(room), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_kill_in_the_middle_leaves_nothing_usable_and_the_next_one_succeeds(home: Path, tmp_path: Path) -> None:
    killed = start(tmp_path / "room", home, fault="kill@data.shard:3")
    assert killed.communicate(timeout=60)[0] == ""
    assert killed.returncode == -signal.SIGKILL
    (left,) = folders(home)
    assert left.endswith(".partial") and any((home / "prepared" / left).glob("train_*.bin"))  # it had begun to write
    assert list_prepared() == []
    both = start(tmp_path / "room", home), start(tmp_path / "room", tmp_path / "clean")
    again, clean = (process.communicate(timeout=60)[0] for process in both)
    assert again == clean != ""
    assert folders(home) == folders(tmp_path / "clean") and len(folders(home)) == 1


def test_two_at_once_end_with_one(home: Path, tmp_path: Path) -> None:
    both = [start(tmp_path / "room", home, "race") for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second != ""
    assert (tmp_path / "room" / "made").read_text() == "made\n"
    assert len(folders(home)) == 1


def test_leftovers_of_other_processes_are_removed_only_if_unlocked(config: Make, home: Path) -> None:
    dead, alive = (home / "prepared" / f".{key}.1.partial" for key in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "train_000.bin").write_bytes(b"ab")
    with file_lock(home / "prepared" / ".alive.lock"):
        prepare(config())
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_full_disk_and_a_forbidden_place_are_said_plainly(
    config: Make, home: Path, monkeypatch: pytest.MonkeyPatch, file_limit: Any
) -> None:
    with file_limit(4096), pytest.raises(EnvironmentFault, match=r"no room to write .* bytes free"):
        prepare(config())
    assert folders(home) == []
    (home / "file").write_text("")
    monkeypatch.setenv("GPT2LAB_DATA", str(home / "file"))
    with pytest.raises(EnvironmentFault, match="Not a directory"):
        prepare(config())


def test_interrupted_by_the_keyboard_leaves_nothing(config: Make, home: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(), progress=stop)
    assert folders(home) == []


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, gpt2lab.data.shards, gpt2lab.data.batches, gpt2lab.data.progress; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


@pytest.mark.parametrize("name", ["documents", "text"])
@pytest.mark.parametrize("spec", ["raise@data.state:2", "raise@data.shard:5", "full@data.state:2"])
def test_what_is_interrupted_continues_to_the_same_bytes(
    wanted: dict[str, DataConfig],
    name: str,
    spec: str,
    contents: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    assert contents(again.path) == contents(made.path)
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
    wanted: dict[str, DataConfig], contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        assert contents(prepare(wanted["documents"], shard_tokens=1500).path) == contents(made.path)


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


KILLED = """
import json, sys
from gpt2lab.data import encode, shards
encode.BATCH_CHARACTERS = 20_000
shards.STATE_SECONDS = 0.05
shards.POOL_BYTES = 0
config = shards.DataConfig.model_validate(json.loads(sys.argv[1]))
print(shards.prepare(config, shard_tokens=30_000, threads=2).path)
"""


@pytest.mark.slow
def test_twelve_real_kills_end_in_the_same_bytes(tmp_path: Path, play: Play, contents: Contents) -> None:
    for i in range(4):
        rows = [json.dumps({"text": play(f"{i} {j}", lines=3 + j % 60)}) + "\n" for j in range(700)]
        (tmp_path / f"{i}.jsonl").write_text("".join(rows))
    config = {"corpus": {"name": "documents", "paths": [str(tmp_path / "*.jsonl")]}, "tokenizer": "gpt2"}

    def begin(home: str) -> subprocess.Popen[str]:
        environment = os.environ | {"GPT2LAB_DATA": str(tmp_path / home)}
        command = [sys.executable, "-c", KILLED, json.dumps(config)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    clean = begin("clean").communicate()[0].strip()
    rng, kills, places = random.Random(0), 0, set()
    while kills < 12:
        process = begin("killed")
        partial = tmp_path / "killed" / "prepared"
        before = [p.read_bytes() for p in partial.glob(".*.partial/state.json")]
        while process.poll() is None:  # at least one new note each time, so that it gets on
            time.sleep(0.01)
            now = [p.read_bytes() for p in partial.glob(".*.partial/state.json")]
            if now != before and now:
                time.sleep(rng.random() * 0.1)
                break
        ended = process.poll() is not None
        process.kill()
        process.communicate()
        if ended:
            break
        kills += 1
        places |= {json.loads(p.read_text())["done"] for p in partial.glob(".*.partial/state.json")}
    killed = begin("killed").communicate()[0].strip()
    assert kills >= 4 and len(places) > 3
    assert contents(Path(clean)) == contents(Path(killed))
