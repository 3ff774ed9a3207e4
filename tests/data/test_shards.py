"""Preparing: what is written, once, and never by halves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from gpt2lab.data import files, shards
from gpt2lab.data.corpora import corpus
from gpt2lab.data.floors import floors
from gpt2lab.data.prepared import list_prepared
from gpt2lab.data.shards import DataConfig, prepare, prepared_key
from gpt2lab.data.tokenizers import ByteTable, TokenizerSite, tokenizer
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault

Make = Callable[..., DataConfig]


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


def test_little_endian_and_as_wide_as_needed(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(config("gpt2"))
    raw = (made.path / "train_000.bin").read_bytes()
    first = int(made.train[:1][0])
    assert (made.manifest["dtype"], raw[:2]) == ("<u2", first.to_bytes(2, "little"))

    def wide(site: TokenizerSite) -> ByteTable:
        """Bytes, moved up by 70,000."""
        return ByteTable([b"x"] * 71_000, None, lambda text: np.frombuffer(text.encode(), np.uint8) + np.int64(70_000))

    monkeypatch.setattr(tokenizer, "_components", dict(tokenizer._components))
    tokenizer.register("wide", source="test")(wide)
    made = prepare(config("wide"))
    assert (made.manifest["dtype"], int(made.train[:].min()) > 70_000) == ("<u4", True)
    assert (made.path / "train_000.bin").stat().st_size == 4 * len(made.train)


@pytest.mark.parametrize("bad", [100, 65_535, 65_536 + 7, -1])  # in 16 bits, the third would read as a good 7
def test_an_id_outside_the_vocabulary_is_refused_while_preparing(
    config: Make, home: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    def loose(site: TokenizerSite) -> ByteTable:
        """One good id per byte, and a bad one for the third."""

        def encode(text: str) -> NDArray[np.int64]:
            return np.array([7, 7, bad, *[7] * (len(text.encode()) - 3)])

        return ByteTable([b"x"] * 100, None, encode)

    monkeypatch.setattr(tokenizer, "_components", dict(tokenizer._components))
    tokenizer.register("loose", source="test")(loose)
    with pytest.raises(
        DataFault, match=rf"train_000\.bin: token id {bad} at offset 2 is outside the vocabulary of 100"
    ):
        prepare(config("loose"))
    assert folders(home) == []


def test_found_again_without_tokenizing(config: Make, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(config())
    monkeypatch.setattr(shards, "_write", None)  # would raise if it were called
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


def test_few_files_are_split_by_position_and_the_tokenizer_sees_training_text_only(
    config: Make, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(site: TokenizerSite) -> ByteTable:
        """Bytes; keeps the training text."""
        assert site.text is not None
        seen.append("".join(site.text()))
        built = tokenizer.build(tokenizer.read("bytes"), site)
        assert isinstance(built, ByteTable)
        return built

    monkeypatch.setattr(tokenizer, "_components", dict(tokenizer._components))
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


def test_a_bad_file_leaves_nothing(config: Make, texts: Path, home: Path) -> None:
    (texts / "play09.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        prepare(config())
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
    real_fsync, real_rename = os.fsync, os.rename
    inside: set[int] = set()

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        inside.update(p.stat().st_ino for p in (old, *old.iterdir()))
        assert inside <= set(synced)
        synced.clear()
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    prepare(config({"name": "bpe", "vocab_size": 280}))
    assert len(inside) == 5  # the folder, two shards, tokenizer and manifest
    assert (home / "prepared").stat().st_ino in synced


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from gpt2lab.data import encode as encoding
from gpt2lab.data.corpora import Corpus, corpus
from gpt2lab.data.prepared import list_prepared
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.data.split import Document

room, mode = Path(sys.argv[1]), sys.argv[2]
encoding.BATCH_CHARACTERS = 1000

@corpus.register("plays", source="test")
def plays() -> Corpus:
    "Twenty documents."
    def chunks(i):
        if mode == "kill" and i == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"play {i} " * 500
    def documents():
        with open(room / "made", "a") as file:
            file.write("made\\n")
        end = time.monotonic() + 20
        while mode == "race" and time.monotonic() < end:  # until the other one waits, or makes it too
            if (room / "waiting").exists() or (room / "made").read_text().count("made") > 1:
                break
            time.sleep(0.01)
        return [Document(f"d{i}", len(f"play {i} " * 500), lambda i=i: chunks(i)) for i in range(20)]
    return Corpus("test", "one", documents)

def progress(done, total, what):
    if what.startswith("waiting"):
        (room / "waiting").touch()

print(prepare(DataConfig(corpus="plays", tokenizer="bytes"), progress=progress, shard_tokens=5000).fingerprint)
"""


def start(room: Path, mode: str, home: Path) -> subprocess.Popen[str]:
    room.mkdir(exist_ok=True)
    environment = os.environ | {"GPT2LAB_DATA": str(home)}
    command = [sys.executable, "-c", SCRIPT, str(room), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_kill_in_the_middle_leaves_nothing_usable_and_the_next_one_succeeds(home: Path, tmp_path: Path) -> None:
    killed = start(tmp_path / "room", "kill", home)
    assert killed.communicate(timeout=60)[0] == ""
    assert killed.returncode == -signal.SIGKILL
    left = folders(home)
    assert [name.endswith(".partial") for name in left] == [True]
    assert any((home / "prepared" / left[0]).glob("train_*.bin"))  # it had begun to write
    assert list_prepared() == []
    again, clean = start(tmp_path / "room", "", home), start(tmp_path / "room", "", tmp_path / "clean")
    said = [process.communicate(timeout=60)[0] for process in (again, clean)]
    assert said[0] == said[1] != ""
    assert folders(home) == folders(tmp_path / "clean")
    assert len(folders(home)) == 1


def test_two_at_once_end_with_one(home: Path, tmp_path: Path) -> None:
    both = [start(tmp_path / "room", "race", home) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert said[0] == said[1] != ""
    assert (tmp_path / "room" / "made").read_text() == "made\n"
    assert len(folders(home)) == 1


def test_leftovers_of_others_are_swept_only_if_nobody_works_on_them(config: Make, home: Path) -> None:
    dead, alive = (home / "prepared" / f".{key}.1.partial" for key in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "train_000.bin").write_bytes(b"ab")
    with files.locked(home / "prepared" / ".alive.lock"):
        prepare(config())
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_full_disk_and_a_forbidden_place_are_said_plainly(
    config: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(EnvironmentFault, match=r"no room to write .* bytes free"):
            prepare(config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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


def test_the_manifest_is_plain_json(config: Make) -> None:
    made = prepare(config())
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["corpus"]["source"].startswith("12 text files, ")
    assert manifest["fingerprint"] == made.fingerprint
    assert str(made.path.parent) not in json.dumps(manifest["corpus"])
