"""Judge the declared contrasts of one study as one family, and write each one's sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from gpt2lab.analysis import planning, words
from gpt2lab.analysis.best_rate import OwnBest, WeightedArm
from gpt2lab.analysis.sensitivity import sensitivity
from gpt2lab.analysis.statistics import (
    INFLATION,
    Comparison,
    Family,
    adjust,
    at_own_best,
    borrowed,
    linear,
)
from gpt2lab.analysis.verdicts import FEWEST, Arm, Contrast, Declared, Standing, Terms, decide, standing

SEARCH_OPEN = "inconclusive: the search of rates leaves it open"
"""Decided at the rates that were chosen, but not at each arm's best."""

MOST_MORE = 100
"""Seeds per arm beyond which a contrast is called not decidable here."""

WORTH_TELLING = 1.1
"""An exaggeration below this factor is not mentioned."""

TELLING_TIES = 0.1
"""Share of pairs of an arm's values up to which equal ones go untold; rounding to a third of an sd gives as many."""


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
    as_chosen: Mapping[str, float]
    """the same at the rates that searches chose, as if each were its arm's best; equal to `at` without a search"""
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
    def searched(self) -> bool:
        """Whether its interval includes what the search of a rate leaves open."""
        return not self.standing.borrow and any(side.name in self.terms.searches for side in self.sides)

    @property
    def fewest(self) -> int:
        return min(side.n for side in self.sides)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(side.n for side in self.sides)

    @property
    def weight(self) -> float:
        """Sum of the squared weights: 2 for a pair."""
        return sum(w**2 for w in self.weights)

    @property
    def inflation(self) -> float | None:
        """Of a noise that is borrowed."""
        return INFLATION if self.standing.borrow else None


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a contrast: a weighted mean of arms; `n` is that of the arm with the fewest seeds."""

    n: int
    mean: float
    sd: float
    failed: int

    @classmethod
    def of(cls, parts: Sequence[tuple[float, Arm]]) -> Side:
        """From (weight, arm). A single arm of weight 1 keeps its own mean and sd."""
        squares = sum(w**2 for w, _ in parts)
        return cls(
            n=min(arm.n for _, arm in parts),
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
    chosen = [_test(*each, terms) for each in zip(declared, sides, standings, strict=True)]
    tested = [
        (settled or {}).get(i) or _with_search(one, own, test, terms)
        for i, (one, own, test) in enumerate(zip(declared, sides, chosen, strict=True))
    ]
    chosen = [(settled or {}).get(i) or test for i, test in enumerate(chosen)]
    family = as_chosen = adjust(tested, alpha=terms.alpha, dropped=terms.dropped)
    if any(test.own_best is not None for test in tested):
        as_chosen = adjust(chosen, alpha=terms.alpha, dropped=terms.dropped)
    runs = {name: arm.values for name, arm in arms.items()}
    level = terms.alpha / (len(declared) + terms.dropped)
    judged = []
    for i, (one, own, s) in enumerate(zip(declared, sides, standings, strict=True)):
        at, plain = ({f.name: float(getattr(g, f.name)[..., i]) for f in fields(Family)} for g in (family, as_chosen))
        case = Case(declared=one, sides=own, standing=s, terms=terms, at=at, as_chosen=plain, level=level)
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
    result = linear(values, list(one.weights.values()), margin=margin, alpha=alpha)
    if own.testable:
        return result
    nothing = np.full_like(result.p, np.nan)
    return replace(result, p=nothing, p_equivalence=nothing)


def _with_search(one: Declared, sides: Sequence[Arm], test: Comparison, terms: Terms) -> Comparison:
    """The comparison at each arm's own best rate, where any of them searched for it and both can be judged."""
    if not any(side.name in terms.searches for side in sides) or not test.sizes or not math.isfinite(float(test.p)):
        return test
    arms = [
        WeightedArm(weight=weight, losses=side.array, search=terms.searches.get(side.name))
        for weight, side in zip(one.weights.values(), sides, strict=True)
    ]
    return at_own_best(test, OwnBest(arms), alpha=terms.alpha, margin=terms.smallest_effect)


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
        joint_low=at["joint_low"], joint_high=at["joint_high"],
        p=at["p"], p_holm=at["p_holm"], p_equivalence_holm=at["p_equivalence_holm"],
        in_noise_sd=at["difference"] / noise.sd if noise is not None and noise.sd > 0 else math.nan,
        detectable=least, detectable_upper=least_upper, exaggeration=factor,
        word=word, survivors=survivors, reason=reason,
        verdict="; ".join([_sentence(case, word, claim), *notes, *case.terms.scope]),
        notes=notes, sensitivity=others, weights=dict(case.declared.weights),
        alpha=case.terms.alpha, halfwidths=halfwidths(case),
    )  # fmt: skip


