"""Whether a verdict says what was expected, or what others published: found again, contradicted or inconclusive.

The rules, which the page across studies prints:

- better or worse (also likely better or worse), as expected: found again; the other way round: contradicted.
- No difference larger than X, where none was expected: found again. Where a difference was expected: contradicted if a
  size of at least X was published for that scale, else inconclusive, for the expected one may lie below X.
- Any other verdict, and a difference where none was expected: inconclusive.
- What was published at another size of model (more than twice or less than half, or not stated) is not repeated by a
  study, so it says "same sign at nano" and "other sign at nano" instead; so do studies whose scale allows the sign
  only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2lab.analysis import Contrast
from gpt2lab.report.published import Effect
from gpt2lab.results import Study, smallest_effect, unit
from gpt2lab.text import DASH

ONE_CLASS = 2.0
"""Models are of one scale class when neither has more than this many times the parameters of the other."""

SIGN_ONLY = "sign only"
"""In the caveat of a scale whose studies show which way a difference goes, not how large it is."""

FOUND = {"better": -1, "likely better": -1, "worse": 1, "likely worse": 1, "no difference": 0}

SAID: Sequence[tuple[str, int]] = (
    (r"(slightly |likely |much )?better\b", -1),
    (r"(slightly |likely |much )?worse\b|fails?\b|diverges?\b", 1),
    (r"(about |nearly )?(equal|the same)\b|no difference\b|none\b|nothing\b", 0),
)
"""How what is expected begins -> its direction."""

SIZE = re.compile(r"\b(\d+(?:\.\d+)?)(?:\s*[-–]\s*\d+(?:\.\d+)?)?\s?([MB])\b(?!i)")
"""`125M`, `125-150M`, `1.3B`: the size of a model, in what is expected."""

AGAIN, AGAINST, OPEN = "found again", "contradicted", "inconclusive"
CHIPS = {AGAIN: "same", AGAINST: "broken", OPEN: "open"}


@dataclass(frozen=True)
class Agreement:
    """`kind` is found again, contradicted or inconclusive; `word` what the page says; `why` what it adds."""

    kind: str
    word: str
    why: str = ""

    @property
    def chip(self) -> str:
        """The class of its label; tentative where another scale is compared with."""
        return CHIPS[self.kind] + (" tentative" if self.word != self.kind else "")


def agree(
    contrast: Contrast, direction: int, *, smallest_effect: float, size: float | None, same_class: bool, scale: str
) -> Agreement:
    """What a verdict says of an effect in this `direction` (-1 better, 0 none, 1 worse).

    size: what was published for it at the scale of the study, in the study's unit; None where nothing was.
    """
    found = found_direction(contrast)
    if found is None:
        return Agreement(OPEN, OPEN, _undecided(contrast))
    if found == direction:
        elsewhere = f"same sign at {scale}" if direction else f"no difference at {scale} either"
        return Agreement(AGAIN, AGAIN if same_class else elsewhere)
    if not direction:
        return Agreement(OPEN, OPEN, "a difference, where none was expected")
    if found == -direction:
        return Agreement(AGAINST, AGAINST if same_class else f"other sign at {scale}")
    if not same_class:
        return Agreement(OPEN, OPEN, f"no difference at {scale}, and what was expected is not said of this size")
    if size is None:
        return Agreement(OPEN, OPEN, "no difference, and how large the expected one is was not published")
    if size < smallest_effect:
        return Agreement(OPEN, OPEN, f"no difference larger than {smallest_effect:g}; the published one is {size:.2g}")
    return Agreement(
        AGAINST, AGAINST, f"no difference larger than {smallest_effect:g}; the published one is {size:.2g}"
    )


def _undecided(contrast: Contrast) -> str:
    """Why a verdict says nothing of an effect; "" where it calls itself inconclusive, which needs no more words."""
    if contrast.word.startswith(OPEN):
        return ""
    return f"{contrast.word}: {contrast.reason}" if contrast.reason else contrast.word


def found_direction(contrast: Contrast) -> int | None:
    """What the verdict's word says; None for a word that decides nothing."""
    starts = [known for known in FOUND if contrast.word.startswith(known)]
    return FOUND[max(starts, key=len)] if starts else None


def with_published(study: Study, contrast: Contrast, effect: Effect) -> Agreement:
    """The agreement with a published effect."""
    same = not sign_only(study) and one_class(study, effect.parameters)
    return agree(
        contrast,
        effect.direction,
        smallest_effect=smallest_effect(study),
        size=effect.size if unit(study) == "nats" else None,  # bits per byte depend on the tokenizer
        same_class=same,
        scale=scale_of(study),
    )


def with_expected(study: Study, contrast: Contrast, expected: str, effects: Sequence[Effect]) -> Agreement:
    """The agreement with what the study's file expects, given the published `effects` that the contrast repeats."""
    direction = expected_direction(expected)
    if direction is None:
        return Agreement(OPEN, OPEN, "what is expected does not begin with better, worse or no difference")
    stated = [_parameters(*match) for match in SIZE.findall(expected)]
    same = not sign_only(study) and (not stated or any(one_class(study, size) for size in stated))
    sizes = [e.size for e in effects if e.direction == direction and e.size and one_class(study, e.parameters)]
    return agree(
        contrast,
        direction,
        smallest_effect=smallest_effect(study),
        size=max(sizes, default=None) if unit(study) == "nats" else None,
        same_class=same,
        scale=scale_of(study),
    )


def expected_direction(expected: str) -> int | None:
    """-1, 0 or 1 by how the sentence begins; None where it begins otherwise."""
    text = expected.strip().lower()
    return next((direction for pattern, direction in SAID if re.match(pattern, text)), None)


def expected_of(study: Study, contrast: Contrast) -> str:
    """What was expected of the contrast: it is said of an arm, and means it against the baseline, or against whatever
    the arm is compared with where it is not compared with the baseline."""
    arms: Mapping[str, Mapping[str, str | None]] = study["arms"]
    said = (arms.get(contrast.arm) or {}).get("expected") or ""
    compared = [pair[1] for pair in study["contrasts"] if not isinstance(pair, Mapping) and pair[0] == contrast.arm]
    baseline = study["baseline"]
    return said if contrast.against == baseline or baseline not in compared else ""


def one_class(study: Study, parameters: float | None) -> bool:
    """Whether models of this size and the study's are of one scale class."""
    own = study["scope"].get("parameters")
    return bool(own and parameters and 1 / ONE_CLASS <= parameters / own <= ONE_CLASS)


def sign_only(study: Study) -> bool:
    """Whether the study's scale allows to say which way a difference goes, and no more."""
    return SIGN_ONLY in (study.get("caveat") or "")


def scale_of(study: Study) -> str:
    """The name of its scale."""
    return str(study.get("scale") or study["scope"].get("preset") or DASH)


def _parameters(count: str, suffix: str) -> float:
    return float(count) * {"M": 1e6, "B": 1e9}[suffix]
