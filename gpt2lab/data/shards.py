"""Text becomes token shards: done once, kept below `data_home()`, found again by content.

A prepared folder holds `train_000.bin`, ..., `validation_000.bin`, ... (little-endian ids), whatever the tokenizer
keeps, and `manifest.json`:
  format, dtype, vocab_size, separator, tokenizer, validation_fraction, fingerprint, floors, created,
  corpus  {name, source, identity}
  splits  {train | validation: {tokens, bytes, documents: [{name, bytes, tokens}], shards: [{file, tokens, sha256}]}}
  files   {other file: sha256}
  sha256  of all the rest
Bytes are those of the text in UTF-8; tokens include separators.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gpt2lab.data.corpora import Corpus
from gpt2lab.data.corpora import corpus as corpus_slot
from gpt2lab.data.files import Progress, canonical_sha256, data_home, disk, file_sha256, locked, publish, sync_file
from gpt2lab.data.floors import floors
from gpt2lab.data.prepared import FORMAT, MANIFEST, Prepared, Tokens, check_ids, fingerprint, open_prepared
from gpt2lab.data.split import SPLITS, Part, SplitName, divide
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, pieces
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Choice, read_field
from gpt2lab.schema import Settings

SHARD_TOKENS = 100_000_000
FLOOR_TOKENS = 50_000_000


class DataConfig(Settings):
    """Which text, as which tokens, and how much of it for validation."""

    corpus: Choice = Field(default_factory=lambda: corpus_slot.read(corpus_slot.default))
    """Where the text comes from."""
    tokenizer: Choice = Field(default_factory=lambda: tokenizer_slot.read(tokenizer_slot.default))
    """How text becomes token ids."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the text's bytes that is kept for validation."""

    @field_validator("corpus", "tokenizer", mode="before")
    @classmethod
    def _choice(cls, raw: object, info: Any) -> object:
        return read_field(info.field_name, raw)


def prepare(config: DataConfig, *, progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS) -> Prepared:
    """The prepared data of `config`, made if it is not there yet.

    One process makes it while others wait; what is not finished is never seen under its final name. Raises ConfigError
    for text that cannot be used, EnvironmentFault for the machine, DataFault for what is damaged.
    """
    corpus: Corpus = corpus_slot.build(config.corpus)
    home = data_home() / "prepared"
    key = prepared_key(config, corpus, shard_tokens)
    with disk(home):
        home.mkdir(parents=True, exist_ok=True)
        if (home / key).exists():
            return open_prepared(home / key)
        say = progress or (lambda done, total, what: None)
        with locked(_lock(home, key), waiting=lambda: say(0, 0, "waiting for another process that prepares this")):
            if (home / key).exists():
                return open_prepared(home / key)
            _sweep(home, key)
            partial = home / f".{key}.{os.getpid()}.partial"
            try:
                partial.mkdir()
                _write(partial, config, corpus, say, shard_tokens)
                publish(partial, home / key)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return open_prepared(home / key)


def prepared_key(config: DataConfig, corpus: Corpus, shard_tokens: int = SHARD_TOKENS) -> str:
    """The folder name for a config over a corpus: its content counts, not where it lies."""
    parts = {
        "format": FORMAT,
        "corpus": [config.corpus.name, corpus.identity],
        "tokenizer": config.tokenizer.full(),
        "validation_fraction": config.validation_fraction,
        "shard_tokens": shard_tokens,
    }
    return canonical_sha256(parts)[:32]


def _write(folder: Path, config: DataConfig, corpus: Corpus, say: Progress, shard_tokens: int) -> None:
    """Everything of a prepared folder, fsynced, the manifest last."""
    documents = corpus.documents()
    parts = divide(documents, config.validation_fraction)
    told = _Told(say, sum(part.size for split in SPLITS for part in parts[split]))
    site = TokenizerSite(folder, lambda: pieces(told.text(parts["train"], "training the tokenizer")))
    tokenizer: Tokenizer = tokenizer_slot.build(config.tokenizer, site)
    kept = {path.name: path for path in folder.iterdir()}

    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    told.restart()
    records = {
        split: _write_split(folder, split, parts[split], tokenizer, dtype, told, shard_tokens) for split in SPLITS
    }
    for split, record in records.items():
        if record["tokens"] < 2:
            raise ConfigError(f"{split} needs 2 tokens, has {record['tokens']}", where="data.corpus", hint="more text")

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": config.tokenizer.full(),
        "validation_fraction": config.validation_fraction,
        "corpus": {"name": config.corpus.name, "source": corpus.source, "identity": corpus.identity},
        "splits": records,
        "files": {name: file_sha256(path) for name, path in sorted(kept.items())},
        "floors": _floors(folder, records, dtype, tokenizer.vocab_size, told),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["sha256"] = canonical_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*kept.values(), folder / MANIFEST]:
        sync_file(path)


