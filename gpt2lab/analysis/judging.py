"""Judge the declared contrasts of one study as one family, and write each one's sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from gpt2lab.analysis import planning, words
from gpt2lab.analysis.sensitivity import sensitivity
from gpt2lab.analysis.statistics import (
    INFLATION,
    Comparison,
    Family,
    adjust,
    borrowed,
    equivalence_interval,
    linear,
    welch,
)
from gpt2lab.analysis.verdicts import FEWEST, Arm, Contrast, Declared, Standing, Terms, decide, standing

WORTH_TELLING = 1.1
"""An exaggeration below this factor is not mentioned."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything known about one contrast when its words are chosen."""

    declared: Declared
    sides: tuple[Arm, ...]
    """the arms in it, in the order of the weights"""
    standing: Standing
    terms: Terms
    at: Mapping[str, float]
    """its numbers: one entry per field of Family"""
    level: float
    """alpha, divided by the number of contrasts"""

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(self.declared.weights.values())

    @property
    def plus(self) -> Side:
        """The arms that count with a positive weight, as one."""
        return Side.of([(w, arm) for w, arm in zip(self.weights, self.sides, strict=True) if w > 0])

    @property
    def minus(self) -> Side:
        """The arms that are taken off, as one."""
        return Side.of([(-w, arm) for w, arm in zip(self.weights, self.sides, strict=True) if w < 0])

    @property
    def fewest(self) -> int:
        return min(side.n for side in self.sides)

    @property
    def sizes(self) -> tuple[float, float]:
        """Seeds that a single arm would need for a mean as sure as either side's: their own n for a pair."""
        return self.plus.size, self.minus.size

    @property
    def weight(self) -> float:
        """Sum of the squared weights: 2 for a pair."""
        return sum(w**2 for w in self.weights)

    @property
    def inflation(self) -> float:
        return INFLATION if self.standing.borrow else 1.0


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a contrast: a weighted mean of arms; `n` is that of the arm with the fewest seeds."""

    n: int
    size: float
    mean: float
    sd: float
    failed: int

    @classmethod
    def of(cls, parts: Sequence[tuple[float, Arm]]) -> Side:
        """From (weight, arm). A single arm of weight 1 keeps its own mean and sd."""
        squares = sum(w**2 for w, _ in parts)
        return cls(
            n=min(arm.n for _, arm in parts),
            size=1 / sum(w**2 / arm.n for w, arm in parts) if all(arm.n for _, arm in parts) else 0.0,
            mean=sum(w * arm.mean for w, arm in parts),
            sd=math.sqrt(sum(w**2 * arm.sd**2 for w, arm in parts) / squares),
            failed=sum(arm.failed for _, arm in parts),
        )


def judge(
    arms: Mapping[str, Arm],
    declared: Sequence[Declared],
    terms: Terms,
    settled: Mapping[int, Comparison] | None = None,
) -> tuple[list[Contrast], list[Comparison]]:
    """The declared contrasts as one family, and what each was tested with.

    settled: by position, what a contrast was tested with at an earlier look that decided it: it keeps its place in the
    family with the p of that look.
    """
    if not declared:
        return [], []
    sides = [tuple(arms[name] for name in one.weights) for one in declared]
    standings = [standing(own, terms) for own in sides]
    tested = [
        (settled or {}).get(i) or _test(one, own, s, terms)
        for i, (one, own, s) in enumerate(zip(declared, sides, standings, strict=True))
    ]
    family = adjust(tested, alpha=terms.alpha)
    runs = {name: arm.values for name, arm in arms.items()}
    judged = []
    for i, (one, own, s) in enumerate(zip(declared, sides, standings, strict=True)):
        at = {f.name: float(getattr(family, f.name)[..., i]) for f in fields(Family)}
        case = Case(declared=one, sides=own, standing=s, terms=terms, at=at, level=terms.alpha / len(declared))
        others = sensitivity(runs, one.arm, one.against, alpha=terms.alpha) if one.is_pair and terms.sensitivity else {}
        judged.append(_contrast(case, others))
    return judged, tested


def _test(one: Declared, sides: Sequence[Arm], own: Standing, terms: Terms) -> Comparison:
    """The comparison; without p where it could claim nothing, so that it counts in the family as p = 1."""
    margin, alpha = terms.smallest_effect, terms.alpha
    values = [side.array for side in sides]
    if own.borrow:
        assert terms.noise
        sd, df = terms.noise.sd, terms.noise.df
        return borrowed(values[0], values[1], sd=sd, df=df, margin=margin, alpha=alpha)
    if one.is_pair:
        result = welch(values[0], values[1], margin=margin, alpha=alpha)
    else:
        result = linear(values, list(one.weights.values()), margin=margin, alpha=alpha)
    if own.testable:
        return result
    nothing = np.full_like(result.p, np.nan)
    return replace(result, p=nothing, p_equivalence=nothing)


def _contrast(case: Case, others: dict[str, dict[str, float]]) -> Contrast:
    own, at, plus, minus = case.standing, case.at, case.plus, case.minus
    claim = _claim(case)
    least, least_upper = _detectable(case)
    factor = _exaggeration(case, least)
    notes = _notes(case, claim, factor, others)
    word, survivors, reason = claim, None, own.exploratory or None
    if own.not_comparable:
        word, reason = "not comparable", own.not_comparable
    elif own.unstable:
        word, reason = own.unstable, f"failed runs in {own.where}"
        survivors = claim if own.conditional else None
    noise = case.terms.noise
    return Contrast(
        arm=case.declared.arm, against=case.declared.against, n_arm=plus.n, n_against=minus.n,
        mean_arm=plus.mean, mean_against=minus.mean, sd_arm=plus.sd, sd_against=minus.sd,
        failed_arm=plus.failed, failed_against=minus.failed,
        difference=at["difference"], low=at["low"], high=at["high"], raw_low=at["raw_low"], raw_high=at["raw_high"],
        p=at["p"], p_holm=at["p_holm"], p_equivalence_holm=at["p_equivalence_holm"],
        in_noise_sd=at["difference"] / noise.sd if noise is not None and noise.sd > 0 else math.nan,
        detectable=least, detectable_upper=least_upper, exaggeration=factor,
        word=word, survivors=survivors, reason=reason,
        verdict="; ".join([_sentence(case, word, claim), *notes, *case.terms.scope]),
        notes=notes, sensitivity=others, weights=dict(case.declared.weights),
        alpha=case.terms.alpha,
    )  # fmt: skip


def _claim(case: Case) -> str:
    """The word for runs that may be judged: from exploratory down to inconclusive."""
    at, effect = case.at, f"{case.terms.smallest_effect:g}"
    found = str(decide(at["difference"], at["p_holm"], at["p_equivalence_holm"], alpha=case.terms.alpha))
    if case.standing.exploratory or not found:
        return "exploratory"
    direction, _, smaller = found.partition(" ")
    if direction in ("better", "worse"):
        if case.standing.borrow:
            return f"likely {direction} (noise borrowed)"
        return f"{direction} (smaller than {effect})" if smaller else direction
    if found == "no difference":
        return f"no difference larger than {effect}"
    more = _more_seeds(case)
    if more > 0:
        return f"inconclusive: need about {more} more seeds per arm"
    return f"inconclusive: the effect is near {effect}, interval {words.interval(at['low'], at['high'])}"


def _planning_noise(case: Case) -> tuple[float, float, float]:
    """(sd between seeds, its degrees of freedom, degrees of freedom that each further seed brings).

    From the noise floor where one is given, else the contrast's own: the sd that gives its standard error.
    """
    noise, at = case.terms.noise, case.at
    if noise is not None and noise.lends:
        return noise.sd, noise.df, case.weight**2 / sum(w**4 for w in case.weights)
    if not at["se"] > 0:
        return math.nan, math.nan, math.nan
    parts = [w**2 * side.sd**2 for w, side in zip(case.weights, case.sides, strict=True)]
    scale = sum(w**2 / side.n for w, side in zip(case.weights, case.sides, strict=True))
    return at["se"] / math.sqrt(scale), at["df"], sum(parts) ** 2 / sum(part**2 for part in parts)


def _more_seeds(case: Case) -> int:
    """Seeds per arm that are missing until the family's interval is no wider than +- half the smallest effect."""
    sd, df, gain = _planning_noise(case)
    halfwidth = case.terms.smallest_effect / 2
    enough = planning.seeds_for_halfwidth(
        planning.sd_upper(sd, df), halfwidth, confidence=1 - case.level, df_per_seed=gain, weight=case.weight
    )
    return int(enough) - case.fewest


