"""Parts beyond canonical GPT-2 against torch and the formulas of their sources."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import LATER, B, C, D, H, T, context, initial, model, part, random, tokens
from torch import Tensor, nn

from gpt2lab.components.attend import Mask
from gpt2lab.components.head import Head
from gpt2lab.components.linear import rounded_to_float8
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError

# --- norms, MLPs, linear maps ---


def test_derf_is_its_formula() -> None:
    made, x = part("norm", "derf", alpha=0.7), random(3, C)
    with torch.no_grad():
        made.shift.fill_(0.2)
    assert torch.allclose(made(x), torch.tensor([[math.erf(0.7 * u + 0.2) for u in row] for row in x.tolist()]))


def test_partial_rmsnorm_with_all_channels_is_rmsnorm() -> None:
    x = random(3, C)
    assert torch.allclose(part("norm", "partial_rmsnorm", fraction=1.0)(x), F.rms_norm(x, (C,), eps=1e-5), atol=1e-6)
    changed = torch.cat([x[:, :8], 9 * x[:, 8:]], -1)
    made = part("norm", "partial_rmsnorm")
    assert torch.equal(made(changed)[:, :8], made(x)[:, :8])  # channels beyond the first 8 do not count


def test_gated_sigmoid_is_glu() -> None:
    made, x = model(mlp={"name": "activated", "activation": "sigmoid", "gated": True}).h[0].mlp, random(B, T, C)
    gate, up = made.c_fc(x).chunk(2, -1)
    assert torch.allclose(made(x, None), made.c_proj(F.glu(torch.cat([up, gate], -1))), atol=1e-6)


@pytest.mark.parametrize("name", ["mish", "selu", "softsign"])
def test_activations_are_torchs(name: str) -> None:
    made, x = model(mlp={"name": "activated", "activation": name, "norm": True}).h[0].mlp, random(B, T, C)
    assert torch.allclose(made(x, None), made.c_proj(made.ln(getattr(F, name)(made.c_fc(x)))), atol=1e-6)


def test_float8_has_four_bits_of_exponent_and_three_of_mantissa() -> None:
    x = random(7, 9)
    rounded, unit = rounded_to_float8(x), x.abs().max() / 448
    assert ((rounded - x).abs() <= x.abs() / 16 + unit / 512).all()  # half of 1/8, and half of the smallest step
    assert len((rounded / unit).unique()) <= 2 * 126 + 1


# --- scores ---


def attended(made: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax attention by the weights that these scores give.  -> (B, H, T, D)"""
    logits = (q @ k.mT) * D**-0.5
    weights: Tensor = made.weights(logits.masked_fill(LATER, -math.inf), context(model(position="none")))
    return weights @ v


def test_off_by_one_is_torchs_added_zero() -> None:
    reference = nn.MultiheadAttention(C, H, bias=False, add_zero_attn=True, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.eye(C).repeat(3, 1))
        reference.out_proj.weight.copy_(torch.eye(C))
    x = random(B, T, C)
    heads = x.view(B, T, H, D).transpose(1, 2)
    wanted, _ = reference(x, x, x, attn_mask=LATER)
    ours = attended(part("scores", "off_by_one"), heads, heads, heads).transpose(1, 2).flatten(-2)
    assert torch.allclose(ours, wanted, atol=1e-6)


def test_pointwise_and_consmax_are_their_formulas() -> None:
    logits = torch.tensor([[[[-1.0, -math.inf], [0.5, 2.0]]]]).expand(1, H, 2, 2)
    relu = part("scores", "pointwise", divisor=4.0).weights(logits, None)
    assert relu[0, 0].tolist() == [[0.0, 0.0], [0.125, 0.5]]
    square = part("scores", "pointwise", function="squareplus", divisor=1.0).weights(logits, None)
    assert square[0, 0, 1, 1].item() == pytest.approx(1 + math.sqrt(2))
    assert square[0, 0, 0, 1].item() == 0.0
    consmax = part("scores", "consmax").weights(logits, None)
    assert consmax[0, 0].tolist() == [
        pytest.approx([math.exp(-3.5) / 4, 0]),
        pytest.approx([math.exp(-2) / 4, math.exp(-0.5) / 4]),
    ]


def test_distance_is_minus_half_the_square() -> None:
    q, k = random(B, H, T, D), random(B, H, T, D, seed=1)
    made, ctx = part("scores", "distance"), context(model(position="none"))
    logits = (q @ k.mT) * D**-0.5 + made.bias(q, k, random(B, T, C), ctx)
    assert torch.allclose(logits.softmax(-1), (-0.5 * D**-0.5 * torch.cdist(q, k).square()).softmax(-1), atol=1e-6)


def test_residual_scores_add_up() -> None:
    made, ctx = part("scores", "residual_scores"), context(model(position="none"))
    first, second = (random(B, H, T, T, seed=i) for i in (0, 1))
    made.weights(first, ctx)
    assert torch.allclose(made.weights(second, ctx), (first + second).softmax(-1), atol=1e-6)


