"""The text of verdicts: formatted numbers, the sentence and notes of a contrast, and the summary of a study."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2lab.analysis.statistics import INFLATION
from gpt2lab.analysis.verdicts import FEWEST, Action, ArmResult, Contrast, NextStep, Verdicts
from gpt2lab.basics.text import plural

if TYPE_CHECKING:
    from gpt2lab.analysis.judging import ContrastCase

HUGE = 1e7
"""Numbers from here on are written with an exponent."""
MOST_DECIMALS = 7
"""Numbers that need more digits after the point are written with an exponent."""
MOST_SIGNIFICANT = 12
SMALLEST_P = 1e-15
"""A smaller p is rounding error of the arithmetic."""
MOST_MORE = 100
"""Further seeds per arm beyond which a contrast is called not decidable here."""
AS_LARGE = "if the difference is as large as it looks"
ESTIMATORS = {
    "paired": "paired by seed", "blocked": "with arm and seed as factors", "permutation": "by permutation",
}  # fmt: skip
"""Name of a sensitivity estimator -> what a remark calls it."""
MOST_TIES = 0.1
"""Share of pairs of equal values in an arm up to which they are not mentioned; rounding to a third of an sd gives as
many."""


def decimals(halfwidth: float, value: float) -> int:
    """Digits after the point: two significant ones of the half-width, or three of the value where there is none."""
    if math.isfinite(halfwidth) and halfwidth > 0:
        return min(max(1 - math.floor(math.log10(halfwidth)), 1), 10)
    if math.isfinite(value) and value:
        return min(max(2 - math.floor(math.log10(abs(value))), 1), 10)
    return 4


def written(numbers: Sequence[float], low: float, high: float) -> list[str]:
    """Each number with its sign, to the precision of the interval low to high; huge and tiny ones as 1.2e-09.

    With more digits where rounding would turn a bound of an interval that excludes zero into zero.
    """
    halfwidth, largest = (high - low) / 2, max(map(abs, numbers))
    if not largest:
        return ["0" for _ in numbers]
    has_interval = math.isfinite(halfwidth) and halfwidth > 0
    finest = -math.floor(math.log10(halfwidth / 10 if has_interval else largest / 100))
    if largest >= HUGE or finest > MOST_DECIMALS:
        digits = min(max(math.floor(math.log10(largest)) + finest, 1), MOST_SIGNIFICANT)
        return [f"{number:+.{digits}e}" if number else "0" for number in numbers]
    digits = max(finest, 1)
    if low > 0 or high < 0:
        digits = max(digits, min(-math.floor(math.log10(min(abs(low), abs(high)))), MOST_DECIMALS))
    small = 0.5 * 10**-digits if low > 0 or high < 0 else 0.0
    return [f"{n:+.0e}" if abs(n) < small else f"{n:+z.{digits}f}" for n in numbers]


def effect(difference: float, low: float, high: float, unit: str) -> str:
    """`-0.257 nats [-0.281, -0.233]`, without brackets where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{written([difference], math.nan, math.nan)[0]} {unit}"
    middle, *bounds = written([difference, low, high], low, high)
    return f"{middle} {unit} [{', '.join(bounds)}]"


def interval(low: float, high: float) -> str:
    """`[-0.281, -0.233]`"""
    return f"[{', '.join(written([low, high], low, high))}]"


def probability(p: float, alpha: float) -> str:
    """`= 0.036`: two significant digits, more where rounding would move p across alpha; `< 1e-15` for smaller ones."""
    if p < SMALLEST_P:
        return f"< {SMALLEST_P:g}"
    texts = [f"{p:.{digits}g}" for digits in range(2, 8)]
    return f"= {next((text for text in texts if (float(text) < alpha) == (p < alpha)), texts[-1])}"


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = items
    return f"{', '.join(rest)} and {last}" if rest else last


