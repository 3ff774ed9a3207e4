"""Tokens made elsewhere, read as they are: shards of llm.c and modded-nanogpt, `train.bin` of nanoGPT.

llm.c:   256 int32 (20240520, version 1, number of tokens, zeros), then uint16 tokens, all little-endian. The separator
         comes before each document.  Source: karpathy/llm.c, dev/data/data_common.py
nanoGPT: uint16 tokens and nothing else, the separator behind each document.  Source: karpathy/nanoGPT,
         data/openwebtext/prepare.py
No two GPT-2 tokens read as the magic number, so the two are told apart by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.corpora import corpus
from gpt2lab.data.files import Progress, canonical_sha256, known_sha256, matching, unreadable
from gpt2lab.data.split import SPLITS, SplitName
from gpt2lab.data.tokenizers import GPT2_SIZE
from gpt2lab.errors import ConfigError, DataFault, Problem

DTYPE = "<u2"
HEADER_BYTES = 256 * 4
MAGIC, VERSION = 20240520, 1
OTHER_MAGIC = {20240801: "llm.c's tokens of Llama 3"}
WORDS: dict[str, SplitName] = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}


@dataclass(frozen=True)
class TokenFile:
    """tokens: how many. skip: bytes before the first of them."""

    path: Path
    tokens: int
    skip: int


@dataclass(frozen=True)
class TokenFiles:
    """Tokens of GPT-2 in files made elsewhere, by split. source: as of a Corpus."""

    source: str
    files: Mapping[SplitName, Sequence[TokenFile]]
    _sums: dict[Path, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """As of a Corpus: of the tokens alone, not of names or headers."""
        sums = self.sums()
        return canonical_sha256(["tokens", *([sums[file.path] for file in self.files[split]] for split in SPLITS)])

    def sums(self, say: Progress = lambda done, total, what: None) -> Mapping[Path, str]:
        """sha256 of each file's tokens; files that are not known yet are read."""
        every = [file for split in SPLITS for file in self.files[split]]
        total = sum(file.path.stat().st_size for file in every)
        done = 0

        def seen(count: int) -> None:
            nonlocal done
            done += count
            say(done, total, "hashing the tokens")

        for file in every:
            if file.path not in self._sums:
                self._sums[file.path] = known_sha256(file.path, skip=file.skip, seen=seen)
        return self._sums


def _check_tokens(section: Any, options: Mapping[str, Any]) -> list[str]:
    said = [] if options["paths"] else ["corpus tokens needs at least one path"]
    if section is not None and section.tokenizer.name != "gpt2":
        said.append(f"corpus tokens holds tokens of gpt2, not of {section.tokenizer}: write tokenizer: gpt2")
    return said


