"""Judge the declared contrasts of one study as one family, and write each one's sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from gpt2lab.analysis import planning, words
from gpt2lab.analysis.sensitivity import sensitivity
from gpt2lab.analysis.statistics import INFLATION, Comparison, Family, adjust, borrowed, equivalence_interval, welch
from gpt2lab.analysis.verdicts import FEWEST, Arm, Contrast, Standing, Terms, decide, standing

WORTH_TELLING = 1.1
"""An exaggeration below this factor is not mentioned."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Everything known about one contrast when its words are chosen."""

    arm: Arm
    against: Arm
    standing: Standing
    terms: Terms
    at: Mapping[str, float]
    """its numbers: one entry per field of Family"""
    level: float
    """alpha, divided by the number of contrasts"""

    @property
    def seeds(self) -> tuple[int, int]:
        return self.arm.n, self.against.n

    @property
    def inflation(self) -> float:
        return INFLATION if self.standing.borrow else 1.0


def judge(arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]], terms: Terms) -> tuple[Contrast, ...]:
    """The declared pairs (arm, against), as one family."""
    if not pairs:
        return ()
    standings = [standing(arms[a], arms[b], terms) for a, b in pairs]
    tested = [_test(arms[a], arms[b], s, terms) for (a, b), s in zip(pairs, standings, strict=True)]
    family = adjust(tested, alpha=terms.alpha)
    runs = {name: arm.values for name, arm in arms.items()}
    judged = []
    for i, ((a, b), own) in enumerate(zip(pairs, standings, strict=True)):
        at = {f.name: float(getattr(family, f.name)[..., i]) for f in fields(Family)}
        pair = Pair(arm=arms[a], against=arms[b], standing=own, terms=terms, at=at, level=terms.alpha / len(pairs))
        judged.append(_contrast(pair, sensitivity(runs, a, b, alpha=terms.alpha)))
    return tuple(judged)


def _test(arm: Arm, against: Arm, own: Standing, terms: Terms) -> Comparison:
    """The comparison; without p where it could claim nothing, so that it counts in the family as p = 1."""
    margin, alpha = terms.smallest_effect, terms.alpha
    if own.borrow:
        assert terms.noise
        sd, df = terms.noise.sd, terms.noise.df
        return borrowed(arm.array, against.array, sd=sd, df=df, margin=margin, alpha=alpha)
    result = welch(arm.array, against.array, margin=margin, alpha=alpha)
    if own.testable:
        return result
    nothing = np.full_like(result.p, np.nan)
    return replace(result, p=nothing, p_equivalence=nothing)


def _contrast(pair: Pair, others: dict[str, dict[str, float]]) -> Contrast:
    arm, against, own, at = pair.arm, pair.against, pair.standing, pair.at
    claim = _claim(pair)
    least, least_upper = _detectable(pair)
    factor = _exaggeration(pair, least)
    notes = _notes(pair, claim, factor, others)
    word, survivors, reason = claim, None, own.exploratory or None
    if own.not_comparable:
        word, reason = "not comparable", own.not_comparable
    elif own.unstable:
        word, reason = own.unstable, f"failed runs in {own.where}"
        survivors = claim if own.conditional else None
    return Contrast(
        arm=arm.name, against=against.name, n_arm=arm.n, n_against=against.n,
        mean_arm=arm.mean, mean_against=against.mean, sd_arm=arm.sd, sd_against=against.sd,
        failed_arm=arm.failed, failed_against=against.failed,
        difference=at["difference"], low=at["low"], high=at["high"], raw_low=at["raw_low"], raw_high=at["raw_high"],
        p=at["p"], p_holm=at["p_holm"], p_equivalence_holm=at["p_equivalence_holm"],
        detectable=least, detectable_upper=least_upper, exaggeration=factor,
        word=word, survivors=survivors, reason=reason,
        verdict="; ".join([_sentence(pair, word, claim), *notes, *pair.terms.scope]),
        notes=notes, sensitivity=others,
    )  # fmt: skip


def _claim(pair: Pair) -> str:
    """The word for runs that may be judged: from exploratory down to inconclusive."""
    at, effect = pair.at, f"{pair.terms.smallest_effect:g}"
    found = str(decide(at["difference"], at["p_holm"], at["p_equivalence_holm"], alpha=pair.terms.alpha))
    if pair.standing.exploratory or not found:
        return "exploratory"
    direction, _, smaller = found.partition(" ")
    if direction in ("better", "worse"):
        if pair.standing.borrow:
            return f"likely {direction} (noise borrowed)"
        return f"{direction} (smaller than {effect})" if smaller else direction
    if found == "no difference":
        return f"no difference larger than {effect}"
    more = _more_seeds(pair)
    if more > 0:
        return f"inconclusive: need about {more} more seeds per arm"
    return f"inconclusive: the effect is near {effect}, interval {words.interval(at['low'], at['high'])}"


