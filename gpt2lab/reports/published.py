"""Effects that others published, from published.yaml, which of them a contrast of ours repeats, and what a verdict says
of them: found again, contradicted or inconclusive.

A contrast repeats a published effect when its two arms differ in that one component or setting and in nothing else that
the study's record names; what an arm was given to be comparable (a width, a bracketed rate) does not count. The rules
of agreement are printed on the page across studies (RULES).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from gpt2lab import records
from gpt2lab.analysis import Contrast
from gpt2lab.analysis.metric_names import reading
from gpt2lab.analysis.results import Study
from gpt2lab.analysis.studies import smallest_effect
from gpt2lab.basics.text import DASH
from gpt2lab.config.source import read_file
from gpt2lab.errors import ConfigError
from gpt2lab.records import ArmRecord

FILE = Path(__file__).with_name("published.yaml")
NEGLIGIBLE = 0.005
"""Nats. Measured values that lie closer than the smallest effect of interest at 124M are no difference."""

DIRECTIONS = {"better": -1, "none": 0, "worse": 1}
NOTHING = ("null", "~", "", "None")
"""How a file writes that a setting is off."""

LOSSES = ("nats", "nats of span filling")
SCALES_OWN = "the scale's own"
"""What a setting is compared with."""


@dataclass(frozen=True, kw_only=True)
class PublishedEffect:
    """One published difference: of `component` against `against` in `slot`, or of the setting `slot` at the value
    `component` against another value."""

    slot: str
    component: str
    against: str
    direction: int
    """-1 better (a lower loss), 0 no difference worth the name, +1 worse"""
    setting: str
    """on what it was measured, in words"""
    source: str
    address: str = ""
    """where it can be read; "" where none is known"""
    size: float | None = None
    """in nats, without its sign; None where no size was published, or in no unit that becomes nats"""
    values: tuple[float, float] | None = None
    """what was measured for `component` and for `against`, in `unit`"""
    unit: str = ""
    parameters: float | None = None
    """of the models; None where the source's size is not known"""
    given: Mapping[str, str] = field(default_factory=dict)
    """slot -> component that both sides must have"""

    @property
    def is_setting(self) -> bool:
        return "." in self.slot

    def is_of(self, one: str | None, other: str | None) -> bool:
        """Whether these are its sides; of a setting: whether `one` is the value that it is about, and `other` not."""
        if not self.is_setting:
            return (self.component, self.against) == (one, other)
        if self.component == ">0":  # against 0, which is what every shipped scale has
            return _positive(one) and other in (None, "0")
        return one == self.component and other != self.component

    def turned(self) -> PublishedEffect:
        """The same effect, seen from the other side."""
        values = self.values and (self.values[1], self.values[0])
        return replace(self, component=self.against, against=self.component, direction=-self.direction, values=values)

    def __str__(self) -> str:
        """`rotary against learned: better (2.759 against 2.809 nats); 125-150M, OpenWebText2`"""
        what = {-1: "better", 0: "no difference", 1: "worse"}[self.direction]
        if self.values:
            what += f" ({self.values[0]:g} against {self.values[1]:g} {self.unit})"
        elif self.size is not None:
            what += f" (by {self.size:g} nats)"
        name = f"{self.slot} = {self.component}" if self.is_setting else self.component
        return f"{name} against {self.against}: {what}; {self.setting}"


@cache
def published(file: Path = FILE) -> tuple[PublishedEffect, ...]:
    """Every effect of the file. Raises ConfigError for one that does not say what it must."""
    tree = read_file(file).tree
    found: list[PublishedEffect] = []
    for kind, read in (("measured", _measured), ("stated", _stated)):
        for index, entry in enumerate(tree.get(kind) or []):
            try:
                found += read(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"not a published effect: {error}", where=f"{file.name}: {kind}.{index}") from error
    return tuple(found)


def _measured(entry: Mapping[str, Any]) -> Iterator[PublishedEffect]:
    """Every pair of the components that have a value."""
    rest = {key: value for key, value in entry.items() if key != "values"}
    for (one, a), (other, b) in combinations(entry["values"].items(), 2):
        values = (float(a), float(b))
        difference = _in_nats(*values, entry["unit"])
        direction = 0 if abs(difference) < NEGLIGIBLE else int(math.copysign(1, difference))
        effect = {"component": one, "against": other, "direction": direction, "size": abs(difference), "values": values}
        yield PublishedEffect(**_with_numbers(rest | effect))


