"""Whether another analysis, which was as reasonable beforehand, would have claimed something else.

The alternatives of a contrast: the other estimators of the sensitivity table; leaving out one seed at a time, where at
least FEWEST stay; other validation text of the same kind. Each is adjusted for the family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gpt2lab.analysis.judging import decide
from gpt2lab.analysis.statistics import adjust, linear
from gpt2lab.analysis.verdicts import FEWEST, ArmResult, Contrast, TextNoise, Verdicts

ESTIMATORS = {"paired": "paired by seed", "blocked": "arm and seed", "permutation": "permutation"}


def claim(word: str) -> str:
    """better, worse, or "" for no difference that is claimed."""
    return next((kind for kind in ("better", "worse") if word.startswith((kind, f"likely {kind}"))), "")


def alternatives(verdicts: Verdicts, contrast: Contrast, text: TextNoise | None, *, searched: bool) -> dict[str, str]:
    """Alternative -> its claim, better, worse or "". Empty for contrasts that could not claim anything.

    searched: whether rates were searched; leaving out a seed would then have to repeat the search, and is not tried.
    """
    if not math.isfinite(contrast.p) or contrast.word.startswith(("exploratory", "not comparable", "unstable")):
        return {}
    kinds = {}
    for name, title in ESTIMATORS.items():
        result = contrast.sensitivity.get(name)
        if result and name != "permutation":
            p = min(1.0, result["p"] * verdicts.members)
            kinds[title] = _kind(verdicts, result["difference"], p, contrast.alpha)
        elif result:
            p = min(1.0, result["p"] * verdicts.members)
            kinds[title] = _kind(verdicts, contrast.difference, p, contrast.alpha)
    if not searched:
        kinds |= {f"without seed {seed}": kind for seed, kind in _without_each_seed(verdicts, contrast)}
    if text is not None:
        same = abs(contrast.difference) > text.halfwidth
        kinds["other text"] = claim(contrast.word) if same else ""
    return kinds


def _without_each_seed(verdicts: Verdicts, contrast: Contrast) -> Iterator[tuple[str, str]]:
    """The claim without the first seed of every arm, without the second, ...; named after this contrast's first arm."""
    arms = {arm.name: arm for arm in verdicts.arms}
    index = next(i for i, other in enumerate(verdicts.contrasts) if other is contrast)
    members = [arms[name] for name in contrast.weights]
    fewest = min(arm.n for arm in members)
    for place in range(fewest if fewest > FEWEST else 0):
        tests = []
        for other in verdicts.contrasts:
            values = [_without(arms[name], place) for name in other.weights]
            tests.append(linear(values, list(other.weights.values()), alpha=contrast.alpha))
        family = adjust(tests, alpha=contrast.alpha, dropped=verdicts.dropped)
        p, difference = float(family.p_holm[..., index]), float(family.difference[..., index])
        yield list(members[0].values)[place], _kind(verdicts, difference, p, contrast.alpha)


def _without(arm: ArmResult, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.delete(arm.array, place) if place < arm.n else arm.array


def _kind(verdicts: Verdicts, difference: float, p: float, alpha: float) -> str:
    word = decide(difference, p, np.nan, alpha=alpha, higher_is_better=verdicts.higher_is_better)
    return claim(str(word))
