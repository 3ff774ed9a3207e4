"""Arguments of `compare` that cannot mean anything are refused in words, whatever their type."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2lab.analysis import compare
from gpt2lab.errors import ConfigError

ROWS = [{"arm": a, "seed": s, "value": 2.0 + s / 100} for a in ("base", "new") for s in range(3)]
WEIGHTS = {"new": 1.0, "base": -1.0}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("baseline", 0, "baseline: the name of an arm is expected, not 0"),
        ("smallest_effect", "0.05", "smallest_effect: a positive difference is expected, not '0.05'"),
        ("smallest_effect", None, "smallest_effect: a positive"),
        ("alpha", "5 %", "alpha: a level"),
        ("metric", 3, "metric: a name is expected, not 3"),
        ("seed", 0, "seed: the name of a column is expected, not 0"),
        ("looks", 3, "looks: rising numbers of seeds are expected, from 3 on, not 3"),
        ("looks", "3,5", "looks: rising"),
        ("looks", (-3, 5), "looks: rising"),
        ("looks", (3.5, 5), "looks: rising"),
        ("looks", (3, None), "looks: rising"),
        ("noise", 0.01, "noise: a Noise is expected, not 0.01"),
        ("exploratory", {"nwe": "why"}, "exploratory: unknown arm 'nwe'; did you mean 'new'"),
        ("exploratory", ["new"], "exploratory: a reason for each arm"),
        ("not_comparable", {"nwe": "why"}, "not_comparable: unknown arm 'nwe'"),
        ("not_comparable", {"new": 3}, "not_comparable: a reason for each arm"),
        ("unigram", "3.3", "unigram: a loss in nats is expected"),
        ("higher_is_better", "yes", "higher_is_better: True or False is expected"),
        ("scope", None, "scope: text is expected"),
        ("unit", 1, "unit: text is expected"),
        ("contrasts", "ab", "contrasts: a list of contrasts is expected"),
        ("contrasts", 3, "contrasts: a list of contrasts is expected"),
        ("contrasts", [3], "contrasts: a contrast is a pair of two arms, not 3"),
        ("contrasts", [("new", "base", "more")], "contrasts: a contrast is a pair of two arms"),
        ("contrasts", [(0, 1)], "contrasts: a contrast is a pair of two arms"),
        ("contrasts", [{"arm": "new"}], "contrasts: a mapping has arm, against and weights"),
        ("contrasts", [{"weights": WEIGHTS}], "contrasts: a mapping has arm, against and weights"),
        ("contrasts", [{"arm": "a", "against": "b", "weights": {"new": "1", "base": -1}}], "contrasts: a mapping has"),
        ("frame", {"arm": ["base"]}, "a table is expected .* not dict"),
        ("frame", "a\0b", "not a CSV file in UTF-8"),
    ],
)  # fmt: skip
def test_arguments_of_wrong_types(name: str, given: Any, said: str) -> None:
    terms: dict[str, Any] = {"frame": ROWS, "baseline": "base", "smallest_effect": 0.05} | {name: given}
    with pytest.raises(ConfigError, match=said):
        compare(terms.pop("frame"), **terms)


def test_all_wrong_arguments_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        compare(ROWS, baseline="base", smallest_effect=-1, alpha=2, looks=(2,))
    assert [problem.where for problem in error.value.problems] == ["smallest_effect", "alpha", "looks"]
