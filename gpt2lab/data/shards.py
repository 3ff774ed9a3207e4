"""Text becomes token shards: done once, kept below `data_home()`, found again by content.

A prepared folder holds `train_000.bin`, ..., `validation_000.bin`, ... (little-endian ids, or links to token files made
elsewhere), whatever the tokenizer keeps, and `manifest.json`:
  format, dtype, vocab_size, separator, tokenizer, validation_fraction, fingerprint, floors, created,
  corpus  {name, source, identity, of the hub: commit}
  splits  {train | validation: {tokens, bytes, documents: [{name, bytes, tokens}], shards: [{file, tokens, sha256}]}}
          of a stream no document is listed: document_count says how many there are, and `documents` of each shard how
          many end in it; linked shards say how many bytes to skip, which their sha256 leaves out
  files   {other file: sha256}
  sha256  of all the rest
Bytes are those of the text in UTF-8; tokens include separators.

Until it is whole, the folder is called `.KEY.partial`. Now and then its shards are flushed to disk, and `state.json`
says how much of them counts and where reading continues; after a crash, what lies behind that is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gpt2lab.data.corpora import Corpus, Place, Stream
from gpt2lab.data.corpora import corpus as corpus_slot
from gpt2lab.data.encode import Batch, Division, Encoded, Piece, alone_because, batches, division, encoder, usable_cores
from gpt2lab.data.files import (
    READ_BYTES,
    Progress,
    canonical_sha256,
    data_home,
    disk,
    file_sha256,
    locked,
    publish,
    sync_file,
)
from gpt2lab.data.floors import floors
from gpt2lab.data.prepared import FORMAT, MANIFEST, Prepared, Tokens, check_ids, fingerprint, open_prepared
from gpt2lab.data.split import SPLITS, SplitName
from gpt2lab.data.tokenfiles import DTYPE, TokenFiles, link
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, pieces
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.faults import point
from gpt2lab.registry import Choice, read_field
from gpt2lab.schema import Settings

STATE = "state.json"
SHARD_TOKENS = 100_000_000
FLOOR_TOKENS = 50_000_000
STATE_SECONDS = 10.0
"""How often the state is saved, besides after every whole shard."""
POOL_BYTES = 32_000_000
"""Of text: from here on tokenizing in several processes saves more than it takes to start them."""
LEARNING_BYTES = 1_000_000_000
"""As much of a stream's training text a tokenizer is made from."""
LARGE_BYTES = 1_000_000_000


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


def prepare(
    config: DataConfig,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = None,
) -> Prepared:
    """The prepared data of `config`, made if it is not there yet.

    One process makes it while others wait; what is not finished is never seen under its final name, and continues where
    it stopped. processes: that tokenize; None is one for each core, or this one alone for little text. The result does
    not depend on it.

    Raises ConfigError for text that cannot be used, EnvironmentFault for the machine, DataFault for what is damaged.
    """
    corpus: Corpus | Stream | TokenFiles = corpus_slot.build(config.corpus)
    say = progress or (lambda done, total, what: None)
    if isinstance(corpus, TokenFiles):
        corpus.sums(say)
    home = data_home() / "prepared"
    key = prepared_key(config, corpus, shard_tokens)
    partial = home / f".{key}.partial"
    with disk(home, lambda: (partial / STATE).exists()):
        home.mkdir(parents=True, exist_ok=True)
        if (home / key).exists():
            return open_prepared(home / key)
        with locked(_lock(home, key), waiting=lambda: say(0, 0, "waiting for another process that prepares this")):
            if (home / key).exists():
                return open_prepared(home / key)
            _sweep(home, key)
            try:
                partial.mkdir(exist_ok=True)
                if isinstance(corpus, TokenFiles):
                    _link(partial, config, corpus, say)
                else:
                    _write(partial, config, corpus, say, shard_tokens, processes)
                publish(partial, home / key)
            except BaseException as error:
                # what is wrong with the text stays wrong; anything else may be over when the same command comes again
                if isinstance(error, (ConfigError, DataFault)) or not (partial / STATE).exists():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    return open_prepared(home / key)