def _detectable(case: Case) -> tuple[float, float]:
    """In the metric's unit: from the sd as estimated, and from its upper limit."""
    sd, df, _ = _planning_noise(case)
    if not (sd > 0 and case.at["se"] > 0):
        return math.nan, math.nan
    least = case.inflation * planning.detectable(*case.sizes, alpha=case.level, df=case.at["df"])
    return least * sd, least * float(planning.sd_upper(sd, df))


def _exaggeration(case: Case, least: float) -> float | None:
    """The factor at a true effect of one sd, for a significant estimate that this design would often have missed."""
    if not (case.at["p_holm"] < case.terms.alpha and abs(case.at["difference"]) < least):
        return None
    factor = planning.exaggeration(1.0, *case.sizes, df=case.at["df"], alpha=case.level, inflation=case.inflation)
    return factor if factor >= WORTH_TELLING else None


def _notes(case: Case, claim: str, factor: float | None, others: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """What a reader should know beside the word."""
    found, own, noise, alpha = [], case.standing, case.terms.noise, case.terms.alpha
    found += [case.terms.look] if case.terms.look else []
    at, effect = case.at, case.terms.smallest_effect
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
    still = [side for side in case.sides if side.n >= FEWEST and not side.sd]
    found += [f"all {side.n} values of {side.name} are equal" for side in still]
    return tuple(found)


def _sentence(case: Case, word: str, claim: str) -> str:
    own = case.standing
    if word == "not comparable":
        return f"{word}: {own.not_comparable}"
    judged = (f"{claim} ({own.exploratory})" if own.exploratory else claim) + _numbers(case, claim)
    if not own.unstable:
        return judged
    failed = f"{word} in {own.where}"
    return f"{failed}; conditional on not failing: {judged}" if own.conditional else failed


def _numbers(case: Case, claim: str) -> str:
    """`, -0.257 nats [-0.281, -0.233], Holm p = 1.2e-05 (n = 3, 3)`; no p beside a word that claims nothing."""
    at, alpha = case.at, case.terms.alpha
    if not math.isfinite(at["difference"]):
        return ""
    told = "interval" in claim
    low, high = (math.nan, math.nan) if told else (at["low"], at["high"])
    parts = [words.effect(at["difference"], low, high, case.terms.unit)]
    if claim != "exploratory":
        parts.append(f"Holm p = {words.probability(at['p_holm'], alpha)}")
    if claim.startswith("no difference"):
        parts.append(f"equivalence Holm p = {words.probability(at['p_equivalence_holm'], alpha)}")
    return f", {', '.join(parts)} (n = {case.plus.n}, {case.minus.n})"
