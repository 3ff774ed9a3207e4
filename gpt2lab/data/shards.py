"""Prepares token shards of a corpus: once, stored below `data_home()` under a hash of content and config.

A prepared folder holds `train_000.bin`, ..., `validation_000.bin`, ... (little-endian ids, or links to token files of
other projects), the tokenizer's files, and `manifest.json`:
  format, dtype, vocab_size, separator, tokenizer, validation_fraction, fingerprint, floors, created,
  corpus  {name, source, identity, of the hub: commit}
  splits  {train | validation: {tokens, bytes, documents: [{name, bytes, tokens}], shards: [{file, tokens, sha256}]}}
          of a stream, document_count instead of the list, and `documents` of each shard: how many end in it;
          linked shards: how many bytes to skip, which their sha256 excludes
  files   {other file: sha256}
  sha256  of everything above
Bytes are those of the text in UTF-8; tokens include separators.

Until it is complete, the folder is named `.KEY.partial`. After each complete shard, and every STATE_SECONDS, its
shards are flushed to disk and `state.json` records their lengths and where reading continues; after a crash, they are
truncated to these lengths.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gpt2lab.basics.cores import usable_cores
from gpt2lab.basics.faults import point
from gpt2lab.data.corpora import SPLITS, Corpus, Place, SplitName, Stream
from gpt2lab.data.corpora import corpus as corpus_slot
from gpt2lab.data.curricula import batches as batches_slot
from gpt2lab.data.encode import DividedText, Piece, batches, division, encoded
from gpt2lab.data.files import Progress, canonical_sha256, data_home, disk, file_sha256, quiet
from gpt2lab.data.prepared import (
    FORMAT,
    MANIFEST,
    Prepared,
    Tokens,
    check_ids,
    fingerprint,
    floors,
    open_verified,
    stretches,
)
from gpt2lab.data.tokenfiles import TokenFiles
from gpt2lab.data.tokenizers import GPT2_SIZE, Tokenizer, TokenizerSite, pieces
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError, LockHeld, Problem
from gpt2lab.registry import Choice, read_field
from gpt2lab.schema import Settings
from gpt2lab.store import file_lock, now, publish_folder, read_json, write_json

STATE = "state.json"
SHARD_TOKENS = 100_000_000
FLOOR_TOKENS = 50_000_000
STATE_SECONDS = 10.0
"""How often the state is saved, besides after every complete shard."""
LEARNING_BYTES = 1_000_000_000
"""Bytes of a stream's training text that a tokenizer is trained on."""
LARGE_BYTES = 1_000_000_000


class DataConfig(Settings):
    """The corpus, the tokenizer, the share for validation, and the order of the text."""

    corpus: Choice = Field(default_factory=lambda: corpus_slot.read(corpus_slot.default))
    """The source of the text."""
    tokenizer: Choice = Field(default_factory=lambda: tokenizer_slot.read(tokenizer_slot.default))
    """How text becomes token ids."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the text's bytes that is held out for validation."""
    batches: tuple[Choice, ...] = Field(default_factory=lambda: batches_slot.read_all(batches_slot.default))
    """What changes from step to step: size, order and length of sequences."""

    @field_validator("corpus", "tokenizer", "batches", mode="before")
    @classmethod
    def _choice(cls, raw: object, info: Any) -> object:
        return read_field(info.field_name, raw)

    def written(self) -> dict[str, Any]:
        """What the prepared data depends on, in the short form, as for `--set`."""
        return {"corpus": self.corpus.written(), "tokenizer": self.tokenizer.written(),
                "validation_fraction": self.validation_fraction}  # fmt: skip


def prepare(
    config: DataConfig,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
    threads: int | None = None,
) -> Prepared:
    """The prepared data of `config`, verified; prepares it if necessary.

    One process prepares it while others wait; an unfinished folder never has its final name, and is continued by the
    next call. threads: that tokenize; None is one for each core. The result does not depend on it.

    Raises ConfigError for unusable text, EnvironmentFault for problems of the machine, DataFault for damaged data.
    """
    corpus: Corpus | Stream | TokenFiles = corpus_slot.build(config.corpus)
    progress = progress or quiet
    if isinstance(corpus, TokenFiles):
        corpus.sums(progress)
    home = data_home() / "prepared"
    key = prepared_key(config, corpus, shard_tokens)
    final, partial = home / key, home / f".{key}.partial"
    with disk(home, lambda: (partial / STATE).exists()), ExitStack() as stack:
        home.mkdir(parents=True, exist_ok=True)
        if not final.exists():
            try:
                stack.enter_context(file_lock(_lock(home, key), 0))
            except LockHeld:
                progress(0, 0, "waiting for another process that prepares this")
                stack.enter_context(file_lock(_lock(home, key)))
        if not final.exists():
            _remove_leftovers(home, key)
            try:
                partial.mkdir(exist_ok=True)
                _Preparation(partial, config, progress, shard_tokens, threads).make(corpus)
                publish_folder(partial, final)
            except BaseException as error:
                # after other errors the same command may continue
                if isinstance(error, (ConfigError, DataFault)) or not (partial / STATE).exists():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    return open_verified(final, progress)


