"""How far a difference in validation loss depends on which documents were scored. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def document_error(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], documents: ArrayLike, *, targets: ArrayLike | None = None
) -> tuple[float, int]:
    """Standard error, over validation documents, of arm a's mean loss minus arm b's; and the number of documents.

    a, b:      one array (windows,) of mean losses per window for each seed of the arm, on the same windows.
    documents: (windows,) the document that each window belongs to.
    targets:   (windows,) how many targets each window's mean is over; equal unless given.
    Seeds are averaged first, so this is the noise of the text alone. A ratio estimator: the documents are the sample,
    and the size of each is random as well. NaN for fewer than two documents. Raises ValueError for arrays that differ
    in length.  Source: Cochran, Sampling Techniques, 3rd edition, section 6.3; with equal weights it is the
    cluster-robust standard error of a mean.
    """
    labels = np.asarray(documents)
    weights = np.ones(labels.shape) if targets is None else np.asarray(targets, dtype=np.float64)
    rows = [np.asarray(row, dtype=np.float64) for row in (*a, *b)]
    if labels.ndim != 1 or any(row.shape != labels.shape for row in (weights, *rows)) or not a or not b:
        raise ValueError("every seed of both arms needs one loss for each window, and every window its document")
    difference = np.mean(rows[: len(a)], axis=0) - np.mean(rows[len(a) :], axis=0)  # (windows,)
    names, index = np.unique(labels, return_inverse=True)
    count = len(names)
    if count < 2:
        return math.nan, count
    sums = np.bincount(index, weights * difference)  # (documents,)
    sizes = np.bincount(index, weights)
    residuals = sums - sums.sum() / sizes.sum() * sizes
    variance = count / (count - 1) * np.square(residuals).sum() / sizes.sum() ** 2
    return math.sqrt(variance), count


def effective_documents(documents: ArrayLike, *, targets: ArrayLike | None = None) -> float:
    """How many documents of equal size would tell as much: (sum of sizes)^2 / sum of squared sizes.

    Three documents of which one is tiny are two. One less is the degrees of freedom of `document_error`.
    """
    labels = np.asarray(documents)
    weights = np.ones(labels.shape) if targets is None else np.asarray(targets, dtype=np.float64)
    sizes = np.bincount(np.unique(labels, return_inverse=True)[1], weights)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())
