"""Judges the declared contrasts of one study as one family, at each of its looks: the verdict word and all numbers.

Precedence: not comparable > unstable > exploratory > better / worse > no difference larger than X > inconclusive.
One or two seeds never yield plain better or worse: with the noise of at least ten baseline repeats they are "likely
better" or "likely worse", without it exploratory. Verdicts are put into words by wording.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2lab.analysis import planning, wording
from gpt2lab.analysis.best_rate import BestRateDifference, WeightedArm
from gpt2lab.analysis.calibration import power
from gpt2lab.analysis.planning import Look
from gpt2lab.analysis.statistics import (
    INFLATION,
    Comparison,
    Family,
    adjust,
    at_best_rates,
    borrowed,
    linear,
    no_spread,
    sensitivity,
)
from gpt2lab.analysis.verdicts import FEWEST, FEWEST_REPEATS, Action, ArmResult, Contrast, Declared, Terms
from gpt2lab.basics.text import plural

DECISIVE = ("better", "worse", "no difference")
"""Decisions after which no further seeds are needed."""

MOST_FAILED = 0.25
"""Share of failed seeds up to which the survivors are still judged."""

SEARCH_OPEN = "search open"
"""The decision on a contrast that is decided at the chosen rates, but not at each arm's best."""

NUMBERS = ("difference", "low", "high", "raw_low", "raw_high", "joint_low", "joint_high", "p", "p_holm",
           "p_equivalence_holm")  # fmt: skip
"""Fields of the family that a contrast takes over."""

WORTH_A_NOTE = 1.1
"""A smaller factor of exaggeration is not mentioned."""


def decide(
    difference: ArrayLike,
    p_holm: ArrayLike,
    p_equivalence_holm: ArrayLike,
    *,
    alpha: float = 0.05,
    higher_is_better: bool = False,
) -> NDArray[np.str_]:
    """better, worse, either with " (smaller)", no difference, inconclusive; "" without a p.  (...) -> (...)"""
    difference, p_holm, p_same = (np.asarray(x, dtype=np.float64) for x in (difference, p_holm, p_equivalence_holm))
    significant, same = p_holm < alpha, p_same < alpha
    gain = difference > 0 if higher_is_better else difference < 0
    return np.select(
        [np.isnan(p_holm), significant & same & gain, significant & same, significant & gain, significant, same],
        ["", "better (smaller)", "worse (smaller)", "better", "worse", "no difference"],
        default="inconclusive",
    )


@dataclass(frozen=True, kw_only=True)
class Eligibility:
    """Which verdicts a contrast may get, before any p value is computed; reasons are "" where they do not apply."""

    not_comparable: str = ""
    unstable: str = ""
    where: str = ""
    """arms with failed runs: `arm and base`"""
    counted: str = ""
    """the same with counts: `(1 of 4 failed) in arm and (2 of 4 failed) in base`"""
    conditional: bool = False
    """whether few enough failed to judge the others"""
    exploratory: str = ""
    remedy: Action | None = None
    """the action after which it would not be exploratory"""
    borrow: bool = False
    """whether it is judged by the noise of other runs"""
    testable: bool = True


def eligibility(contrast: Declared, sides: Sequence[ArmResult], terms: Terms) -> Eligibility:
    """The eligibility of a contrast of these arms; noise can be borrowed for a pair."""
    names = (contrast.arm, contrast.against)
    barred = _reason(sides, terms.not_comparable) or ("" if terms.force_exploratory else _unequal_lengths(sides))
    failed = [side for side in sides if side.failed]
    conditional = all(side.failed <= MOST_FAILED * (side.failed + side.n) for side in failed)
    counts = [f"({side.failed} of {side.failed + side.n} failed)" for side in failed]
    fewest = min(side.n for side in sides)
    available = terms.noise is not None and terms.noise.sufficient and len(sides) == 2
    borrow = 0 < fewest < FEWEST and available
    constant = fewest >= FEWEST and all(bool(no_spread(side.array)) for side in sides)
    late_reason = terms.late.get(names, "")
    exploratory, remedy = _exploratory(names, sides, terms, borrow=borrow, constant=constant)
    return Eligibility(
        not_comparable=barred,
        unstable=f"unstable {counts[0]}" if failed else "",
        where=wording.listed(side.name for side in failed) if failed else "",
        counted=wording.listed(f"{n} in {side.name}" for n, side in zip(counts, failed, strict=True)) if failed else "",
        conditional=conditional,
        exploratory=exploratory or late_reason,
        remedy=remedy or ("confirm" if late_reason else None),
        borrow=borrow,
        testable=not (barred or late_reason or constant)
        and (not failed or conditional)
        and (fewest >= FEWEST or borrow),
    )