def figure(x: float | None) -> str:
    """A setting with two significant digits, three from 100 on."""
    assert x is not None
    return np.format_float_positional(x, precision=3 if abs(x) >= 100 else 2, fractional=False, trim="-")


# One contrast.


class MissingSeeds(NamedTuple):
    """Further seeds per arm for a decision."""

    seeds: int
    as_large: bool = False
    """whether they suffice only if the difference is as large as it looks"""


def worded(decision: str, smallest_effect: float) -> str:
    """A result of `judging.decide` with its margin, as `better (smaller than 0.05)`."""
    same, smaller = f"no difference larger than {smallest_effect:g}", f"(smaller than {smallest_effect:g})"
    return decision.replace("no difference", same).replace("(smaller)", smaller)


def claim(case: ContrastCase, decision: str, more: MissingSeeds) -> str:
    """The verdict word of a decision (see `judging.decide`; "" claims nothing)."""
    direction = decision.partition(" ")[0]
    if direction in ("better", "worse") and case.eligibility.borrow:
        return f"likely {direction} (noise borrowed)"
    if decision == "search open":
        return "inconclusive: the search of rates leaves it open"
    if decision == "inconclusive":
        return f"inconclusive: {_more_seeds(case, more).text}"
    return worded(decision, case.terms.smallest_effect) or "exploratory"


def _more_seeds(case: ContrastCase, more: MissingSeeds) -> NextStep:
    """What would decide an inconclusive contrast, as its verdict says it."""
    coming, fewest = case.terms.coming, min(case.sizes)
    if more.seeds > MOST_MORE:
        text = f"not decidable here, it would take more than {MOST_MORE} further seeds per arm"
        return NextStep(action="stop", text=text)
    enough = fewest + more.seeds
    if coming is not None:
        at_look = next((n for n in coming if n >= enough), None)
        if at_look is None:
            start = "start again with" if coming else "confirm on"
            return NextStep(action="confirm", text=f"{start} about {enough} fresh seeds per arm", seeds=enough)
        enough = at_look
    text = f"need about {enough - fewest} more seeds per arm"
    return NextStep(action="add seeds", text=f"{text}, {AS_LARGE}" if more.as_large else text, seeds=enough)


REMEDIES: Mapping[Action, str] = {
    "confirm": "declare it anew and train it on fresh seeds",
    "finish": "train the runs that are missing",
    "repair": "remove the reason, or take it as a hint for a study of its own",
    "add seeds": f"train {FEWEST} seeds per arm",
}
"""What to do about an exploratory contrast."""


def next_step(case: ContrastCase, decision: str, more: MissingSeeds) -> NextStep:
    """What to do after a verdict. decision, more: as `claim` takes them."""
    status, x, arm = case.eligibility, f"{case.terms.smallest_effect:g} {case.terms.unit}", case.declared.arm
    if status.not_comparable:
        return NextStep(action="repair", text=f"make the arms comparable: {status.not_comparable}")
    if status.unstable and not status.conditional:
        return NextStep(action="repair", text=f"find out why runs of {status.where} failed")
    if status.remedy:
        seeds = FEWEST if status.remedy == "add seeds" else None
        return NextStep(action=status.remedy, text=REMEDIES[status.remedy], seeds=seeds)
    direction, _, smaller = decision.partition(" ")
    if direction in ("better", "worse") and status.borrow:
        text = f"train {FEWEST} seeds per arm, which need no borrowed noise"
        return NextStep(action="add seeds", text=text, seeds=FEWEST)
    if smaller or decision == "no difference":
        return NextStep(action="either", text=f"choose by cost or simplicity, the difference is below {x}")
    if decision == "search open":
        return NextStep(action="refine rates", text="try rates between the best one and its neighbours")
    if decision == "inconclusive":
        step = _more_seeds(case, more)
        enough = step.action == "add seeds" and f"train {step.seeds} seeds per arm"
        return replace(step, text=enough or step.text)
    if decision == "better":
        return NextStep(action="keep", text=f"keep {arm}, and test it at the next scale")
    if decision == "worse":
        part = arm.removeprefix("without ")  # as leave-one-out designs name their arms
        return NextStep(action="drop", text=f"leave {arm} out" if part == arm else f"keep {part}")
    return NextStep(action="stop", text="leave it open")


