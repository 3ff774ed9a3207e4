"""Whether another analysis, which was as reasonable beforehand, would have claimed something else.

The alternatives of a contrast: the other estimators of the sensitivity table; leaving out one seed at a time, where at
least FEWEST stay; other validation text of the same kind. Each is adjusted for the family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpt2lab.analysis.judging import decide
from gpt2lab.analysis.statistics import Array, holm, linear
from gpt2lab.analysis.verdicts import FEWEST, Contrast, TextNoise, Verdicts

ESTIMATORS = {"paired": "paired by seed", "blocked": "arm and seed", "permutation": "permutation"}


def claim(word: str) -> str:
    """better, worse, or "" for no difference that is claimed."""
    return next((kind for kind in ("better", "worse") if word.startswith((kind, f"likely {kind}"))), "")


def _can_claim(contrast: Contrast) -> bool:
    return math.isfinite(contrast.p) and not contrast.word.startswith(("exploratory", "not comparable", "unstable"))


LeftOut = Sequence[tuple[Array, Array]]
"""For each place among an arm's seeds: Holm p and difference of all contrasts where every arm lacks the seed at that
place, (contrast,) each."""


def without_each_seed(verdicts: Verdicts) -> LeftOut:
    """Of the first seed of every arm, the second, and so on; none where no contrast that can claim something has more
    than FEWEST."""
    arms = {arm.name: arm for arm in verdicts.arms}
    sizes = [min(arms[name].n for name in contrast.weights) for contrast in filter(_can_claim, verdicts.contrasts)]
    most = max(sizes, default=0)
    left_out = []
    for place in range(most if most > FEWEST else 0):
        tests = [
            linear([np.delete(arms[name].array, slice(place, place + 1)) for name in weights], list(weights.values()))
            for weights in (contrast.weights for contrast in verdicts.contrasts)
        ]
        p, difference = (np.stack([getattr(test, name) for test in tests]) for name in ("p", "difference"))
        left_out.append((holm(p, dropped=verdicts.dropped), difference))
    return left_out


def alternatives(
    verdicts: Verdicts, contrast: Contrast, text: TextNoise | None, left_out: LeftOut = ()
) -> dict[str, str]:
    """Alternative -> its claim, better, worse or "". Empty for contrasts that could not claim anything.

    left_out: of `without_each_seed`. Not where rates were searched: leaving out a seed would have to repeat the search.
    """
    if not _can_claim(contrast):
        return {}
    kinds = {}
    for name, title in ESTIMATORS.items():
        if result := contrast.sensitivity.get(name):
            p = min(1.0, result["p"] * verdicts.members)
            kinds[title] = _kind(verdicts, result.get("difference", contrast.difference), p, contrast.alpha)
    members = [next(arm for arm in verdicts.arms if arm.name == name) for name in contrast.weights]
    index, fewest = verdicts.contrasts.index(contrast), min(arm.n for arm in members)
    places = left_out[: fewest if fewest > FEWEST else 0]
    for seed, (p_holm, difference) in zip(members[0].values, places, strict=False):
        kinds[f"without seed {seed}"] = _kind(verdicts, difference[index], p_holm[index], contrast.alpha)
    if text is not None:
        kinds["other text"] = claim(contrast.word) if abs(contrast.difference) > text.halfwidth else ""
    return kinds


def _kind(verdicts: Verdicts, difference: float, p: float, alpha: float) -> str:
    return claim(str(decide(difference, p, np.nan, alpha=alpha, higher_is_better=verdicts.higher_is_better)))