def halfwidths(case: Case) -> dict[str, float]:
    """Half the width of an interval by each source alone; see Contrast."""
    found = {"seeds": (case.as_chosen["high"] - case.as_chosen["low"]) / 2}
    if case.searched:
        found["search"] = max(
            case.as_chosen["joint_low"] - case.at["joint_low"], case.at["joint_high"] - case.as_chosen["joint_high"]
        )
    text = case.terms.text.get((case.declared.arm, case.declared.against))
    if text:
        found["text"] = text.halfwidth
    return {name: width for name, width in found.items() if math.isfinite(width)}


def _claim(case: Case) -> str:
    """The word for runs that may be judged: from exploratory down to inconclusive."""
    at, effect = case.at, f"{case.terms.smallest_effect:g}"
    found = _decided(case, at)
    if case.standing.exploratory or not found:
        return "exploratory"
    direction, _, smaller = found.partition(" ")
    if direction in ("better", "worse"):
        if case.standing.borrow:
            return f"likely {direction} (noise borrowed)"
        return f"{direction} (smaller than {effect})" if smaller else direction
    if found == "no difference":
        return f"no difference larger than {effect}"
    if case.searched and _decided(case, case.as_chosen) != "inconclusive":
        return SEARCH_OPEN
    return f"inconclusive: {_what_would_decide(case)}"


def _decided(case: Case, at: Mapping[str, float]) -> str:
    """What `decide` makes of these numbers of the case."""
    alpha, higher = case.terms.alpha, case.terms.higher_is_better
    return str(decide(at["difference"], at["p_holm"], at["p_equivalence_holm"], alpha=alpha, higher_is_better=higher))


def _what_would_decide(case: Case) -> str:
    """How many more seeds, if any number that could be trained here."""
    more, coming = _more_seeds(case), case.terms.coming
    if more > MOST_MORE:
        return f"not decidable here, it would take more than {MOST_MORE} further seeds per arm"
    if coming is None:
        return f"need about {more} more seeds per arm"
    if not coming:
        return f"confirm on about {case.fewest + more} fresh seeds per arm"
    at_look = next((n for n in coming if n >= case.fewest + more), None)
    if at_look is None:
        return f"start again with about {case.fewest + more} fresh seeds per arm"
    return f"need about {at_look - case.fewest} more seeds per arm"


def _planning_noise(case: Case) -> tuple[float, float, float]:
    """(sd between seeds, its degrees of freedom, degrees of freedom that each further seed brings).

    The contrast's own: the sd that gives its standard error. From the noise floor where that was borrowed.
    """
    noise, at = case.terms.noise, case.as_chosen
    if case.standing.borrow and noise is not None:
        return noise.sd, noise.df, case.weight**2 / sum(w**4 for w in case.weights)
    if not at["se"] > 0:
        return math.nan, math.nan, math.nan
    parts = [w**2 * side.sd**2 for w, side in zip(case.weights, case.sides, strict=True)]
    scale = sum(w**2 / side.n for w, side in zip(case.weights, case.sides, strict=True))
    return at["se"] / math.sqrt(scale), at["df"], sum(parts) ** 2 / sum(part**2 for part in parts)


def _more_seeds(case: Case) -> int:
    """Seeds per arm that are missing until the family's interval is no wider than +- half the smallest effect; at least
    one, since an interval as narrow as that decides either way."""
    sd, df, gain = _planning_noise(case)
    enough = planning.seeds_for_halfwidth(
        float(planning.sd_upper(sd, df)), case.terms.smallest_effect / 2,
        alpha=case.level, df_per_seed=gain, weight=case.weight,
    )  # fmt: skip
    return max(enough - case.fewest, 1)


def _detectable(case: Case) -> tuple[float, float]:
    """In the metric's unit: from the sd as estimated, and from its upper limit."""
    sd, df, _ = _planning_noise(case)
    if not (sd > 0 and case.at["se"] > 0):
        return math.nan, math.nan
    lent = case.at["df"] if case.standing.borrow else None
    least = (case.inflation or 1.0) * planning.detectable(case.sizes, case.weights, alpha=case.level, df=lent)
    return least * sd, least * float(planning.sd_upper(sd, df))


