"""Prepared data, opened: token shards on disk as sequences, with the manifest that says what they must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.files import Progress, canonical_sha256, data_home, disk, file_sha256
from gpt2lab.data.split import SPLITS, SplitName
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError, Problem

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("<u2", "<u4")


class Tokens:
    """Token ids in shards on disk, as one sequence: `len(tokens)` and `tokens[a:b]` -> (b - a,) int64.

    Reading checks every id against the vocabulary and raises DataFault with shard and offset. Cheap to pickle.
    skips: bytes before the first token of each shard; none where left out.
    """

    def __init__(
        self, shards: Sequence[tuple[Path, int]], dtype: str, vocab_size: int, skips: Sequence[int] | None = None
    ) -> None:
        self.paths = tuple(path for path, _ in shards)
        self.skips = tuple(skips or [0] * len(shards))
        self.dtype, self.vocab_size = dtype, vocab_size
        self.starts = np.cumsum([0, *(count for _, count in shards)]).tolist()
        self._maps: dict[int, NDArray[Any]] = {}

    @classmethod
    def of(cls, folder: Path, records: Sequence[Mapping[str, Any]], dtype: str, vocab_size: int) -> Tokens:
        """Those of a split, from the records of its shards in a manifest."""
        shards = [(folder / record["file"], int(record["tokens"])) for record in records]
        return cls(shards, dtype, vocab_size, [int(record.get("skip", 0)) for record in records])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> NDArray[np.int64]:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in order: no step")
        parts: list[NDArray[np.int64]] = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, self.starts[shard + 1])
            parts.append(self._read(shard, start - self.starts[shard], end - self.starts[shard]))
            start, shard = end, shard + 1
        if len(parts) == 1:  # spares a copy of what may be large
            return parts[0]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _read(self, shard: int, start: int, stop: int) -> NDArray[np.int64]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.paths[shard], self.dtype, "r", offset=self.skips[shard])
        ids: NDArray[np.int64] = self._maps[shard][start:stop].astype(np.int64)
        check_ids(ids, self.vocab_size, str(self.paths[shard]), start)
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


def check_ids(ids: NDArray[Any], vocab_size: int, where: str, start: int) -> None:
    """Raise DataFault for the first id outside the vocabulary; `start` is the place of ids[0] in `where`."""
    if ids.size and (ids.max() >= vocab_size or ids.min() < 0):
        first = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        raise DataFault(
            f"token id {ids[first]} at offset {start + first} is outside the vocabulary of {vocab_size}",
            where=where,
            hint="gpt2lab data check",
        )


@dataclass(frozen=True)
class Prepared:
    """One prepared data set. `manifest` is its record as written; see `shards.py` for its fields."""

    path: Path
    manifest: Mapping[str, Any]
    train: Tokens
    validation: Tokens

    @property
    def fingerprint(self) -> str:
        """sha256 over dtype and the hashes of the shards: equal for equal tokens in an equal split."""
        return fingerprint(self.manifest)

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return int(self.manifest["vocab_size"])

    @property
    def floors(self) -> dict[str, float]:
        """Cross entropy of validation under training counts, nats per token: "unigram" and "bigram"."""
        return {name: float(self.manifest["floors"][name]) for name in ("unigram", "bigram")}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens."""
        choice = tokenizer_slot.read(self.manifest["tokenizer"])
        made: Tokenizer = tokenizer_slot.build(choice, TokenizerSite(self.path))
        return made

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for.  -> (vocab_size,)"""
        return self.tokenizer.byte_lengths

    def require(self, block_size: int) -> None:
        """Raise ConfigError unless each split holds a block and the token after it."""
        lengths = {"train": len(self.train), "validation": len(self.validation)}
        short = [
            Problem(f"{self.path}: {split}", f"needs {block_size + 1} tokens, has {length}")
            for split, length in lengths.items()
            if length < block_size + 1
        ]
        if short:
            raise ConfigError(short, hint="more text, or a smaller block_size")

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file again and raise DataFault with all that is not as the manifest says."""
        expected: dict[str, str] = dict(self.manifest["files"])
        skips: dict[str, int] = {}
        for split in SPLITS:
            for shard in self.manifest["splits"][split]["shards"]:
                expected[shard["file"]], skips[shard["file"]] = shard["sha256"], int(shard.get("skip", 0))
        total = sum((self.path / file).stat().st_size - skips.get(file, 0) for file in expected)
        done, problems = 0, []
        for file, sha256 in expected.items():

            def seen(count: int, file: str = file) -> None:
                nonlocal done
                done += count
                if progress:
                    progress(done, total, f"checking {file}")

            found = file_sha256(self.path / file, seen, skip=skips.get(file, 0))
            if found != sha256:
                problems.append(Problem(str(self.path / file), f"damaged: sha256 is {found}, not {sha256}"))
        if problems:
            raise DataFault(problems, hint=f"rm -r {self.path}, then prepare it again")
        for tokens in (self.train, self.validation):
            for start in range(0, len(tokens), 1 << 22):
                tokens[start : start + (1 << 22)]  # reading checks the ids


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """See `Prepared.fingerprint`."""
    shards = {split: [shard["sha256"] for shard in manifest["splits"][split]["shards"]] for split in SPLITS}
    return canonical_sha256({"dtype": manifest["dtype"], **shards})