def _in_nats(one: float, other: float, unit: str) -> float:
    """The difference of two measured values."""
    if unit == "perplexity":
        return math.log(one / other)
    if unit in LOSSES:
        return one - other
    raise ValueError(f"unit '{unit}' is none of {', '.join((*LOSSES, 'perplexity'))}")


def _stated(entry: Mapping[str, Any]) -> Iterator[PublishedEffect]:
    effect = {"against": SCALES_OWN, **entry, "direction": DIRECTIONS[entry["direction"]]}
    yield PublishedEffect(**_with_numbers(effect))


def _with_numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """YAML reads 124e6 as text."""
    return {**entry, **{key: float(entry[key]) for key in ("size", "parameters") if key in entry}}


@cache
def alike() -> Mapping[str, Mapping[str, str]]:
    """Slot -> component -> the one that it counts as."""
    found: Mapping[str, Mapping[str, str]] = read_file(FILE).tree.get("alike") or {}
    return found


def matching(
    study: Study, arm: str, against: str, effects: Sequence[PublishedEffect] | None = None
) -> list[PublishedEffect]:
    """The published effects that `arm` against `against` repeats, in that direction."""
    ours, theirs = study.arms.get(arm), study.arms.get(against)
    if ours is None or theirs is None:  # an effect over several arms, by a name of its own
        return []
    differing = _differing(ours, theirs)
    if len(differing) != 1:
        return []
    [(slot, (one, other))] = differing.items()
    both = [_components(ours), _components(theirs)]
    effects_of_slot = []
    for effect in published() if effects is None else effects:
        if effect.slot != slot or not all(arm.get(k) == v for k, v in effect.given.items() for arm in both):
            continue
        if effect.is_of(one, other):
            effects_of_slot.append(effect)
        elif effect.is_of(other, one):
            effects_of_slot.append(effect.turned())
    return effects_of_slot


def _differing(ours: ArmRecord, theirs: ArmRecord) -> dict[str, tuple[str | None, str | None]]:
    """Slots and settings in which two arms differ -> what each has; None where an arm leaves it to its scale."""
    one, other = _components(ours), _components(theirs)
    found: dict[str, tuple[str | None, str | None]] = {
        slot: (one.get(slot), other.get(slot)) for slot in sorted({*one, *other}) if one.get(slot) != other.get(slot)
    }
    a, b = ours.changes, theirs.changes
    for key in sorted({*a, *b}):
        section = key.split(".")
        if len(section) > 1 and section[1] in one:  # a slot: its component has been looked at
            continue
        values = (_value(a.get(key)), _value(b.get(key)))
        if values[0] != values[1]:
            found[key] = values
    return found


def _components(arm: ArmRecord) -> dict[str, str]:
    components = arm.components
    return {slot: alike().get(slot, {}).get(name, name) for slot, name in components.items()}


def _value(written: Any) -> str | None:
    """A setting as text, equal for equal settings; None where it was not written."""
    if written is None:
        return None
    text = str(written)
    try:
        return f"{float(text):g}"
    except ValueError:
        return "null" if text in NOTHING else text


def _positive(value: str | None) -> bool:
    try:
        return value is not None and float(value) > 0
    except ValueError:
        return False


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

RULES = (
    "Better or worse (also likely better or worse) as expected is found again; the other way round is contradicted.",
    "No difference larger than the smallest effect of interest, where none was expected, is found again. Where one was "
    "expected, it contradicts only a published difference of at least that size at the same scale; otherwise the "
    "published difference was not seen, or is too small to see.",
    "Exploratory, unstable, not comparable and inconclusive verdicts, and a difference where none was expected, are "
    "inconclusive here.",
    "Scales are the same when neither model has more than twice the parameters of the other. At another scale, at one "
    "that the source does not state, and at a scale that shows signs only, the page says same sign and other sign: "
    "such a study does not repeat what was published.",
    "The expectation is taken from the beginning of its sentence in the study's file: better, worse, about equal, no "
    "difference. A published result counts if the two arms differ only in the change that it is about.",
)


@dataclass(frozen=True)
class PublishedAgreement:
    """`kind` is found again, contradicted or inconclusive; `word` what the page shows for it; `why` the reason."""

    kind: str
    word: str
    why: str = ""

    @property
    def chip(self) -> str:
        """The class of its label; tentative where another scale is compared with."""
        return CHIPS[self.kind] + (" tentative" if self.elsewhere else "")

    @property
    def elsewhere(self) -> bool:
        """Whether it is with a result at another scale."""
        return self.kind != OPEN and self.word != self.kind

    def to_json(self) -> dict[str, str]:
        """As plain data."""
        return {"kind": self.kind, "word": self.word, "why": self.why}


