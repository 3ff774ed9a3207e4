"""Opening what was prepared: every kind of damage is found, reading crosses shards; floors against plain Python;
progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt2lab.data import files
from gpt2lab.data.files import canonical_sha256
from gpt2lab.data.prepared import (
    Prepared,
    Tokens,
    find_prepared,
    floors,
    list_prepared,
    open_prepared,
    open_verified,
)
from gpt2lab.data.progress import rich_progress
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError, DataFault

Make = Callable[..., DataConfig]


@pytest.fixture
def made(config: Make) -> Prepared:
    return prepare(config({"name": "bpe", "vocab_size": 280}), shard_tokens=1000)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the hash that fits."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = canonical_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_slices_cross_shards(tmp_path: Path) -> None:
    ids = np.arange(23)
    shards = []
    for i, (a, b) in enumerate([(0, 5), (5, 10), (10, 11), (11, 23)]):
        ids[a:b].astype("<u2").tofile(tmp_path / str(i))
        shards.append((tmp_path / str(i), b - a))
    tokens = Tokens(shards, "<u2", 23)
    assert len(tokens) == 23
    for a in range(24):
        for b in range(25):
            assert tokens[a:b].tolist() == ids[a:b].tolist()
    assert tokens[:].dtype == np.int64
    assert (tokens[-3:].tolist(), tokens[30:40].tolist()) == ([20, 21, 22], [])
    with pytest.raises(ValueError, match="no step"):
        tokens[::2]
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy[3:12].tolist() == ids[3:12].tolist()
    assert len(pickle.dumps(tokens)) < 1000
    assert len(Tokens([], "<u2", 5)[:]) == 0


def test_ids_outside_the_vocabulary_are_found_when_read(tmp_path: Path) -> None:
    np.array([1, 2], "<u2").tofile(tmp_path / "a")
    np.array([3, 9, 4], "<u2").tofile(tmp_path / "b")
    tokens = Tokens([(tmp_path / "a", 2), (tmp_path / "b", 3)], "<u2", 9)
    assert tokens[:3].tolist() == [1, 2, 3]
    with pytest.raises(DataFault, match=r"b: token id 9 at offset 1 is outside the vocabulary of 9"):
        tokens[1:5]


def leads_outside(path: Path) -> None:
    shutil.copy(path / "train_000.bin", path.parent)
    rewrite(path, lambda manifest: manifest["splits"]["train"]["shards"][0].update(file="../train_000.bin"))


def rewritten(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda manifest: manifest.update(changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: os.truncate(path / "train_001.bin", 1997),
            r"train_001\.bin: 2,000 bytes expected \(1,000 tokens of <u2\), 1,997 found",
        ),
        (lambda path: (path / "train_000.bin").write_bytes(b""), r"train_000\.bin: .* 0 found"),
        *((lambda path, name=name: (path / name).unlink(), f"{name}: missing")
          for name in ("train_000.bin", "validation_000.bin", "tokenizer.json")),
        *((rewritten(dtype=dtype), "does not hold a vocabulary of 280")
          for dtype in ("<u8", ">u2", "<i2", "float32", "O")),
        (rewritten(dtype="<u4"), r"4,000 bytes expected \(1,000 tokens of <u4\), 2,000 found"),
        (rewritten(vocab_size=65_537), "does not hold a vocabulary of 65537"),
        (leads_outside, r"\.\./train_000\.bin"),
    ],
)  # fmt: skip
def test_damage_is_refused_when_opened_or_prepared_again(
    made: Prepared, config: Make, damage: Callable[[Path], None], message: str
) -> None:
    damage(made.path)
    for again in (
        lambda: open_prepared(made.path),
        lambda: prepare(config({"name": "bpe", "vocab_size": 280}), shard_tokens=1000),
    ):
        with pytest.raises(DataFault, match=message) as caught:
            again()
        assert caught.value.exit_code == 4 and caught.value.hint == f"rm -r {made.path}, then prepare it again"


def test_every_single_bit_flip_is_found(made: Prepared) -> None:
    made.verify()
    rng = random.Random(0)
    for file in sorted(made.path.iterdir()):
        good = file.read_bytes()
        for _ in range(12):
            raw, bit = bytearray(good), rng.randrange(8 * len(good))
            raw[bit // 8] ^= 1 << bit % 8
            file.write_bytes(raw)
            with pytest.raises(DataFault, match=file.name):
                open_prepared(made.path).verify()
        file.write_bytes(good)
    open_prepared(made.path).verify()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []

    def counted(path: Path, *rest: Any, real: Callable[..., str] = files.file_sha256, **options: Any) -> str:
        names.append(path.name)
        return real(path, *rest, **options)

    monkeypatch.setattr(files, "file_sha256", counted)
    return names


def test_content_is_verified_when_opened_and_remembered_until_a_file_changes(made: Prepared, reads: list[str]) -> None:
    for file in made.path.iterdir():
        os.utime(file, (1, 1))  # no longer fresh
    open_verified(made.path)
    assert sorted(reads) == sorted(file.name for file in made.path.iterdir() if file.name != "manifest.json")
    reads.clear()
    open_verified(made.path)
    assert reads == []
    shard = made.path / "validation_000.bin"
    good = shard.read_bytes()
    for change in ("modified", "another file with the old time"):
        if change != "modified":
            shard.unlink()
        shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        if change != "modified":
            os.utime(shard, (1, 1))
        reads.clear()
        with pytest.raises(DataFault, match=r"validation_000\.bin: damaged") as caught:
            open_verified(made.path)
        assert reads == ["validation_000.bin"] and caught.value.hint == f"rm -r {made.path}, then prepare it again"
    with pytest.raises(DataFault):
        find_prepared(made.fingerprint)
    assert find_prepared("another") is None


def test_files_on_a_shared_disk_are_read_by_every_process(
    made: Prepared, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(made.path), fstype="nfs4")]
    monkeypatch.setattr(files.psutil, "disk_partitions", lambda all: mounts)
    assert not files.on_shared_disk(made.path) and files.on_shared_disk(made.path / "x")
    for process in range(2):
        monkeypatch.setattr(files, "_read_here", {})
        reads.clear()
        for _ in range(2):
            open_verified(made.path)
        assert "train_000.bin" in reads and len(reads) == len(set(reads)), process


def test_verify_reports_all_damage_and_its_progress(made: Prepared) -> None:
    for name in ("train_000.bin", "validation_000.bin"):
        raw = bytearray((made.path / name).read_bytes())
        raw[10] ^= 1
        (made.path / name).write_bytes(raw)
    said: list[tuple[int, int, str]] = []
    with pytest.raises(DataFault) as caught:
        made.verify(lambda *now: said.append(now))
    assert [Path(p.where).name for p in caught.value.problems] == ["train_000.bin", "validation_000.bin"]
    assert said[-1][0] == said[-1][1] > 0


def test_verify_finds_ids_outside_the_vocabulary(made: Prepared) -> None:
    rewrite(made.path, lambda manifest: manifest.update(vocab_size=200))
    with pytest.raises(DataFault, match="is outside the vocabulary of 200"):
        open_prepared(made.path).verify()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not prepared data"),
        ("{", "not JSON"),
        ("[]", "not of format 1"),
        ('{"format": 2}', "not of format 1"),
        ('{"format": 1}', "its own sha256"),
        ("\xff", "not JSON"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataFault, match=said):
        open_prepared(tmp_path)


def test_both_splits_must_hold_a_block(made: Prepared) -> None:
    shortest = min(len(made.train), len(made.validation))
    made.require(shortest - 1)
    with pytest.raises(ConfigError, match=f"validation: needs {shortest + 1} tokens, has {shortest}") as caught:
        made.require(shortest)
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError) as caught:
        made.require(10**9)
    assert len(caught.value.problems) == 2


def test_list_shows_the_good_and_the_bad(made: Prepared, config: Make) -> None:
    other = prepare(config())
    (other.path / "train_000.bin").unlink()
    found = dict(list_prepared())
    assert set(found) == {made.path, other.path}
    good, bad = found[made.path], found[other.path]
    assert isinstance(good, Prepared)
    assert good.fingerprint == made.fingerprint
    assert isinstance(bad, DataFault)


def test_nothing_prepared_is_an_empty_list() -> None:
    assert list_prepared() == []


def test_the_record_of_a_split(made: Prepared) -> None:
    record = made.manifest["splits"]["validation"]
    assert record["tokens"] == len(made.validation) == sum(d["tokens"] for d in record["documents"])


def plain_floors(train: list[int], validation: list[int], size: int) -> tuple[float, float]:
    """The definition, token by token."""
    single, double, heads = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    kinds = Counter(h for h, _ in double)
    uni = [(single[w] + 1) / (len(train) + size) for w in range(size)]
    both = [0.0, 0.0]
    for h, w in pairwise(validation):
        both[0] -= math.log(uni[w])
        seen = heads[h] + kinds[h]
        both[1] -= math.log((double[h, w] + kinds[h] * uni[w]) / seen if seen else uni[w])
    return both[0] / (len(validation) - 1), both[1] / (len(validation) - 1)


def test_floors_by_hand() -> None:
    # a b a b a, then b a: p(a) = 4/7 of V = 2; after b came a twice, one kind: (2 + 4/7) / 3 = 6/7.
    found = floors(np.array([0, 1, 0, 1, 0]), np.array([1, 0]), 2, 99)
    assert found == pytest.approx({"unigram": -math.log(4 / 7), "bigram": -math.log(6 / 7)})
    # After an unseen head, the unigram alone.
    alone = floors(np.array([0, 1, 0]), np.array([2, 0]), 3, 99)
    assert alone == pytest.approx({"unigram": math.log(2), "bigram": math.log(2)})


@pytest.mark.parametrize("size", [2, 7, 300, 70_000])
def test_floors_against_plain_python(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.data.prepared.STRETCH", 64)
    rng = np.random.default_rng(size)
    train = np.maximum(size - rng.geometric(0.1, 900), 0)  # mostly high ids, whose pairs are the largest numbers
    validation = np.concatenate([rng.choice(train, 200), [size - 1, 0, size - 1, size - 1]])
    found = floors(train, validation, size, 10**6)
    assert (found["unigram"], found["bigram"]) == pytest.approx(plain_floors(train.tolist(), validation.tolist(), size))


def test_the_bigram_is_a_distribution() -> None:
    train = np.random.default_rng(0).integers(0, 5, 60)
    for head in range(6):
        total = sum(math.exp(-floors(train, np.array([head, w]), 6, 99)["bigram"]) for w in range(6))
        assert total == pytest.approx(1)


def test_no_more_than_the_limit_is_read() -> None:
    train, validation = np.random.default_rng(0).integers(0, 9, (2, 400))
    assert floors(train, validation, 9, 150) == floors(train[:150], validation[:150], 9, 400)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_each_phase_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with rich_progress(stream) as say:
        for seconds in range(25):
            now = 100.0 + seconds
            say(seconds * 10**6, 25 * 10**6, "writing tokens")
        say(0, 0, "counting")
        say(40 * 10**9, 48 * 10**9, "writing tokens")  # continued: the rate is that of what is done here
        now += 20
        say(40 * 10**9 + 20 * 10**6, 48 * 10**9, "writing tokens")
    assert stream.getvalue().splitlines() == [
        "writing tokens: 0.0 of 25.0 MB",
        "writing tokens: 10.0 of 25.0 MB, 1.0 MB/s, 0:15 left",
        "writing tokens: 20.0 of 25.0 MB, 1.0 MB/s, 0:05 left",
        "counting",
        "writing tokens: 40,000.0 of 48,000.0 MB",
        "writing tokens: 40,020.0 of 48,000.0 MB, 1.0 MB/s, 2:13:00 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with rich_progress(stream) as say:
        say(5, 10, "writing tokens")
        say(0, 0, "counting")
    assert "counting" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()
