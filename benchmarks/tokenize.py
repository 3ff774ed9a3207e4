"""`tokenize`: our processes beside tiktoken's own batch call, in turns on the same text and cores."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import options as o
from benchmarks.turns import ratio_of
from gpt2lab.basics.cores import usable_cores
from gpt2lab.config import load_config
from gpt2lab.data.corpora import Corpus, Stream
from gpt2lab.data.corpora import corpus as corpus_slot
from gpt2lab.data.encode import PieceBatch, batches, division, encoder
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, gpt2_encoding
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, NumericsFault
from gpt2lab.registry import Choice

BLOCK_BYTES = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What was found. ours, theirs: MB of text per second, one figure a block. ratio, interval: as
    `turns.ratio_of` has them, from blocks that follow each other."""

    processes: int
    block_bytes: int
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    ratio: float
    interval: tuple[float, float] | None


def measured(corpus: Choice, *, processes: int, blocks: int, block_bytes: int | None = None) -> Tokenizing:
    """Tokenize the training text of `corpus` with GPT-2's tokenizer in both ways, `blocks` times each in turns.

    Ours is what `data prepare` runs: processes that are ready before the clock starts, batches sent to them, ids as
    arrays back in order. Theirs: `encode_ordinary_batch` of the same documents with as many threads. A corpus of less
    than `block_bytes` (None: BLOCK_BYTES) is taken several times. Raises ConfigError for a corpus without text,
    NumericsFault when the ids differ.
    """
    choice = tokenizer_slot.read("gpt2")
    tokenizer: Tokenizer = tokenizer_slot.build(choice, TokenizerSite(Path()))
    work, documents = _work(corpus, block_bytes or BLOCK_BYTES)
    total = sum(batch.size for batch in work)
    encoding, _ = gpt2_encoding()
    with encoder(choice, Path(), tokenizer, processes) as encode:
        mine = np.concatenate([ids for _, (ids, _) in encode(work)])
        theirs = encoding.encode_ordinary_batch(documents, num_threads=processes)
        _compare(mine, theirs, tokenizer.separator)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for block in range(blocks):
            for side in ("ours", "theirs") if block % 2 == 0 else ("theirs", "ours"):
                began = time.perf_counter()
                if side == "ours":
                    for _ in encode(work):
                        pass
                else:
                    encoding.encode_ordinary_batch(documents, num_threads=processes)
                rates[side].append(total / 1e6 / (time.perf_counter() - began))
    # ratio_of takes seconds, and a rate is their inverse
    ratio, interval = ratio_of(rates["ours"], rates["theirs"])
    return Tokenizing(
        processes=processes,
        block_bytes=total,
        ours=tuple(rates["ours"]),
        theirs=tuple(rates["theirs"]),
        ratio=ratio,
        interval=interval,
    )


def _work(choice: Choice, wanted: int) -> tuple[list[PieceBatch], list[str]]:
    """Batches as `data prepare` makes them, and the same documents whole, repeated up to `wanted` bytes."""
    corpus = corpus_slot.build(choice)
    if not isinstance(corpus, (Corpus, Stream)):
        raise ConfigError(
            f"corpus {choice} holds no text", where="benchmarks tokenize", hint="gpt2lab components corpus"
        )
    once: list[PieceBatch] = []
    size = 0
    for batch in batches(division(corpus, 0.05).open(None)):
        once.append(batch)
        size += batch.size
        if size >= wanted:
            break
    if not size:
        raise ConfigError(f"corpus {choice} is empty", where="benchmarks tokenize")
    times = max(1, round(wanted / size))
    documents: list[str] = [""]
    for piece in (piece for batch in once for piece in batch.pieces):
        documents[-1] += piece.text
        if piece.last:
            documents.append("")
    return once * times, [text for text in documents if text] * times


def _compare(mine: np.ndarray[Any, Any], theirs: Sequence[Sequence[int]], separator: int | None) -> None:
    """Raise NumericsFault unless both sides say the same, our separators aside."""
    other = np.concatenate([np.array(ids, np.int64) for ids in theirs])
    if not np.array_equal(mine[mine != separator], other):
        raise NumericsFault("the two sides give different tokens", where="benchmarks tokenize")


def tokenize(
    corpus: Annotated[
        str, typer.Option("--corpus", help="As shakespeare, or '{name: text, paths: [FILE]}'.")
    ] = "shakespeare",
    processes: Annotated[int | None, typer.Option("--processes", help="Ours; threads of tiktoken.", min=1)] = None,
    blocks: o.Blocks = 7,
    json_: o.Json = False,
) -> None:
    """Time tokenizing with GPT-2's tokenizer as `data prepare` does it, and tiktoken's own batch call, in turns.

    Both are given the same documents and as many cores.
    """
    chosen = load_config("gpt2-124m", [f"data.corpus={corpus}"]).data.corpus
    found = measured(chosen, processes=processes or usable_cores(), blocks=blocks)
    if json_:
        print(json.dumps(asdict(found)))
        return
    for name, rates in (("gpt2lab", found.ours), ("tiktoken", found.theirs)):
        print(f"{name:9}{statistics.median(rates):7.1f} MB/s   blocks from {min(rates):.1f} to {max(rates):.1f}")
    words = o.verdict("gpt2lab", "tiktoken", found.ratio, found.interval)
    print(f"{words} ({blocks} blocks of {found.block_bytes / 1e6:.0f} MB each, {found.processes} processes or threads)")