def agree(
    study: Study, contrast: Contrast, direction: int, size: float | None, *, same_class: bool
) -> PublishedAgreement:
    """How a verdict agrees with an effect in this `direction` (-1 better, 0 none, 1 worse).

    size: what was published for it, in nats; None where nothing was. same_class: at the scale of the study.
    """
    measured, scale = found_direction(contrast), study.scale or study.scope.preset or DASH
    same_class = same_class and SIGN_ONLY not in (study.caveat or "")
    if measured is None:
        return PublishedAgreement(OPEN, OPEN, _undecided(contrast))
    if measured == direction:
        elsewhere = f"same sign at {scale}" if direction else f"no difference at {scale} either"
        return PublishedAgreement(AGAIN, AGAIN if same_class else elsewhere)
    if not direction:
        return PublishedAgreement(OPEN, "not expected", "a difference, where none was expected")
    if measured == -direction:
        return PublishedAgreement(AGAINST, AGAINST if same_class else f"other sign at {scale}")
    if not same_class:
        return PublishedAgreement(OPEN, f"not seen at {scale}", "what was expected is not said of this size")
    if size is None or reading(study.metric).unit != "nats":  # bits per byte depend on the tokenizer
        return PublishedAgreement(OPEN, "not seen", "how large the expected difference is was not published")
    least = smallest_effect(study)
    why = f"no difference larger than {least:g}; the published one is {size:.2g}"
    too_small = size < least
    return PublishedAgreement(OPEN, "too small to see", why) if too_small else PublishedAgreement(AGAINST, AGAINST, why)


def _undecided(contrast: Contrast) -> str:
    """Why a verdict says nothing of an effect; "" where it calls itself inconclusive, which needs no more words."""
    if contrast.word.startswith(OPEN):
        return ""
    return f"{contrast.word}: {contrast.reason}" if contrast.reason else contrast.word


def found_direction(contrast: Contrast) -> int | None:
    """-1, 0 or 1 by the verdict; None for one that decides nothing."""
    return next((direction for word, direction in FOUND.items() if contrast.word.startswith(word)), None)


def with_published(study: Study, contrast: Contrast, effect: PublishedEffect) -> PublishedAgreement:
    """The agreement with a published effect."""
    same_class = one_class(study, effect.parameters)
    return agree(study, contrast, effect.direction, effect.size, same_class=same_class)


def with_expected(
    study: Study, contrast: Contrast, expected: str, effects: Sequence[PublishedEffect]
) -> PublishedAgreement:
    """The agreement with what the study's file expects, given the published `effects` that the contrast repeats."""
    direction = expected_direction(expected)
    if direction is None:
        return PublishedAgreement(OPEN, OPEN, "what is expected does not begin with better, worse or no difference")
    stated = [float(count) * {"M": 1e6, "B": 1e9}[suffix] for count, suffix in SIZE.findall(expected)]
    same = not stated or any(one_class(study, size) for size in stated)
    sizes = [e.size for e in effects if e.direction == direction and e.size and one_class(study, e.parameters)]
    return agree(study, contrast, direction, max(sizes, default=None), same_class=same)


def expectation(study: Study, contrast: Contrast) -> tuple[str, PublishedAgreement | None]:
    """What the study's file expects of a contrast, and how the verdict agrees with it; "" and None for nothing."""
    pair = len(contrast.weights) == 2  # effects over more arms repeat nothing, whatever they are called
    expected = expected_of(study, contrast) if pair else study.expected.get(contrast.arm, "")
    effects = matching(study, contrast.arm, contrast.against) if pair else []
    return expected, with_expected(study, contrast, expected, effects) if expected else None


def expected_direction(expected: str) -> int | None:
    """-1, 0 or 1 by how the sentence begins; None where it begins otherwise."""
    text = expected.strip().lower()
    return next((direction for pattern, direction in SAID if re.match(pattern, text)), None)


def expected_of(study: Study, contrast: Contrast) -> str:
    """What was expected of the contrast: it is said of an arm, and means it against the baseline, or against whatever
    the arm is compared with where it is not compared with the baseline."""
    expected = study.arms[contrast.arm].expected if contrast.arm in study.arms else None
    pairs = [pair for pair in study.contrasts if not isinstance(pair, records.Effect)]
    is_meant = contrast.against == study.baseline or [contrast.arm, study.baseline] not in pairs
    return (expected or "") if is_meant else ""


def one_class(study: Study, parameters: float | None) -> bool:
    """Whether models of this size and the study's are of one scale class."""
    size = study.scope.parameters
    return bool(size and parameters and 1 / ONE_CLASS <= parameters / size <= ONE_CLASS)
