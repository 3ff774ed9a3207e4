"""The verdicts of a study as a short paragraph of plain English."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gpt2lab.analysis import words
from gpt2lab.analysis.compare import Verdicts
from gpt2lab.analysis.verdicts import Contrast

Group = tuple[str, Callable[[Sequence[Contrast], Verdicts], str]]


def in_words(verdicts: Verdicts) -> str:
    """What was found, how surely, what was not found, and where it holds; one line per paragraph."""
    if not verdicts.contrasts:
        return f"Nothing was compared: no arm beside {verdicts.baseline} has results."
    groups = {start: [c for c in verdicts.contrasts if c.word.startswith(start)] for start, _ in GROUPS}
    told = [tell(groups[start], verdicts) for start, tell in GROUPS if groups[start]]
    found = any((c.survivors or c.word).startswith(("better", "worse", "likely")) for c in verdicts.contrasts)
    opening = [] if found else ["No arm was found better or worse."]
    closing = " ".join(_certainty(verdicts) + _scope(verdicts))
    return "\n".join(filter(None, [" ".join(opening + told), closing]))


def _better(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    return f"{words.listed(_by_size(c, verdicts) for c in contrasts)}."


def _likely(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    return f"Judged by the noise of baseline repeats, on one or two seeds: {_better(contrasts, verdicts)}"


def _same(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    effect = f"{verdicts.smallest_effect:g} {verdicts.unit}"
    first, *rest = (f"between {c.arm} and {c.against}" for c in contrasts)
    places = ", ".join([f"B{first[1:]}", *rest[:-1]]) + (f", and {rest[-1]}" if rest else "")
    return f"{places}, any difference is smaller than {effect}."


def _open(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    parts = [f"{_pair(c, verdicts)} ({c.word.removeprefix('inconclusive: ')})" for c in contrasts]
    return f"Left open, which is not the same as no difference: {words.listed(parts)}."


def _unstable(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    parts = []
    for c in contrasts:
        rest = f"; conditional on not failing: {c.survivors}" if c.survivors else "; too many to judge the rest"
        parts.append(f"{_pair(c, verdicts)} ({c.word.removeprefix('unstable ').strip('()')}{rest})")
    return f"Unstable: {words.listed(parts)}."


def _exploratory(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    parts = [f"{_pair(c, verdicts)} ({c.reason})" for c in contrasts]
    return f"Exploratory only, so nothing is claimed: {words.listed(parts)}."


def _not_comparable(contrasts: Sequence[Contrast], verdicts: Verdicts) -> str:
    parts = [f"{_pair(c, verdicts)} ({c.reason})" for c in contrasts]
    return f"Not comparable: {words.listed(parts)}."


GROUPS: tuple[Group, ...] = (
    ("better", _better),
    ("worse", _better),
    ("likely", _likely),
    ("no difference", _same),
    ("inconclusive", _open),
    ("unstable", _unstable),
    ("exploratory", _exploratory),
    ("not comparable", _not_comparable),
)


def _by_size(c: Contrast, verdicts: Verdicts) -> str:
    """`rotary is better than learned by 0.257 nats (95 % interval 0.233 to 0.281)`"""
    direction = "better" if "better" in c.word else "worse"
    bounds = sorted((abs(c.low), abs(c.high)))
    size, near, far = (text.lstrip("+-") for text in words.written([abs(c.difference), *bounds], *bounds))
    size = f"{size} {verdicts.unit} ({100 * (1 - c.alpha):g} % interval {near} to {far})"
    small = f", less than the {verdicts.smallest_effect:g} that was declared to matter" if "smaller" in c.word else ""
    likely = "likely " if c.word.startswith("likely") else ""
    times = c.exaggeration and f"{c.exaggeration:.1f} times"
    doubt = f", probably an overestimate (small effects that pass are exaggerated about {times})" if times else ""
    return f"{c.arm} is {likely}{direction} than {c.against} by {size}{small}{doubt}"


def _pair(c: Contrast, verdicts: Verdicts) -> str:
    return f"{c.arm} against {c.against}" if c.against != verdicts.baseline else c.arm


def _certainty(verdicts: Verdicts) -> list[str]:
    """How sure the words are; nothing where no contrast could be tested."""
    tested = [c for c in verdicts.contrasts if math.isfinite(c.p_holm)]
    if not tested:
        return []
    borrowed = [c for c in tested if "borrowed" in c.verdict]
    own = [c for c in tested if c not in borrowed]
    told = []
    if own:
        counts = sorted({n for c in own for n in (c.n_arm, c.n_against)})
        seeds = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        family = f", Holm-adjusted over {verdicts.members} contrasts" if verdicts.members > 1 else ""
        percent = f"{100 * verdicts.alpha:g} %"
        told.append(
            f"Tested with {seeds} seeds per arm (Welch's t-test, calibrated for arms of unequal noise{family}): the "
            f'chance of any false "better" or "worse" is at most {percent}, and so is that of any false "no '
            f'difference", {verdicts.provided}.'
        )
    if any("search" in c.halfwidths for c in own):
        told.append("The intervals include how far each arm's rate may be from its best.")
    if borrowed:
        told.append(
            "Words with borrowed noise are outside that limit: they hold if an arm is no noisier than the loan allows "
            "for, which one or two seeds cannot show. A third seed per arm would."
        )
    return told


def _scope(verdicts: Verdicts) -> list[str]:
    holds = [f"This holds {', '.join(verdicts.scope)}."] if verdicts.scope else []
    return holds + ([f"Caveat: {verdicts.caveat}."] if verdicts.caveat else [])
