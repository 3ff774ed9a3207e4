"""How long arms train, and arms made equal, as plans have them."""

from __future__ import annotations

import pytest
from tiny_plan import ABLATION, Planned

from gpt2lab.errors import ConfigError
from gpt2lab.inspection.costs import costs
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.record import study_record

HEAD = "ablation: tiny\nquestion: Which?\nbase: tiny.yaml\nbaseline: a\nseeds: 2\n"
WIDE = HEAD + "arms:\n  a: {}\n  b: {model.mlp: {name: swiglu, two_thirds: false}}\n  c: {model.head: untied}\n"
LARGE = ["model.n_embd=128", "training.steps=240", "optim.warmup_steps=24"]


def width(arm: ArmPlan) -> float:
    return arm.arm.config.model.mlp_ratio * arm.arm.config.model.n_embd


def flops(arm: ArmPlan) -> float:
    return costs(arm.arm.config.model).flops_per_token * arm.tokens


def steps(plan: Plan) -> dict[str, int]:
    return {name: arm.arm.config.training.steps for name, arm in plan.arms.items()}


def test_parameters_are_made_equal_and_the_plan_says_by_what(planned: Planned) -> None:
    """By hand: a channel of width has 257 parameters, 386 with full swiglu, and an untied head is worth 256 x 128:
    512 x 257 / 386 = 340.9, and 512 - 32768 / (2 x 257) = 448.2."""
    plan = planned(WIDE + "equalise: parameters\n", overrides=LARGE)
    assert {name: width(arm) for name, arm in plan.arms.items()} == {"a": 512, "b": 344, "c": 448}
    for arm in plan.arms.values():
        assert abs(costs(arm.arm.config.model).parameters / plan.baseline.costs.parameters - 1) <= 0.01
        assert arm.costs == costs(arm.arm.config.model) and arm.tokens == plan.baseline.tokens
        assert [run.config.model for run in arm.runs] == 2 * [arm.arm.config.model]
    assert plan.baseline.adjustment is None
    plain = planned(WIDE, overrides=LARGE)
    assert [run.id for run in plan.baseline.runs] == [run.id for run in plain.baseline.runs]
    record = study_record(plan, reproduce="")
    assert record["arms"]["b"]["adjustment"].startswith("MLP width (mlp_ratio x n_embd) 512 -> 344: ")
    assert record["arms"]["a"]["adjustment"] is None and record["equalise"] == "parameters"


def test_flops_are_made_equal_by_tokens(planned: Planned) -> None:
    plan = planned(WIDE + "equalise: flops\n", overrides=LARGE)
    assert steps(plan)["a"] == steps(plan)["c"] == 240 > steps(plan)["b"]
    assert abs(flops(plan.arms["b"]) / flops(plan.baseline) - 1) <= 0.01
    assert plan.arms["b"].arm.config.optim.warmup_steps == round(steps(plan)["b"] / 10)


def test_arms_that_cannot_be_made_equal_are_all_told_with_the_knob_that_would_do(planned: Planned) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(WIDE + "equalise: {axis: parameters, by: depth}\n", overrides=LARGE)
    assert [problem.where for problem in caught.value.problems] == ["arm b", "arm c"]
    assert "depth cannot make parameters equal to within 1 %: the nearest is" in str(caught.value)
    assert caught.value.hint == "equalise: {axis: parameters, by: mlp_width}"
    huge = WIDE.replace("model.head: untied", "model.vocab_size: 9000")
    with pytest.raises(ConfigError, match=r"arm c: .* no other knob would do") as caught:
        planned(huge + "equalise: parameters\n", overrides=LARGE)
    assert caught.value.hint == "--arms a,b"


def test_a_change_that_the_knob_undoes_is_told(planned: Planned) -> None:
    """Twice the width, made equal by width, is the baseline again."""
    text = WIDE.replace("model.head: untied", "model.mlp_ratio: 8")
    with pytest.raises(ConfigError, match=r"arm c: made equal \(.* 1024 -> 512\), it is the same training as arm 'a'"):
        planned(text + "equalise: parameters\n", overrides=LARGE)
    control = WIDE.replace("model.head: untied", "control: true")
    plan = planned(control + "equalise: parameters\n", overrides=LARGE)
    assert plan.arms["c"].arm.config == plan.baseline.arm.config and plan.arms["c"].adjustment is None


def test_rates_are_bracketed_and_budgets_curved_around_the_equal_arm(planned: Planned) -> None:
    text = (
        WIDE + "tune: {grid: {optim.lr: [0.5x, 1x, 2x]}}\nbudget_curve: {budgets: [0.5, 1, 2], arms: [b]}\nequalise: "
    )
    plan = planned(text + "parameters\n", overrides=LARGE)
    b = plan.arms["b"]
    assert b.tuning is not None and plan.tuning
    assert {run.config.model.mlp_ratio for run in b.tuning.runs} == {344 / 128}
    assert [(b.tuning.labels[run.id], run.config.optim.lr) for run in b.tuning.runs] == [
        ("lr x0.5", 0.005), ("lr x1", 0.01), ("lr x2", 0.02),
    ]  # fmt: skip
    assert b.curve.keys() == plan.baseline.curve.keys() == {0.5, 2} and not plan.arms["c"].curve
    plan = planned(text + "flops\n", overrides=LARGE)
    b = plan.arms["b"]
    for budget, runs in b.curve.items():
        config, base = runs[0].config, plan.baseline.curve[budget][0].config
        assert config.training.steps == round(steps(plan)["b"] * budget) and base.training.steps == 240 * budget
        assert abs(config.optim.warmup_steps - config.training.steps / 10) <= 1
        ratio = costs(config.model).flops_per_token * config.training.steps
        assert abs(ratio / (costs(base.model).flops_per_token * base.training.steps) - 1) <= 0.01


def test_tokens_per_parameter_are_those_of_the_baseline(planned: Planned) -> None:
    """Also for an arm that has fewer: its tokens are what is equal."""
    plan = planned(ABLATION + "tokens_per_parameter: 5\n")
    learned = plan.arms["learned"]
    assert steps(plan) == dict.fromkeys(("learned", "rotary"), round(5 * learned.costs.parameters / 64))
    assert plan.arms["rotary"].costs.parameters < learned.costs.parameters
    assert learned.arm.config.optim.warmup_steps == round(steps(plan)["learned"] * 4 / 24)
    assert plan.ablation.scale == "tiny-5tpp"


def test_a_ladder_keeps_arms_of_other_batches_at_equal_tokens(planned: Planned) -> None:
    arms = ABLATION.replace("{model.position: rotary}", "{training: {batch_tokens: 128, steps: 12}}")
    plan = planned(arms + "tokens_per_parameter: 5\n")
    learned, other = plan.arms["learned"], plan.arms["rotary"]
    assert learned.tokens == other.tokens and learned.tokens % 128 == 0
    assert abs(learned.tokens - 5 * learned.costs.parameters) <= 64
    assert steps(plan)["learned"] == 2 * steps(plan)["rotary"]


def test_a_ladder_equalises_after_its_budget_is_known(planned: Planned) -> None:
    plan = planned(WIDE + "tokens_per_parameter: 0.5\nequalise: flops\n", overrides=LARGE)
    parameters = plan.baseline.costs.parameters
    assert steps(plan)["a"] == steps(plan)["c"] == round(0.5 * parameters / 64)
    assert abs(flops(plan.arms["b"]) / flops(plan.baseline) - 1) <= 0.01
