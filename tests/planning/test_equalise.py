"""Arms made equal to the baseline in parameters and FLOPs by one knob, against counts of the models that result."""

from __future__ import annotations

import math

import pytest

from gpt2lab.config import Config, config_from_text, load_config
from gpt2lab.errors import ConfigError
from gpt2lab.inspection.costs import costs
from gpt2lab.inspection.costs import parameters as count
from gpt2lab.model import build_model
from gpt2lab.planning.equalise import KNOBS, Adjustment, Measure, equalise, with_steps

WIDE = "model.mlp={name: swiglu, two_thirds: false}"


def parameters(config: Config) -> float:
    return float(count(config.model))


def flops(config: Config) -> float:
    return costs(config.model).flops_per_token * config.training.steps * config.training.batch_tokens


MEASURES: dict[str, Measure] = {"parameters": parameters, "flops": flops}


def equal(scale: str, *changes: str, axis: str = "parameters", knob: str = "mlp_width") -> tuple[Config, Adjustment]:
    """The arm of `changes` made equal to the preset, and what was changed."""
    measure = MEASURES[axis]
    found, adjustment = equalise(
        load_config(scale, changes), measure(load_config(scale)), axis=axis, knob=knob, measure=measure
    )
    assert adjustment is not None
    assert abs(measure(found) / measure(load_config(scale)) - 1) <= 0.01
    assert (adjustment.after, adjustment.target) == (measure(found), measure(load_config(scale)))
    assert adjustment.before == measure(load_config(scale, changes))
    return found, adjustment


def refusal(scale: str, *changes: str, axis: str = "parameters", knob: str = "mlp_width") -> ConfigError:
    measure = MEASURES[axis]
    with pytest.raises(ConfigError) as caught:
        equalise(load_config(scale, changes), measure(load_config(scale)), axis=axis, knob=knob, measure=measure)
    return caught.value


@pytest.mark.parametrize(
    ("scale", "change", "width"),
    [
        # by hand, nano: an MLP of width F has 4 (257 F + 128) parameters in the baseline, 4 (386 F + 128) with swiglu,
        # and an untied head adds 256 x 128: 512 * 257 / 386 = 340.9, and 512 - 32768 / 1028 = 480.1
        ("nano", WIDE, 344),
        ("nano", "model.head=untied", 480),
        # micro: 6 (769 F + 384), 6 (1154 F + 384): 1023.6; and 4096 x 384 more: 1536 - 1572864 / 4614 = 1195.1
        ("micro", WIDE, 1024),
        ("micro", "model.head=untied", 1192),
    ],
)
def test_mlp_width_makes_parameters_equal(scale: str, change: str, width: int) -> None:
    config, _ = equal(scale, change)
    own = load_config(scale, [change])
    assert config.model.mlp_ratio * config.model.n_embd == pytest.approx(width) and width % 8 == 0
    assert config == own.with_changes({"model.mlp_ratio": repr(config.model.mlp_ratio)})  # and nothing else changed
    built = build_model(config.model, seed=0)
    assert sum(p.numel() for p in built.parameters()) == costs(config.model).parameters == parameters(config)
    hidden = {p.shape[1] for name, p in built.named_parameters() if name.endswith("mlp.c_proj.weight")}
    assert hidden == {width}
    assert config_from_text(config.to_yaml()) == config


def test_what_was_changed_is_said() -> None:
    assert str(equal("nano", WIDE)[1]) == (
        "MLP width (mlp_ratio x n_embd) 512 -> 344: 1,106,688 -> 847,296 parameters, the baseline has 842,496 (+0.57 %)"
    )
    assert str(equal("nano", WIDE, axis="flops", knob="tokens")[1]) == (
        "steps 800 -> 627: 5.959e+12 -> 4.671e+12 FLOP, the baseline has 4.671e+12 (-0.00 %)"
    )
    assert "n_layer 4 -> 3: " in str(equal("nano", WIDE, knob="depth")[1])


def test_width_leaves_multiples_of_8_only_where_they_are_too_coarse() -> None:
    """A channel of width has 33 parameters here: 4 more or less than 12 of them are 1.6 % of all."""
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.vocab_size=300", "model.mlp_ratio=4"]
    arm = load_config("nano", [*small, "model.position=none"])
    target = parameters(arm) + 12 * 33
    assert 0.01 < 4 * 33 / target < 0.02
    config, _ = equalise(arm, target, axis="parameters", knob="mlp_width", measure=parameters)
    assert config.model.mlp_ratio * 16 == 64 + 12 and parameters(config) == target


