"""Prepared data: token shards on disk as sequences, verified against their manifest; and the floors: the losses of
unigram and bigram counts, which a model must beat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.batches import Ids, TokenSequence
from gpt2lab.data.corpora import SPLITS
from gpt2lab.data.files import Progress, canonical_sha256, data_home, disk, known_sums, quiet
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError, Problem, command
from gpt2lab.store import open_file

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("<u2", "<u4")
SHOW_PROGRESS_FROM = 100_000_000
"""Number of tokens from which verification shows progress."""


class Tokens:
    """Token ids in shards on disk, as one sequence: `len(tokens)` and `tokens[a:b]` -> (b - a,) int64.

    Reading checks every id against the vocabulary and raises DataFault with shard and offset. Cheap to pickle.
    skips: bytes before the first token of each shard; 0 by default.
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
        if len(parts) == 1:  # avoids a copy
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
        """Size of the vocabulary."""
        return int(self.manifest["vocab_size"])

    @property
    def floors(self) -> dict[str, float]:
        """Cross entropy of validation under training counts, nats per token: "unigram" and "bigram"."""
        return {name: float(self.manifest["floors"][name]) for name in ("unigram", "bigram")}

    @cached_property
    def validation_text(self) -> str:
        """sha256 of the validation split's text in UTF-8, whatever the tokenizer."""
        ids = self.validation[:]
        if self.tokenizer.separator is not None:
            ids = ids[ids != self.tokenizer.separator]
        return hashlib.sha256(self.tokenizer.decode(ids).encode()).hexdigest()

    @property
    def corpora(self) -> dict[str, range]:
        """Of the corpus `several`: the training tokens of each of its corpora; empty for others."""
        spans: dict[str, range] = {}
        if self.manifest["corpus"]["name"] == "several":
            end = 0
            for document in self.manifest["splits"]["train"]["documents"]:
                name, start, end = document["name"].partition("/")[0], end, end + int(document["tokens"])
                spans[name] = range(spans[name].start if name in spans else start, end)
        return spans

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens."""
        choice = tokenizer_slot.read(self.manifest["tokenizer"])
        made: Tokenizer = tokenizer_slot.build(choice, TokenizerSite(self.path))
        return made

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text of each id.  -> (vocab_size,)"""
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

    def verify(self, progress: Progress = quiet, *, remembered: bool = False) -> None:
        """Compare every file with its checksum in the manifest; raises DataFault with all that differ.

        remembered: read only the files whose checksum is not remembered (see `known_sha256`); otherwise every byte.
        """
        sums: dict[Path, str] = {self.path / name: sha256 for name, sha256 in self.manifest["files"].items()}
        skips = dict.fromkeys(sums, 0)
        for shard in _shards(self.manifest):
            file = self.path / shard["file"]
            sums[file], skips[file] = shard["sha256"], int(shard.get("skip", 0))
        actual = known_sums(skips, progress, "checking the prepared data", remembered=remembered)
        problems = [
            Problem(str(file), f"damaged: its sha256 is {actual[file][:12]}..., not {sha256[:12]}... as prepared")
            for file, sha256 in sums.items()
            if actual[file] != sha256
        ]
        if problems:
            raise DataFault(problems, hint=_again(self.path))
        if not remembered:
            for tokens in (self.train, self.validation):
                for _ in stretches(tokens):
                    pass  # reading checks the ids


