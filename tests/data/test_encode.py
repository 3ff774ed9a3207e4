"""Text in chunks, its division into training and validation, and tokenizing in one process or several: the same ids in
order, bounded memory, and clean ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2lab.data import encode as module
from gpt2lab.data.corpora import Document, Stream
from gpt2lab.data.encode import PENDING, Part, Piece, PieceBatch, batches, between, divide, division, encode, encoder
from gpt2lab.data.files import READ_BYTES
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.data.texts import decoded
from gpt2lab.data.tokenizers import ByteTable, TokenizerSite, tokenizer
from gpt2lab.errors import ConfigError, EnvironmentFault
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
        print("printed by a tokenizer")
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
def test_the_number_of_processes_changes_nothing(
    config: Make, contents: Contents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    chosen = config({"name": "bpe", "vocab_size": 300} if name == "bpe" else name)
    made = []
    for processes in (1, 2, 3):
        monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / f"home{processes}"))
        made.append(contents(prepare(chosen, shard_tokens=500, processes=processes).path))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_pieces_of_every_kind_arrive(processes: int) -> None:
    choice = tokenizer.read("gpt2")
    here = tokenizer.build(choice, TokenizerSite(Path()))
    texts = ["", "plain\n\0", "é中\U0001f600", "lone \ud800 surrogate", "a" * 70_000]
    with encoder(choice, Path(), here, processes) as encode_all:
        answers = list(encode_all(work(*texts)))
        assert [batch.pieces[0].text for batch, _ in answers] == texts
        for text, (_, (ids, counts)) in zip(texts, answers, strict=True):
            wanted = [*here.encode(text), here.separator] if text else []
            assert ids.tolist() == wanted and counts.tolist() == [len(wanted)]
        assert len(list(encode_all(work("again")))) == 1


def test_ids_travel_in_few_bytes_and_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    source = module.TokenizerSpec("", "", (), "")
    for ids, width in ([0, 255], 1), ([0, 256], 2), ([0, 65_536], 4), ([0, 2**32], 8), ([-1, 65_535], 4), ([], 8):
        table = ByteTable([], None, lambda text, ids=ids: np.array(ids, np.int64))  # type: ignore[misc]
        monkeypatch.setattr(module, "_built", lambda source, table=table: table)
        packed, counts = module._encode_in_process(source, next(work("x")).pieces)
        assert (packed.tolist(), packed.itemsize, counts.tolist()) == (ids, width, [len(ids)])


def test_no_more_than_a_few_batches_are_under_way() -> None:
    choice = tokenizer.read("bytes")
    taken = 0

    def endless() -> Iterator[PieceBatch]:
        nonlocal taken
        while True:
            taken += 1
            yield next(work("text"))

    with encoder(choice, Path(), tokenizer.build(choice, TokenizerSite(Path())), 2) as encode_all:
        answers = encode_all(endless())
        for number in range(1, 30):
            next(answers)
            assert taken - number < 2 * PENDING


@pytest.mark.usefixtures("no_plugins_after")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_document_that_a_tokenizer_fails_on_is_named(
    config: Make, texts: Path, plugin: Path, processes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    load_plugin(plugin)
    (texts / "play07.txt").write_text("all is well\n" * 100 + "poison")
    said = r"^play07\.txt: the tokenizer fails on it: ArithmeticError: cannot stomach this$"
    with pytest.raises(ConfigError, match=said):
        prepare(config("moody"), processes=processes)
    if processes > 1:
        assert capfd.readouterr().out == ""  # what a tokenizer prints there is not the command's answer
    with pytest.raises(ConfigError, match=r"^the document with 'poison of a stream': "):
        encode(tokenizer.build(tokenizer.read("moody"), TokenizerSite(Path())), next(work("poison of a stream")).pieces)


def test_what_building_a_tokenizer_raises_in_a_process_is_raised_here() -> None:
    bytes_ = tokenizer.build(tokenizer.read("bytes"), TokenizerSite(Path()))
    with (
        encoder(tokenizer.read("bpe"), Path("/nowhere"), bytes_, 2) as encode_all,
        pytest.raises(FileNotFoundError, match=r"tokenizer\.json"),
    ):
        list(encode_all(work("text")))


def test_a_process_that_dies_is_named_and_the_same_call_continues(
    config: Make, contents: Contents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = prepare(config(), shard_tokens=500)
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "again"))
    monkeypatch.setattr("gpt2lab.data.shards.STATE_SECONDS", 0.0)

    def kill(done: int, total: int, what: str) -> None:
        if done > total / 3:
            for process in multiprocessing.active_children():
                process.kill()

    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"^data\.tokenizer: a tokenizing process ended \(SIGKILL\)$"):
        prepare(config(), shard_tokens=500, processes=2, progress=kill)
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()
    ((state,),) = [list((tmp_path / "again").rglob("state.json"))]
    assert json.loads(state.read_text())["done"] > 0
    assert contents(prepare(config(), shard_tokens=500, processes=2).path) == contents(made.path)


def test_a_process_that_dies_with_full_pipes_is_noticed() -> None:
    choice = tokenizer.read("gpt2")
    here = tokenizer.build(choice, TokenizerSite(Path()))
    began = time.monotonic()
    with encoder(choice, Path(), here, 2) as encode_all:
        answers = encode_all(work(*["many words of text " * 30_000] * 20))
        next(answers)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(EnvironmentFault, match=r"\(SIGKILL\)$"):
            list(answers)
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()


def test_a_system_without_locks_between_processes_tokenizes_in_one(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(self: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(multiprocessing.context.SpawnContext, "Lock", lock)
    said: list[str] = []
    made = prepare(config(), processes=2, progress=lambda done, total, what: said.append(what))
    assert len(made.train) > 100
    assert any("no locks between processes ([Errno 38] Function not implemented): one process" in what for what in said)


SCRIPT = """
import sys
from pathlib import Path
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.data.tokenizers import tokenizer, bytes_