def _write_split(
    folder: Path, split: SplitName, parts: Sequence[Part], tokenizer: Tokenizer, dtype: str, told: _Told, size: int
) -> dict[str, Any]:
    """Write one split's shards; returns its record for the manifest."""
    shards = _ShardWriter(folder, split, dtype, tokenizer.vocab_size, size)
    documents = []
    with shards:
        for part in parts:
            text_bytes, before = 0, shards.tokens
            for piece in pieces(told.text([part], "writing tokens")):
                text_bytes += len(piece.encode())
                shards.add(tokenizer.encode(piece))
            if tokenizer.separator is not None and text_bytes:
                shards.add(np.array([tokenizer.separator]))
            documents.append({"name": part.document.name, "bytes": text_bytes, "tokens": shards.tokens - before})
    return {
        "tokens": shards.tokens,
        "bytes": sum(document["bytes"] for document in documents),
        "documents": documents,
        "shards": shards.records,
    }


def _floors(folder: Path, records: dict[SplitName, Any], dtype: str, vocab_size: int, told: _Told) -> dict[str, Any]:
    """Floors over at most the first FLOOR_TOKENS of each split, and how many tokens those were."""
    told.say(0, 0, "counting unigrams and bigrams")
    train, validation = (
        Tokens([(folder / s["file"], s["tokens"]) for s in records[split]["shards"]], dtype, vocab_size)
        for split in SPLITS
    )
    counted = {f"{split}_tokens": min(FLOOR_TOKENS, records[split]["tokens"]) for split in SPLITS}
    return floors(train, validation, vocab_size, FLOOR_TOKENS) | counted


class _ShardWriter:
    """Appends ids to shards of at most `size` tokens; each is fsynced when it is closed."""

    def __init__(self, folder: Path, split: SplitName, dtype: str, vocab_size: int, size: int) -> None:
        self.folder, self.split, self.dtype, self.vocab_size, self.size = folder, split, dtype, vocab_size, size
        self.tokens = 0
        self.records: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, ids: NDArray[np.int64]) -> None:
        """Append ids, over as many shards as they need; raises DataFault for one outside the vocabulary."""
        while len(ids):
            if self._file is None:
                name = f"{self.split}_{len(self.records):03d}.bin"
                self.records.append({"file": name, "tokens": 0, "sha256": ""})
                self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed by _close, when the shard is full)
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
                self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.flush()
            os.fsync(file.fileno())
        finally:
            file.close()
        self.records[-1]["sha256"] = self._digest.hexdigest()


class _Told:
    """Passes text on and tells how many of its bytes went by."""

    def __init__(self, say: Progress, total: int) -> None:
        self.say, self.total, self.done = say, total, 0

    def restart(self) -> None:
        """Count from zero again, for the next pass over the text."""
        self.done = 0

    def text(self, parts: Iterable[Part], what: str) -> Iterator[str]:
        """The parts' chunks, one after the other."""
        for part in parts:
            for chunk in part.chunks():
                yield chunk
                self.done += len(chunk.encode())
                self.say(min(self.done, self.total), self.total, what)


def _lock(home: Path, key: str) -> Path:
    return home / f".{key}.lock"


def _sweep(home: Path, held: str) -> None:
    """Remove what killed processes left: of the key `held`, whose lock we have, and of others that nobody works on."""
    for partial in home.glob(".*.partial"):
        key = partial.name.split(".")[1]
        if key == held:
            shutil.rmtree(partial)
        else:
            with locked(_lock(home, key), wait=False) as free:
                if free:
                    shutil.rmtree(partial)
