"""The corpus `tokens`: GPT-2 tokens in files of other projects.

llm.c:         256 int32 (20240520, version 1, number of tokens, zeros), then uint16 tokens, all little-endian; the
               separator comes before each document.  Source: karpathy/llm.c, dev/data/data_common.py
nanoGPT:       uint16 tokens and nothing else, the separator after each document.  Source: karpathy/nanoGPT,
               data/openwebtext/prepare.py
build-nanogpt: one array of uint16 in NumPy's format, the separator before each document.  Source:
               karpathy/build-nanogpt, fineweb.py
The first bytes tell the formats apart: no two GPT-2 tokens read as llm.c's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gpt2lab.basics.text import plural
from gpt2lab.data.corpora import SPLITS, SplitName, corpus
from gpt2lab.data.files import Progress, canonical_sha256, known_sums, matching, others, quiet, reading
from gpt2lab.errors import ConfigError, DataFault

HEADER_BYTES = 256 * 4
LOOKED_AT = 65_536  # bytes of a file without a header that show how wide its numbers are
MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train", "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip
FEWEST_LOOKED_AT = 8
NARROWER = "tokens.astype('<u2').tofile(FILE), of a NumPy array"
NAME_VALIDATION = "--set 'data.corpus.validation_paths=[FILE]' names those for validation"


@dataclass(frozen=True)
class TokenFile:
    """A file of `tokens` GPT-2 ids (uint16, little-endian), the first of them after `skip` bytes."""

    path: Path
    tokens: int
    skip: int


@dataclass(frozen=True)
class TokenFiles:
    """GPT-2 tokens in files of other projects, by split. source: as of a Corpus."""

    source: str
    files: Mapping[SplitName, Sequence[TokenFile]]
    _sums: dict[Path, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """As of a Corpus; depends on the tokens only, not on names or headers."""
        sums = self.sums()
        return canonical_sha256(["tokens", *([sums[file.path] for file in self.files[split]] for split in SPLITS)])

    def sums(self, progress: Progress = quiet) -> Mapping[Path, str]:
        """sha256 of each file's tokens; files whose sum is not remembered are read."""
        if not self._sums:
            skips = {file.path: file.skip for split in SPLITS for file in self.files[split]}
            self._sums.update(known_sums(skips, progress, "hashing the tokens"))
        return self._sums


def _check_tokens(section: Any, options: Mapping[str, Any]) -> list[str]:
    problems = [] if options["paths"] else ["corpus tokens needs at least one path"]
    if section is not None and section.tokenizer.name != "gpt2":
        problems.append(f"corpus tokens holds tokens of gpt2, not of {section.tokenizer}: write tokenizer: gpt2")
    return problems


@corpus.register("tokens", source="karpathy/llm.c, dev/data; karpathy/nanoGPT, data", check=_check_tokens)
def tokens(*, paths: list[str], validation_paths: list[str] | None = None) -> TokenFiles:
    """GPT-2 tokens in the files of llm.c, modded-nanogpt, nanoGPT and build-nanogpt, read in place: files or globs.

    paths: those with `train` in their names are for training, those with `val` for validation.
    validation_paths: files for validation; all of `paths` are for training then.
    """
    matches = matching(paths, example="*.bin")
    if validation_paths is None:
        split_of = {path: _split_of(path) for path in matches}
    else:
        validation = matching(validation_paths, key="validation_paths", example="*.bin")
        split_of = dict.fromkeys(others(matches, validation), "train")
        split_of |= dict.fromkeys(validation, "validation")
    files = {split: [token_file(path) for path, where in split_of.items() if where == split] for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            problem = f"no file for {split} among {len(split_of)}"
            raise ConfigError(problem, where="data.corpus.paths", hint=NAME_VALIDATION)
    return TokenFiles(f"{plural(len(split_of), 'file')} of tokens made elsewhere", files)


def _split_of(path: Path) -> SplitName:
    """The split that a file's name contains. Raises ConfigError for none or both."""
    splits = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    if len(splits) != 1:
        problem = f"'{path.name}' does not say whether it is for training or validation"
        raise ConfigError(problem, where="data.corpus.paths", hint=NAME_VALIDATION)
    return splits.pop()


def token_file(path: Path) -> TokenFile:
    """A file's format and length. Raises DataFault for an unknown format or a truncated file."""
    with reading(path), open(path, "rb") as file:
        size, start = path.stat().st_size, file.read(LOOKED_AT)

    def refused(problem: str, hint: str = "fetch or make it again") -> DataFault:
        return DataFault(problem, where=str(path), hint=hint)

    if start.startswith(npy.MAGIC_PREFIX):
        return _array_file(path, size, refused)
    head: NDArray[np.int32] = np.frombuffer(start[: min(size, HEADER_BYTES) // 4 * 4], "<i4")
    magic = int(head[0]) if len(head) else 0
    if magic == LLAMA_MAGIC:
        raise refused("holds llm.c's tokens of Llama 3, not of GPT-2", "shards made for GPT-2")
    if magic != MAGIC:
        if any((folder / "meta.pkl").exists() for folder in (path.parent, path.resolve().parent)):
            raise refused("the folder's meta.pkl shows that its ids are not GPT-2's", "the text itself, as corpus text")
        if size % 2:
            raise refused(f"{size:,} bytes are no whole number of 16-bit tokens")
        every_second: NDArray[np.uint16] = np.frombuffer(start[: len(start) // 4 * 4], "<u2")[1::2]
        if len(every_second) >= FEWEST_LOOKED_AT and not every_second.any():
            raise refused("every second 16-bit number is 0: its numbers are wider than 16 bits", NARROWER)
        return TokenFile(path, size // 2, 0)
    if len(head) < HEADER_BYTES // 4 or head[1] != VERSION:
        what = f"version {head[1]}" if len(head) > 1 else "a header cut short"
        raise refused(f"{what} of llm.c's format, not {VERSION}")
    count = int(head[2])
    if size != HEADER_BYTES + 2 * count:
        raise refused(f"{HEADER_BYTES + 2 * count:,} bytes expected ({count:,} tokens), {size:,} found")
    return TokenFile(path, count, HEADER_BYTES)


def _array_file(path: Path, size: int, refused: Callable[..., DataFault]) -> TokenFile:
    """The array in a file of NumPy's format; it must have one dimension, of uint16."""
    try:
        with open(path, "rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, kind = read(file)
            skip = file.tell()
    except ValueError as error:
        raise refused(f"its header is not that of a NumPy array: {error}") from error
    if len(shape) != 1 or kind != np.dtype("<u2"):
        what = f"an array of {kind.name if kind.isnative else kind.str} and shape {shape}"
        raise refused(f"{what}, where one row of uint16 is expected", NARROWER)
    if size != skip + 2 * shape[0]:
        raise refused(f"{skip + 2 * shape[0]:,} bytes expected ({shape[0]:,} tokens), {size:,} found")
    return TokenFile(path, shape[0], skip)