def _exploratory(
    names: tuple[str, str], sides: Sequence[ArmResult], terms: Terms, *, borrow: bool, constant: bool
) -> tuple[str, Action | None]:
    """(why it is exploratory, the action that would change that); ("", None) where it is not."""
    empty = [side.name for side in sides if not side.n and not side.failed]
    if empty:
        return f"no value for {wording.listed(empty)}", "finish"
    if terms.screen:
        return "a screen, to be confirmed on fresh seeds", "confirm"
    declared = _reason(sides, terms.exploratory) or terms.unfair.get(names, "")
    unequal = _unequal_lengths(sides)
    if declared or unequal:
        return declared or f"not comparable: {unequal}", "repair"
    waiting = [side for side in sides if side.missing]
    if waiting:
        runs = wording.listed(f"{plural(side.missing, 'run')} of {side.name} without a value" for side in waiting)
        return runs, "finish"
    if min(side.n for side in sides) < FEWEST and not borrow:
        too_few = terms.noise is not None and not terms.noise.sufficient
        floor = f", and the noise floor rests on fewer than {FEWEST_REPEATS} repeats" if too_few else ""
        return f"fewer than {FEWEST} seeds{floor}", "add seeds"
    return ("no spread between seeds, hence no noise to judge by", "repair") if constant else ("", None)


def _unequal_lengths(sides: Sequence[ArmResult]) -> str:
    """How the lengths of training differ; "" where they do not, or are unknown."""
    ends = [(side.name, side.end) for side in sides if side.end is not None]
    differing = [(name, end) for name, end in ends if end != ends[-1][1]]
    if not differing:
        return ""
    (name, end), (reference, reference_end) = differing[0], ends[-1]
    whose = "its runs" if len(sides) == 2 else f"the runs of {name}"
    return f"{whose} end at step {end:.15g}, those of {reference} at {reference_end:.15g}"


