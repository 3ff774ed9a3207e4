"""Ablations whose arms are tuned first: what `tune:` may say, what is planned, and what is declared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import end
from tiny_plan import ABLATION, Planned

from gpt2lab.errors import ConfigError
from gpt2lab.planning import forecast
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.record import study_record
from gpt2lab.planning.scope import StudyScope, study_seconds
from gpt2lab.planning.tuning import Tuning
from gpt2lab.records import SweepRecord
from gpt2lab.store import Store
from gpt2lab.tracking.follower import runs_of

TUNE = "tune: {space: {optim.lr: {low: 0.25, high: 4, log: true, relative: true}}, trials: 4, sampler: qmc}\n"
TUNED = ABLATION + TUNE
POST = TUNED.replace("model.position: rotary", "model.residual: post").replace("rotary", "post")

Search = Callable[..., dict[str, Any]]


def tuning(plan: Plan, arm: str) -> Tuning:
    found = plan.arms[arm].tuning
    assert found is not None
    return found


def trial(slot: int, lr: float, value: float | None, outcome: str = "finished") -> dict[str, Any]:
    return {"slot": slot, "outcome": outcome, "settings": {"optim.lr": lr}, "value": value, "tokens": 1536}


def keep(plan: Plan, trials: Mapping[str, list[dict[str, Any]]], root: Path, **changed: Any) -> None:
    """The record of searches that have come so far."""
    searches = {}
    for name, done in trials.items():
        search = tuning(plan, name).search
        assert search is not None
        space = [one.as_record() for one in search.space.dimensions]
        searches[name] = {"study": search.study, "space": space, "trials": done, **changed}
    record = {"name": "tiny@tiny", "sweep": "tiny", "scale": "tiny", "trials": 4, "evaluation": {"key": "e"}}
    Store(root / "runs").write_sweep(SweepRecord.read(record | {"searches": searches}, "a test"))


def done(best: float, worst: float = 0.0125, *, outcome: str = "finished") -> list[dict[str, Any]]:
    """Four trials, the best in the middle of the space."""
    return [trial(0, worst, 2.4), trial(1, best, 2.1), trial(2, 0.03, 2.5), trial(3, 0.006, 2.6, outcome)]


def test_every_arm_searches_the_same_space_around_its_own_settings(planned: Planned) -> None:
    plan = planned(TUNED.replace("seeds: 2", "  again: {control: true}\nseeds: 2"))
    assert plan.tuning and plan.searches.keys() == plan.arms.keys() == {"learned", "rotary", "again"}
    for search in plan.searches.values():
        [rate] = search.space.dimensions
        assert (rate.name, rate.low, rate.high, rate.log) == ("optim.lr", 0.0025, 0.04, True)
        assert search.trials == 4 and search.settings.sampler.name == "qmc"
    assert plan.searches["learned"].seeds == (100,) and plan.searches["again"].seeds == (600,)
    assert len({search.study for search in plan.searches.values()}) == 3
    assert plan.runs() == []
    of_parts = planned(TUNED.replace("space: {", "space: {model.norm: [layernorm, rmsnorm], ")).searches["learned"]
    assert of_parts.as_written == {"model.norm": "layernorm", "optim.lr": 0.01}


def test_confirmation_runs_follow_at_the_best_settings_and_at_those_as_written(planned: Planned, preset: Path) -> None:
    keep(planned(TUNED), {"learned": done(0.01), "rotary": done(0.02)}, preset.parent)
    plan = planned(TUNED)
    assert not plan.tuning and not plan.searches
    rates = {name: {run.config.optim.lr for run in arm.runs} for name, arm in plan.arms.items()}
    assert rates == {"learned": {0.01}, "rotary": {0.02}}
    learned, rotary = plan.arms["learned"], plan.arms["rotary"]
    assert [run.id for run in learned.shared] == [run.id for run in learned.runs]  # its own settings were best
    assert {run.config.optim.lr for run in rotary.shared} == {0.01}
    assert [run.seed for run in rotary.shared] == [run.seed for run in rotary.runs] == [0, 1]
    assert len(plan.runs()) == 2 + 4
    untuned = planned(ABLATION)
    assert [run.id for run in rotary.shared] == [run.id for run in untuned.arms["rotary"].runs]


def test_a_search_counts_only_if_it_is_of_this_space_and_over(planned: Planned, preset: Path) -> None:
    first = planned(TUNED)
    keep(first, {"learned": done(0.01), "rotary": done(0.02)[:3]}, preset.parent)
    plan = planned(TUNED)
    assert plan.tuning and plan.searches.keys() == {"learned", "rotary"}  # all of them, so that they share the machine
    assert (tuning(plan, "learned").left, tuning(plan, "rotary").left) == (0, 1)
    keep(first, {"learned": done(0.01), "rotary": done(0.02)}, preset.parent)
    assert not planned(TUNED).tuning
    assert planned(TUNED.replace("high: 4", "high: 8")).tuning  # another space
    assert planned(TUNED.replace("trials: 4", "trials: 5")).tuning  # one trial is left
    assert planned(TUNED, overrides=["training.steps=25"]).tuning  # another training
    fewer = planned(TUNED.replace("trials: 4", "trials: 2"))
    assert not fewer.tuning and tuning(fewer, "rotary").tuned.trials == 2
    keep(first, {"learned": done(0.01), "rotary": done(0.02, outcome="running")}, preset.parent)
    assert planned(TUNED).tuning


def test_arms_with_another_budget_are_not_comparable(planned: Planned, preset: Path) -> None:
    """A pruned or diverged trial told something of its settings; one that failed did not."""
    first = planned(TUNED)
    keep(first, {"learned": done(0.01, outcome="pruned"), "rotary": done(0.02, outcome="failed")}, preset.parent)
    plan = planned(TUNED)
    assert not plan.tuning and tuning(plan, "learned").reason is None
    assert tuning(plan, "rotary").reason == "it was tuned by 3 trials, others by 4, since 1 of them failed"
    record = study_record(plan, reproduce="").plain()
    assert record["arms"]["rotary"]["not_comparable"] == tuning(plan, "rotary").reason
    assert record["arms"]["rotary"]["tuned"]["failed"] == 1 and record["arms"]["learned"]["tuned"]["pruned"] == 1
    assert len(record["arms"]["rotary"]["runs"]) == 2  # for whoever wants numbers all the same


def test_an_arm_of_which_nothing_finished_has_no_runs(planned: Planned, preset: Path) -> None:
    lost = [trial(slot, 0.01, None, "diverged") for slot in range(4)]
    keep(planned(TUNED), {"learned": done(0.01), "rotary": lost}, preset.parent)
    plan = planned(TUNED)
    assert not plan.tuning and tuning(plan, "rotary").settings is None
    assert plan.arms["rotary"].runs == plan.arms["rotary"].shared == ()
    assert tuning(plan, "rotary").reason == "no trial of its search finished (4 diverged)"
    assert len(plan.runs()) == 2
    record = study_record(plan, reproduce="").plain()
    assert record["arms"]["rotary"]["runs"] == {} and record["arms"]["rotary"]["tuned"]["diverged"] == 4


def test_a_search_that_gave_up_is_over(planned: Planned, preset: Path) -> None:
    text = TUNED.replace("trials: 4", "trials: 8, max_failures: 1")
    broken = [*done(0.02), trial(4, 0.03, None, "failed"), trial(5, 0.03, None, "failed")]
    whole = [*done(0.01), *(trial(slot, 0.02, 2.3) for slot in range(4, 8))]
    keep(planned(text), {"learned": whole, "rotary": broken}, preset.parent)
    plan = planned(text)
    assert not plan.tuning
    assert tuning(plan, "rotary").reason == "it was tuned by 4 trials, others by 8, since 2 of them failed"
    assert planned(text.replace("max_failures: 1", "max_failures: 2")).tuning


def test_the_record_declares_the_search_and_says_what_it_found(planned: Planned, preset: Path) -> None:
    open_ = study_record(planned(TUNED), reproduce="").plain()
    assert open_["tune"]["trials"] == 4 and open_["tune"]["tuning_seeds"] == [100]
    assert open_["tune"]["space"]["optim.lr"]["low"] == 0.25
    assert all(arm["runs"] == arm["shared"]["runs"] == {} for arm in open_["arms"].values())
    keep(planned(TUNED), {"learned": done(0.01), "rotary": done(0.02)}, preset.parent)
    plan = planned(TUNED)
    record = study_record(plan, reproduce="").plain()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["hash"] == open_["hash"] != study_record(planned(ABLATION), reproduce="")["hash"]
    assert study_record(planned(TUNED.replace("trials: 4", "trials: 2")), reproduce="")["hash"] != record["hash"]
    rotary = record["arms"]["rotary"]
    assert rotary["tuned"]["settings"] == {"optim.lr": 0.02} and rotary["tuned"]["value"] == 2.1
    assert (rotary["tuned"]["sweep"], rotary["tuned"]["label"]) == ("tiny@tiny", "rotary")
    assert rotary["tuned"]["trials"] == rotary["tuned"]["finished"] == 4
    assert (
        rotary["lr"] == 0.02 and rotary["shared"]["lr"] == 0.01 and rotary["shared"]["settings"] == {"optim.lr": 0.01}
    )
    assert rotary["shared"]["runs"] == {str(run.seed): run.id for run in plan.arms["rotary"].shared}
    assert record["scope"]["optimizer"] == "adamw"  # no rate in particular
    found = [(arm, which) for arm, which, _ in runs_of(Store(preset.parent / "runs"), record)]
    assert found == [("learned", "0"), ("rotary", "0"), ("rotary", "0 shared"), ("learned", "1"), ("rotary", "1"),
                     ("rotary", "1 shared")]  # fmt: skip


def test_the_hash_of_ablations_without_a_search_is_what_it_was(planned: Planned) -> None:
    from gpt2lab.identity import digest

    record = study_record(planned(ABLATION), reproduce="").plain()
    assert record["tune"] is None
    own = ("changes", "control", "expected", "settings")
    known = {"bracketed", "floors", "noise", "noise_command", "left_out", "scope", "caveat", "mistakes", "reproduce",
             "stack", "created", "hash", "tune", "earlier", "history", "undeclared_look",
             "judged_contexts", "confirm", "screened", "validation_text", "campaign", "ledger"}  # fmt: skip
    declared = {key: value for key, value in record.items() if key not in known}
    declared["arms"] = {name: {key: arm[key] for key in own} for name, arm in record["arms"].items()}
    assert record["hash"] == digest(declared)


def test_contrasts_that_move_the_rate_count_once_it_was_searched(planned: Planned) -> None:
    def moved(text: str) -> list[str]:
        return list(study_record(planned(text), reproduce="").arms["post"].moves_rate)

    assert moved(POST) == []
    assert moved(POST.replace(TUNE, "")) == ["model.residual"]
    weight_decay = "optim.optimizer.weight_decay: {low: 0, high: 0.2}"
    assert moved(POST.replace("optim.lr: {low: 0.25, high: 4, log: true, relative: true}", weight_decay)) == [
        "model.residual"
    ]


def test_trials_are_forecast(planned: Planned, preset: Path) -> None:
    plan, plain = planned(TUNED, jobs=1), planned(ABLATION, jobs=1)
    store = Store(preset.parent / "runs")
    each = {name: arm.seconds for name, arm in plan.arms.items()}
    whole = sum((4 + 2 + 2) * seconds for seconds in each.values())
    assert forecast.seconds_left(plan, store) == pytest.approx(whole)
    assert forecast.seconds_left(plain, store) < 0.3 * whole
    scope = StudyScope(tuple(plan.arms), (0, 1), (0, 1))
    assert study_seconds(plan.ablation, scope, each, 1) == pytest.approx(whole)
    keep(plan, {"learned": done(0.01)[:1], "rotary": done(0.02)}, preset.parent)
    half = planned(TUNED, jobs=1)
    left, each = forecast.seconds_left(half, store), {name: arm.seconds for name, arm in half.arms.items()}
    assert left == pytest.approx((3 + 4) * each["learned"] + 4 * each["rotary"])


def test_a_centre_moves_an_arms_space_and_nothing_else(planned: Planned) -> None:
    text = TUNED.replace("trials: 4", "centre: {rotary: {optim.lr: 8}}, enqueue: [{optim.lr: 2}, {}], trials: 4")
    plan = planned(text)
    [learned], [rotary] = (search.space.dimensions for search in plan.searches.values())
    assert (learned.low, learned.high) == (0.0025, 0.04) and (rotary.low, rotary.high) == (0.02, 0.32)
    assert plan.searches["learned"].known_points == [{"optim.lr": 0.02}, {"optim.lr": 0.01}]
    assert plan.searches["rotary"].known_points == [{"optim.lr": 0.16}, {"optim.lr": 0.08}]
    assert plan.arms["rotary"].arm.config.optim.lr == plan.arms["learned"].arm.config.optim.lr == 0.01


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (TUNE, "tune: {grid: {optim.lr: [0.5, 1x, 2x]}}\n", "tune.grid.optim.lr.0: '0.5' does not fit: a multiple"),
        (TUNE, "tune: {grid: {optim.lr: [0x, 1x, 2x]}}\n", "tune.grid.optim.lr.0: '0x' does not fit"),
        (TUNE, "tune: {grid: {optim.lr: [0.5x, 2x, 4x]}}\n", "1 among them"),
        (TUNE, "tune: {grid: {model.mlp_ratio: [0.5x, 1x, 2x]}}\n", "multiples of optim.lr alone"),
        (TUNE, "tune: {grid: {optim.lr: [0.5x, 1x, 2x]}, trials: 4}\n", "tune.trials: is no part of a grid"),
        (TUNE, "tune: {trials: 4}\n", "tune.space: nothing to try"),
        ("model.position: rotary", "model.position: rotary, optim.lr: 1e-3",
         "arms.rotary: sets optim.lr, which `tune` is to find; drop one of the two"),
        ("trials: 4", "trials: 4, metric: val/bits_per_byte", "tune.metric: arms are judged by a low val/loss"),
        ("trials: 4", "trials: 4, direction: maximize", "tune.direction: arms are judged by a low val/loss"),
        ("trials: 4", "trials: 4, centre: {rotray: {optim.lr: 2}}", "did you mean 'rotary'"),
        ("trials: 4", "trials: 4, centre: {rotary: {optim.beta: 2}}", "unknown dimension 'optim.beta'"),
        ("optim.lr: {low", "optim.beta: {low: 0, high: 1}, optim.lr: {low", "tune.space.optim.beta: unknown key"),
        ("low: 0.25", "low: little", "tune.space.optim.lr.low: 'little' does not fit: a number is expected"),
        ("optim.lr: {low", "evaluation.tokens: {low: 10, high: 20}, optim.lr: {low",
         "tune.space.evaluation.tokens: no arm may change this: all arms are judged alike"),
        ("optim.lr: {low", "training.steps: {low: 10, high: 20}, optim.lr: {low",
         "tune.space.training.steps: no arm may change this: arms train on as many tokens"),
        ("low: 0.25", "low: 4.25", "tune.space.optim.lr: low (4.25) must be less than high (4)"),
        ("trials: 4", "trials: 4, enqueue: [{optim.lr: 9}]", "tune.enqueue: optim.lr: 0.09 is outside"),
        ("sampler: qmc", "sampler: qcm", "did you mean 'qmc'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_line_and_key(planned: Planned, old: str, new: str, said: str) -> None:
    assert old in TUNED
    with pytest.raises(ConfigError) as refused:
        planned(TUNED.replace(old, new))
    told = str(refused.value)
    assert said in told, told
    assert "ablation.yaml:" in told


def test_a_space_that_misfits_one_arm_names_it(planned: Planned) -> None:
    text = TUNED.replace("model.position: rotary", "training: {batch_tokens: 128, steps: 12}").replace(
        "optim.lr: {low", "optim.warmup_steps: {low: 2, high: 20}, optim.lr: {low"
    )
    with pytest.raises(ConfigError) as refused:
        planned(text.replace("expected: {rotary: better}\n", ""))
    assert "tune.space.optim.warmup_steps: at arm rotary: " in str(refused.value)


def test_equal_parameters_are_not_searched_away(planned: Planned) -> None:
    text = TUNED.replace("optim.lr: {low", "training.batch_tokens: {low: 64, high: 128}, optim.lr: {low")
    assert planned(text).tuning
    with pytest.raises(ConfigError, match=r"could change what `equalise: wall_clock` makes equal"):
        planned(text + "equalise: wall_clock\n")


GRID = "tune: {grid: {optim.lr: [2x, 1x, 0.5x]}}\n"


def test_a_grid_is_widened_before_the_runs_at_the_best_rate(planned: Planned, preset: Path) -> None:
    store = Store(preset.parent / "runs")
    counts: list[int] = []
    for _ in range(3):
        plan = planned(POST.replace(TUNE, GRID))
        record = study_record(plan, reproduce="")
        assert record.lr_bracket == [0.5, 1, 2] and record.bracketed and record.tune is None
        counts.append(len(plan.runs()))
        for run in plan.runs() if plan.tuning else ():
            end(store.run(run.id), {"status": "finished"})
            loss = 2 + abs(run.config.optim.lr - 0.02)  # the best is first at an edge: x2 of 0.01
            store.run(run.id).write_evaluation({"key": run.evaluation_key, "metrics": {"val/loss": loss}})
    assert counts == [6, 8, 8 + 4] and not plan.tuning
    assert {run.config.optim.lr for arm in plan.arms.values() for run in arm.runs} == {0.02}
    assert plan.ablation.moves_rate("post") == {}
    with pytest.raises(ConfigError, match=r"sets optim\.lr, which `tune` is to find"):
        planned(ABLATION.replace("model.position: rotary", "optim.lr: 1e-3") + GRID)


def test_untuned_arms_train_with_their_settings_as_written(tmp_path: Path) -> None:
    """Also those that would need another rate, which then claim nothing."""
    file = tmp_path / "post.yaml"
    file.write_text(POST.replace("tiny.yaml", "nano"))
    ablation = load_ablation(file, untuned=True)
    assert ablation.tune is None and load_ablation(file).tune is not None
    assert ablation.moves_rate("post") == {"model.residual": '[{"name": "post"}]'}
    file.write_text(ABLATION.replace("tiny.yaml", "nano"))
    assert load_ablation(file, untuned=True) == load_ablation(file)  # it tunes nothing
