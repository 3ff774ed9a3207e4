"""A curve with a single minimum through noisy values, and the confidence interval of the minimum's position.

The curve is two half parabolas that meet at the minimum: a loss over rates is steeper towards divergence than towards
zero, and a single parabola then puts the optimum up to half an octave too low. Only points near the lowest value are
fitted, since a loss is a parabola there alone. A penalty shrinks the steepnesses of both sides towards each other, so
that a few points suffice for the position and many determine the shape.

The interval assumes neither equal sides nor parabolas, since the steepness of each side decides where the minimum lies:
each side of its curves rises by any steepness and by one of several powers of the distance. It is a profile: all
positions at which the best such curve fits about as well as the best of all, by an F test with one degree of freedom.
Its coverage on curves like those of small models, and on worse ones, is simulated in the tests.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import scipy

from gpt2lab.analysis.statistics import Array

NEAR = 3.0
"""Points within this many effects of the lowest value are fitted ..."""
CLOSE = 2.0
"""... or only those within this many, if they are at least MANY: the closer, the more like a parabola."""
MANY = 10
ENOUGH = 5
"""Fewer are supplemented by the next ones, up to 1.5 times as far."""
LEAST = 4
"""With fewer near the lowest, nothing is fitted."""
LOPSIDED = 0.6
"""Prior standard deviation of (right - left) / (right + left) steepness."""
POWERS = (1.0, 2.0, 3.0)
"""Powers of the distance by which a side may rise: a straight flank, a parabola, and one that ends in divergence."""
SPENT = 5
"""Degrees of freedom of the interval's curves: bottom, position, two steepnesses, and one for the powers."""
PLACES = 301
"""Candidate positions of the minimum between the outermost fitted points."""
ROUNDS = 4
"""Iterations of noise and penalty, which depend on each other."""
MISFIT = 0.01
"""Level of the goodness-of-fit test; a curve that fails it gives no interval."""
ALPHA = 0.05
FREEDOM = 2.0
"""Fewest degrees of freedom to estimate the noise from the points."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`bottom + steepness * distance^2`, with the distance in octaves where `log`, else in units of x."""

    at: float
    """position of the minimum"""
    bottom: float
    left: float
    """steepness below `at`"""
    right: float
    """steepness above it"""
    within: tuple[float, float]
    """the outermost fitted points"""
    sd: float
    """residual standard deviation; NaN with too few points"""
    points: int
    """number of fitted points"""
    log: bool

    def __call__(self, x: Array) -> Array:
        """Values at `x`."""
        u = scaled(x, self.log) - scaled(self.at, self.log)
        return np.asarray(self.bottom + np.where(u < 0, self.left, self.right) * u * u)

    def line(self, count: int = 101) -> tuple[Array, Array]:
        """The curve between the fitted points, for figures.  -> (count,), (count,)"""
        low, high = scaled(self.within, self.log)
        x = unscaled(np.linspace(low, high, count), self.log)
        return x, self(x)

    def within_loss(self, loss: float) -> tuple[float, float]:
        """The range of x in which the curve is less than `loss` above its bottom, also beyond the fitted points."""
        at = float(scaled(self.at, self.log))
        reach = [math.sqrt(loss / side) if side > 0 else math.inf for side in (self.left, self.right)]
        low, high = at - reach[0], at + reach[1]
        return (_octaves(low), _octaves(high)) if self.log else (low, high)


@dataclass(frozen=True, kw_only=True)
class ParabolaFit:
    """The minimum; where a field is None, `reason` says why."""

    curve: Curve | None = None
    interval: tuple[float, float] | None = None
    falls: str | None = None
    """`low` or `high`: the side towards which the curve still falls where the fitted points end"""
    end: float | None = None
    """the outermost of the fitted points on that side"""
    reason: str = ""


def scaled(x: Array | float | tuple[float, ...], log: bool) -> Array:
    """`x` on the scale of the curve: octaves where `log`."""
    values = np.asarray(x, dtype=np.float64)
    return np.asarray(np.log2(values) if log else values)


def unscaled(x: Array, log: bool) -> Array:
    """Back from `scaled`."""
    return np.asarray(np.exp2(x) if log else x)


def _octaves(t: float) -> float:
    return 2.0**t if t < sys.float_info.max_exp else math.inf


