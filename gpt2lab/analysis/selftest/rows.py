"""The yardsticks of the self-test: what was measured, what is accepted, and whether the one lies within the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.verdicts import as_json

ALPHA = 0.05
SIGMAS = 3.0
"""Standard errors by which chance may move a rate before it counts as wrong."""

NARROWEST = 0.03
"""A rate this close to its reference is accepted, however many draws there are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement and what is accepted of it."""

    check: str
    part: str = ""
    """of the self-test that it belongs to"""
    bank: str = ""
    """noise that the studies were drawn from; "" where none was drawn, or all in turn"""
    n: int | None = None
    """seeds per arm, where there is one such number"""
    measured: float
    reference: float | None = None
    """what it should be, where that is known"""
    low: float = -math.inf
    high: float = math.inf
    control: bool = False
    """a negative control: a method known to be wrong, which the yardstick must reject"""
    note: str = ""

    @property
    def within(self) -> bool:
        """Whether it was measured within the accepted range; NaN never is."""
        return self.low <= self.measured <= self.high

    @property
    def ok(self) -> bool:
        return self.within is not self.control

    @property
    def status(self) -> str:
        """accepted or rejected; flagged or missed for a negative control."""
        if self.control:
            return "flagged" if self.ok else "missed"
        return "accepted" if self.ok else "rejected"


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """All rows of one self-test. The same draws and seed give the same rows."""

    rows: tuple[Row, ...]
    draws: int
    seed: int

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def wrong(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def to_json(self) -> dict[str, object]:
        """Plain data for `json.dumps(..., allow_nan=False)`; open ends of a range are null."""
        names = ("part", "check", "bank", "n", "measured", "reference", "low", "high", "status", "ok", "note")
        rows = [as_json({name: getattr(row, name) for name in names}) for row in self.rows]
        return {"ok": self.ok, "draws": self.draws, "seed": self.seed, "rows": rows}


def chance(rate: float, draws: int) -> float:
    """What chance alone may add to a rate: SIGMAS standard errors."""
    return SIGMAS * math.sqrt(rate * (1 - rate) / draws)


def level(check: str, wrong: NDArray[np.bool_], bank: str = "", n: int | None = None) -> Row:
    """Studies that make a false claim: at most ALPHA of them, but for chance.

    wrong: (draws,), or (draws, contrast), where one false claim makes a study wrong.
    """
    draws = wrong.shape[0]
    rate = float(wrong.reshape(draws, -1).any(-1).mean())
    return Row(check=check, bank=bank, n=n, measured=rate, low=0.0, high=ALPHA + chance(ALPHA, draws))


def flagged(check: str, wrong: NDArray[np.bool_], bank: str = "", n: int | None = None) -> Row:
    """A method known to be wrong, held against the yardstick of `level`, which must reject it."""
    return replace(level(check, wrong, bank, n), control=True)


def near(check: str, hits: NDArray[np.bool_], reference: float, bank: str = "", n: int | None = None) -> Row:
    """How often something happens: as often as the reference, on either side.  hits: (draws,) or (draws, contrast)"""
    allowed = max(NARROWEST, chance(reference, hits.shape[0]))
    low, high = max(0.0, reference - allowed), min(1.0, reference + allowed)
    return Row(check=check, bank=bank, n=n, measured=float(hits.mean()), reference=reference, low=low, high=high)


def none_of(check: str, count: int, of: int, bank: str = "", n: int | None = None) -> Row:
    """Something that may never happen, in `of` cases."""
    return Row(check=check, bank=bank, n=n, measured=float(count), low=0.0, high=0.0, note=f"of {of:,}")
