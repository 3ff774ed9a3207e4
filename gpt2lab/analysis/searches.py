"""What one search of a sweep record found, whether it may stand beside another, and why not.

A search is one entry of a sweep record's `searches`: a space, and trials with their outcome, settings and value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.analysis.tuning import Optimum, figure, optimum
from gpt2lab.analysis.words import listed, plural

Search = Mapping[str, Any]

RESULTS = ("finished", "pruned", "diverged")
"""Outcomes that tell something of the settings: what a budget is counted in."""
OPEN = ("waiting", "running")
WORDS = {"optim.lr": "learning rate", "optim.weight_decay": "weight decay"}
"""Settings that have a name in prose; others go by their key."""
SAME = 0.01
"""Spaces whose widths differ by less than this share are the same: rates are rounded."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The best trial of a search, and what speaks against it."""

    settings: Mapping[str, Any] | None
    """of the best finished trial; None where none finished"""
    value: float | None
    slot: int | None
    edge: Mapping[str, str]
    """numeric setting -> `low` or `high`, where the best trial is the outermost one on that side"""
    optima: Mapping[str, Optimum] = field(default_factory=dict)
    """of each numeric setting; with a curve only where the search has that one setting"""
    reason: str | None = None
    """why this search cannot stand beside another, or None"""


def chosen(
    search: Search, *, maximize: bool = False, slots: int | None = None, effect: float | None = None,
    noise_sd: float | None = None, unit: str = "nats",
) -> Chosen:  # fmt: skip
    """The settings of the best finished trial (of equals the lowest slot), and whether they may be compared.

    `slots` is the number of trials that the sweep has in all; without it, those in the record.
    """
    trials = search["trials"]
    done = [t for t in trials if t["outcome"] == "finished" and t["value"] is not None]
    best = min(done, key=lambda t: ((-t["value"] if maximize else t["value"]), t["slot"]), default=None)
    numeric = [d for d in search["space"] if d["kind"] != "categorical" and (not best or d["name"] in best["settings"])]
    optima = {
        d["name"]: _along(d, trials, best, maximize, effect, noise_sd, unit, alone=len(search["space"]) == 1)
        for d in numeric
    }
    edges = {name: found.edge for name, found in optima.items() if found.edge}
    return Chosen(
        settings=best["settings"] if best else None, value=best["value"] if best else None,
        slot=best["slot"] if best else None, edge=edges, optima=optima,
        reason=_refusal(trials, slots or len(trials), bool(best), {n: o for n, o in optima.items() if o.edge}),
    )  # fmt: skip


def _along(
    dimension: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, maximize: bool,
    effect: float | None, noise_sd: float | None, unit: str, *, alone: bool,
) -> Optimum:  # fmt: skip
    """What the trials say of one numeric setting."""
    name = dimension["name"]
    at = {outcome: [t for t in trials if t["outcome"] == outcome and name in t["settings"]] for outcome in RESULTS}
    points = [(t["settings"][name], t["value"]) for t in at["finished"] if t["value"] is not None]
    return optimum(
        [*points, *((t["settings"][name], math.inf) for t in at["diverged"])],
        low=dimension["low"], high=dimension["high"], log=bool(dimension.get("log")), effect=effect, noise_sd=noise_sd,
        pruned=[t["settings"][name] for t in at["pruned"]], maximize=maximize, alone=alone,
        what=WORDS.get(name, name), unit=unit,
    )  # fmt: skip


def _refusal(trials: Sequence[Mapping[str, Any]], slots: int, found: bool, edges: Mapping[str, Optimum]) -> str | None:
    """The strongest reason against a comparison."""
    ended = sum(t["outcome"] not in OPEN for t in trials)
    if ended < slots:
        return f"{slots - ended} of {plural(slots, 'trial')} of its search have not ended"
    if not found:
        return "no trial of its search finished"
    if not edges:
        return None
    ends = {"low": "lower", "high": "upper"}
    parts = [f"its best {o.what} lies at the {ends[str(o.edge)]} edge ({figure(o.best)})" for o in edges.values()]
    return listed(parts)


def budgets_differ(a: Search, b: Search, *, names: tuple[str, str] = ("one", "the other")) -> str | None:
    """How two searches differ in what they could find: trials that told something, and the width of their spaces.

    Spaces are compared relative to where they lie, since each arm is searched around its own prior. None if equal.
    """
    told = [sum(t["outcome"] in RESULTS for t in search["trials"]) for search in (a, b)]
    if told[0] != told[1]:
        counts = listed(f"{plural(n, 'trial')} of {name}" for n, name in zip(told, names, strict=True))
        return f"unequal budgets: {counts} told something"
    spaces = [{d["name"]: d for d in search["space"]} for search in (a, b)]
    only = sorted(spaces[0].keys() ^ spaces[1].keys())
    if only:
        return f"unequal spaces: {listed(only)} is searched in one of them only"
    unlike = [name for name in spaces[0] if not _alike(spaces[0][name], spaces[1][name])]
    return f"unequal spaces: {listed(unlike)} has another range" if unlike else None


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two dimensions have the same choices or the same range, as it is or as multiples of where it lies."""
    if any(a.get(key) != b.get(key) for key in ("kind", "choices", "when")) or bool(a.get("log")) != bool(b.get("log")):
        return False
    if a["kind"] == "categorical":
        return True
    ends = [(float(d["low"]), float(d["high"])) for d in (a, b)]
    if all(math.isclose(x, y, rel_tol=SAME) for x, y in zip(*ends, strict=True)):
        return True
    return all(low > 0 for low, _ in ends) and math.isclose(*(high / low for low, high in ends), rel_tol=SAME)
