"""Which way a metric is better, its unit, and what `compare` makes of both."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gpt2lab.analysis import Verdicts, compare, in_words
from gpt2lab.analysis.metrics import known
from gpt2lab.errors import ConfigError

LOW, HIGH = (0.412, 0.418, 0.409), (0.458, 0.463, 0.455)


def judged(name: str = "value", base: Any = LOW, new: Any = HIGH, **terms: Any) -> Verdicts:
    rows = [
        {"arm": a, "seed": s, name: v} for a, values in (("base", base), ("new", new)) for s, v in enumerate(values)
    ]
    return compare(rows, **{"baseline": "base", "smallest_effect": 0.01, **terms})


@pytest.mark.parametrize(
    ("name", "higher", "unit"),
    [
        ("loss", False, "nats"),
        ("val/loss", False, "nats"),
        ("final/val/loss/position/1-1", False, "nats"),
        ("eval_loss", False, "nats"),
        ("Val Loss", False, "nats"),
        ("loss/train", False, "nats"),
        ("val_loss_best", False, "nats"),
        ("val-final/bits_per_byte", False, "bits per byte"),
        ("val_ppl", False, "perplexity"),
        ("word_perplexity,none", False, "perplexity"),
        ("acc", True, "accuracy"),
        ("acc_norm,none", True, "accuracy"),
        ("eval/accuracy", True, "accuracy"),
        ("acc_pct", True, "percentage points"),
        ("Accuracy (%)", True, "percentage points"),
        ("error_rate_percent", False, "percentage points"),
        ("logprob", True, "nats"),
        ("f1_score", True, "f1"),
    ],
)
def test_metrics_known_by_name(name: str, higher: bool, unit: str) -> None:
    found = known(name)
    assert found and (found.higher_is_better, found.unit) == (higher, unit)


@pytest.mark.parametrize("name", ["quality", "acc_stderr", "loss_scale", "lr", "score", "accuracy_gap", "mem", ""])
def test_metrics_of_no_known_direction(name: str) -> None:
    assert known(name) is None


def test_better_is_a_positive_difference_where_higher_is_better() -> None:
    verdicts = judged("accuracy")
    contrast = verdicts.contrasts[0]
    assert (contrast.word, verdicts.higher_is_better, verdicts.unit) == ("better", True, "accuracy")
    assert contrast.difference == pytest.approx(0.0456667) and contrast.low > 0
    assert "new is better than base by 0.046 accuracy (95 % interval 0.0" in in_words(verdicts)
    assert judged("accuracy", HIGH, LOW).contrasts[0].word == "worse"
    assert judged("loss").contrasts[0].word == "worse" and judged().contrasts[0].word == "worse"
    assert verdicts.to_json()["higher_is_better"] is True
    assert verdicts.read_as == "accuracy, higher is better, unit accuracy"


def test_an_unknown_direction_is_refused_with_the_ways_out() -> None:
    with pytest.raises(ConfigError, match="whether a higher or a lower 'quality' is better is not known") as error:
        judged("quality", metric="quality")
    assert error.value.hint == "higher_is_better=True or higher_is_better=False"
    assert judged("quality", metric="quality", higher_is_better=True).contrasts[0].word == "better"
    lower = judged("quality", metric="quality", higher_is_better=False, unit="points")
    assert (lower.contrasts[0].word, lower.unit) == ("worse", "points")


def test_the_plain_column_is_a_loss_in_nats_unless_told() -> None:
    assert judged().read_as == "value, lower is better, unit nats"
    assert judged(higher_is_better=True).read_as == "value, higher is better, unit value"
    assert judged(unit="points").unit == "points"


def test_the_unigram_floor_is_for_losses_in_nats() -> None:
    for terms in ({"name": "accuracy"}, {"name": "bits_per_byte"}, {"higher_is_better": True}):
        with pytest.raises(ConfigError, match="unigram: it bounds a loss in nats"):
            judged(unigram=3.3, **terms)
    assert judged("val/loss", metric="val/loss", unigram=0.3).arms[0].failed == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_what_is_no_number_failed_in_both_directions(name: str, value: float) -> None:
    assert judged(name, new=(*HIGH, value)).contrasts[0].word == "unstable (1 of 4 failed)"


def test_the_value_column_is_the_one_known_metric() -> None:
    rows = [
        {"arm": a, "seed": s, "acc": v, "acc_stderr": 0.1, "lr": 1} for a in ("base", "new") for s, v in enumerate(LOW)
    ]
    assert compare(rows, baseline="base", smallest_effect=0.01).metric == "acc"
    with pytest.raises(ConfigError, match=r"which metric\? The table holds acc, val_loss"):
        compare([row | {"val_loss": 2.0} for row in rows], baseline="base", smallest_effect=0.01)