def prepared_key(config: DataConfig, corpus: Corpus | Stream | TokenFiles, shard_tokens: int = SHARD_TOKENS) -> str:
    """The folder name for a config over a corpus, a hash of its content and not of its location."""
    parts = {
        "format": FORMAT,
        "corpus": [config.corpus.name, corpus.identity],
        "tokenizer": config.tokenizer.full(),
        "validation_fraction": config.validation_fraction,
        "shard_tokens": shard_tokens,
    }
    return canonical_sha256(parts)[:32]


def unfinished() -> list[tuple[Path, dict[str, Any]]]:
    """Interrupted preparations below `data_home()`: folder and state, with "config" as `DataConfig.written`, "done" and
    "size" in bytes of text."""
    home = data_home() / "prepared"
    with disk(home):
        folders = sorted(home.glob(".*.partial")) if home.is_dir() else []
    return [(folder, state) for folder in folders if (state := _load_state(folder)) is not None]


def _lock(home: Path, key: str) -> Path:
    return home / f".{key}.lock"


def _remove_leftovers(home: Path, key: str) -> None:
    """Remove partial folders that cannot be continued: of `key`, whose lock is held, those with another name; of other
    keys, unless they are locked, those without a state."""
    for partial in home.glob(".*.partial"):
        other_key = partial.name.split(".")[1]
        if other_key == key:
            if partial.name != f".{key}.partial":
                shutil.rmtree(partial)
        elif not (partial / STATE).exists():
            with suppress(LockHeld), file_lock(_lock(home, other_key), 0):
                shutil.rmtree(partial)


