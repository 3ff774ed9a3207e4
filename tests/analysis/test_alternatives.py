"""How many other analyses would have claimed something else."""

from __future__ import annotations

import math
from dataclasses import replace

from gpt2lab.analysis import Verdicts, compare
from gpt2lab.analysis.alternatives import alternatives, claim, without_each_seed
from gpt2lab.analysis.verdicts import TextNoise


def judged(values: list[float], baseline: list[float]) -> Verdicts:
    rows = [{"arm": arm, "seed": seed, "value": value}
            for arm, losses in (("base", baseline), ("arm", values)) for seed, value in enumerate(losses)]  # fmt: skip
    return compare(rows, baseline="base", smallest_effect=0.01)


def test_a_large_difference_holds_in_every_analysis() -> None:
    verdicts = judged([1.0, 1.01, 0.99, 1.005, 0.995], [2.01, 1.99, 2.0, 1.995, 2.003])
    [contrast] = verdicts.contrasts
    found = alternatives(
        verdicts, contrast, TextNoise(se=0.01, count=20, unit="documents"), without_each_seed(verdicts)
    )
    assert {f"without seed {seed}" for seed in range(5)} | {
        "paired by seed",
        "arm and seed",
        "permutation",
        "other text",
    } == set(found)
    assert set(found.values()) == {"better"}
    assert not any("without" in name for name in alternatives(verdicts, contrast, None))


def test_a_claim_that_rests_on_one_seed_is_found() -> None:
    verdicts = judged([1.0, 1.01, 0.99, 1.005, 1.26], [1.07, 1.05, 1.06, 1.055, 1.063])
    [contrast] = verdicts.contrasts
    assert claim(contrast.word) == ""
    found = alternatives(verdicts, contrast, None, without_each_seed(verdicts))
    assert found["without seed 4"] == "better" and found["without seed 0"] == "" and found["paired by seed"] == ""


def test_other_text_can_take_a_claim_away_and_exploratory_contrasts_have_none() -> None:
    verdicts = judged([1.0, 1.01, 0.99, 1.005, 0.995], [2.01, 1.99, 2.0, 1.995, 2.003])
    [contrast] = verdicts.contrasts
    wide = TextNoise(se=1.0, count=5, unit="documents")
    assert alternatives(verdicts, contrast, wide)["other text"] == ""
    for changed in (replace(contrast, word="exploratory"), replace(contrast, p=math.nan)):
        assert alternatives(replace(verdicts, contrasts=(changed,)), changed, wide) == {}


def test_few_seeds_are_not_left_out() -> None:
    verdicts = judged([1.0, 1.01, 0.99], [2.01, 1.992, 2.0])
    found = alternatives(verdicts, verdicts.contrasts[0], None, without_each_seed(verdicts))
    assert not any(name.startswith("without") for name in found) and found["paired by seed"] == "better"
