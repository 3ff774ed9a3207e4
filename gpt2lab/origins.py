"""Where differences between arms come from: by position in the context, by how frequent the token is, and by work.
Description only: nothing of it was declared, and no word is decided here.

Every number is a difference in mean loss, arm minus baseline, in nats, over some of the final evaluation's targets.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.statistics import welch
from gpt2lab.errors import DataFault
from gpt2lab.results import Study, StudyRun, failure_ceiling
from gpt2lab.store import Store
from gpt2lab.store.parts import DIVISIONS, POSITION, Part, read_parts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A difference and its interval by Welch's test over seeds, not adjusted for anything; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of 0, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to divide the targets. shares: of all targets, by group. examples: what is in a group, or nothing.
    arms: arm -> its difference to the baseline in every group. changes: arm -> that of the last group less that of the
    first."""

    name: str
    groups: Sequence[str]
    shares: Sequence[float]
    examples: Sequence[str]
    arms: Mapping[str, Sequence[Difference]]
    changes: Mapping[str, Difference]

    def part(self, arm: str, group: int) -> float:
        """What a group contributes to the arm's difference over all targets, as a share of it."""
        parts = [share * one.value for share, one in zip(self.shares, self.arms[arm], strict=True)]
        return parts[group] / sum(parts)


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What was measured of a study's differences. totals: arm -> its difference over all targets. seeds: arm, the
    baseline too -> runs that stand for it. lacking: arm -> usable runs that kept nothing. apart: arms that cannot be
    compared. level: of every interval."""

    divisions: Sequence[Division] = ()
    totals: Mapping[str, Difference] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)
    apart: Sequence[str] = ()
    level: float = 0.95


def origins(study: Study, runs: Sequence[StudyRun], store: Store, apart: Sequence[str] = ()) -> Origins:
    """Of every arm but those `apart`, which cannot be compared with the baseline. Failed runs are left out, and so are
    arms of which some run kept nothing, for the others would not stand for it."""
    baseline, ceiling = study["baseline"], failure_ceiling(study)
    usable = [run for run in runs if run.value is not None and run.value < ceiling and run.arm not in apart]
    kept: dict[str, list[dict[str, Part]]] = {}
    lacking: dict[str, int] = {}
    for run in usable:
        found = kept_of(run, study, store)
        if POSITION in found:
            kept.setdefault(run.arm, []).append(found)
        else:
            lacking[run.arm] = lacking.get(run.arm, 0) + 1
    whole = {arm: kept[arm] for arm in study["arms"] if arm in kept and arm not in lacking}
    ours = {arm: found for arm, found in whole.items() if arm != baseline}
    if baseline not in whole or not ours:
        return Origins(lacking=lacking, apart=apart, level=1 - study["alpha"])
    divisions = [
        made for name in DIVISIONS if (made := _division(name, ours, whole[baseline], study["alpha"])) is not None
    ]
    totals = {arm: _difference(_totals(found), _totals(whole[baseline]), study["alpha"]) for arm, found in ours.items()}
    return Origins(
        divisions=divisions,
        totals=totals,
        seeds={arm: len(found) for arm, found in whole.items()},
        lacking=lacking,
        apart=apart,
        level=1 - study["alpha"],
    )


def kept_of(run: StudyRun, study: Study, store: Store) -> dict[str, Part]:
    """What a run kept of its final evaluation, by division; empty for older runs and for damaged files."""
    try:
        return read_parts(store.run(run.id).parts(study["evaluation"]["key"]))
    except DataFault:
        return {}


def _division(
    name: str, arms: Mapping[str, Sequence[Mapping[str, Part]]], base: Sequence[Mapping[str, Part]], alpha: float
) -> Division | None:
    """Arms whose runs were divided otherwise than the baseline's first are left out."""
    first = base[0].get(name)
    if first is None or len(first.groups) < 2 or not all(_alike(run.get(name), first) for run in base):
        return None
    theirs = _losses(name, base)
    found, changes = {}, {}
    for arm, runs in arms.items():
        if not all(_alike(run.get(name), first) for run in runs):
            continue
        ours = _losses(name, runs)
        found[arm] = [_difference(a, b, alpha) for a, b in zip(ours, theirs, strict=True)]
        changes[arm] = _difference(ours[-1] - ours[0], theirs[-1] - theirs[0], alpha)
    if not found:
        return None
    return Division(
        name=name,
        groups=first.groups,
        shares=[count / sum(first.targets) for count in first.targets],
        examples=first.examples if len(first.examples) == len(first.groups) else (),
        arms=found,
        changes=changes,
    )


def _alike(kept: Part | None, first: Part) -> bool:
    return kept is not None and (kept.groups, kept.targets) == (first.groups, first.targets)


def _losses(name: str, runs: Sequence[Mapping[str, Part]]) -> Array:
    """-> (group, seed)"""
    return np.array([run[name].losses for run in runs], dtype=np.float64).T


def _totals(runs: Sequence[Mapping[str, Part]]) -> Array:
    """Mean loss over all targets.  -> (seed,)"""
    return np.array([np.average(run[POSITION].losses, weights=run[POSITION].targets) for run in runs])


def _difference(ours: Array, theirs: Array, alpha: float) -> Difference:
    """(seed,), (seed,)"""
    test = welch(ours, theirs, alpha=alpha)
    return Difference(float(test.difference), float(test.low), float(test.high))