def sentence(case: ContrastCase, word: str, claimed: str) -> str:
    """The verdict without notes: `better, -0.257 nats [-0.281, -0.233], Holm p = 1.2e-05 (n = 3, 3)`.

    claimed: the word of the runs that did not fail.
    """
    status = case.eligibility
    if word == "not comparable":
        return f"{word}: {status.not_comparable}"
    judged = (f"{claimed} ({status.exploratory})" if status.exploratory else claimed) + _numbers(case, claimed)
    if not status.unstable:
        return judged
    failed = f"unstable {status.counted}"
    return f"{failed}; conditional on not failing: {judged}" if status.conditional else failed


def _numbers(case: ContrastCase, claimed: str) -> str:
    """The numbers of the sentence; no p for an exploratory verdict."""
    at, alpha = case.at, case.terms.alpha
    if not math.isfinite(at["difference"]):
        return ""
    plus, minus = case.side(1), case.side(-1)
    same = math.isclose(plus.mean, minus.mean, rel_tol=1e-14)  # equal values, added in another order
    parts = [effect(0.0 if same else at["difference"], at["low"], at["high"], case.terms.unit)]
    if claimed != "exploratory":
        parts.append(f"Holm p {probability(at['p_holm'], alpha)}")
    if claimed.startswith("no difference"):
        parts.append(f"equivalence Holm p {probability(at['p_equivalence_holm'], alpha)}")
    return f", {', '.join(parts)} (n = {plus.n}, {minus.n})"


def notes(
    case: ContrastCase, decision: str, exaggeration: float | None, estimates: Mapping[str, Mapping[str, float]]
) -> tuple[str, ...]:
    """Remarks after the verdict. estimates: of the sensitivity estimators."""
    at, status, noise, x = case.at, case.eligibility, case.terms.noise, case.terms.smallest_effect
    texts = [case.terms.look]
    if decision == "no difference" and max(-at["low"], at["high"]) > x:
        texts.append(f"the interval that equivalence goes by is {interval(at['same_low'], at['same_high'])}")
    if decision == "search open":
        texts.append(_at_chosen_rates(case))
    if status.borrow and noise:
        texts.append(
            f"noise borrowed from {noise.runs} baseline repeats ({noise.scale}, {noise.stack}): sd {noise.sd:.2g}, "
            f"times {INFLATION}; whether an arm is noisier than that, a third seed would show"
        )
    if status.testable and not status.exploratory:
        if exaggeration is not None:
            texts.append(f"small effects that pass at this n are exaggerated about {exaggeration:.1f} times")
        texts.append(_disagreement(case, estimates))
    arm, against = case.sides[0], case.sides[-1]
    if case.declared.is_pair and arm.values and arm.values == against.values:
        texts.append(f"identical to {against.name} at every seed: did the change reach the model?")
    texts += map(_ties, case.sides)
    return tuple(filter(None, [*texts, _other_text(case, decision)]))


def _at_chosen_rates(case: ContrastCase) -> str:
    """The result at the chosen rates, where the search leaves open the one at the best rates."""
    plain = case.as_chosen
    decision = case.decision(plain).partition(" (")[0]
    same = decision == "no difference"
    ends = (plain["same_low"], plain["same_high"]) if same else (plain["low"], plain["high"])
    word = worded(decision, case.terms.smallest_effect)
    by = f"{case.halfwidths['search']:.2g} {case.terms.unit}"
    return f"at the rates that were chosen: {word}, {interval(*ends)}; the best ones may move that by up to {by}"