def _planning_noise(pair: Pair) -> tuple[float, float, float]:
    """(sd between seeds, its degrees of freedom, degrees of freedom that each further seed brings).

    From the noise floor where one is given, else the contrast's own: the sd that gives its standard error.
    """
    noise, at = pair.terms.noise, pair.at
    if noise is not None and noise.lends:
        return noise.sd, noise.df, 2.0
    if not at["se"] > 0:
        return math.nan, math.nan, math.nan
    first, second = pair.arm.sd**2, pair.against.sd**2
    gain = (first + second) ** 2 / (first**2 + second**2)
    return at["se"] / math.sqrt(sum(1 / n for n in pair.seeds)), at["df"], gain


def _more_seeds(pair: Pair) -> int:
    """Seeds per arm that are missing until the family's interval is no wider than +- half the smallest effect."""
    sd, df, gain = _planning_noise(pair)
    halfwidth = pair.terms.smallest_effect / 2
    enough = planning.seeds_for_halfwidth(
        planning.sd_upper(sd, df), halfwidth, confidence=1 - pair.level, df_per_seed=gain
    )
    return int(enough) - min(pair.seeds)


def _detectable(pair: Pair) -> tuple[float, float]:
    """In the metric's unit: from the sd as estimated, and from its upper limit."""
    sd, df, _ = _planning_noise(pair)
    if not (sd > 0 and pair.at["se"] > 0):
        return math.nan, math.nan
    least = pair.inflation * planning.detectable(*pair.seeds, alpha=pair.level, df=pair.at["df"])
    return least * sd, least * float(planning.sd_upper(sd, df))


def _exaggeration(pair: Pair, least: float) -> float | None:
    """The factor at a true effect of one sd, for a significant estimate that this design would often have missed."""
    if not (pair.at["p_holm"] < pair.terms.alpha and abs(pair.at["difference"]) < least):
        return None
    factor = planning.exaggeration(1.0, *pair.seeds, df=pair.at["df"], alpha=pair.level, inflation=pair.inflation)
    return factor if factor >= WORTH_TELLING else None


def _notes(pair: Pair, claim: str, factor: float | None, others: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """What a reader should know beside the word."""
    found, own, noise, alpha = [], pair.standing, pair.terms.noise, pair.terms.alpha
    at, effect = pair.at, pair.terms.smallest_effect
    if claim.startswith("no difference") and max(-at["low"], at["high"]) > effect:
        inside = equivalence_interval(
            at["difference"], at["se"], at["df"], at["p_equivalence"], at["p_equivalence_holm"], alpha
        )
        found.append(f"the interval that equivalence goes by is {words.interval(*inside)}")
    if own.borrow and noise:
        lender = f"{noise.runs} baseline repeats ({noise.scale}, {noise.stack})"
        found.append(f"noise borrowed from {lender}: sd {noise.sd:.2g}, times {INFLATION}")
    if own.testable and not own.exploratory:
        if factor is not None:
            found.append(f"small effects that pass at this n are exaggerated about {factor:.1f} times")
        p = at["p"]
        unlike = [
            f"{name} p = {words.probability(other['p'], alpha)}"
            for name, other in others.items()
            if (other["p"] < alpha) != (p < alpha)
        ]
        if unlike and not own.borrow:
            found.append(f"unlike Welch (p = {words.probability(p, alpha)}): {words.listed(unlike)}")
    sides = (pair.arm, pair.against)
    found += [f"all {side.n} values of {side.name} are equal" for side in sides if side.n >= FEWEST and not side.sd]
    return tuple(found)


def _sentence(pair: Pair, word: str, claim: str) -> str:
    own = pair.standing
    if word == "not comparable":
        return f"{word}: {own.not_comparable}"
    judged = (f"{claim} ({own.exploratory})" if own.exploratory else claim) + _numbers(pair, claim)
    if not own.unstable:
        return judged
    failed = f"{word} in {own.where}"
    return f"{failed}; conditional on not failing: {judged}" if own.conditional else failed


def _numbers(pair: Pair, claim: str) -> str:
    """`, -0.257 nats [-0.281, -0.233], Holm p = 1.2e-05 (n = 3, 3)`; no p beside a word that claims nothing."""
    at, alpha = pair.at, pair.terms.alpha
    if not math.isfinite(at["difference"]):
        return ""
    told = "interval" in claim
    low, high = (math.nan, math.nan) if told else (at["low"], at["high"])
    parts = [words.effect(at["difference"], low, high, pair.terms.unit)]
    if claim != "exploratory":
        parts.append(f"Holm p = {words.probability(at['p_holm'], alpha)}")
    if claim.startswith("no difference"):
        parts.append(f"equivalence Holm p = {words.probability(at['p_equivalence_holm'], alpha)}")
    return f", {', '.join(parts)} (n = {pair.seeds[0]}, {pair.seeds[1]})"
