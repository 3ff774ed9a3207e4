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
    direction = "better" if c.difference < 0 else "worse"
    near, far = sorted((abs(c.low), abs(c.high)))
    digits = words.decimals((c.high - c.low) / 2, c.difference)
    percent = f"{100 * (1 - c.alpha):g} %"
    size = f"{abs(c.difference):.{digits}f} {verdicts.unit} ({percent} interval {near:.{digits}f} to {far:.{digits}f})"
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
    counts = sorted({n for c in tested for n in (c.n_arm, c.n_against)})
    seeds = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    family = f" over {len(verdicts.contrasts)} contrasts" if len(verdicts.contrasts) > 1 else ""
    lent = " With borrowed noise that is so only if no arm is noisier than the loan allows for."
    borrowed = any("borrowed" in c.verdict for c in tested)
    noun = "seed" if counts[-1] == 1 else "seeds"
    return [
        f"Tested with {seeds} {noun} per arm (Welch, Holm-adjusted{family}): the chance of any false "
        f'"better" or "worse" is at most {100 * verdicts.alpha:g} %, and so is that of any false '
        f'"no difference".{lent if borrowed else ""}'
    ]


def _scope(verdicts: Verdicts) -> list[str]:
    holds = [f"This holds {', '.join(verdicts.scope)}."] if verdicts.scope else []
    return holds + ([f"Caveat: {verdicts.caveat}."] if verdicts.caveat else [])