def _reason(sides: Sequence[ArmResult], reasons: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(reasons[side.name] for side in sides if reasons.get(side.name)))


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a contrast: a weighted mean of arms; `n` is that of the arm with the fewest seeds."""

    n: int
    mean: float
    sd: float
    failed: int

    @classmethod
    def of(cls, parts: Sequence[tuple[float, ArmResult]]) -> Side:
        """From (weight, arm). A single arm of weight 1 keeps its mean and sd."""
        squares = sum(w**2 for w, _ in parts)
        return cls(
            n=min(arm.n for _, arm in parts),
            mean=sum(w * arm.mean for w, arm in parts),
            sd=math.sqrt(sum(w**2 * arm.sd**2 for w, arm in parts) / squares),
            failed=sum(arm.failed for _, arm in parts),
        )


@dataclass(frozen=True)
class ContrastCase:
    """The data from which one contrast's verdict is written."""

    declared: Declared
    sides: tuple[ArmResult, ...]
    """the arms in it, in the order of the weights"""
    eligibility: Eligibility
    terms: Terms
    at: Mapping[str, float]
    """its numbers: one entry per field of Family"""
    as_chosen: Mapping[str, float]
    """the same as if the chosen rates were the best; equal to `at` without a search"""
    level: float
    """alpha divided by the number of contrasts"""

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(self.declared.weights.values())

    def side(self, sign: int) -> Side:
        """The arms whose weight has this sign."""
        return Side.of([(sign * w, arm) for w, arm in zip(self.weights, self.sides, strict=True) if sign * w > 0])

    @property
    def searched(self) -> bool:
        """Whether its interval includes the uncertainty of a rate search."""
        return not self.eligibility.borrow and any(side.name in self.terms.searches for side in self.sides)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(side.n for side in self.sides)

    @property
    def weight(self) -> float:
        """Sum of the squared weights: 2 for a pair."""
        return sum(w**2 for w in self.weights)

    @property
    def halfwidths(self) -> dict[str, float]:
        """Half the width of an interval by each source alone; see Contrast."""
        at, plain = self.at, self.as_chosen
        widths = {"seeds": (plain["high"] - plain["low"]) / 2}
        if self.searched:
            widths["search"] = max(plain["joint_low"] - at["joint_low"], at["joint_high"] - plain["joint_high"])
        text = self.terms.text.get((self.declared.arm, self.declared.against))
        if text:
            widths["text"] = text.halfwidth
        return {name: width for name, width in widths.items() if math.isfinite(width)}

    def decision(self, at: Mapping[str, float]) -> str:
        """The result of `decide` for these numbers of the case."""
        alpha, higher = self.terms.alpha, self.terms.higher_is_better
        p = at["p_holm"], at["p_equivalence_holm"]
        return str(decide(at["difference"], *p, alpha=alpha, higher_is_better=higher))


def judge(
    arms: Mapping[str, ArmResult],
    declared: Sequence[Declared],
    terms: Terms,
    settled: Mapping[int, Comparison] | None = None,
) -> tuple[list[Contrast], list[Comparison]]:
    """The declared contrasts as one family, and the comparison that each was tested with.

    settled: by position, the comparison of the earlier look that decided a contrast: it stays in the family with its p
    of that look.
    """
    if not declared:
        return [], []
    sides = [tuple(arms[name] for name in contrast.weights) for contrast in declared]
    statuses = [eligibility(contrast, members, terms) for contrast, members in zip(declared, sides, strict=True)]
    chosen: list[Comparison] = []
    tested: list[Comparison] = []
    for i, (contrast, members, status) in enumerate(zip(declared, sides, statuses, strict=True)):
        earlier = (settled or {}).get(i)
        chosen.append(earlier or _test(contrast, members, status, terms))
        tested.append(earlier or _with_search(contrast, members, chosen[i], terms))
    family = as_chosen = adjust(tested, alpha=terms.alpha, dropped=terms.dropped)
    if any(test.best_rates is not None for test in tested):
        as_chosen = adjust(chosen, alpha=terms.alpha, dropped=terms.dropped)
    runs = {name: arm.values for name, arm in arms.items()}
    pairs = [contrast for contrast in declared if contrast.is_pair and terms.sensitivity]
    arms_of = {pair.against: [other.arm for other in pairs if other.against == pair.against] for pair in pairs}
    others = {against: sensitivity(runs, own, against, alpha=terms.alpha) for against, own in arms_of.items()}
    level = terms.alpha / (len(declared) + terms.dropped)
    judged = []
    for i, (contrast, members, status) in enumerate(zip(declared, sides, statuses, strict=True)):
        at, plain = ({f.name: float(getattr(g, f.name)[..., i]) for f in fields(Family)} for g in (family, as_chosen))
        case = ContrastCase(contrast, members, status, terms, at, plain, level)
        judged.append(_contrast(case, others[contrast.against][contrast.arm] if contrast in pairs else {}))
    return judged, tested