def prepared_key(config: DataConfig, corpus: Corpus | Stream | TokenFiles, shard_tokens: int = SHARD_TOKENS) -> str:
    """The folder name for a config over a corpus: its content counts, not where it lies."""
    parts = {
        "format": FORMAT,
        "corpus": [config.corpus.name, corpus.identity],
        "tokenizer": config.tokenizer.full(),
        "validation_fraction": config.validation_fraction,
        "shard_tokens": shard_tokens,
    }
    return canonical_sha256(parts)[:32]


def _write(
    folder: Path, config: DataConfig, corpus: Corpus | Stream, say: Progress, shard_tokens: int, processes: int | None
) -> None:
    """Everything of a prepared folder, fsynced, the manifest last; continues from what is there already."""
    divided = division(corpus, config.validation_fraction)
    state = _clean(folder)
    tokenizer, files = _tokenizer(folder, config, divided, state, say)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with Writers(folder, dtype, tokenizer.vocab_size, shard_tokens, listed=divided.listed) as writers:
        if state is not None:
            writers.restore(state["splits"])
        place = None if state is None else state["place"]
        facts = {"dtype": dtype, "files": files, "size": divided.size, "config": config_facts(config)}
        place = _encode(writers, divided, place, config.tokenizer, tokenizer, processes, facts, say)
        records = writers.finish()
    for split, record in records.items():
        if record["tokens"] < 2:
            hint = "more text" if divided.listed else "more text, or a larger data.validation_fraction"
            raise ConfigError(f"{split} needs 2 tokens, has {record['tokens']}", where="data.corpus", hint=hint)
    (folder / STATE).unlink(missing_ok=True)
    commit = place.get("commit") if isinstance(place, dict) else None
    _seal(folder, config, corpus, tokenizer, dtype, records, files, say, {"commit": commit} if commit else {})


def _clean(folder: Path) -> dict[str, Any] | None:
    """Remove what does not count of what a killed process left in `folder`; -> the state to continue from, if any."""
    state = load_state(folder)
    kept: set[str] = set()
    if state is not None:
        least = dict.fromkeys([STATE, *state["files"]], 0) | shard_sizes(state)
        if all((folder / name).is_file() and (folder / name).stat().st_size >= n for name, n in least.items()):
            kept = set(least)
        else:
            state = None
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    return state


