"""Numbers and reasons as readers see them: one way to write a difference, an interval, a p value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

HUGE = 1e7
"""Numbers from here on are written with an exponent."""
MOST_DECIMALS = 7
"""Numbers that need more digits after the point are written with an exponent."""
MOST_SIGNIFICANT = 12
SMALLEST_P = 1e-15
"""A smaller p is rounding error of the arithmetic."""


def decimals(halfwidth: float, value: float) -> int:
    """Digits after the point: two significant ones of the half-width, or three of the value where there is none."""
    if math.isfinite(halfwidth) and halfwidth > 0:
        return min(max(1 - math.floor(math.log10(halfwidth)), 1), 10)
    if math.isfinite(value) and value:
        return min(max(2 - math.floor(math.log10(abs(value))), 1), 10)
    return 4


def written(numbers: Sequence[float], low: float, high: float) -> list[str]:
    """Each number with its sign, to the precision of the interval low to high; huge and tiny ones as 1.2e-09.

    More digits where rounding would turn a bound of an interval that leaves out zero into zero.
    """
    halfwidth, largest = (high - low) / 2, max(map(abs, numbers))
    if not largest:
        return ["0" for _ in numbers]
    known = math.isfinite(halfwidth) and halfwidth > 0
    finest = -math.floor(math.log10(halfwidth / 10 if known else largest / 100))
    if largest >= HUGE or finest > MOST_DECIMALS:
        digits = min(max(math.floor(math.log10(largest)) + finest, 1), MOST_SIGNIFICANT)
        return [f"{number:+.{digits}e}" if number else "0" for number in numbers]
    digits = max(finest, 1)
    if low > 0 or high < 0:
        digits = max(digits, min(-math.floor(math.log10(min(abs(low), abs(high)))), MOST_DECIMALS))
    small = 0.5 * 10**-digits if low > 0 or high < 0 else 0.0
    return [f"{n:+.0e}" if abs(n) < small else f"{n:+z.{digits}f}" for n in numbers]


def effect(difference: float, low: float, high: float, unit: str) -> str:
    """`-0.257 nats [-0.281, -0.233]`, without brackets where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{written([difference], math.nan, math.nan)[0]} {unit}"
    middle, *bounds = written([difference, low, high], low, high)
    return f"{middle} {unit} [{', '.join(bounds)}]"


def interval(low: float, high: float) -> str:
    """`[-0.281, -0.233]`"""
    return f"[{', '.join(written([low, high], low, high))}]"


def probability(p: float, alpha: float) -> str:
    """`= 0.036`: two significant digits, more where rounding would move p across alpha; `< 1e-15` for smaller ones."""
    if p < SMALLEST_P:
        return f"< {SMALLEST_P:g}"
    texts = [f"{p:.{digits}g}" for digits in range(2, 8)]
    return f"= {next((text for text in texts if (float(text) < alpha) == (p < alpha)), texts[-1])}"


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = items
    return f"{', '.join(rest)} and {last}" if rest else last


def plural(count: int, noun: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