class _Preparation:
    """Fills one partial folder: the tokenizer's files and the shards, the manifest last."""

    def __init__(
        self, folder: Path, config: DataConfig, progress: Progress, shard_tokens: int, threads: int | None
    ) -> None:
        self.folder, self.config, self.progress = folder, config, progress
        self.shard_tokens, self.threads = shard_tokens, threads or usable_cores()

    def make(self, corpus: Corpus | Stream | TokenFiles) -> None:
        """Prepare the data, continuing from the saved state, if any."""
        facts = {"name": self.config.corpus.name, "source": corpus.source, "identity": corpus.identity}
        if isinstance(corpus, TokenFiles):
            self._clean()
            tokenizer: Tokenizer = tokenizer_slot.build(self.config.tokenizer, TokenizerSite(self.folder))
            self._seal(facts, tokenizer, {}, link(self.folder, corpus, tokenizer, self.progress))
            return
        if isinstance(corpus, Corpus):
            corpus.ready(self.progress)
        divided = division(corpus, self.config.validation_fraction)
        state = self._clean()
        tokenizer, files = self._tokenizer(divided, state)
        records, place = self._encode(divided, tokenizer, files, state)
        for split, record in records.items():
            if record["tokens"] < 2:
                hint = "more text" if divided.listed else "more text, or a larger data.validation_fraction"
                problem = f"{split} needs 2 tokens, has {record['tokens']}"
                raise ConfigError(problem, where="data.corpus", hint=hint)
        (self.folder / STATE).unlink(missing_ok=True)
        known = {key: place[key] for key in ("commit", "skipped") if isinstance(place, dict) and place.get(key)}
        if "skipped" in known:
            self.progress(0, 0, f"bad documents left out: {known['skipped']:,}")
        self._seal(facts | known, tokenizer, files, records)

    def _clean(self) -> dict[str, Any] | None:
        """Remove files that the state does not list, and return the state to continue from, if any."""
        state = _load_state(self.folder)
        sizes: dict[str, int] = {}
        if state is not None:
            width = np.dtype(state["dtype"]).itemsize
            shards = [shard for split in SPLITS for shard in state["splits"][split]["shards"]]
            sizes = {STATE: 0, **dict.fromkeys(state["files"], 0), **{s["file"]: s["tokens"] * width for s in shards}}
            files = {name: self.folder / name for name in sizes}
            if not all(file.is_file() and file.stat().st_size >= sizes[name] for name, file in files.items()):
                state, sizes = None, {}
        for path in self.folder.iterdir():
            if path.name not in sizes:
                path.unlink()
        return state

    def _tokenizer(self, divided: DividedText, state: dict[str, Any] | None) -> tuple[Tokenizer, dict[str, str]]:
        """The tokenizer, trained or read from its files, and the sha256 of each of these files."""
        text = None if state else lambda: pieces(self._training_text(divided))
        tokenizer: Tokenizer = tokenizer_slot.build(self.config.tokenizer, TokenizerSite(self.folder, text))
        if state:
            return tokenizer, state["files"]
        return tokenizer, {path.name: file_sha256(path) for path in sorted(self.folder.iterdir())}

    def _training_text(self, divided: DividedText) -> Iterator[str]:
        """The text that a tokenizer is trained on: of a stream the first LEARNING_BYTES."""
        total = divided.size if divided.listed else min(divided.size, LEARNING_BYTES)
        done = 0
        for split, _, chunks in divided.open(None):
            if split != "train":
                continue
            for chunk in chunks:
                yield chunk
                done += len(chunk.encode())
                self.progress(min(done, total), total, "training the tokenizer")
            if not divided.listed and done >= LEARNING_BYTES:
                return

    def _encode(
        self, divided: DividedText, tokenizer: Tokenizer, files: dict[str, str], state: dict[str, Any] | None
    ) -> tuple[dict[SplitName, Any], Place]:
        """Write all shards, saving the state regularly; -> the record of each split, and the last place."""
        dtype = _dtype(tokenizer.vocab_size)
        facts = {"dtype": dtype, "files": files, "size": divided.size, "config": self.config.written()}
        texts = divided.open(state and state["place"])
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(SplitWriter(
                    self.folder, split, tokenizer.vocab_size, self.shard_tokens,
                    listed=divided.listed, record=state and state["splits"][split],
                ))
                for split in SPLITS
            }  # fmt: skip
            records = {split: writer.record for split, writer in writers.items()}
            saved, complete = time.monotonic(), _complete_shards(records)
            work = stack.enter_context(closing(encoded(batches(texts), tokenizer, self.threads)))
            done = sum(record["bytes"] for record in records.values())
            for batch, (ids, counts) in work:
                if not done:
                    self._check_room(divided.size, batch.size, len(ids) * np.dtype(dtype).itemsize)
                for piece, part in zip(batch.pieces, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
                    writers[piece.split].add(piece, part)
                done += batch.size
                self.progress(min(done, divided.size), divided.size, "writing tokens")
                due = _complete_shards(records) > complete or time.monotonic() - saved >= STATE_SECONDS
                if due and batch.place is not None:
                    for writer in writers.values():
                        writer.flush()
                    content = {**facts, "place": batch.place, "splits": records, "done": done}
                    write_json(self.folder / STATE, content)
                    point("data.state")
                    saved, complete = time.monotonic(), _complete_shards(records)
            for writer in writers.values():
                writer.finish()
        return records, texts.place() if done else None

    def _check_room(self, size: int, text_bytes: int, token_bytes: int) -> None:
        """Raise EnvironmentFault if the shards will not fit, estimated from the ratio of the first batch."""
        needed = int(size * token_bytes / max(1, text_bytes))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise EnvironmentFault(
                f"the tokens need about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
                where=str(self.folder.parent),
                hint="free some space, or set GPT2LAB_DATA to a folder on a larger disk",
            )
        if needed >= LARGE_BYTES:
            self.progress(
                0, 0, f"the tokens need about {needed / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB that are free"
            )

    def _seal(
        self, corpus: dict[str, Any], tokenizer: Tokenizer, files: dict[str, str], records: dict[SplitName, Any]
    ) -> None:
        """Write the manifest."""
        size, dtype = tokenizer.vocab_size, _dtype(tokenizer.vocab_size)
        self.progress(0, 0, "counting unigrams and bigrams")
        train, validation = (Tokens.of(self.folder, records[split]["shards"], dtype, size) for split in SPLITS)
        counted = {f"{split}_tokens": min(FLOOR_TOKENS, records[split]["tokens"]) for split in SPLITS}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtype": dtype,
            "vocab_size": size,
            "separator": tokenizer.separator,
            "tokenizer": self.config.tokenizer.full(),
            "validation_fraction": self.config.validation_fraction,
            "corpus": corpus,
            "splits": records,
            "files": files,
            "floors": floors(train, validation, size, FLOOR_TOKENS) | counted,
            "created": now(),
        }
        manifest["fingerprint"] = fingerprint(manifest)
        manifest["sha256"] = canonical_sha256(manifest)
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _complete_shards(records: Mapping[SplitName, Any]) -> int:
    return sum("sha256" in shard for record in records.values() for shard in record["shards"])


