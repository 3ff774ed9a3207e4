"""Reading a study back: what counts as a value, what is listed apart, and what the verdicts are computed from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_up_study import IDENTITY, KEY, UNIGRAM, run_id, typed, write
from scipy import stats

from gpt2lab.analysis import compare
from gpt2lab.analysis.results import cleaned, collect, contexts_of, final_values, load_results, missing_runs
from gpt2lab.analysis.studies import LATE, judge, judge_contexts
from gpt2lab.errors import ConfigError
from gpt2lab.records import History, StudyRecord
from gpt2lab.store import Store

MakeStudy = Callable[..., dict[str, Any]]


def change(path: Path, **values: object) -> None:
    write(path, json.loads(path.read_text()) | values)


def set_final(run: Path, value: float) -> None:
    change(run / "evaluations" / f"{KEY}.json", metrics={"val/loss": value, "val/bits_per_byte": value / math.log(2)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def contexts(study: StudyRecord, store: Store) -> pd.DataFrame:
    columns = ["arm", "seed", "multiple", "length", "loss"]
    return pd.DataFrame(contexts_of(study, collect(study, store)), columns=columns)


def test_final_values_come_from_the_evaluation_of_the_study(make_study: MakeStudy, store: Store) -> None:
    study = make_study()
    run = store.root / run_id("rotary", 1)
    set_final(run, 1.5)
    other = run / "evaluations" / f"{'0' * 16}.json"
    write(other, {"key": "0" * 16, "metrics": {"val/loss": 0.1}, "contexts": {}})
    values = final_values(typed(study), store).set_index(["arm", "seed"])["value"]
    assert len(values) == 9
    assert values["rotary", 1] == 1.5


@pytest.mark.parametrize(
    ("final", "result", "failed"),
    [
        (None, {"status": "diverged", "reason": "inf loss at step 12"}, True),
        (math.inf, {}, True),
        (UNIGRAM - 0.04, {}, True),  # within the margin of the unigram floor
        (UNIGRAM - 0.06, {}, False),
    ],
)
def test_failed_runs_stay_in_the_table_and_make_a_contrast_unstable(
    make_study: MakeStudy, store: Store, final: float | None, result: dict[str, str], failed: bool
) -> None:
    study, run = make_study(), store.root / run_id("none", 0)
    change(run / "result.json", **result)
    if final is not None:
        set_final(run, final)
    values = final_values(typed(study), store).set_index(["arm", "seed"])["value"]
    assert math.isnan(values["none", 0]) == (final is None or math.isinf(final))
    assert missing_runs(typed(study), store).empty
    verdict = next(c for c in judge(typed(study), store).contrasts if c.arm == "none")
    assert (verdict.failed_arm, verdict.n_arm) == ((1, 2) if failed else (0, 3))
    assert verdict.word.startswith("unstable") == failed
    if result:
        again = compare(load_results("posenc", store.root), baseline="learned", smallest_effect=0.05)
        assert next(c for c in again.contrasts if c.arm == "none").failed_arm == 1


def test_runs_without_a_value_are_listed_with_their_reason(make_study: MakeStudy, store: Store) -> None:
    study = make_study()
    shutil.rmtree(store.root / run_id("rotary", 0))
    (store.root / run_id("rotary", 1) / "result.json").unlink()
    failed = store.root / run_id("rotary", 2)
    (failed / "result.json").unlink()
    write(failed / "failure.json", {"reason": "out of memory", "phase": "training", "step": 7})
    (store.root / run_id("none", 0) / "evaluations" / f"{KEY}.json").unlink()
    (store.root / run_id("none", 1) / "result.json").write_text("{")
    missing = missing_runs(typed(study), store).set_index(["arm", "seed"])
    statuses = {key: row["status"] for key, row in missing.iterrows()}
    assert statuses == {
        ("rotary", 0): "absent", ("rotary", 1): "partial", ("rotary", 2): "failed", ("none", 0): "unevaluated",
        ("none", 1): "damaged",
    }  # fmt: skip
    assert missing.loc[("rotary", 2), "reason"] == "training, step 7: out of memory"
    assert KEY in missing.loc[("none", 0), "reason"]
    assert "result.json" in missing.loc[("none", 1), "reason"]
    assert set(final_values(typed(study), store)["arm"]) == {"learned", "none"}


def test_looking_before_every_seed_is_done_is_exploratory(make_study: MakeStudy, store: Store) -> None:
    study = make_study(seeds=4)
    assert {c.arm: c.word for c in judge(typed(study), store).contrasts}["rotary"] == "better"
    (store.root / run_id("rotary", 3) / "result.json").unlink()
    assert {c.arm: c.word for c in judge(typed(study), store).contrasts}["rotary"] == "exploratory"


def test_a_declared_reason_makes_an_arm_exploratory(make_study: MakeStudy, store: Store) -> None:
    study = make_study()
    study["arms"]["rotary"]["exploratory"] = "it touches the schedule"
    contrast = next(c for c in judge(typed(study), store).contrasts if c.arm == "rotary")
    assert (contrast.word, contrast.reason) == ("exploratory", "it touches the schedule")


def test_only_contrasts_that_move_the_rate_are_exploratory(make_study: MakeStudy, store: Store) -> None:
    """Two arms with the same other optimizer may be compared with each other, not with the baseline."""
    study = make_study()
    for arm in ("rotary", "none"):
        study["arms"][arm]["moves_rate"] = {"optim.optimizer": '{"name": "muon"}'}
    study["contrasts"] = [["rotary", "learned"], ["none", "rotary"]]
    to_baseline, between = judge(typed(study), store).contrasts
    assert to_baseline.word == "exploratory" and "it changes optim.optimizer, which moves" in str(to_baseline.reason)
    assert between.word == "worse"


@pytest.mark.parametrize("part", list(IDENTITY))
def test_arms_on_another_basis_are_not_comparable(make_study: MakeStudy, store: Store, part: str) -> None:
    study = make_study()
    change(store.root / run_id("rotary", 2) / "run.json", identity=IDENTITY | {part: "another"})
    found = {c.arm: c.word for c in judge(typed(study), store).contrasts}
    assert found["rotary"] == "not comparable"
    assert found["none"] != "not comparable"


def test_verdicts_carry_scope_rate_and_caveat(make_study: MakeStudy, store: Store) -> None:
    study = make_study()
    text = str(judge(typed(study), store))
    for part in ("842 k parameters", "819 k tokens", "shakespeare (bytes)", "shared rate", "early training: sign only"):
        assert part in text
    assert "shared rate" not in str(judge(typed(study).with_(bracketed=True), store))


def test_load_results_has_curves_and_final_metrics(make_study: MakeStudy, store: Store) -> None:
    make_study()
    frame = load_results("posenc", store.root)
    assert list(frame.columns) == ["arm", "seed", "step", "metric", "value"]
    own = frame[(frame["arm"] == "rotary") & (frame["seed"] == 0)]
    assert sorted(own.loc[own["metric"] == "val/loss", "step"]) == list(range(0, 801, 40))
    final = own[own["metric"] == "final/val/loss"]
    assert final["step"].tolist() == [800]
    verdicts = compare(frame, baseline="learned", smallest_effect=0.05)
    assert {c.arm: c.word for c in verdicts.contrasts}["rotary"] == "better"


def test_contexts_leave_out_what_cannot_be_extended(make_study: MakeStudy, store: Store) -> None:
    frame = contexts(typed(make_study()), store)
    by_arm = {arm: sorted(set(own["length"])) for arm, own in frame.groupby("arm")}
    assert by_arm == {"learned": [64, 128], "rotary": [64, 128, 256, 512], "none": [64, 128, 256, 512]}
    assert frame.groupby(["arm", "length"]).size().eq(3).all()


def test_an_unknown_study_is_named_with_its_neighbour(make_study: MakeStudy, store: Store) -> None:
    make_study()
    with pytest.raises(ConfigError, match="posenc@nano"):
        load_results("posenk@nano", store.root)


def test_cleaned_records_can_be_printed_anywhere() -> None:
    record = cleaned({"a\x00b": ["x\ud800\u202ey", 3, None], "n": {"line\nbreak": True}})
    assert record == {"a\ufffdb": ["x\ufffd\ufffdy", 3, None], "n": {"line break": True}}
    json.dumps(record, ensure_ascii=False).encode()


def test_arms_are_judged_beyond_the_training_context_against_themselves(make_study: MakeStudy, store: Store) -> None:
    study = typed(make_study(judged_contexts=[2, 4], seeds=4))
    rows = {(row.arm, row.multiple): row for row in judge_contexts(study, collect(study, store))}
    assert rows.keys() == {(arm, at) for arm in ("learned", "rotary", "none") for at in (2, 4)}
    assert rows["learned", 2].contrast is None  # its positions end there
    losses = contexts(study, store).query("arm == 'rotary'").pivot(index="seed", columns="multiple", values="loss")
    for multiple in (2, 4):
        paired = stats.ttest_rel(losses[multiple], losses[1.0])
        low, high = paired.confidence_interval(0.96)  # a fifth of the 5 % is kept back for later seeds
        row = rows["rotary", multiple]
        assert row.loss == pytest.approx(losses[multiple].mean()) and row.length == 128 * multiple
        contrast = row.contrast
        assert contrast is not None and contrast.word == "worse"
        assert contrast.difference == pytest.approx((losses[multiple] - losses[1.0]).mean())
        assert contrast.raw_low < low < high < contrast.raw_high  # valid at any ratio of noise, hence wider
        assert contrast.p_holm >= contrast.p >= paired.pvalue


def test_longer_contexts_claim_nothing_unless_they_were_declared_in_time(make_study: MakeStudy, store: Store) -> None:
    study = typed(make_study(judged_contexts=[2]))
    history = History(
        looks=[], first_seeds=3, smallest_effect=study.smallest_effect, alpha=study.alpha, late_contexts=[2]
    )
    for record, arms in ((study.with_(judged_contexts=[]), 4), (study.with_(history=history), 2)):
        judged = [row.contrast for row in judge_contexts(record, collect(record, store)) if row.contrast]
        assert len(judged) == arms and {c.word for c in judged} == {"exploratory"}
    assert LATE in {c.reason for c in judged}


def test_a_run_that_failed_is_counted_at_longer_contexts(make_study: MakeStudy, store: Store) -> None:
    study = typed(make_study(judged_contexts=[2]))
    set_final(store.root / run_id("rotary", 0), math.inf)
    rows = {row.arm: row.contrast for row in judge_contexts(study, collect(study, store))}
    assert rows["rotary"] and rows["rotary"].word.startswith("unstable")
