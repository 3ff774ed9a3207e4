"""Text in chunks, its division into training and validation, and tokenizing in one thread or several: the same ids in
order, bounded memory, and clean ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.data import encode as module
from gpt2lab.data.corpora import Document, Stream
from gpt2lab.data.encode import PENDING, Part, Piece, PieceBatch, batches, between, divide, division, encode, encoded
from gpt2lab.data.files import READ_BYTES
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.data.texts import decoded
from gpt2lab.data.tokenizers import TokenizerSite, tokenizer
from gpt2lab.errors import ConfigError
from gpt2lab.registry import load_plugin

Make = Callable[..., DataConfig]
Contents = Callable[[Path], dict[str, Any]]
PLUGIN = '''
import os
import time
from pathlib import Path

import numpy as np

from gpt2lab.data.tokenizers import ByteTable, tokenizer


@tokenizer.register("moody", source="test")
def moody(site, *, seconds: float = 0.0, folder: str = "") -> ByteTable:
    """Bytes, slowly; fails on poison.

    seconds: for each piece. folder: gets a file for each process that has begun.
    """

    def encode(text):
        if folder:
            (Path(folder) / str(os.getpid())).touch()
        if "poison" in text:
            raise ArithmeticError("cannot stomach this")
        time.sleep(seconds)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    return ByteTable([bytes([i]) for i in range(256)], None, encode)
'''


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 400)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "moody.py"
    path.write_text(PLUGIN)
    return path


def work(*texts: str) -> Iterator[PieceBatch]:
    """One batch for each text."""
    return (PieceBatch([Piece("train", None, text, len(text), True)]) for text in texts)


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_the_number_of_threads_changes_nothing(
    config: Make, contents: Contents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    chosen = config({"name": "bpe", "vocab_size": 300} if name == "bpe" else name)
    made = []
    for threads in (1, 2, 3):
        monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / f"home{threads}"))
        made.append(contents(prepare(chosen, shard_tokens=500, threads=threads).path))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_every_kind_arrive(threads: int) -> None:
    gpt2 = tokenizer.build(tokenizer.read("gpt2"), TokenizerSite(Path()))
    texts = ["", "plain\n\0", "é中\U0001f600", "lone \ud800 surrogate", "a" * 70_000]
    answers = list(encoded(work(*texts), gpt2, threads))
    assert [batch.pieces[0].text for batch, _ in answers] == texts
    for text, (_, (ids, counts)) in zip(texts, answers, strict=True):
        wanted = [*gpt2.encode(text), gpt2.separator] if text else []
        assert ids.tolist() == wanted and counts.tolist() == [len(wanted)]


def test_no_more_than_a_few_batches_are_under_way() -> None:
    taken = 0

    def endless() -> Iterator[PieceBatch]:
        nonlocal taken
        while True:
            taken += 1
            yield next(work("text"))

    answers = encoded(endless(), tokenizer.build(tokenizer.read("bytes"), TokenizerSite(Path())), 2)
    for number in range(1, 30):
        next(answers)
        assert taken - number < 2 * PENDING


@pytest.mark.usefixtures("no_plugins_after")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_document_that_a_tokenizer_fails_on_is_named(config: Make, texts: Path, plugin: Path, threads: int) -> None:
    load_plugin(plugin)
    (texts / "play07.txt").write_text("all is well\n" * 100 + "poison")
    said = r"^play07\.txt: the tokenizer fails on it: ArithmeticError: cannot stomach this$"
    with pytest.raises(ConfigError, match=said):
        prepare(config("moody"), threads=threads)
    with pytest.raises(ConfigError, match=r"^the document with 'poison of a stream': "):
        encode(tokenizer.build(tokenizer.read("moody"), TokenizerSite(Path())), next(work("poison of a stream")).pieces)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 75),
    ],
    ids=lambda value: str(value),
)
def test_signals_end_it_within_seconds(
    texts: Path, tmp_path: Path, plugin: Path, number: signal.Signals, code: int
) -> None:
    (texts / "long.txt").write_text("a line of the text\n" * 200_000)
    (tmp_path / "begun").mkdir()
    chosen = json.dumps({"name": "moody", "seconds": 0.3, "folder": str(tmp_path / "begun")})
    command = [sys.executable, "-m", "gpt2lab", "data", "prepare", "text", "--tokenizer", chosen, "--threads", "2"]
    command += ["--set", f"data.corpus.paths=[{texts}/*.txt]", "--plugin", str(plugin)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "begun").iterdir()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code and time.monotonic() - began < 15
        assert "Traceback" not in err
        assert (
            number != signal.SIGINT or "interrupted; what was prepared is kept\ntry: the same command continues" in err
        )
    finally:
        if process.poll() is None:
            process.kill()


def test_copies_of_a_document_are_on_one_side_and_large_corpora_give_little_for_validation() -> None:
    class Reading:
        def __iter__(self) -> Any:
            return iter([("same", None)] * 50 + [(f"text {i}", None) for i in range(4000)])

        def place(self) -> Any:
            return None

    def parts(size: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"train": [], "validation": []}
        for split, _, chunks in division(Stream("s", "i", size, lambda place: Reading()), 0.2).open(None):
            found[split].append("".join(chunks))
        return found

    small, large = parts(10**6), parts(10**10)
    assert {small[split].count("same") for split in small} == {0, 50}
    assert 650 < len(set(small["validation"])) < 950
    assert 20 < len(set(large["validation"])) < 70  # a hundredth
    assert set(large["validation"]) <= set(small["validation"])


def test_batches_hold_all_text_in_order_and_say_where_reading_continues() -> None:
    documents = [("words " * 30_000).strip(), "", "b" * 399, "c", "d" * 1000]

    class Reading:
        count = 0

        def __iter__(self) -> Any:
            for text in documents:
                self.count += 1
                yield text, "train"

        def place(self) -> Any:
            return self.count

    made = list(batches(division(Stream("s", "i", 1, lambda place: Reading()), 0.2).open(None)))
    pieces = [piece for batch in made for piece in batch.pieces]
    assert re.split("\0", "".join(piece.text + "\0" * piece.last for piece in pieces)) == [*documents, ""]
    assert max(len(piece.text) for piece in pieces) < 1 << 17
    assert [(batch.place, batch.size >= 400) for batch in made] == [
        (None, True), (None, True), (1, True), (4, True), (5, True)
    ]  # fmt: skip


# --- text in chunks, and its division ---

AWKWARD = "naïve 🙂\r\nline\0two\n字字字\n"


def document(name: str, text: str) -> Document:
    return Document(name, len(text.encode()), lambda: iter([text[:7], text[7:]]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_text_is_kept_as_it_is_however_the_bytes_are_cut(size: int) -> None:
    raw = AWKWARD.encode()
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert "".join(decoded(blocks, where="x")) == AWKWARD


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_only_a_byte_order_mark_at_the_start_is_dropped(size: int) -> None:
    raw = b"\xef\xbb\xbf" + "a\ufeffb".encode()
    assert "".join(decoded([raw[i : i + size] for i in range(0, len(raw), size)], where="x")) == "a\ufeffb"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("raw", "line", "byte"),
    [
        (b"ok\n\xff", 2, 3),
        ("é\n\nab".encode() + b"\xe9t\xe9", 3, 6),
        (b"a\nbc\xe2\x82", 2, 4),  # ends inside a character
    ],
)
def test_bad_utf8_names_file_line_and_byte_and_offers_to_replace(size: int, raw: bytes, line: int, byte: int) -> None:
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    with pytest.raises(ConfigError) as caught:
        list(decoded(blocks, where="f.txt"))
    assert f"f.txt:{line}: byte {byte} (0x{raw[byte]:02x}) is not UTF-8" in caught.value.render()
    assert "errors: replace" in str(caught.value.hint)
    assert "\ufffd" in "".join(decoded(blocks, where="f.txt", errors="replace"))


def test_one_endless_line_is_read_in_bounded_chunks() -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x" * READ_BYTES

    chunks = decoded(endless(), where="x")
    assert [len(next(chunks)) for _ in range(3)] == [READ_BYTES] * 3
    assert read == 3


@pytest.mark.parametrize("cuts", [[3], [1, 2, 9], [7, 8]])
def test_parts_that_share_a_border_lose_and_double_nothing(cuts: list[int]) -> None:
    chunks = [AWKWARD[a:b] for a, b in zip([0, *cuts], [*cuts, len(AWKWARD)], strict=True)]
    for border in range(len(AWKWARD.encode()) + 2):
        head, tail = "".join(between(chunks, 0, border)), "".join(between(chunks, border, None))
        assert head + tail == AWKWARD
        assert border <= len(head.encode()) <= border + 3 or head == AWKWARD


def test_few_documents_are_split_by_position() -> None:
    documents = [document(f"d{i}", "é" * 50) for i in range(9)]
    parts = divide(documents, 0.1)
    assert ["".join(p.chunks()) for p in parts["train"]] == ["é" * 45] * 9
    assert ["".join(p.chunks()) for p in parts["validation"]] == ["é" * 5] * 9
    assert sum(p.size for ps in parts.values() for p in ps) == 900


def test_many_documents_are_split_whole_by_hash_of_name_until_the_fraction_is_reached() -> None:
    documents = [document(f"d{i:02d}", "x" * 100) for i in range(40)]
    parts = divide(documents, 0.1)
    names = {split: [p.document.name for p in ps] for split, ps in parts.items()}
    # The four smallest sha256 of d00 ... d39, taken with `sha256sum`.
    assert names["validation"] == ["d01", "d04", "d06", "d34"]
    assert sorted(names["train"] + names["validation"]) == [d.name for d in documents]
    # One more document changes nothing for the others.
    more = {p.document.name for p in divide([*documents, document("e", "x")], 0.1)["validation"]}
    assert set(names["validation"]) <= more


def test_a_huge_document_is_passed_over_and_only_huge_ones_are_split_by_position() -> None:
    sizes = {f"d{i:02d}": 100 for i in range(30)}
    for huge in sizes:
        documents = [document(name, "x" * (3000 if name == huge else size)) for name, size in sizes.items()]
        validation = divide(documents, 0.05)["validation"]
        assert huge not in [p.document.name for p in validation]
        assert 0.04 * 5900 < sum(p.size for p in validation) < 0.1 * 5900
    even = divide([document(f"d{i}", "x" * 100) for i in range(10)], 0.05)["validation"]
    assert [p.size for p in even] == [5] * 10


def test_a_whole_part_reads_its_document_as_it_is() -> None:
    assert list(Part(document("d", AWKWARD)).chunks()) == [AWKWARD[:7], AWKWARD[7:]]
