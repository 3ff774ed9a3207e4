"""Is the code that writes verdicts calibrated? Thousands of studies with known answers, judged by that very code.

No training: the studies are drawn from three noise banks (Gaussian, Student's t with 5 degrees of freedom, and the
seeds of one 124M recipe). Rates are held against limits and against an independent simulation, methods known to be
wrong against the same limits, which must reject them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from gpt2lab.analysis.selftest.claims import rates
from gpt2lab.analysis.selftest.designs import added, dropped, intervals, lent, measures, searched, text, unequal
from gpt2lab.analysis.selftest.noise import BANKS, Draws
from gpt2lab.analysis.selftest.plans import forecasts, looks, planner
from gpt2lab.analysis.selftest.rows import Row, SelfTest
from gpt2lab.analysis.selftest.sameness import agreement, golden, invariances
from gpt2lab.analysis.selftest.wrong_methods import controls
from gpt2lab.errors import ConfigError, unknown

__all__ = ["BANKS", "LONG", "PARTS", "QUICK", "Row", "SelfTest", "selftest"]

LONG, QUICK = 10_000, 2_000
FEWEST, MOST = 1_000, 100_000
"""Draws: fewer leave chance too much room for a control to be flagged; more do not fit into memory."""

PARTS: Mapping[str, Callable[[Draws], Iterator[Row]]] = MappingProxyType(
    {
        "rates": rates,
        "looks": looks,
        "planner": planner,
        "forecasts": forecasts,
        "unequal": unequal,
        "added": added,
        "dropped": dropped,
        "searched": searched,
        "intervals": intervals,
        "lent": lent,
        "text": text,
        "measures": measures,
        "controls": controls,
        "invariances": invariances,
        "agreement": agreement,
        "golden": golden,
    }
)


def selftest(
    draws: int = LONG,
    seed: int = 0,
    *,
    parts: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> SelfTest:
    """Run the self-test, or some of its parts. Deterministic: the same draws and seed give the same rows.

    draws:    studies per rate.
    progress: called before each row with what is at work and how many rows there are so far.
    Raises ConfigError for a number of draws or a part that cannot be had.
    """
    if not FEWEST <= draws <= MOST:
        what = f"between {FEWEST} and {MOST} draws are expected, not {draws}"
        raise ConfigError(what, where="draws", hint=f"gpt2lab selftest statistics --draws {LONG}")
    for name in parts or ():
        if name not in PARTS:
            raise ConfigError(unknown("part", name, PARTS), where="parts")
    rows: list[Row] = []
    for name in parts or PARTS:
        if progress is not None:
            progress(name, len(rows))
        for row in PARTS[name](Draws(count=draws, seed=seed)):
            rows.append(replace(row, part=name))
            if progress is not None:
                progress(name, len(rows))
    return SelfTest(rows=tuple(rows), draws=draws, seed=seed)