def open_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder; raises DataFault if the manifest or the size of any file is not as written."""
    path = Path(path)
    again = f"rm -r {path}, then prepare it again"
    manifest = _read_manifest(path, again)
    dtype, vocab_size = manifest["dtype"], manifest["vocab_size"]
    if dtype not in DTYPES or vocab_size > 1 << 8 * np.dtype(dtype).itemsize:
        what = f"dtype '{dtype}' does not hold a vocabulary of {vocab_size} (known: {', '.join(DTYPES)})"
        raise DataFault(what, where=str(path / MANIFEST), hint=again)
    names = [*manifest["files"], *(s["file"] for split in SPLITS for s in manifest["splits"][split]["shards"])]
    problems = [_missing(path / n) for n in names if not (path / n).is_file() or Path(n).name != n]
    tokens = {}
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        tokens[split] = Tokens.of(path, shards, dtype, vocab_size)
        problems += [problem for shard in shards if (problem := _wrong_size(path, shard, dtype))]
    if problems:
        raise DataFault(problems, hint=again)
    return Prepared(path, manifest, tokens["train"], tokens["validation"])


def list_prepared() -> list[tuple[Path, Prepared | Gpt2labError]]:
    """Every prepared folder below `data_home()`, oldest name first, opened, or with the reason why it does not open."""
    found: list[tuple[Path, Prepared | Gpt2labError]] = []
    home = data_home() / "prepared"
    with disk(home):
        folders = sorted(home.iterdir()) if home.is_dir() else []
    for folder in folders:
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                found.append((folder, open_prepared(folder)))
            except Gpt2labError as error:
                found.append((folder, error))
    return found


def _missing(file: Path) -> Problem:
    gone = f"missing: it is a link to {file.readlink()}, which is gone" if file.is_symlink() else "missing"
    return Problem(str(file), gone)


def _wrong_size(folder: Path, shard: Mapping[str, Any], dtype: str) -> Problem | None:
    file, count, skip = folder / shard["file"], int(shard["tokens"]), int(shard.get("skip", 0))
    expected = skip + count * np.dtype(dtype).itemsize
    if not file.is_file() or (actual := file.stat().st_size) == expected:
        return None
    header = f" behind {skip:,} bytes" if skip else ""
    return Problem(str(file), f"{expected:,} bytes expected ({count:,} tokens of {dtype}{header}), {actual:,} found")


def _read_manifest(path: Path, again: str) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataFault(f"no {MANIFEST}: not prepared data", where=str(path), hint="gpt2lab data list") from None
    except OSError as error:
        raise DataFault(f"cannot be read: {error.strerror}", where=str(file), hint=f"ls -l {file}") from error
    except (ValueError, RecursionError):
        raise DataFault("damaged: not JSON", where=str(file), hint=again) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataFault(f"not of format {FORMAT}, the one that this gpt2lab reads", where=str(file), hint=again)
    if manifest.pop("sha256", None) != canonical_sha256(manifest):
        raise DataFault("damaged: its own sha256 does not fit its content", where=str(file), hint=again)
    return manifest


def split_record(prepared: Prepared, split: SplitName) -> Mapping[str, Any]:
    """The manifest's record of one split: "tokens", "bytes", "documents" (name, bytes, tokens, in order;
    of a stream none, but "document_count"), "shards"."""
    record: Mapping[str, Any] = prepared.manifest["splits"][split]
    return record