def _disagreement(case: ContrastCase, estimates: Mapping[str, Mapping[str, float]]) -> str:
    """Estimators that are significant where Welch's test is not, or the reverse; "" for none."""
    alpha, p = case.terms.alpha, case.as_chosen["p"]
    unlike = [
        f"{ESTIMATORS[name]} p {probability(estimate['p'], alpha)}"
        for name, estimate in estimates.items()
        if (estimate["p"] < alpha) != (p < alpha)
    ]
    if not unlike or case.eligibility.borrow:
        return ""
    return f"unlike Welch (p {probability(p, alpha)}): {listed(unlike)}"


def _other_text(case: ContrastCase, decision: str) -> str:
    """How far the difference depends on the validation text, and the consequence for the verdict."""
    text = case.terms.text.get((case.declared.arm, case.declared.against))
    if text is None or not text.se > 0 or not decision:
        return ""
    size, x = abs(case.at["difference"]), case.terms.smallest_effect
    note = f"on other text ±{text.halfwidth:.2g} (by {plural(text.count, text.unit.removesuffix('s'))})"
    if decision.startswith(("better", "worse")) and size < text.halfwidth:
        return f"{note}, so the sign may be that of this text alone"
    if decision == "no difference" and size + text.halfwidth > x:
        return f"{note}, so a difference of {x:g} is possible there"
    return note


def _ties(side: ArmResult) -> str:
    """Equal values in an arm; "" where hardly any are equal."""
    if side.n >= FEWEST and not side.sd:
        return f"all {side.n} values of {side.name} are equal"
    counts = Counter(side.values.values())
    pairs = sum(math.comb(count, 2) for count in counts.values())
    if pairs <= MOST_TIES * math.comb(side.n, 2):
        return ""
    equal = sum(count for count in counts.values() if count > 1)
    return f"{equal} of {side.n} values of {side.name} occur more than once: rounded, or one run written down twice?"


# A study.


def in_words(verdicts: Verdicts) -> str:
    """A study's verdicts as a summary: what was found, how sure it is, what is open, where it holds; one paragraph per
    line."""
    if not verdicts.contrasts:
        return f"Nothing was compared: no arm beside {verdicts.baseline} has results."
    sentences = ["Every arm is compared with the one before it."] if _is_chain(verdicts) else []
    if not any((c.survivors or c.word).startswith(("better", "worse", "likely")) for c in verdicts.contrasts):
        sentences.append("No arm was found better or worse.")
    for start in ("better", "worse", "likely", "no difference", *DETAILS):
        group = [c for c in verdicts.contrasts if c.word.startswith(start)]
        if group:
            sentences.append(_group(start, group, verdicts))
    closing = " ".join(_certainty(verdicts) + _scope(verdicts))
    return "\n".join(filter(None, [" ".join(sentences), closing]))


def _is_chain(verdicts: Verdicts) -> bool:
    """Whether each of several arms is compared with the one before it, as the steps of a cumulative design are."""
    names = [(c.arm, c.against) for c in verdicts.contrasts]
    return len(names) > 1 and all(after[1] == before[0] for before, after in itertools.pairwise(names))


def _failures(c: Contrast) -> str:
    rest = f"conditional on not failing: {c.survivors}" if c.survivors else "too many to judge the rest"
    return f"{c.word.removeprefix('unstable ').strip('()')}; {rest}"


DETAILS: Mapping[str, tuple[str, Callable[[Contrast], str | None]]] = {
    "inconclusive": (
        "Left open, which is not the same as no difference", lambda c: c.word.removeprefix("inconclusive: ")
    ),
    "unstable": ("Unstable", _failures),
    "exploratory": ("Exploratory only, so nothing is claimed", lambda c: c.reason),
    "not comparable": ("Not comparable", lambda c: c.reason),
}  # fmt: skip
"""Verdict word -> title of the list of its contrasts, and the remark on each."""


