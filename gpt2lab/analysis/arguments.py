"""Types and ranges of the arguments of `compare`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from gpt2lab.analysis.verdicts import FEWEST, Noise
from gpt2lab.errors import ConfigError, Problem


def number(x: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _optional_text(x: Any) -> bool:
    return x is None or isinstance(x, str)


def _truth(x: Any) -> bool:
    return isinstance(x, bool)


def _count(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _optional_mapping(x: Any) -> bool:
    return x is None or isinstance(x, Mapping)


def _rising(x: Any) -> bool:
    if x is None:
        return True
    if not isinstance(x, Sequence) or not all(map(_count, x)):
        return False
    return all(n >= FEWEST for n in x) and all(n < later for n, later in itertools.pairwise(x))


def _reasons(x: Any) -> bool:
    return x is None or (isinstance(x, Mapping) and all(_text(k) and _optional_text(v) for k, v in x.items()))


KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "baseline": ("the name of an arm is expected", _text),
    "smallest_effect": ("a positive difference is expected", lambda x: number(x) and x > 0),
    "alpha": ("a level between 0 and 0.5 is expected", lambda x: number(x) and 0 < x < 0.5),
    "metric": ("a name is expected", _optional_text),
    "arm": ("the name of a column is expected", _optional_text),
    "seed": ("the name of a column is expected", _optional_text),
    "value": ("the name of a column is expected", _optional_text),
    "unigram": ("a loss in nats is expected", lambda x: x is None or number(x)),
    "noise": ("a Noise is expected", lambda x: x is None or isinstance(x, Noise)),
    "exploratory": ("a reason for each arm, as {'rotary': 'other data'}, is expected", _reasons),
    "not_comparable": ("a reason for each arm, as {'rotary': 'other data'}, is expected", _reasons),
    "looks": (f"rising numbers of seeds are expected, from {FEWEST} on", _rising),
    "extendable": ("True or False is expected", _truth),
    "baseline_seeds": ("a number of seeds is expected", lambda x: x is None or (_count(x) and x > 0)),
    "dropped": ("a number of contrasts is expected", lambda x: _count(x) and x >= 0),
    "late": ("a mapping from (arm, against) is expected", _optional_mapping),
    "searches": ("a mapping from arms is expected", _optional_mapping),
    "text": ("a mapping from (arm, against) is expected", _optional_mapping),
    "screen": ("True or False is expected", _truth),
    "force_exploratory": ("True or False is expected", _truth),
    "sensitivity": ("True or False is expected", _truth),
    "at_shared_rate": ("True or False is expected", _truth),
    "higher_is_better": ("True or False is expected", lambda x: x is None or _truth(x)),
    "scope": ("text is expected", _text),
    "caveat": ("text is expected", _optional_text),
    "unit": ("text is expected", _optional_text),
}
"""What is expected of each argument, in words and as a test."""


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError with every argument that is not as expected."""
    wrong = [(name, what) for name, (what, fits) in KINDS.items() if name in given and not fits(given[name])]
    if wrong:
        raise ConfigError([Problem(name, f"{what}, not {given[name]!r:.60}") for name, what in wrong])
