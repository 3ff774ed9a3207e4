"""The moderated t test, which verdicts do not use: it does not keep its error rate (docs/statistics.md).

A moderated test (Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3(1):3, the estimator of limma)
replaces each arm's variance by a mean of it and a prior variance from other runs of the same scale. Here the prior is
exactly the sd 1 of the baseline, which favours the moderated tests.

Shapes: D simulated studies.
"""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]

CANDIDATES = LIMMA, FALLS_BACK, ONE_SIDED = "moderated", "moderated, falling back", "moderated upwards only"
PRIOR_DF = 10.0
"""Degrees of freedom of the prior: those of a noise floor of eleven repeats."""
DISAGREES, STEEPNESS = 1.5, 6.0
"""Ratio of an arm's variance to the prior's at which half of the prior's degrees of freedom are withdrawn, and the
power of that ratio in the decline."""


def moderated(arm: Array, against: Array, kind: str) -> Array:
    """Two-sided p of the difference of means with moderated variances.  (D, seed) twice -> (D,)

    Degrees of freedom by Satterthwaite from those of each arm and of the prior. FALLS_BACK withdraws the prior from an
    arm the more its variance exceeds the prior's, so that a noisy arm is judged as by Welch's test; ONE_SIDED also
    never replaces a variance by a smaller one.
    """
    variances, freedom = [], []
    for values in (arm, against):
        n, observed = values.shape[-1], values.var(-1, ddof=1)
        prior = np.full_like(observed, PRIOR_DF)
        if kind != LIMMA:
            prior = PRIOR_DF / (1 + (observed / DISAGREES) ** STEEPNESS)
        shrunk = (prior + (n - 1) * observed) / (prior + n - 1)
        variances.append((np.maximum(shrunk, observed) if kind == ONE_SIDED else shrunk) / n)
        freedom.append(prior + n - 1)
    total = variances[0] + variances[1]
    df = 1 / sum((v / total) ** 2 / f for v, f in zip(variances, freedom, strict=True))
    t = (arm.mean(-1) - against.mean(-1)) / np.sqrt(total)
    return np.asarray(2 * scipy.special.stdtr(df, -np.abs(t)))