def test_attention_z_loss_is_counted_in_every_layer() -> None:
    made = model(scores={"name": "z_loss", "weight": 0.5}, position="none")
    ctx = context(made)
    made.hidden(ctx)
    assert sorted(ctx.losses) == ["attention_z.0", "attention_z.1"]
    logits = random(B, H, T, T)
    made.h[0].attn.scores.weights(logits, ctx)
    wanted = 0.5 * logits.exp().sum(-1).log().square().mean()
    assert torch.allclose(ctx.losses[f"attention_z.{ctx.depth}"], wanted)


def test_exclusive_attention_is_orthogonal_to_the_own_value() -> None:
    made, y, v = part("scores", "xsa", trained=False), random(B, T, C), random(B, 2, T, D, seed=1)
    heads = made.finish(y, y, v).unflatten(-1, (H, D))
    assert (heads * v.transpose(1, 2).repeat_interleave(2, 2)).sum(-1).abs().max() < 1e-5
    trained = part("scores", "xsa")
    assert torch.equal(trained.finish(y, y, v), y)  # nothing is removed at first


def test_gates_and_gains_are_per_head() -> None:
    y = random(B, T, C)
    scale, gate = part("scores", "head_scale"), model(scores={"name": "head_gate", "inputs": 3}).h[0].attn.scores
    with torch.no_grad():
        scale.gain.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(scale.finish(y, y, y), y * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(D))
    gates = torch.sigmoid(y[..., :3] @ gate.head_gate.weight.T).repeat_interleave(D, -1)
    assert torch.allclose(gate.finish(y, y, y), gates * y, atol=1e-6)