def _exaggeration(case: Case, least: float) -> float | None:
    """The factor at a true effect of one sd, for a significant estimate that this design would often have missed."""
    if not (case.at["p_holm"] < case.terms.alpha and abs(case.at["difference"]) < least):
        return None
    factor = planning.exaggeration(
        1.0, case.sizes, case.weights, df=case.at["df"], alpha=case.level, inflation=case.inflation
    )
    return factor if factor >= WORTH_TELLING else None


def _notes(case: Case, claim: str, factor: float | None, others: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """What a reader should know beside the word."""
    found, own, noise, alpha = [], case.standing, case.terms.noise, case.terms.alpha
    found += [case.terms.look] if case.terms.look else []
    at, effect = case.at, case.terms.smallest_effect
    if claim.startswith("no difference") and max(-at["low"], at["high"]) > effect:
        found.append(f"the interval that equivalence goes by is {words.interval(at['same_low'], at['same_high'])}")
    found += _search_notes(case, claim)
    if own.borrow and noise:
        lender = f"{noise.runs} baseline repeats ({noise.scale}, {noise.stack})"
        found.append(
            f"noise borrowed from {lender}: sd {noise.sd:.2g}, times {INFLATION}; whether an arm is noisier than that, "
            "a third seed would show"
        )
    if own.testable and not own.exploratory:
        if factor is not None:
            found.append(f"small effects that pass at this n are exaggerated about {factor:.1f} times")
        p = case.as_chosen["p"]
        unlike = [
            f"{name} p {words.probability(other['p'], alpha)}"
            for name, other in others.items()
            if (other["p"] < alpha) != (p < alpha)
        ]
        if unlike and not own.borrow:
            found.append(f"unlike Welch (p {words.probability(p, alpha)}): {words.listed(unlike)}")
    arm, against = case.sides[0], case.sides[-1]
    if case.declared.is_pair and arm.values and arm.values == against.values:
        found.append(f"identical to {against.name} at every seed: did the change reach the model?")
    found += filter(None, map(_ties, case.sides))
    return (*found, *_text_notes(case, claim))


def _search_notes(case: Case, claim: str) -> list[str]:
    """What holds at the rates that were chosen, where the search of rates leaves open what holds at the best ones."""
    if claim != SEARCH_OPEN:
        return []
    plain, wide = case.as_chosen, halfwidths(case)["search"]
    unit, effect = case.terms.unit, f"{case.terms.smallest_effect:g}"
    word = _decided(case, plain).partition(" (")[0]
    word = f"no difference larger than {effect}" if word == "no difference" else word
    ends = ("same_low", "same_high") if word.startswith("no difference") else ("low", "high")
    at = f"{word}, {words.interval(*(plain[end] for end in ends))}"
    return [f"at the rates that were chosen: {at}; the best ones may move that by up to {wide:.2g} {unit}"]


def _text_notes(case: Case, claim: str) -> tuple[str, ...]:
    """How far the difference depends on the validation text, and what that means for the word."""
    text = case.terms.text.get((case.declared.arm, case.declared.against))
    if text is None or not text.se > 0 or claim == "exploratory":
        return ()
    size, effect = abs(case.at["difference"]), case.terms.smallest_effect
    of = f"on other text ±{text.halfwidth:.2g} (by {words.plural(text.count, text.unit.removesuffix('s'))})"
    if claim.startswith(("better", "worse", "likely")) and size < text.halfwidth:
        return (f"{of}, so the sign may be that of this text alone",)
    if claim.startswith("no difference") and size + text.halfwidth > effect:
        return (f"{of}, so a difference of {effect:g} is possible there",)
    return (of,)


def _ties(side: Arm) -> str:
    """What an arm's equal values say of its noise; "" where hardly any are equal."""
    if side.n >= FEWEST and not side.sd:
        return f"all {side.n} values of {side.name} are equal"
    counts = Counter(side.values.values())
    pairs = sum(math.comb(count, 2) for count in counts.values())
    if pairs <= TELLING_TIES * math.comb(side.n, 2):
        return ""
    equal = sum(count for count in counts.values() if count > 1)
    return f"{equal} of {side.n} values of {side.name} occur more than once: rounded, or one run written down twice?"


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
    same = math.isclose(case.plus.mean, case.minus.mean, rel_tol=1e-14)  # equal values, added in another order
    difference = 0.0 if same else at["difference"]
    parts = [words.effect(difference, at["low"], at["high"], case.terms.unit)]
    if claim != "exploratory":
        parts.append(f"Holm p {words.probability(at['p_holm'], alpha)}")
    if claim.startswith("no difference"):
        parts.append(f"equivalence Holm p {words.probability(at['p_equivalence_holm'], alpha)}")
    return f", {', '.join(parts)} (n = {case.plus.n}, {case.minus.n})"