@corpus.register("tokens", source="karpathy/llm.c, dev/data; karpathy/nanoGPT, data", check=_check_tokens)
def tokens(*, paths: list[str], validation_paths: list[str] | None = None) -> TokenFiles:
    """GPT-2 tokens as llm.c, modded-nanogpt and nanoGPT keep them, read where they lie: files or globs.

    paths: those with `train` in their names are for training, those with `val` for validation.
    validation_paths: files for validation; all of `paths` are for training then.
    """
    found = matching(paths, example="*.bin")
    own = None if validation_paths is None else matching(validation_paths, key="validation_paths", example="*.bin")
    if own is None:
        by_name = {path: _split_of(path) for path in found}
    else:
        by_name = {path: "train" for path in found if path not in own}
        by_name |= dict.fromkeys(own, "validation")
    files = {split: [token_file(path) for path, where in by_name.items() if where == split] for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            raise ConfigError(
                f"no file for {split} among {len(by_name)}",
                where="data.corpus.paths",
                hint="--set 'data.corpus.validation_paths=[FILE]' names those for validation",
            )
    count = len(by_name)
    return TokenFiles(f"{count} file{'s' * (count != 1)} of tokens made elsewhere", files)


def _split_of(path: Path) -> SplitName:
    """The split that a file's name names. Raises ConfigError where it names none, or both."""
    found = {WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in WORDS}
    if len(found) != 1:
        raise ConfigError(
            f"'{path.name}' does not say whether it is for training or validation",
            where="data.corpus.paths",
            hint="--set 'data.corpus.validation_paths=[FILE]' names those for validation",
        )
    return found.pop()


def token_file(path: Path) -> TokenFile:
    """A file's format and length. Raises DataFault for a format that is not known and for files cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head: NDArray[np.int32] = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], "<i4")
    except OSError as error:
        raise unreadable(path, error) from error
    first = int(head[0]) if len(head) else 0
    if first in OTHER_MAGIC:
        raise DataFault(f"holds {OTHER_MAGIC[first]}, not of GPT-2", where=str(path), hint="shards made for GPT-2")
    if first != MAGIC:
        if (path.parent / "meta.pkl").exists():
            raise DataFault(
                "meta.pkl beside it says that its ids are not GPT-2's",
                where=str(path),
                hint="the text itself, as corpus text",
            )
        if size % 2:
            raise DataFault(f"{size:,} bytes are no whole number of 16-bit tokens", where=str(path), hint=_AGAIN)
        return TokenFile(path, size // 2, 0)
    if len(head) < HEADER_BYTES // 4 or head[1] != VERSION:
        what = f"version {head[1]}" if len(head) > 1 else "a header cut short"
        raise DataFault(f"{what} of llm.c's format, not {VERSION}", where=str(path), hint=_AGAIN)
    expected = HEADER_BYTES + 2 * int(head[2])
    if size != expected:
        raise DataFault(
            f"{expected:,} bytes expected ({int(head[2]):,} tokens), {size:,} found", where=str(path), hint=_AGAIN
        )
    return TokenFile(path, int(head[2]), HEADER_BYTES)


_AGAIN = "fetch or make it again"


def link(
    folder: Path, corpus: TokenFiles, byte_lengths: NDArray[np.int64], separator: int, say: Progress
) -> dict[SplitName, Any]:
    """Links to the files in a prepared folder; -> the manifest's record of each split. Reads every token.

    Raises DataFault for ids outside the vocabulary.
    """
    sums = corpus.sums(say)
    total = 2 * sum(file.tokens for split in SPLITS for file in corpus.files[split])
    done = 0
    records: dict[SplitName, Any] = {}
    problems: list[Problem] = []
    for split in SPLITS:
        counts, shards = np.zeros(1 << 16, np.int64), []
        for number, file in enumerate(corpus.files[split]):
            name = f"{split}_{number:03d}.bin"
            (folder / name).symlink_to(file.path)
            here = np.zeros(1 << 16, np.int64)
            wrong: Problem | None = None
            ids = np.memmap(file.path, DTYPE, "r", offset=file.skip) if file.tokens else np.empty(0, DTYPE)
            for start in range(0, file.tokens, 1 << 22):
                stretch = ids[start : start + (1 << 22)]
                here += np.bincount(stretch, minlength=1 << 16)
                if wrong is None and here[GPT2_SIZE:].any():
                    at = int(np.argmax(stretch >= GPT2_SIZE))
                    what = f"token id {stretch[at]} at offset {start + at} is outside the vocabulary of {GPT2_SIZE}"
                    wrong = Problem(str(file.path), what)
                done += 2 * len(stretch)
                say(done, total, "checking the tokens")
            problems += [wrong] if wrong else []
            counts += here
            shards.append({"file": name, "tokens": file.tokens, "skip": file.skip, "sha256": sums[file.path],
                           "documents": int(here[separator])})  # fmt: skip
        records[split] = {
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": int(counts[:GPT2_SIZE] @ byte_lengths),
            "documents": [],
            "document_count": int(counts[separator]),
            "shards": shards,
        }
    if problems:
        raise DataFault(problems, hint="tokens made with GPT-2's tokenizer")
    return records