def fit(x: Array, y: Array, *, log: bool, effect: float | None = None, noise_sd: float | None = None) -> ParabolaFit:
    """The curve through finite values `y` at `x` (low is good), and the 95 % interval of its minimum.

    `effect` defines which values are near the lowest one (the better half without it). `noise_sd` is the standard
    deviation of y; it is estimated from the points unless given.  (n,), (n,)
    """
    chosen = _near(y, effect)
    x, y = x[chosen], y[chosen]
    t = scaled(x, log)
    if len(np.unique(t)) < LEAST:
        return ParabolaFit(reason=f"fewer than {LEAST} values were tried near the best one")
    if np.ptp(y) <= 1e-9 * float(np.abs(y).max()):
        return ParabolaFit(reason="the trials near the best one are all alike")
    middle, half = (t.max() + t.min()) / 2, np.ptp(t) / 2
    profile = _profile((t - middle) / half, y, noise_sd)
    if profile is None:
        return ParabolaFit(reason="near the best trial there is no valley")
    if profile.best in (0, PLACES - 1):
        falls, end, name = ("low", x.min(), "lowest") if profile.best == 0 else ("high", x.max(), "highest")
        reason = f"a curve through the trials near the best one still falls at the {name} of them"
        return ParabolaFit(falls=falls, end=float(end), reason=reason)
    places = unscaled(middle + half * profile.places, log)
    bottom, mean, skew = profile.beta
    curve = Curve(
        at=float(places[profile.best]), bottom=float(bottom), left=float((mean - skew) / half**2),
        right=float((mean + skew) / half**2), within=(float(x.min()), float(x.max())),
        sd=math.sqrt(profile.rest / profile.df) if profile.df >= FREEDOM else math.nan, points=len(t), log=log,
    )  # fmt: skip
    ends, reason = _interval(profile, _least_squares((t - middle) / half, y), len(t) - SPENT, noise_sd)
    return ParabolaFit(
        curve=curve, interval=(float(places[ends[0]]), float(places[ends[1]])) if ends else None, reason=reason
    )


def _near(y: Array, effect: float | None) -> Array:
    """Whether each point is near the lowest.  (n,) -> (n,) of bool"""
    excess = y - y.min()
    ordered = np.sort(excess)
    if effect is None:
        return np.asarray(excess <= max(np.median(excess), ordered[min(ENOUGH, len(y)) - 1]))
    reach = max(CLOSE * effect, min(NEAR * effect, ordered[min(MANY, len(y)) - 1]))
    return np.asarray(excess <= max(reach, min(ordered[min(ENOUGH, len(y)) - 1], 1.5 * NEAR * effect)))


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """The fit of the best curve with its minimum at each position."""

    places: Array
    best: int
    beta: Array
    """(bottom, mean steepness, half their difference) at the best position"""
    rest: float
    """the lowest sum of squares"""
    df: float
    misfit: float
    """p value of the curve against a more winding one; NaN with too few points"""


def _profile(z: Array, y: Array, noise_sd: float | None) -> _Profile | None:
    """Curves through points (z from -1 to 1) for every position of the minimum; None where all are concave."""
    places = np.linspace(-1, 1, PLACES)
    u = z - places[:, None]  # (position, point)
    design = np.stack([np.ones_like(u), u * u, np.sign(u) * u * u], axis=-1)  # (position, point, 3)
    squares, target = np.einsum("kni,knj->kij", design, design), np.einsum("kni,n->ki", design, y)
    start = _symmetric(squares, target, design, y)
    if start is None:
        return None
    steepness, rest = start
    least = (1e-6 * float(np.ptp(y)) + 1e-12) ** 2  # points that lie on a curve exactly
    variance = max(noise_sd**2 if noise_sd else rest / max(len(z) - 3, 1), least)
    for _ in range(ROUNDS):
        penalty = np.zeros((3, 3))
        penalty[2, 2] = variance / (LOPSIDED * steepness) ** 2 + 1e-9
        inverse = np.linalg.inv(squares + penalty)
        beta = np.einsum("kij,kj->ki", inverse, target)
        sums = ((y - np.einsum("kni,ki->kn", design, beta)) ** 2).sum(-1) + beta[:, 2] ** 2 * penalty[2, 2]
        penalised_sums = np.where(beta[:, 1] > np.abs(beta[:, 2]), sums, np.inf)
        best = int(np.argmin(penalised_sums))
        if not math.isfinite(penalised_sums[best]):
            return None
        df = len(z) - 1 - float(np.trace(inverse[best] @ squares[best]))
        steepness, rest = float(beta[best, 1]), float(penalised_sums[best])
        if not noise_sd and df >= FREEDOM / 2:
            variance = max(rest / df, least)
    return _Profile(
        places=places, best=best, beta=beta[best], rest=max(rest, df * least if df > 0 else rest), df=df,
        misfit=_misfit(u[best], y),
    )  # fmt: skip


