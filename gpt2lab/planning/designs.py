"""Designs: which arms an ablation's file stands for, and which contrasts they are there for.

arms:           one factor at a time: every arm against the baseline
leave_one_out:  a baseline with all parts, and for each part an arm without it
factors:        every combination of levels, for main effects and two-way interactions


"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.config.fitting import Complaint
from gpt2lab.config.source import Key
from gpt2lab.schema import ABSENT

CONTROL = "control"  # the one key of an arm that is no change
ALL = "all"
WITHOUT = "without "
TOGETHER = "their effects added"


@dataclass(frozen=True)
class Change:
    """One change of an arm: a dotted key, where in the file its value stands, and what errors put before the key."""

    key: str
    at: Key
    prefix: str


@dataclass(frozen=True)
class Written:
    """An arm as its file stands for it. `at`: the key at which errors about the whole arm are told."""

    name: str
    changes: tuple[Change, ...]
    at: Key


@dataclass(frozen=True)
class Design:
    """The arms of an ablation, its baseline, and the contrasts that follow from it."""

    kind: str
    """one factor, leave one out, or factorial"""
    baseline: str
    arms: Mapping[str, Written]
    contrasts: tuple[Declared, ...] = ()
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """of a factorial design: factor -> levels, the reference first"""


def one_factor(arms: Mapping[str, Mapping[str, Any]], baseline: str) -> Design:
    """Arms as they are written, each against the baseline."""
    written = {
        name: Written(
            name,
            tuple(Change(key, ("arms", name, key), f"arms.{name}.") for key in changes if key != CONTROL),
            ("arms", name),
        )
        for name, changes in arms.items()
    }
    return Design("one factor", baseline, written, tuple(Declared.pair(n, baseline) for n in arms if n != baseline))


def leave_one_out(parts: Mapping[str, Mapping[str, Any]]) -> Design:
    """`all` with the changes of every part, and `without X` for each part X: worse means that X helps."""
    changes = {
        part: tuple(Change(key, ("leave_one_out", part, key), f"leave_one_out.{part}.") for key in written)
        for part, written in parts.items()
    }
    arms = {ALL: Written(ALL, tuple(itertools.chain(*changes.values())), ("leave_one_out",))}
    for part in parts:
        rest = tuple(itertools.chain(*(own for other, own in changes.items() if other != part)))
        arms[WITHOUT + part] = Written(WITHOUT + part, rest, ("leave_one_out", part))
    return Design("leave one out", ALL, arms, tuple(Declared.pair(WITHOUT + part, ALL) for part in parts))


def factorial(factors: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> Design:
    """Every combination of levels; the first level of each factor is its reference.

    A factor is a dotted key with a list of values, or a name with levels that are sets of changes as of an arm.
    """
    levels = {name_of(key): _levels(key, values) for key, values in factors.items()}
    cells = [dict(zip(levels, combination, strict=True)) for combination in itertools.product(*levels.values())]
    arms = {}
    for cell in cells:
        changes = itertools.chain(*(levels[factor][level] for factor, level in cell.items()))
        arms[_cell_name(cell)] = Written(_cell_name(cell), tuple(changes), ("factors",))
    names = {factor: tuple(own) for factor, own in levels.items()}
    return Design("factorial", _cell_name(cells[0]), arms, tuple(_effects(names)), names)


def name_of(key: str) -> str:
    """What a factor is called: `norm` for `model.norm`."""
    return key.rsplit(".", 1)[-1]


def _levels(key: str, values: Sequence[Any] | Mapping[str, Any]) -> dict[str, tuple[Change, ...]]:
    """Level -> its changes."""
    if isinstance(values, Mapping):
        return {
            str(level): tuple(
                Change(k, ("factors", key, level, k), f"factors.{key}.{level}.")
                for k in (() if changes in ABSENT else changes or {})
            )
            for level, changes in values.items()
        }
    return {in_short(value): (Change(key, ("factors", key, i), "factors."),) for i, value in enumerate(values)}


def in_short(value: Any) -> str:
    """A value as people say it: `rotary`, `sliding_window(window=64)`, `rotary, none`."""
    if isinstance(value, dict):
        options = ", ".join(f"{key}={in_short(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    return ", ".join(map(in_short, value)) if isinstance(value, list) else str(value)


def _cell_name(cell: Mapping[str, str]) -> str:
    return "+".join(cell.values()).replace(",", ";").replace("/", ":")


def _effects(factors: Mapping[str, tuple[str, ...]]) -> Iterator[Declared]:
    """Main effects of every level against its factor's reference, then every two-way interaction, each averaged over
    the other factors."""
    for factor, levels in factors.items():
        for level in levels[1:]:
            signs: dict[tuple[str, ...], float] = {(level,): 1.0, (levels[0],): -1.0}
            yield Declared(
                arm=f"{factor}={level}", against=f"{factor}={levels[0]}", weights=_weights(factors, (factor,), signs)
            )
    for f, g in itertools.combinations(factors, 2):
        for a, b in itertools.product(factors[f][1:], factors[g][1:]):
            x, y = factors[f][0], factors[g][0]
            signs = {(a, b): 1.0, (x, y): 1.0, (a, y): -1.0, (x, b): -1.0}
            yield Declared(arm=f"{f}={a} with {g}={b}", against=TOGETHER, weights=_weights(factors, (f, g), signs))


def _weights(
    factors: Mapping[str, tuple[str, ...]], of: tuple[str, ...], signs: Mapping[tuple[str, ...], float]
) -> dict[str, float]:
    """Weight of every cell whose levels of the factors `of` have a sign, shared evenly over the other factors."""
    others = math.prod(len(levels) for factor, levels in factors.items() if factor not in of)
    found = {}
    for combination in itertools.product(*factors.values()):
        cell = dict(zip(factors, combination, strict=True))
        sign = signs.get(tuple(cell[factor] for factor in of))
        if sign is not None:
            found[_cell_name(cell)] = sign / others
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def design_problems(
    arms: Mapping[str, Any], parts: Mapping[str, Any] | None, factors: Mapping[str, Any] | None
) -> Iterator[Complaint]:
    """What is wrong with the way in which a file says its arms."""
    given = [n for n, v in (("arms", arms), ("leave_one_out", parts), ("factors", factors)) if v]
    if len(given) != 1:
        what = "one of `arms`, `leave_one_out` and `factors` is expected" + (f", not {len(given)}" if given else "")
        yield Complaint(what, ((given[-1],) if given else (),))
    if parts:
        if len(parts) < 2:
            yield Complaint("at least two parts are expected", (("leave_one_out",),))
        seen: dict[str, str] = {}
        for part, changes in parts.items():
            if not changes:
                yield Complaint("changes nothing, so there is nothing to leave out", (("leave_one_out", part),))
            for key in changes:
                twin = seen.setdefault(key, part)
                if twin != part:
                    yield Complaint(f"'{key}' is changed by '{twin}' as well", (("leave_one_out", part, key),))
    for key, values in (factors or {}).items():
        at: tuple[Key, ...] = (("factors", key),)
        if not isinstance(values, (list, Mapping)) or len(values) < 2:
            yield Complaint("at least two levels are expected: a list of values, or names with their changes", at)
        elif isinstance(values, Mapping) and not all(isinstance(v, Mapping) or v in ABSENT for v in values.values()):
            yield Complaint("each level is a set of changes by dotted key, or {} for none", at)
        elif isinstance(values, list) and len({in_short(value) for value in values}) < len(values):
            yield Complaint("the same level twice", at)
    if factors is not None and len({name_of(key) for key in factors}) < len(factors):
        yield Complaint("two factors end in the same name; give one of them a name of its own", (("factors",),))
    if factors is not None and len(factors) < 2:
        yield Complaint("at least two factors are expected; a single one is what `arms` is for", (("factors",),))