def test_depth_makes_parameters_equal_and_keeps_patterns_whole() -> None:
    """swiglu of full width has 3/2 of an MLP's matrices, so 4 blocks are worth 4 x 12 / (4 + 12) = 3."""
    assert equal("nano", WIDE, knob="depth")[0].model.n_layer == 3
    target = parameters(load_config("nano", ["model.n_layer=6"]))
    pattern = load_config("nano", ["model.norm=[layernorm, rmsnorm]"])
    config, _ = equalise(pattern, target, axis="parameters", knob="depth", measure=parameters)
    assert config.model.n_layer == 6
    target = parameters(load_config("nano", ["model.n_layer=7"]))
    with pytest.raises(ConfigError, match=r"at n_layer (6|8),"):
        equalise(pattern, target, axis="parameters", knob="depth", measure=parameters)


@pytest.mark.parametrize("scale", ["nano", "micro"])
@pytest.mark.parametrize("change", [WIDE, "model.mlp=moe", "model.mlp_ratio=2"])
def test_tokens_make_flops_equal_and_warm_up_keeps_its_share(scale: str, change: str) -> None:
    config, _ = equal(scale, change, axis="flops", knob="tokens")
    plain, own = load_config(scale), load_config(scale, [change])
    share = costs(plain.model).flops_per_token / costs(own.model).flops_per_token
    assert config.training.steps == round(plain.training.steps * share)
    assert config.optim.warmup_steps == round(plain.optim.warmup_steps / plain.training.steps * config.training.steps)
    assert config.model == own.model


def test_tokens_count_batches_of_the_arms_own_size() -> None:
    config, _ = equal("nano", "training.batch_tokens=2048", axis="flops", knob="tokens")
    assert (config.training.steps, config.optim.warmup_steps) == (400, 40)


def test_width_makes_flops_equal() -> None:
    config, _ = equal("nano", WIDE, axis="flops", knob="mlp_width")
    assert config.training == load_config("nano").training and config.model.mlp_ratio == 344 / 128


def test_an_arm_within_one_per_cent_is_left_as_it_is() -> None:
    arm = load_config("nano", ["model.norm=rmsnorm"])
    target = parameters(load_config("nano"))
    assert 0 < 1 - parameters(arm) / target < 0.01
    found = equalise(arm, target, axis="parameters", knob="mlp_width", measure=parameters)
    assert found == (arm, None)


def test_a_knob_that_is_too_coarse_says_how_near_it_came_and_which_other_would_do() -> None:
    error = refusal("micro", WIDE, knob="depth")
    assert str(error) == (
        "depth cannot make parameters equal to within 1 %: the nearest is 13,501,056 parameters at n_layer 5, the "
        "baseline has 12,318,720 (+9.60 %); `by: mlp_width` would do"
    )
    assert error.hint == "equalise: {axis: parameters, by: mlp_width}"
    error = refusal("nano", WIDE, axis="flops", knob="depth")
    assert "at n_layer 3" in str(error) and error.hint == "equalise: {axis: flops, by: tokens}"


def test_embeddings_that_exceed_the_target_are_refused() -> None:
    """50,257 x 384 are 19.3M parameters, the whole baseline has 12.3M: no MLP and no layer are small enough."""
    error = refusal("micro", "model.vocab_size=50257")
    assert "at MLP width (mlp_ratio x n_embd) 1," in str(error) and error.hint is None
    assert str(error).endswith("; no other knob would do")


def test_a_knob_that_changes_nothing_is_refused() -> None:
    """Layers that share one set of weights have as many parameters at any depth."""
    error = refusal("nano", "model.stack=shared_layers", knob="depth")
    assert "by: mlp_width" in str(error)


def test_few_steps_are_too_coarse_for_tokens() -> None:
    """Of 30 steps one is 3.3 %: 30 x 5.70 / 7.27 MFLOP are 23.5 steps."""
    few = ("training.steps=30", "optim.warmup_steps=3")
    with pytest.raises(ConfigError, match=r"at steps 2[34], .*`by: mlp_width` would do"):
        equalise(
            load_config("nano", [WIDE, *few]),
            flops(load_config("nano", few)),
            axis="flops",
            knob="tokens",
            measure=flops,
        )


def test_wall_clock_has_one_knob() -> None:
    assert KNOBS["wall_clock"] == ("tokens",)
    config = load_config("nano")
    with pytest.raises(ConfigError, match="the nearest is 2 s at steps 2") as caught:
        equalise(config, 1.505, axis="wall_clock", knob="tokens", measure=lambda c: float(c.training.steps))
    assert caught.value.hint is None


def test_the_schedule_ends_with_the_steps() -> None:
    config = with_steps(load_config("nano"), 1, "test")
    assert (config.training.steps, config.optim.warmup_steps) == (1, 0)
    longer = with_steps(load_config("nano"), 880, "test")
    assert longer.optim.warmup_steps == 88
    assert math.isclose(longer.optim.multiplier(880)(879), 0.1, abs_tol=1e-4)
