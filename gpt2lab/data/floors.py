"""What a model must beat: cross entropy of the validation tokens under counts of the training tokens.

N training tokens, V vocabulary size, P distinct pairs of neighbours
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpt2lab.data.batches import Ids, TokenSequence

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
    for stretch in _stretches(train, limit, overlap=0):
        single += np.bincount(stretch, minlength=vocab_size)
    unigram = single / single.sum()  # (V,)
    pairs, counts = _pair_counts(train, vocab_size, limit)  # (P,), (P,)
    heads = pairs // vocab_size
    after = np.bincount(heads, weights=counts, minlength=vocab_size)  # c(h), (V,)
    distinct = np.bincount(heads, minlength=vocab_size)  # T(h), (V,)

    nats = np.zeros(2)
    for stretch in _stretches(validation, limit, overlap=1):
        h, w = stretch[:-1], stretch[1:]
        p = unigram[w]
        wanted = h * vocab_size + w
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        together = np.where(pairs[place] == wanted, counts[place], 0)
        total = after[h] + distinct[h]
        conditional = np.where(total > 0, (together + distinct[h] * p) / np.maximum(total, 1), p)
        nats -= np.log(p).sum(), np.log(conditional).sum()
    unigram_floor, bigram_floor = nats / (min(limit, len(validation)) - 1)
    return {"unigram": float(unigram_floor), "bigram": float(bigram_floor)}


def _stretches(tokens: TokenSequence, limit: int, overlap: int) -> Iterator[Ids]:
    """The first `limit` tokens in stretches; with overlap 1, each begins with the last token of the one before."""
    end = min(limit, len(tokens))
    for start in range(0, end - overlap, STRETCH):
        yield tokens[start : min(end, start + STRETCH + overlap)]


def _pair_counts(tokens: TokenSequence, vocab_size: int, limit: int) -> tuple[Ids, Ids]:
    """Distinct neighbours, written as first * V + second, sorted, and how often each occurs.  -> (P,), (P,)"""
    # Half the memory where the numbers fit, and no second array of this size: it is the largest here.
    pairs = np.empty(min(limit, len(tokens)) - 1, dtype=np.uint32 if vocab_size**2 <= 1 << 32 else np.int64)
    filled = 0
    for stretch in _stretches(tokens, limit, overlap=1):
        pairs[filled : filled + len(stretch) - 1] = stretch[:-1] * vocab_size + stretch[1:]
        filled += len(stretch) - 1
    pairs.sort()
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return pairs[starts].astype(np.int64), np.diff(np.append(starts, len(pairs)))