def _tokenizer(
    folder: Path, config: DataConfig, divided: Division, state: dict[str, Any] | None, say: Progress
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, learned now or read again, and the sha256 of each file that it keeps."""
    if state is not None:
        again: Tokenizer = tokenizer_slot.build(config.tokenizer, TokenizerSite(folder))
        return again, state["files"]
    site = TokenizerSite(folder, lambda: pieces(_training_text(divided, say)))
    made: Tokenizer = tokenizer_slot.build(config.tokenizer, site)
    for path in folder.iterdir():
        sync_file(path)
    return made, {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def _training_text(divided: Division, say: Progress) -> Iterator[str]:
    """What a tokenizer may learn from: of a stream the first LEARNING_BYTES."""
    total = divided.size if divided.listed else min(divided.size, LEARNING_BYTES)
    done = 0
    for split, _, chunks in divided.open(None):
        if split != "train":
            continue
        for chunk in chunks:
            yield chunk
            done += len(chunk.encode())
            say(min(done, total), total, "training the tokenizer")
        if not divided.listed and done >= LEARNING_BYTES:
            return


def _encode(
    writers: Writers, divided: Division, place: Place, choice: Choice, tokenizer: Tokenizer, processes: int | None,
    facts: dict[str, Any], say: Progress,
) -> Place:  # fmt: skip
    """Write all that comes from `place` on, and save now and then how far that is; -> the last place of all."""
    texts = divided.open(place)
    saved, whole = time.monotonic(), writers.whole
    wanted = processes or (usable_cores() if divided.size >= POOL_BYTES else 1)
    if wanted > 1 and (reason := alone_because(choice)):
        say(0, 0, reason)
        wanted = 1
    with encoder(choice, writers.folder, tokenizer, wanted) as encode:
        for batch, encoded in encode(batches(texts)):
            if not writers.bytes:
                _check_room(writers.folder, divided.size, batch.size, len(encoded[0]) * writers.width, say)
            writers.add(batch, encoded)
            say(min(writers.bytes, divided.size), divided.size, "writing tokens")
            due = writers.whole > whole or time.monotonic() - saved >= STATE_SECONDS
            if due and batch.place is not None:
                writers.flush()
                state = {**facts, "place": batch.place, "splits": writers.record(), "done": writers.bytes}
                save_state(writers.folder, state)
                saved, whole = time.monotonic(), writers.whole
    return texts.place() if writers.bytes else None


def _check_room(folder: Path, size: int, text_bytes: int, token_bytes: int, say: Progress) -> None:
    """Raise EnvironmentFault if the shards will not fit, going by how many bytes the first text became."""
    wanted = int(size * token_bytes / max(1, text_bytes))
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise EnvironmentFault(
            f"the tokens need about {wanted / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
            where=str(folder.parent),
            hint="free some space, or set GPT2LAB_DATA to a folder on a larger disk",
        )
    if wanted >= LARGE_BYTES:
        say(0, 0, f"the tokens need about {wanted / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB that are free")


def _link(folder: Path, config: DataConfig, corpus: TokenFiles, say: Progress) -> None:
    """A prepared folder of links to token files."""
    _clean(folder)
    tokenizer: Tokenizer = tokenizer_slot.build(config.tokenizer, TokenizerSite(folder))
    assert tokenizer.separator is not None
    records = link(folder, corpus, tokenizer.byte_lengths, tokenizer.separator, say)
    _seal(folder, config, corpus, tokenizer, DTYPE, records, {}, say)


def _seal(
    folder: Path, config: DataConfig, corpus: Corpus | Stream | TokenFiles, tokenizer: Tokenizer, dtype: str,
    records: dict[SplitName, Any], files: dict[str, str], say: Progress, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the manifest. more: of the corpus."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": config.tokenizer.full(),
        "validation_fraction": config.validation_fraction,
        "corpus": {"name": config.corpus.name, "source": corpus.source, "identity": corpus.identity, **(more or {})},
        "splits": records,
        "files": files,
        "floors": _floors(folder, records, dtype, tokenizer.vocab_size, say),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["sha256"] = canonical_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    sync_file(folder / MANIFEST)


def _floors(folder: Path, records: dict[SplitName, Any], dtype: str, vocab_size: int, say: Progress) -> dict[str, Any]:
    """Floors over at most the first FLOOR_TOKENS of each split, and how many tokens those were."""
    say(0, 0, "counting unigrams and bigrams")
    train, validation = (Tokens.of(folder, records[split]["shards"], dtype, vocab_size) for split in SPLITS)
    counted = {f"{split}_tokens": min(FLOOR_TOKENS, records[split]["tokens"]) for split in SPLITS}
    return floors(train, validation, vocab_size, FLOOR_TOKENS) | counted


def unfinished() -> list[tuple[Path, dict[str, Any]]]:
    """Folders below `data_home()` whose making was interrupted, with the state of each: "config" as of `config_facts`,
    "done" and "size" in bytes of text."""
    home = data_home() / "prepared"
    with disk(home):
        folders = sorted(home.glob(".*.partial")) if home.is_dir() else []
    found = [(folder, load_state(folder)) for folder in folders]
    return [(folder, state) for folder, state in found if state is not None]


def config_facts(config: DataConfig) -> dict[str, Any]:
    """A config as people and `--set` write it."""
    return {
        "corpus": config.corpus.written(),
        "tokenizer": config.tokenizer.written(),
        "validation_fraction": config.validation_fraction,
    }


def _lock(home: Path, key: str) -> Path:
    return home / f".{key}.lock"


def _sweep(home: Path, held: str) -> None:
    """Remove partial folders that cannot be continued: of the key `held`, whose lock we hold, those with another name
    than we would give them; of other keys, unless they are locked, those without a state."""
    for partial in home.glob(".*.partial"):
        key = partial.name.split(".")[1]
        if key == held:
            if partial.name != f".{held}.partial":
                shutil.rmtree(partial)
        elif not (partial / STATE).exists():
            with locked(_lock(home, key), wait=False) as free:
                if free:
                    shutil.rmtree(partial)


class SplitWriter:
    """Appends ids to shards of at most `size` tokens; each is fsynced when it is closed.

    listed: whether documents are recorded one by one; otherwise each shard counts those that end in it.
    """

    def __init__(self, folder: Path, split: SplitName, dtype: str, vocab_size: int, size: int, *, listed: bool) -> None:
        self.folder, self.split, self.dtype, self.vocab_size, self.size = folder, split, dtype, vocab_size, size
        self.listed = listed
        self.tokens = self.bytes = self.count = 0
        self.documents: list[dict[str, Any]] = []
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._begun = [0, 0]  # bytes and tokens of the present document

    @property
    def whole(self) -> int:
        """Shards that are finished."""
        return sum("sha256" in shard for shard in self.shards)

    def add(self, piece: Piece, ids: NDArray[Any]) -> None:
        """Append a piece's ids, over as many shards as they need; raises DataFault for one outside the vocabulary."""
        self.bytes += piece.size
        self.tokens += len(ids)
        self._begun = [self._begun[0] + piece.size, self._begun[1] + len(ids)]
        while len(ids):
            if self._file is None:
                name = f"{self.split}_{len(self.shards):03d}.bin"
                self.shards.append({"file": name, "tokens": 0} | ({} if self.listed else {"documents": 0}))
                self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed by finish or close)
                self._digest = hashlib.sha256()
            shard = self.shards[-1]
            now, ids = np.split(ids, [self.size - shard["tokens"]])
            check_ids(now, self.vocab_size, shard["file"], shard["tokens"])
            raw = now.astype(self.dtype).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            shard["tokens"] += len(now)
            if shard["tokens"] == self.size:
                self.finish()
        if not piece.last:
            return
        if self.listed:
            self.documents.append({"name": piece.name, "bytes": self._begun[0], "tokens": self._begun[1]})
        elif self._begun[1]:
            self.count += 1
            self.shards[-1]["documents"] += 1
        self._begun = [0, 0]

    def flush(self) -> None:
        """Bring what was added to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Close the present shard, if any."""
        if self._file is not None:
            self.flush()
            self.close()
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            point("data.shard")

    def close(self) -> None:
        """Release the file, even when the disk does not take what is left."""
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
        shards = [dict(shard) for shard in self.shards]
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, **counted, "shards": shards}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from an earlier `record`: cut files, which are no shorter, to it."""
        self.tokens, self.bytes, self.count = record["tokens"], record["bytes"], record.get("document_count", 0)
        self.documents, self.shards = list(record["documents"]), [dict(shard) for shard in record["shards"]]
        if self.shards and "sha256" not in self.shards[-1]:
            self._file = open(self.folder / self.shards[-1]["file"], "r+b")  # noqa: SIM115 (closed by finish or close)
            self._file.truncate(self.shards[-1]["tokens"] * np.dtype(self.dtype).itemsize)
            self._digest = hashlib.sha256()
            while block := self._file.read(READ_BYTES):
                self._digest.update(block)


class Writers:
    """Both splits of a folder. width: bytes of a token."""

    def __init__(self, folder: Path, dtype: str, vocab_size: int, size: int, *, listed: bool) -> None:
        self.folder, self.width = folder, np.dtype(dtype).itemsize
        self.splits = {s: SplitWriter(folder, s, dtype, vocab_size, size, listed=listed) for s in SPLITS}

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.splits.values():
            writer.close()

    @property
    def whole(self) -> int:
        """Shards that are finished."""
        return sum(writer.whole for writer in self.splits.values())

    @property
    def bytes(self) -> int:
        """Bytes of text."""
        return sum(writer.bytes for writer in self.splits.values())

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append a batch and the ids of its pieces."""
        ids, counts = encoded
        for piece, part in zip(batch.pieces, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
            self.splits[piece.split].add(piece, part)

    def flush(self) -> None:
        """Bring all to disk."""
        for writer in self.splits.values():
            writer.flush()

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
    """The state that a killed process left; None when there is none, or a damaged one."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        sha256 = state.pop("sha256")
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return None
    return state if sha256 == canonical_sha256(state) else None
