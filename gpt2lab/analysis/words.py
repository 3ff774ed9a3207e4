"""Numbers and reasons as readers see them: one way to write a difference, an interval, a p value."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decimals(halfwidth: float, value: float) -> int:
    """Digits after the point: two significant ones of the half-width, or three of the value where there is none."""
    if math.isfinite(halfwidth) and halfwidth > 0:
        return min(max(1 - math.floor(math.log10(halfwidth)), 1), 10)
    if math.isfinite(value) and value:
        return min(max(2 - math.floor(math.log10(abs(value))), 1), 10)
    return 4


def effect(difference: float, low: float, high: float, unit: str) -> str:
    """`-0.257 nats [-0.281, -0.233]`, without brackets where there is no interval."""
    digits = decimals((high - low) / 2, difference)
    bounds = f" {interval(low, high)}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{difference:+z.{digits}f} {unit}{bounds}"


def interval(low: float, high: float) -> str:
    """`[-0.281, -0.233]`"""
    digits = decimals((high - low) / 2, low)
    return f"[{low:+z.{digits}f}, {high:+z.{digits}f}]"


def probability(p: float, alpha: float) -> str:
    """Two significant digits, more where rounding would move p across alpha."""
    texts = [f"{p:.{digits}g}" for digits in range(2, 8)]
    return next((text for text in texts if (float(text) < alpha) == (p < alpha)), texts[-1])


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = items
    return f"{', '.join(rest)} and {last}" if rest else last


def plural(count: int, noun: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