def _symmetric(squares: Array, target: Array, design: Array, y: Array) -> tuple[float, float] | None:
    """(steepness, sum of squares) of the best parabola that opens upwards."""
    beta = np.linalg.solve(squares[:, :2, :2], target[:, :2, None])[..., 0]
    sums = ((y - np.einsum("kni,ki->kn", design[..., :2], beta)) ** 2).sum(-1)
    sums = np.where(beta[:, 1] > 0, sums, np.inf)
    best = int(np.argmin(sums))
    return (float(beta[best, 1]), float(sums[best])) if math.isfinite(sums[best]) else None


def _misfit(u: Array, y: Array) -> float:
    """p value of two further powers in addition to the curve and its position.  (point,), (point,)"""
    freedom = len(u) - 6
    if freedom < 2:
        return math.nan
    curve = np.stack([np.ones_like(u), u, u * u, np.sign(u) * u * u], axis=-1)
    winding = np.concatenate([curve, np.stack([u**3, u**4], axis=-1)], axis=-1)
    curve_sum, winding_sum = (
        float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum()) for design in (curve, winding)
    )
    if winding_sum <= 1e-12 * float(np.ptp(y)) ** 2:
        return math.nan
    return float(scipy.special.fdtrc(2, freedom, max(curve_sum - winding_sum, 0) / 2 / (winding_sum / freedom)))


def _least_squares(z: Array, y: Array) -> Array:
    """The lowest sum of squares around curves that rise on both sides of each position, by any powers.  -> (position,)

    A side is steepness x distance^power with a steepness of zero or more.
    """
    y = y - y.mean()
    u = z - np.linspace(-1, 1, PLACES)[:, None]
    total = float(y @ y)
    lowest = np.full(PLACES, total)
    for chosen in product((None, *_sides(-u, y)), (None, *_sides(u, y))):  # None: a flat side
        sides = [side for side in chosen if side is not None]
        weight = len(y) - sum((side.overlap**2 * side.inverse for side in sides), np.zeros(PLACES))
        bottom = -sum((side.overlap * side.pull * side.inverse for side in sides), np.zeros(PLACES)) / weight
        explained = bottom**2 * weight + sum((side.pull**2 * side.inverse for side in sides), np.zeros(PLACES))
        rises = np.logical_and.reduce([side.pull >= bottom * side.overlap for side in sides], axis=0)
        lowest = np.where(rises, np.minimum(lowest, total - explained), lowest)
    return np.asarray(np.maximum(lowest, 0))


class _Side(NamedTuple):
    """Sums over the points on one side of each position, with distances raised to a power, (position,) each: of the
    powers; of powers x values; and the reciprocal of that of squared powers, zero without a point on this side."""

    overlap: Array
    pull: Array
    inverse: Array


def _sides(u: Array, y: Array) -> list[_Side]:
    """The sums for each power over the points at positive u.  (position, point), (point,)"""
    sides = []
    for power in POWERS:
        raised = np.maximum(u, 0) ** power
        squares = (raised**2).sum(-1)
        inverse = np.divide(1, squares, out=np.zeros_like(squares), where=squares > 1e-12)
        sides.append(_Side(raised.sum(-1), raised @ y, inverse))
    return sides


def _interval(profile: _Profile, sums: Array, df: int, noise_sd: float | None) -> tuple[tuple[int, int] | None, str]:
    """The positions next to the first and the last that fit as well as the best, or why there is no interval."""
    rest = float(sums.min())
    if noise_sd:
        ratio = rest / df / noise_sd**2 if df >= FREEDOM else 1.0
        misfit = float(scipy.special.chdtrc(df, ratio * df)) if df >= FREEDOM else math.nan
        variance, quantile = noise_sd**2 * max(1.0, ratio), float(scipy.special.ndtri(1 - ALPHA / 2))
    elif df >= FREEDOM:
        misfit = profile.misfit
        variance, quantile = rest / df, float(scipy.special.stdtrit(df, 1 - ALPHA / 2))
    else:
        return None, "too few trials near the best one to tell how noisy they are"
    if misfit < MISFIT:
        return None, f"the curve fits badly (p = {misfit:.1g}), so no interval is given"
    inside = np.flatnonzero(sums - rest <= quantile**2 * variance)
    first, last = int(inside[0]), int(inside[-1])
    if first == 0 or last == PLACES - 1:
        return None, "the trials are too few, too noisy or too alike to bound it"
    return (min(first - 1, profile.best), max(last + 1, profile.best)), ""