def test_key_offset_moves_the_second_half() -> None:
    made, k = part("scores", "key_offset"), random(B, H, T, D)
    _, moved = made.prepare(k, k, context(model()))
    assert torch.equal(moved[..., : D // 2], k[..., : D // 2])
    assert torch.equal(moved[:, :, 1:, D // 2 :], k[:, :, :-1, D // 2 :])
    assert moved[:, :, 0, D // 2 :].abs().max() == 0


# --- positions and masks ---


def test_dynamic_bias_is_a_function_of_distance() -> None:
    made = model(position="dynamic_bias").positions[0]
    bias = made.bias(torch.arange(8, T), torch.arange(T))  # the last of a cached sequence
    assert bias.shape == (H, 8, T)
    u = torch.tensor([[math.log1p(5)]])
    assert torch.allclose(bias[:, 2, 5], made.out(F.silu(made.c_fc(u)))[0], atol=1e-6)  # position 10 sees 5


def test_a_window_grows_to_its_full_size() -> None:
    made = model(mask={"name": "growing_window", "start": 2, "window": 10, "warmup": 0.5})
    mask = made.h[0].attn.mask
    for progress, window in ((0.0, 2), (0.25, 6), (0.5, 10), (1.0, 10)):
        assert torch.equal(mask.allowed(context(made, progress=progress)), Mask(window).allowed(context(made))), (
            progress
        )


# --- blocks, across layers ---


def test_macaron_adds_halves() -> None:
    made = model(residual="macaron").h[0]
    x, ctx = random(B, T, C), context(model())
    y = x + made.mlp_first(made.ln_first(x), ctx) / 2
    y = y + made.attn(made.ln_1(y), ctx)
    assert torch.allclose(made(x, ctx), y + made.mlp(made.ln_2(y), ctx) / 2, atol=1e-6)


def test_both_mlps_of_a_macaron_block_are_balanced() -> None:
    made = model(residual="macaron", mlp="moe")
    ctx = context(made)
    made.hidden(ctx)
    assert len(ctx.losses) == 2 * 2


def test_orthogonal_updates_do_not_change_the_stream_along_itself() -> None:
    made, x = model(residual="orthogonal", mlp="none").h[0], random(B, T, C)
    change = made(x, context(model())) - x
    assert (change * x).sum(-1).abs().max() < 1e-5
    assert change.abs().max() > 1e-3


def test_residual_dual_is_post_norm_beside_a_sum() -> None:
    dual, post = (model(residual=name).h[0] for name in ("residual_dual", "post"))
    post.load_state_dict(dual.state_dict())
    x, ctx = random(B, T, C), context(model())
    wanted = post(x, ctx)
    opened = dual.open(x)
    assert torch.allclose(dual(opened, ctx)[:, 0], wanted, atol=1e-6)
    assert torch.allclose(dual.close(opened), x + F.layer_norm(x, (C,)))


def test_token_shift_sees_the_token_before() -> None:
    made, x = model(residual="token_shift", attention="none").h[0], random(B, T, C)
    h = made.ln_2(x)
    before = F.pad(h[:, :-1, : C // 2], (0, 0, 1, 0))
    wanted = x + made.mlp(torch.cat([before, h[..., C // 2 :]], -1), None)
    assert torch.allclose(made(x, context(model())), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["depth_average", "backout"])
def test_connections_without_effect_leave_the_model_as_it_is(name: str) -> None:
    options = {"start": 0.0} if name == "backout" else {}
    assert torch.allclose(initial(stack={"name": name, **options})(tokens()), initial()(tokens()), atol=1e-6)


def test_attention_residuals_are_means_at_first() -> None:
    made = initial(stack="attention_residuals")
    ctx, (x, *changes) = context(made), (random(B, T, C, seed=i) for i in range(3))
    part = made.stack[0]
    assert torch.equal(part.before(0, x, ctx), x)
    part.after(0, x + changes[0], ctx)
    second = part.before(1, x, ctx)
    assert torch.allclose(second, (x + changes[0]) / 2, atol=1e-6)
    part.after(1, second + changes[1], ctx)
    assert torch.allclose(part.before(2, x, ctx), (x + changes[0] + changes[1]) / 3, atol=1e-6)


def test_normed_values_have_unit_size() -> None:
    v = model(stack="value_norm").stack[0].mix_values(0, random(B, H, T, D), None)
    assert torch.allclose(v.square().mean(-1), torch.ones(B, H, T), atol=1e-4)


# --- attention ---


def test_sized_attention_of_the_models_sizes_is_mha() -> None:
    mha, sized = model(), model(attention="sized")
    sized.load_state_dict(mha.state_dict())
    assert torch.allclose(mha(tokens()), sized(tokens()), atol=1e-6)
    wide = model(attention={"name": "sized", "n_head": 2, "qk_size": 4, "v_size": 24}).h[0].attn
    assert (wide.c_attn.weight.shape, wide.c_proj.weight.shape) == ((2 * (4 + 4 + 24), C), (C, 48))


@pytest.mark.parametrize("neighbour", [{"model.position": "alibi"}, {"model.scores": {"name": "plain", "gate": True}}])
def test_sized_attention_refuses_what_it_cannot_combine_with(neighbour: dict[str, Any]) -> None:
    sized = {"model.attention": {"name": "sized", "n_head": 3}}
    with pytest.raises(ConfigError, match=r"3 is not a multiple|gate need"):
        load_config("nano", [f"{key}={value}" for key, value in {**sized, **neighbour}.items()])


# --- head, objective, init ---


def test_sigmoid_softcap_is_its_formula() -> None:
    made = model(head="sigmoid_softcap")
    rows, z = random(5, C), random(5, C) @ made.wte.weight.T
    assert torch.allclose(made.lm_head(rows, made.wte), 23 / (1 + torch.exp(-(z + 5) / 7.5)), atol=1e-5)
    assert isinstance(made.lm_head, Head)
    assert made.lm_head.matrix(made.wte) is None


def test_mixtures_of_softmaxes_are_distributions() -> None:
    made, rows = model(head="mixture_of_softmaxes"), random(5, C)
    logits = made.lm_head(rows, made.wte)
    assert torch.allclose(logits.exp().sum(-1), torch.ones(5), atol=1e-5)
    shares = made.lm_head.mix(rows).softmax(-1)
    vectors = torch.tanh(made.lm_head.project(rows)).view(5, 4, C)
    parts = (vectors @ made.wte.weight.T).softmax(-1)
    assert torch.allclose(logits.exp(), (shares[..., None] * parts).sum(1), atol=1e-6)


def test_focal_loss_is_its_formula() -> None:
    logits, targets = random(6, 9), torch.arange(6)
    nll = F.cross_entropy(logits, targets, reduction="none")
    made = part("objective", "focal", gamma=2.0)
    assert torch.allclose(nll + made.rows(logits, targets, nll), (1 - torch.exp(-nll)) ** 2 * nll, atol=1e-6)


def test_initial_matrices_are_orthogonal_or_of_xaviers_variance() -> None:
    made = initial(init="orthogonal")
    query = made.h[0].attn.c_attn.weight[:C]
    assert torch.allclose(query @ query.T, 0.25 * torch.eye(C), atol=1e-5)
    wide = initial(n_embd=256, init="xavier")
    for matrix in (wide.h[0].attn.c_attn.weight[:256], wide.h[0].mlp.c_fc.weight):
        assert matrix.std().item() == pytest.approx((2 / sum(matrix.shape)) ** 0.5, rel=0.02)
    assert wide.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_gain_of_deepnorm_is_not_that_of_queries_and_keys() -> None:
    made = initial(init="orthogonal", residual="deepnorm")
    for rows, gain in zip(made.h[0].attn.c_attn.weight.split(C), (1, 1, 16**-0.25), strict=True):
        assert torch.allclose(torch.linalg.svdvals(rows), torch.full((C,), 0.5 * gain), atol=1e-5)