def _load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an interrupted preparation; None if missing or damaged."""
    try:
        return read_json(folder / STATE, sealed=True)
    except Gpt2labError:
        return None


class SplitWriter:
    """Appends ids to shards of at most `size` tokens, and keeps the manifest's `record` of the split.

    listed: whether documents are recorded one by one; otherwise each shard counts those that end in it.
    record: an earlier one to continue from; its last shard is truncated to it.
    """

    def __init__(
        self, folder: Path, split: SplitName, vocab_size: int, size: int, *, listed: bool, record: dict[str, Any] | None
    ) -> None:
        self.folder, self.split, self.vocab_size, self.size, self.listed = folder, split, vocab_size, size, listed
        self.dtype = _dtype(vocab_size)
        counted = {} if listed else {"document_count": 0}
        self.record = record or {"tokens": 0, "bytes": 0, "documents": [], **counted, "shards": []}
        self._file: BinaryIO | None = None
        self._document = {"bytes": 0, "tokens": 0}  # of the current document
        shards = self.record["shards"]
        if shards and "sha256" not in shards[-1]:
            self._file = open(folder / shards[-1]["file"], "r+b")  # noqa: SIM115 (closed by finish or __exit__)
            self._file.truncate(shards[-1]["tokens"] * np.dtype(self.dtype).itemsize)
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, even if the rest cannot be written."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                if not file.closed:
                    file.raw.close()  # type: ignore[attr-defined]

    def add(self, piece: Piece, ids: NDArray[Any]) -> None:
        """Append a piece's ids, starting new shards as needed; raises DataFault for an id outside the vocabulary."""
        for counts in (self.record, self._document):
            counts["bytes"] += piece.size
            counts["tokens"] += len(ids)
        shards = self.record["shards"]
        while len(ids):
            if self._file is None:
                name = f"{self.split}_{len(shards):03d}.bin"
                shards.append({"file": name, "tokens": 0} | ({} if self.listed else {"documents": 0}))
                self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed by finish or __exit__)
            shard = shards[-1]
            part, ids = np.split(ids, [self.size - shard["tokens"]])
            check_ids(part, self.vocab_size, shard["file"], shard["tokens"])
            self._file.write(part.astype(self.dtype).tobytes())
            shard["tokens"] += len(part)
            if shard["tokens"] == self.size:
                self.finish()
        if piece.last:
            if self.listed:
                self.record["documents"].append({"name": piece.name, **self._document})
            elif self._document["tokens"]:
                self.record["document_count"] += 1
                shards[-1]["documents"] += 1
            self._document = {"bytes": 0, "tokens": 0}

    def flush(self) -> None:
        """Flush to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Close the current shard, if any."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
            shard = self.record["shards"][-1]
            shard["sha256"] = file_sha256(self.folder / shard["file"])
            point("data.shard")


def link(folder: Path, corpus: TokenFiles, tokenizer: Tokenizer, progress: Progress) -> dict[SplitName, Any]:
    """Links to token files in a prepared folder; -> the manifest's record of each split. Reads every token.

    Raises DataFault for ids outside the vocabulary.
    """
    sums = corpus.sums(progress)
    total = sum(file.tokens for split in SPLITS for file in corpus.files[split])
    done = 0
    records: dict[SplitName, Any] = {}
    problems: list[Problem] = []
    for split in SPLITS:
        counts, shards = np.zeros(GPT2_SIZE, np.int64), []
        for number, file in enumerate(corpus.files[split]):
            name = f"{split}_{number:03d}.bin"
            (folder / name).symlink_to(file.path)
            tokens = Tokens([(file.path, file.tokens)], "<u2", GPT2_SIZE, [file.skip])
            occurring = np.zeros(GPT2_SIZE, np.int64)
            try:
                for stretch in stretches(tokens):  # reading checks the ids
                    occurring += np.bincount(stretch, minlength=GPT2_SIZE)
                    done += len(stretch)
                    progress(2 * done, 2 * total, "checking the tokens")
            except DataFault as fault:
                problems += fault.problems
            counts += occurring
            shards.append({"file": name, "tokens": file.tokens, "skip": file.skip, "sha256": sums[file.path],
                           "documents": int(occurring[tokenizer.separator])})  # fmt: skip
        records[split] = {
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": int(counts @ tokenizer.byte_lengths),
            "documents": [],
            "document_count": int(counts[tokenizer.separator]),
            "shards": shards,
        }
    if problems:
        raise DataFault(problems, hint="tokens made with GPT-2's tokenizer")
    return records