def _shards(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of all shards."""
    return [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]


def _again(path: Path) -> str:
    return command("rm", "-r", path) + ", then prepare it again"


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """See `Prepared.fingerprint`."""
    shards = {split: [shard["sha256"] for shard in manifest["splits"][split]["shards"]] for split in SPLITS}
    return canonical_sha256({"dtype": manifest["dtype"], **shards})


def open_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder; raises DataFault if the manifest or the size of any file is not as written."""
    path = Path(path)
    manifest = _read_manifest(path)
    dtype, vocab_size = manifest["dtype"], manifest["vocab_size"]
    if dtype not in DTYPES or vocab_size > 1 << 8 * np.dtype(dtype).itemsize:
        what = f"dtype '{dtype}' does not hold a vocabulary of {vocab_size} (known: {', '.join(DTYPES)})"
        raise DataFault(what, where=str(path / MANIFEST), hint=_again(path))
    shards = _shards(manifest)
    names = [*manifest["files"], *(shard["file"] for shard in shards)]
    problems = [_missing(path / n) for n in names if not (path / n).is_file() or Path(n).name != n]
    problems += [problem for shard in shards if (problem := _wrong_size(path, shard, dtype))]
    if problems:
        raise DataFault(problems, hint=_again(path))
    train, validation = (Tokens.of(path, manifest["splits"][split]["shards"], dtype, vocab_size) for split in SPLITS)
    return Prepared(path, manifest, train, validation)


def open_verified(path: Path | str, progress: Progress = quiet) -> Prepared:
    """`open_prepared`, with the content of every file compared with the manifest's checksums; a file that was verified
    before and has not been modified since is not read again. Raises DataFault."""
    prepared = open_prepared(path)
    tokens = len(prepared.train) + len(prepared.validation)
    prepared.verify(progress if tokens >= SHOW_PROGRESS_FROM else quiet, remembered=True)
    return prepared


def list_prepared() -> list[tuple[Path, Prepared | Gpt2labError]]:
    """Every prepared folder below `data_home()`, by name: opened, or the error why it cannot be."""
    home = data_home() / "prepared"
    with disk(home):
        folders = sorted(home.iterdir()) if home.is_dir() else []
    return [(path, _opened_or_error(path)) for path in folders if path.is_dir() and not path.name.startswith(".")]


def find_prepared(fingerprint: str | None) -> Prepared | None:
    """The prepared folder with this fingerprint, its content verified; or None. Raises DataFault."""
    for path, data in list_prepared():
        if isinstance(data, Prepared) and data.fingerprint == fingerprint:
            return open_verified(path)
    return None


def _opened_or_error(path: Path) -> Prepared | Gpt2labError:
    try:
        return open_prepared(path)
    except Gpt2labError as error:
        return error


def _missing(file: Path) -> Problem:
    what = f"missing: it is a link to {file.readlink()}, which is gone" if file.is_symlink() else "missing"
    return Problem(str(file), what)


def _wrong_size(folder: Path, shard: Mapping[str, Any], dtype: str) -> Problem | None:
    file, count, skip = folder / shard["file"], int(shard["tokens"]), int(shard.get("skip", 0))
    expected = skip + count * np.dtype(dtype).itemsize
    if not file.is_file() or (actual := file.stat().st_size) == expected:
        return None
    header = f" behind {skip:,} bytes" if skip else ""
    return Problem(str(file), f"{expected:,} bytes expected ({count:,} tokens of {dtype}{header}), {actual:,} found")


def _read_manifest(path: Path) -> dict[str, Any]:
    file, again = path / MANIFEST, _again(path)
    try:
        with open_file(file) as opened:
            manifest = json.load(opened)
    except FileNotFoundError:
        raise DataFault(f"no {MANIFEST}: not prepared data", where=str(path), hint="gpt2lab data list") from None
    except OSError as error:
        raise DataFault(f"cannot be read: {error.strerror}", where=str(file), hint=command("ls", "-l", file)) from error
    except (ValueError, RecursionError):
        raise DataFault("damaged: not JSON", where=str(file), hint=again) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataFault(f"not of format {FORMAT}, the one that this gpt2lab reads", where=str(file), hint=again)
    if manifest.pop("sha256", None) != canonical_sha256(manifest):
        raise DataFault("damaged: its own sha256 does not fit its content", where=str(file), hint=again)
    return manifest


# --- floors: N training tokens, V vocabulary size, P distinct pairs of neighbours ---

STRETCH = 1 << 22


def floors(train: TokenSequence, validation: TokenSequence, vocab_size: int, limit: int) -> dict[str, float]:
    """Unigram and bigram cross entropy, in nats per token, of every validation token but the first; of each
    sequence at most the first `limit` tokens are read, stretch by stretch.

    Unigram: counts plus one. Bigram: Witten-Bell, p(w|h) = (c(h,w) + T(h) p(w)) / (c(h) + T(h)), where T(h) counts the
    distinct successors of h and p is the unigram; p(w) alone after an unseen h.
    Source: Witten and Bell 1991, method C, as interpolated in Chen and Goodman 1998, section 2.6.
    train: (N,)  validation: (M,), both with at least two tokens.
    """
    single = np.ones(vocab_size)  # (V,)
    for stretch in stretches(train, limit):
        single += np.bincount(stretch, minlength=vocab_size)
    unigram = single / single.sum()  # (V,)
    pairs, counts = _pair_counts(train, vocab_size, limit)  # (P,), (P,)
    heads = pairs // vocab_size
    after = np.bincount(heads, weights=counts, minlength=vocab_size)  # c(h), (V,)
    distinct = np.bincount(heads, minlength=vocab_size)  # T(h), (V,)

    totals = np.zeros(2)
    for stretch in stretches(validation, limit, overlap=1):
        h, w = stretch[:-1], stretch[1:]
        p = unigram[w]
        pair_ids = h * vocab_size + w
        place = np.minimum(np.searchsorted(pairs, pair_ids), len(pairs) - 1)
        together = np.where(pairs[place] == pair_ids, counts[place], 0)
        total = after[h] + distinct[h]
        conditional = np.where(total > 0, (together + distinct[h] * p) / np.maximum(total, 1), p)
        totals -= np.log(p).sum(), np.log(conditional).sum()
    unigram_floor, bigram_floor = totals / (min(limit, len(validation)) - 1)
    return {"unigram": float(unigram_floor), "bigram": float(bigram_floor)}


def stretches(tokens: TokenSequence, limit: int | None = None, *, overlap: int = 0) -> Iterator[Ids]:
    """The first `limit` tokens in stretches; with overlap 1, each begins with the last token of the one before."""
    end = len(tokens) if limit is None else min(limit, len(tokens))
    for start in range(0, end - overlap, STRETCH):
        yield tokens[start : min(end, start + STRETCH + overlap)]


def _pair_counts(tokens: TokenSequence, vocab_size: int, limit: int) -> tuple[Ids, Ids]:
    """Distinct neighbours, written as first * V + second, sorted, and how often each occurs.  -> (P,), (P,)"""
    # uint32 halves the memory of this array, the largest here
    pairs = np.empty(min(limit, len(tokens)) - 1, dtype=np.uint32 if vocab_size**2 <= 1 << 32 else np.int64)
    filled = 0
    for stretch in stretches(tokens, limit, overlap=1):
        pairs[filled : filled + len(stretch) - 1] = stretch[:-1] * vocab_size + stretch[1:]
        filled += len(stretch) - 1
    pairs.sort()
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return pairs[starts].astype(np.int64), np.diff(np.append(starts, len(pairs)))
