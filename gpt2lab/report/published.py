"""Effects that others published, from published.yaml, and which of them a contrast of ours repeats.

A contrast repeats a published effect when its two arms differ in that one component or setting and in nothing else that
the study's record names; what an arm was given to be comparable (a width, a bracketed rate) does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from gpt2lab.config.source import read_file
from gpt2lab.errors import ConfigError
from gpt2lab.results import Study

FILE = Path(__file__).with_name("published.yaml")
NEGLIGIBLE = 0.005
"""Nats. Measured values that lie closer than the smallest effect of interest at 124M are no difference."""

DIRECTIONS = {"better": -1, "none": 0, "worse": 1}
NOTHING = ("null", "~", "", "None")
"""How a file writes that a setting is off."""

LOSSES = ("nats", "nats of span filling")


@dataclass(frozen=True, kw_only=True)
class Effect:
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
    is_setting: bool = False

    def turned(self) -> Effect:
        """The same effect, told of the other side."""
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
def published(file: Path = FILE) -> tuple[Effect, ...]:
    """Every effect of the file. Raises ConfigError for one that does not say what it must."""
    tree = read_file(file).tree
    found: list[Effect] = []
    for kind, read in (("measured", _measured), ("stated", _stated)):
        for index, entry in enumerate(tree.get(kind) or []):
            try:
                found += read(entry)
            except (KeyError, ValueError) as error:
                raise ConfigError(f"not a published effect: {error}", where=f"{file.name}: {kind}.{index}") from error
    return tuple(found)


def _measured(entry: Mapping[str, Any]) -> Iterator[Effect]:
    """Every pair of the components that have a value."""
    for (one, a), (other, b) in combinations(entry["values"].items(), 2):
        values = (float(a), float(b))
        difference = _in_nats(*values, entry["unit"])
        direction = 0 if abs(difference) < NEGLIGIBLE else int(math.copysign(1, difference))
        yield Effect(
            slot=entry["slot"], component=one, against=other, direction=direction, size=abs(difference), values=values,
            unit=entry["unit"], **_shared(entry),
        )  # fmt: skip


def _in_nats(one: float, other: float, unit: str) -> float:
    """The difference of two measured values."""
    if unit == "perplexity":
        return math.log(one / other)
    if unit in LOSSES:
        return one - other
    raise ValueError(f"unit '{unit}' is none of {', '.join((*LOSSES, 'perplexity'))}")


def _stated(entry: Mapping[str, Any]) -> Iterator[Effect]:
    changed = "changed" in entry
    yield Effect(
        slot=entry["changed"] if changed else entry["slot"],
        component=entry["to"] if changed else entry["component"],
        against="the scale's own" if changed else entry["against"],
        direction=DIRECTIONS[entry["direction"]],
        size=float(entry["size"]) if "size" in entry else None,
        unit=entry["unit"] if "size" in entry else "",
        given=entry.get("given", {}),
        is_setting=changed,
        **_shared(entry),
    )


def _shared(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = float(entry["parameters"]) if "parameters" in entry else None
    own = {"setting": entry["setting"], "source": entry["source"], "address": entry.get("address", "")}
    return own | {"parameters": parameters}


@cache
def alike() -> Mapping[str, Mapping[str, str]]:
    """Slot -> component -> the one that it counts as."""
    found: Mapping[str, Mapping[str, str]] = read_file(FILE).tree.get("alike") or {}
    return found


def matching(study: Study, arm: str, against: str, effects: Sequence[Effect] | None = None) -> list[Effect]:
    """The published effects that `arm` against `against` repeats, told in that direction."""
    ours, theirs = study["arms"].get(arm), study["arms"].get(against)
    if ours is None or theirs is None:  # an effect over several arms, by a name of its own
        return []
    differing = _differing(ours, theirs)
    if len(differing) != 1:
        return []
    [(slot, (one, other))] = differing.items()
    both = [_components(ours), _components(theirs)]
    found = []
    for effect in published() if effects is None else effects:
        if effect.slot != slot or not all(arm.get(k) == v for k, v in effect.given.items() for arm in both):
            continue
        sides = _setting_sides if effect.is_setting else _component_sides
        if sides(effect, one, other):
            found.append(effect)
        elif sides(effect, other, one):
            found.append(effect.turned())
    return found


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Slots and settings in which two arms differ -> what each has; None where an arm leaves it to its scale."""
    one, other = _components(ours), _components(theirs)
    found: dict[str, tuple[str | None, str | None]] = {
        slot: (one.get(slot), other.get(slot)) for slot in sorted({*one, *other}) if one.get(slot) != other.get(slot)
    }
    a, b = ours.get("changes") or {}, theirs.get("changes") or {}
    for key in sorted({*a, *b}):
        section = key.split(".")
        if len(section) > 1 and section[1] in one:  # a slot: its component has been looked at
            continue
        values = (_value(a.get(key)), _value(b.get(key)))
        if values[0] != values[1]:
            found[key] = values
    return found


def _components(arm: Mapping[str, Any]) -> dict[str, str]:
    found = {slot: str(name) for slot, name in (arm.get("components") or {}).items()}
    return {slot: alike().get(slot, {}).get(name, name) for slot, name in found.items()}


def _value(written: Any) -> str | None:
    """A setting as text, equal for equal settings; None where it was not written."""
    if written is None:
        return None
    text = str(written)
    try:
        return f"{float(text):g}"
    except ValueError:
        return "null" if text in NOTHING else text


def _component_sides(effect: Effect, one: str | None, other: str | None) -> bool:
    return (effect.component, effect.against) == (one, other)


def _setting_sides(effect: Effect, one: str | None, other: str | None) -> bool:
    """Whether `one` is the value that the effect is about, and `other` is not."""
    if effect.component == ">0":  # against 0, which is what every shipped scale has
        return _positive(one) and other in (None, "0")
    return one == effect.component and other != effect.component


def _positive(value: str | None) -> bool:
    try:
        return value is not None and float(value) > 0
    except ValueError:
        return False