def _group(start: str, contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    """One sentence on the contrasts whose verdicts begin alike."""
    if start in DETAILS:
        title, detail = DETAILS[start]
        unnamed = _is_chain(verdicts)
        pairs: dict[str | None, list[str]] = {}  # by the remark on them
        for c in contrasts:
            pair = c.arm if unnamed or c.against == verdicts.baseline else f"{c.arm} against {c.against}"
            pairs.setdefault(detail(c), []).append(pair)
        return f"{title}: {'; '.join(f'{listed(group)} ({remark})' for remark, group in pairs.items())}."
    if start == "no difference":
        least = f"smaller than {verdicts.smallest_effect:g} {verdicts.unit}"
        arms: dict[str, list[str]] = {}
        for c in contrasts:
            arms.setdefault("the arm before" if _is_chain(verdicts) else c.against, []).append(c.arm)
        return " ".join(
            f"Any difference between {names[0]} and {against} is {least}." if len(names) == 1
            else f"Any differences to {against} are {least}: {listed(names)}."
            for against, names in arms.items()
        )  # fmt: skip
    opening = "Judged by the noise of baseline repeats, on one or two seeds: " if start == "likely" else ""
    return f"{opening}{listed(_size(c, verdicts) for c in contrasts)}."


def _size(c: Contrast, verdicts: Verdicts) -> str:
    """`rotary is better than learned by 0.257 nats (95 % interval 0.233 to 0.281)`"""
    direction = "better" if "better" in c.word else "worse"
    bounds = sorted((abs(c.low), abs(c.high)))
    size, near, far = (text.lstrip("+-") for text in written([abs(c.difference), *bounds], *bounds))
    size = f"{size} {verdicts.unit} ({100 * (1 - c.alpha):g} % interval {near} to {far})"
    x = f"the {verdicts.smallest_effect:g} that was declared to matter"
    small = (
        f", less than {x}"
        if "smaller" in c.word
        else f", more than {x}"
        if c.at_least > verdicts.smallest_effect
        else ""
    )
    likely = "likely " if c.word.startswith("likely") else ""
    times = c.exaggeration and f"{c.exaggeration:.1f} times"
    doubt = f", probably an overestimate (small effects that pass are exaggerated about {times})" if times else ""
    return f"{c.arm} is {likely}{direction} than {c.against} by {size}{small}{doubt}"


def _certainty(verdicts: Verdicts) -> list[str]:
    """The error rates of the verdicts; nothing where no contrast could be tested."""
    tested = [c for c in verdicts.contrasts if math.isfinite(c.p_holm)]
    borrowed = [c for c in tested if "borrowed" in c.verdict]
    by_own_noise = [c for c in tested if c not in borrowed]
    sentences = []
    if by_own_noise:
        counts = sorted({n for c in by_own_noise for n in (c.n_arm, c.n_against)})
        seeds = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        family = f", Holm-adjusted over {verdicts.members} contrasts" if verdicts.members > 1 else ""
        provided = "provided that the table lists every run and that it was not looked at before the last one"
        sentences.append(
            f"Tested with {seeds} seeds per arm (Welch's t-test, calibrated for arms of unequal noise{family}): the "
            f'chance of any false "better" or "worse" is at most {100 * verdicts.alpha:g} %, and so is that of any '
            f'false "no difference", {"with the seeds that may be added later" if verdicts.extendable else provided}.'
        )
    if any("search" in c.halfwidths for c in by_own_noise):
        sentences.append("The intervals include how far each arm's rate may be from its best.")
    if borrowed:
        sentences.append(
            "Words with borrowed noise are outside that limit: they hold if an arm is no noisier than the loan allows "
            "for, which one or two seeds cannot show. A third seed per arm would."
        )
    return sentences


def _scope(verdicts: Verdicts) -> list[str]:
    holds = [f"This holds {', '.join(verdicts.scope)}."] if verdicts.scope else []
    return holds + ([f"Caveat: {verdicts.caveat}."] if verdicts.caveat else [])
