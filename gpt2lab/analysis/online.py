"""Control of false discoveries over a campaign, whose hypotheses are declared one after the other without an end.

LORD++: the level of each hypothesis is fixed when it is declared, from its number and from the discoveries that are
known by then. The expected share of false ones among all discoveries stays below ALPHA for p values that are valid
given what was decided before; how far it holds where arms share a baseline is simulated (streams.py, which
`gpt2lab selftest campaigns` prints; table in docs/statistics.md).

Source: Ramdas, Yang, Wainwright and Jordan, Online control of the false discovery rate with decaying memory, NeurIPS
2017; with verdicts that are known only later, Zrnic, Ramdas and Jordan, JMLR 22 (2021), section 3. The sequence of
weights, n^-1.6, is that of Ramdas, Zrnic, Wainwright and Jordan, ICML 2018.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ALPHA = 0.05
"""The share of false discoveries that is controlled."""
START = ALPHA / 2
"""Spent before the first discovery (w0 of the paper); every discovery earns ALPHA, the first ALPHA - START."""
DECAY = 1.6
ALL_WEIGHTS = 2.2857656656801293
"""The sum of n^-DECAY over n from 1 on, Riemann's zeta of DECAY. A constant: importing scipy takes 0.2 s of a plan."""


def weight(number: ArrayLike) -> Array:
    """Share of an amount that the hypothesis so many places later may spend; all shares add up to 1, 0 below 1."""
    n = np.asarray(number, dtype=np.float64)
    return np.where(n >= 1, np.maximum(n, 1) ** -DECAY / ALL_WEIGHTS, 0.0)


def levels(first: int, count: int, known: ArrayLike = (), found: ArrayLike = ()) -> Array:
    """The levels of hypotheses number `first`, `first` + 1, ... (counted from 1) that are declared together.

    known: (k,) numbers of the last hypothesis that had been declared when discoveries became known, ascending.
    found: (..., k) how many discoveries became known then.  -> (..., count)
    """
    known, found = np.asarray(known, dtype=np.float64), np.asarray(found, dtype=np.float64)
    numbers = first + np.arange(count)
    shares = weight(numbers - known[:, None])  # (k, count)
    any_found = found > 0
    first_found = any_found & (np.cumsum(any_found, axis=-1) == 1)
    return np.asarray(START * weight(numbers) + (ALPHA * found - START * first_found) @ shares)