def judge_looks(
    arms_at: Callable[[int], Mapping[str, ArmResult]], declared: Sequence[Declared], terms: Terms, looks: Sequence[Look]
) -> list[Contrast]:
    """Every contrast at the look that decided it, or at the last one that its runs allow.

    arms_at: the arms after their first n seeds. A contrast that a look decides keeps that verdict, and its p in the
    family; runs beyond the last complete look are not used.
    """
    latest: dict[int, Contrast] = {}
    settled: dict[int, Comparison] = {}
    last_declared = [look.n for look in looks if look.declared][-1]
    for number, look in enumerate(looks):
        arms = arms_at(look.n)
        open_contrasts = [i for i in range(len(declared)) if i not in settled]
        names = {name for i in open_contrasts for name in declared[i].weights}
        if not open_contrasts or (latest and any(arms[name].declared < look.n or arms[name].missing for name in names)):
            break
        later_looks = tuple(later.n for later in looks[number + 1 :])
        now = replace(terms, alpha=look.level, look=look.note, coming=later_looks)
        contrasts, tested = judge(arms, declared, now, settled)
        for i in open_contrasts:
            decided = (contrasts[i].survivors or contrasts[i].word).startswith(DECISIVE)
            more = later_looks and not decided
            latest[i] = replace(
                contrasts[i], look=look.n, settled=decided or look.n >= last_declared,
                next_look=later_looks[0] if more else None, next_alpha=looks[number + 1].level if more else None,
            )  # fmt: skip
            if decided:
                settled[i] = tested[i]
    return [latest[i] for i in range(len(declared))]


def _test(contrast: Declared, sides: Sequence[ArmResult], status: Eligibility, terms: Terms) -> Comparison:
    """The comparison; without p where it could claim nothing, so that it counts in the family as p = 1."""
    margin, alpha = terms.smallest_effect, terms.alpha
    values = [side.array for side in sides]
    if status.borrow:
        assert terms.noise
        sd, df = terms.noise.sd, terms.noise.df
        return borrowed(values[0], values[1], sd=sd, df=df, margin=margin, alpha=alpha)
    result = linear(values, list(contrast.weights.values()), margin=margin, alpha=alpha)
    if status.testable:
        return result
    nothing = np.full_like(result.p, np.nan)
    return replace(result, p=nothing, p_equivalence=nothing)


def _with_search(contrast: Declared, sides: Sequence[ArmResult], test: Comparison, terms: Terms) -> Comparison:
    """The comparison at each arm's best rate, where any of them was searched and the contrast can be tested."""
    if not any(side.name in terms.searches for side in sides) or not test.sizes or not math.isfinite(float(test.p)):
        return test
    arms = [
        WeightedArm(weight=weight, losses=side.array, search=terms.searches.get(side.name))
        for weight, side in zip(contrast.weights.values(), sides, strict=True)
    ]
    return at_best_rates(test, BestRateDifference(arms), alpha=terms.alpha, margin=terms.smallest_effect)


def _contrast(case: ContrastCase, estimates: dict[str, dict[str, float]]) -> Contrast:
    status, at, plus, minus, noise = case.eligibility, case.at, case.side(1), case.side(-1), case.terms.noise
    decision = "" if status.exploratory else case.decision(at)
    if decision == "inconclusive" and case.searched and case.decision(case.as_chosen) != "inconclusive":
        decision = SEARCH_OPEN
    more = _missing_seeds(case) if decision == "inconclusive" else wording.MissingSeeds(0)
    claim = wording.claim(case, decision, more)
    least, least_upper = _detectable(case)
    factor = _exaggeration(case, least)
    word, survivors, reason = claim, None, status.exploratory or None
    if status.not_comparable:
        word, reason = "not comparable", status.not_comparable
    elif status.unstable:
        word, reason = status.unstable, f"failed runs in {status.where}"
        survivors = claim if status.conditional else None
    notes = wording.notes(case, decision, factor, estimates)
    numbers: dict[str, Any] = {name: at[name] for name in NUMBERS}
    return Contrast(
        arm=case.declared.arm, against=case.declared.against, n_arm=plus.n, n_against=minus.n,
        mean_arm=plus.mean, mean_against=minus.mean, sd_arm=plus.sd, sd_against=minus.sd,
        failed_arm=plus.failed, failed_against=minus.failed,
        **numbers,
        in_noise_sd=at["difference"] / noise.sd if noise is not None and noise.sd > 0 else math.nan,
        detectable=least, detectable_upper=least_upper, exaggeration=factor,
        word=word, survivors=survivors, reason=reason,
        verdict="; ".join([wording.sentence(case, word, claim), *notes, *case.terms.scope]),
        notes=notes, sensitivity=estimates, weights=dict(case.declared.weights),
        at_least=max(at["joint_low"], -at["joint_high"], 0.0) if decision else math.nan,
        at_most=max(-at["same_low"], at["same_high"]) if decision else math.nan,
        next=wording.next_step(case, decision, more), alpha=case.terms.alpha, halfwidths=case.halfwidths,
    )  # fmt: skip


