"""`compare` end to end: golden contrasts, readable errors, invariances, output, arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gpt2lab.analysis
from gpt2lab.analysis import Verdicts, compare, in_words
from gpt2lab.errors import ConfigError

Table = list[dict[str, Any]]


def table(**arms: Any) -> Table:
    return [{"arm": a, "seed": s, "value": v} for a, values in arms.items() for s, v in enumerate(values)]


def study(seed: int = 0, n: int = 4, **means: float) -> Table:
    rng = np.random.default_rng(seed)
    return table(**{arm: rng.normal(mean, 0.012, n) for arm, mean in means.items()})


NANO = study(seed=1, learned=2.15, rotary=1.89, alibi=2.149, none=2.3)


def verdicts(source: Any = None, **terms: Any) -> Verdicts:
    chosen: dict[str, Any] = {"baseline": "learned", "smallest_effect": 0.05} | terms
    return compare(NANO if source is None else source, **chosen)


def test_each_line_carries_its_scope() -> None:
    lines = str(verdicts(at_shared_rate=True, scope="at 842k parameters", caveat="sign only")).splitlines()
    assert len(lines) == 3
    for line, arm in zip(lines, ("rotary", "alibi", "none"), strict=True):
        assert line.startswith(f"{arm} against learned: ")
        assert line.endswith("; at 842k parameters; at the shared rate; sign only")
    assert "shared rate" not in str(verdicts())


@pytest.mark.parametrize(("change", "terms"), [
    (pd.DataFrame, {}),
    (lambda rows: pd.DataFrame(rows).astype(object), {}),
    (lambda rows: pd.DataFrame(rows).astype({"value": "float32"}), {}),
    (lambda rows: pd.DataFrame(rows).rename(columns={"seed": "run"}), {}),
    (lambda rows: pd.DataFrame(rows).rename(columns={"value": "loss"}).assign(value="unused"), {"metric": "loss"}),
])  # fmt: skip
def test_every_kind_of_table_gives_the_same(change: Any, terms: dict[str, Any], tmp_path: Path) -> None:
    source, file = change(NANO), tmp_path / "r.csv"
    assert str(verdicts(source, **terms)) == str(verdicts())
    source.assign(note="x, y").to_csv(file, index=False, encoding="utf-8-sig")
    assert str(verdicts(file, **terms)) == str(verdicts(str(file), **terms)) == str(verdicts())


def test_blank_is_not_yet_and_nan_is_failed(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    for arm, cell, word in (("rotary", "", "exploratory"), ("alibi", "nan", "unstable (1 of 4 failed)")):
        values = [row | {"value": cell} if (row["arm"], row["seed"]) == (arm, 0) else row for row in NANO]
        pd.DataFrame(values).to_csv(path, index=False, na_rep="nan" if cell else "")
        found = next(c for c in verdicts(path).contrasts if c.arm == arm)
        assert (found.word, found.failed_arm) == (word, int(bool(cell)))


def test_other_labels_another_order_and_a_shift_change_nothing() -> None:
    shuffled = [NANO[i] | {"seed": 900 - 7 * NANO[i]["seed"]} for i in np.random.default_rng(1).permutation(len(NANO))]
    assert sorted(str(verdicts(shuffled)).splitlines()) == sorted(str(verdicts()).splitlines())
    for offset in (-5.0, 100.0):
        assert str(verdicts([row | {"value": row["value"] + offset} for row in NANO])) == str(verdicts())


def test_swapping_the_arms_of_a_contrast_turns_the_sign_and_nothing_else() -> None:
    there, back = (verdicts(contrasts=[pair]).contrasts[0] for pair in (("rotary", "learned"), ("learned", "rotary")))
    assert (there.word, back.word) == ("better", "worse")
    assert back.difference == pytest.approx(-there.difference) and back.p == pytest.approx(there.p)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_declared_contrasts_are_the_family() -> None:
    one, all_three = verdicts(contrasts=[("rotary", "learned")]).contrasts[0], verdicts().contrasts[0]
    assert one.p_holm == one.p == all_three.p and (one.low, one.high) == pytest.approx((one.raw_low, one.raw_high))
    assert all_three.p_holm > all_three.p and all_three.low < all_three.raw_low
    assert [(c.arm, c.against) for c in verdicts(contrasts=[["none", "rotary"]]).contrasts] == [("none", "rotary")]


def test_the_rows_and_the_json() -> None:
    result = verdicts(table(learned=(2.1, 2.2, 2.3), rotary=(1.9,), none=(float("nan"),) * 3))
    frame = result.table()
    assert frame["arm"].tolist() == ["rotary", "none"] and {"p_holm", "raw_low", "p_paired"} <= set(frame.columns)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["contrasts"][1]["difference"] is None and record["arms"][0]["mean"] == pytest.approx(2.2)
    assert [(arm.name, arm.n, arm.failed) for arm in result.arms] == [
        ("learned", 3, 0),
        ("rotary", 1, 0),
        ("none", 0, 3),
    ]


def test_a_baseline_alone_is_no_error() -> None:
    alone = verdicts(table(learned=(2.1, 2.2)))
    assert "no contrast" in str(alone) and alone.table().empty and "Nothing was compared" in in_words(alone)


def test_in_words_says_what_was_found_what_was_not_and_where_it_holds() -> None:
    text = in_words(verdicts(scope="at nano", at_shared_rate=True, caveat="sign only"))
    assert f"rotary is better than learned by {-verdicts().contrasts[0].difference:.3f} nats (95 % interval " in text
    assert "none is worse than learned by" in text
    assert "etween alibi and learned" in text and "smaller than 0.05 nats" in text and "at most 5 %" in text
    assert text.endswith("at nano, at the shared rate. Caveat: sign only.")


def test_in_words_claims_nothing_that_the_words_do_not() -> None:
    noisy = verdicts(table(learned=(2.1, 2.2, 2.15), rotary=(2.08, 2.19, 2.12)), smallest_effect=0.1)
    assert noisy.contrasts[0].word.startswith("inconclusive")
    assert "Left open, which is not the same as no difference: rotary (need about" in in_words(noisy)
    broken = in_words(verdicts(table(learned=(2.1, 2.2, 2.3), rotary=(float("nan"),) * 3)))
    assert broken == "No arm was found better or worse. Unstable: rotary (3 of 3 failed; too many to judge the rest)."
    few = in_words(verdicts(study(n=2, learned=2.15, rotary=1.9)))
    assert "nothing is claimed: rotary (fewer than 3 seeds)" in few and "Tested" not in few
    barred = in_words(verdicts(not_comparable={"rotary": "other tokenizer"}))
    assert "Not comparable: rotary (other tokenizer)." in barred and "rotary is better" not in barred


def test_importing_it_loads_neither_torch_nor_statsmodels() -> None:
    heavy = "import sys, gpt2lab.analysis; print([m for m in ('torch', 'statsmodels', 'mlflow') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert set(gpt2lab.analysis.__all__) >= {"compare", "in_words", "Verdicts", "Contrast", "Noise"}


SIX = [{"arm": a, "seed": s, "value": 2.0 + s / 100} for a in ("base", "new") for s in range(3)]
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
        ("contrasts", [("new", "new")], "contrasts: a contrast is a pair of two arms"),
        ("contrasts", [("new", "base"), ("base", "new")], "base and new are compared twice"),
        ("baseline", "bas", r"unknown baseline 'bas'; did you mean 'base'\?"),
        ("metric", "vale", r"unknown column 'vale'; did you mean 'value'\?"),
        ("smallest_effect", float("nan"), "smallest_effect: a positive"),
        ("alpha", 1.0, "alpha: a level between 0 and 0.5"),
        ("frame", {"arm": ["base"]}, "a table is expected .* not dict"),
        ("frame", "a\0b", "not a CSV file in UTF-8"),
    ],
)  # fmt: skip
def test_arguments_of_wrong_types(name: str, given: Any, said: str) -> None:
    terms: dict[str, Any] = {"frame": SIX, "baseline": "base", "smallest_effect": 0.05} | {name: given}
    with pytest.raises(ConfigError, match=said):
        compare(terms.pop("frame"), **terms)


def test_all_wrong_arguments_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        compare(SIX, baseline="base", smallest_effect=-1, alpha=2, looks=(2,))
    assert [problem.where for problem in error.value.problems] == ["smallest_effect", "alpha", "looks"]
