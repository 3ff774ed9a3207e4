"""Token shards as they are written, and how far writing came: what a killed process leaves, the next one continues.

Now and then both splits are flushed to disk and `state.json` says how much of them counts and where reading goes on.
Whatever lies behind that is cut off when writing continues, so the shards end as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.encoding import Batch, Encoded
from gpt2lab.data.files import READ_BYTES, canonical_sha256, publish
from gpt2lab.data.prepared import check_ids
from gpt2lab.data.split import SPLITS, SplitName
from gpt2lab.faults import point

STATE = "state.json"


class SplitWriter:
    """Appends ids to shards of at most `size` tokens; each is fsynced when it is closed.

    listed: whether documents are recorded one by one; otherwise each shard tells how many end in it.
    """

    def __init__(self, folder: Path, split: SplitName, dtype: str, vocab_size: int, size: int, *, listed: bool) -> None:
        self.folder, self.split, self.dtype, self.vocab_size, self.size = folder, split, dtype, vocab_size, size
        self.listed = listed
        self.tokens = self.bytes = self.count = self.whole = 0
        self.documents: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._begun = [0, 0]  # bytes and tokens of the present document

    def add(self, ids: NDArray[np.int64]) -> None:
        """Append ids, over as many shards as they need; raises DataFault for one outside the vocabulary."""
        while len(ids):
            if self._file is None:
                name = f"{self.split}_{len(self.records):03d}.bin"
                self.records.append({"file": name, "tokens": 0} | ({} if self.listed else {"documents": 0}))
                self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed by _finish or close)
                self._digest = hashlib.sha256()
            record = self.records[-1]
            now, ids = np.split(ids, [self.size - record["tokens"]])
            check_ids(now, self.vocab_size, record["file"], record["tokens"])
            raw = now.astype(self.dtype).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            record["tokens"] += len(now)
            self.tokens += len(now)
            if record["tokens"] == self.size:
                self._finish()

    def passed(self, size: int, tokens: int, name: str | None, *, last: bool) -> None:
        """Count a piece of `size` bytes and so many tokens, which `add` was given."""
        self.bytes += size
        self._begun[0] += size
        self._begun[1] += tokens
        if not last:
            return
        if self.listed:
            self.documents.append({"name": name, "bytes": self._begun[0], "tokens": self._begun[1]})
        elif self._begun[1]:
            self.count += 1
            self.records[-1]["documents"] += 1
        self._begun = [0, 0]

    def flush(self) -> None:
        """Bring what was added to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _finish(self) -> None:
        assert self._file is not None
        self.flush()
        self.close()
        self.records[-1]["sha256"] = self._digest.hexdigest()
        self.whole += 1
        point("data.shard")

    def finish(self) -> None:
        """Close the last shard."""
        if self._file is not None:
            self._finish()

    def close(self) -> None:
        """Let go of the file, whether or not the disk takes what is left."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                if not file.closed:
                    file.raw.close()  # type: ignore[attr-defined]

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        counted = {} if self.listed else {"document_count": self.count}
        records = [dict(record) for record in self.records]
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, **counted, "shards": records}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned earlier: cut files, which are no shorter, to it."""
        self.tokens, self.bytes, self.count = record["tokens"], record["bytes"], record.get("document_count", 0)
        self.documents, self.records = list(record["documents"]), [dict(shard) for shard in record["shards"]]
        self.whole = sum("sha256" in shard for shard in self.records)
        if self.records and "sha256" not in self.records[-1]:
            self._file = open(self.folder / self.records[-1]["file"], "r+b")  # noqa: SIM115 (closed by _finish or close)
            self._file.truncate(self.records[-1]["tokens"] * np.dtype(self.dtype).itemsize)
            self._digest = hashlib.sha256()
            while block := self._file.read(READ_BYTES):
                self._digest.update(block)


class Writers:
    """Both splits of a folder."""

    def __init__(self, folder: Path, dtype: str, vocab_size: int, size: int, *, listed: bool) -> None:
        self.splits = {s: SplitWriter(folder, s, dtype, vocab_size, size, listed=listed) for s in SPLITS}

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.splits.values():
            writer.close()

    @property
    def whole(self) -> int:
        """Shards that are full."""
        return sum(writer.whole for writer in self.splits.values())

    @property
    def bytes(self) -> int:
        """Of text."""
        return sum(writer.bytes for writer in self.splits.values())

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append a batch and the ids of its pieces."""
        ids, counts = encoded
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for piece, part in zip(batch.pieces, parts, strict=True):
            self.splits[piece.split].add(part)
            self.splits[piece.split].passed(piece.size, len(part), piece.name, last=piece.last)

    def finish(self) -> dict[SplitName, Any]:
        """Close the last shards; -> the manifest's record of each split."""
        for writer in self.splits.values():
            writer.finish()
        return self.record()

    def record(self) -> dict[SplitName, Any]:
        """What each split holds so far."""
        return {split: writer.record() for split, writer in self.splits.items()}

    def restore(self, records: Mapping[SplitName, Any]) -> None:
        """Continue from an earlier `record`."""
        for split, writer in self.splits.items():
            writer.restore(records[split])

    def flush(self) -> None:
        """Bring all to disk."""
        for writer in self.splits.values():
            writer.flush()


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace `state.json` in one step."""
    sealed = {**state, "sha256": canonical_sha256(state)}
    temporary = folder / f"{STATE}.new"
    temporary.write_text(json.dumps(sealed))
    publish(temporary, folder / STATE)
    point("data.state")


def shard_sizes(state: Mapping[str, Any]) -> dict[str, int]:
    """The bytes of each shard that count, by file."""
    width = np.dtype(state["dtype"]).itemsize
    return {s["file"]: s["tokens"] * width for split in SPLITS for s in state["splits"][split]["shards"]}


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state that a killed process left; None when there is none that can be trusted."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        told = state.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return state if told == canonical_sha256(state) else None