def _planning_noise(case: ContrastCase) -> tuple[float, float, float]:
    """(sd between seeds, its degrees of freedom, degrees of freedom that each further seed adds).

    The sd that gives the contrast's standard error, or that of the noise floor where it was borrowed.
    """
    noise, at = case.terms.noise, case.as_chosen
    if case.eligibility.borrow and noise is not None:
        return noise.sd, noise.df, case.weight**2 / sum(w**4 for w in case.weights)
    if not at["se"] > 0:
        return math.nan, math.nan, math.nan
    parts = [w**2 * side.sd**2 for w, side in zip(case.weights, case.sides, strict=True)]
    scale = sum(w**2 / side.n for w, side in zip(case.weights, case.sides, strict=True))
    return at["se"] / math.sqrt(scale), at["df"], sum(parts) ** 2 / sum(part**2 for part in parts)


def _missing_seeds(case: ContrastCase) -> wording.MissingSeeds:
    """Further seeds per arm, at least one, until the family's interval is no wider than +- half the smallest effect: an
    interval as narrow as that decides either way. A difference that looks larger than the smallest effect may take
    fewer: as many as find one of its size with 80 % power."""
    sd, df, gain = _planning_noise(case)
    upper, x, difference = float(planning.sd_upper(sd, df)), case.terms.smallest_effect, abs(case.at["difference"])
    enough = planning.seeds_for_halfwidth(upper, x / 2, alpha=case.level, df_per_seed=gain, weight=case.weight)
    either = max(enough - min(case.sizes), 1)
    most = min(case.sizes) + min(either - 1, wording.MOST_MORE)
    if difference > x and not case.eligibility.borrow:
        effect = difference / upper
        if power(effect, (most, most), alpha=case.level) >= planning.POWER:
            seeds = planning.seeds_for_power(effect, alpha=case.level) - min(case.sizes)
            return wording.MissingSeeds(max(seeds, 1), as_large=True)
    return wording.MissingSeeds(either)


def _detectable(case: ContrastCase) -> tuple[float, float]:
    """In the metric's unit: from the estimated sd, and from its upper limit."""
    sd, df, _ = _planning_noise(case)
    if not (sd > 0 and case.at["se"] > 0):
        return math.nan, math.nan
    borrow = case.eligibility.borrow
    least = planning.detectable(case.sizes, case.weights, alpha=case.level, df=case.at["df"] if borrow else None)
    least *= INFLATION if borrow else 1.0
    return least * sd, least * float(planning.sd_upper(sd, df))


def _exaggeration(case: ContrastCase, least: float) -> float | None:
    """The factor at a true effect of one sd, for a significant estimate that this design would often have missed."""
    at = case.at
    if not (at["p_holm"] < case.terms.alpha and abs(at["difference"]) < least):
        return None
    inflation = INFLATION if case.eligibility.borrow else None
    factor = planning.exaggeration(case.sizes, case.weights, df=at["df"], alpha=case.level, inflation=inflation)
    return factor if factor >= WORTH_A_NOTE else None