with open("runs", "a") as file:
    file.write("run\\n")

@tokenizer.register("mine", source="test")
def mine(site):
    "Bytes."
    return bytes_(site)

config = {"corpus": {"name": "text", "paths": ["texts/*.txt"]}, "tokenizer": TOKENIZER, "validation_fraction": 0.2}
say = lambda done, total, what: print(what, file=sys.stderr)
print(prepare(DataConfig.model_validate(config), processes=2, progress=say).fingerprint)
"""


@pytest.mark.parametrize("way", ["script", "stdin", "-c"])
@pytest.mark.parametrize("chosen", ["bytes", "mine"])
def test_a_main_program_without_a_guard_runs_once(
    config: Make, texts: Path, tmp_path: Path, way: str, chosen: str
) -> None:
    """One that spawned processes cannot import as well: standard input, or a notebook."""
    code = SCRIPT.replace("TOKENIZER", repr(chosen))
    (tmp_path / "script.py").write_text(code)
    words = {"script": ["script.py"], "stdin": ["-"], "-c": ["-c", code]}[way]
    environment = os.environ | {"GPT2LAB_DATA": str(tmp_path / "other")}
    answer = subprocess.run(
        [sys.executable, *words], input=code, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.strip() == prepare(config()).fingerprint, answer.stderr
    assert (tmp_path / "runs").read_text() == "run\n"
    alone = "tokenizer mine is defined in the main program: one process tokenizes (a plug-in allows more)"
    assert (alone in answer.stderr) == (chosen == "mine")


def ended(group: int, seconds: float) -> bool:
    """Whether no process of the group is left before so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        pytest.param(signal.SIGINT, True, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, False, 75),
        pytest.param(signal.SIGKILL, False, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_signals_end_all_processes_within_seconds(
    texts: Path, tmp_path: Path, plugin: Path, number: signal.Signals, to_all: bool, code: int
) -> None:
    """SIGINT goes to all of them, as Ctrl-C in a terminal does."""
    (texts / "long.txt").write_text("a line of the text\n" * 200_000)
    (tmp_path / "begun").mkdir()
    chosen = json.dumps({"name": "moody", "seconds": 0.3, "folder": str(tmp_path / "begun")})
    command = [sys.executable, "-m", "gpt2lab", "data", "prepare", "text", "--tokenizer", chosen, "--processes", "2"]
    command += ["--set", f"data.corpus.paths=[{texts}/*.txt]", "--plugin", str(plugin)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while len(list((tmp_path / "begun").iterdir())) < 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        began = time.monotonic()
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code
        assert ended(process.pid, 15) and time.monotonic() - began < 15
        assert "Traceback" not in err
        assert not to_all or "interrupted; what was prepared is kept\ntry: the same command continues" in err
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
