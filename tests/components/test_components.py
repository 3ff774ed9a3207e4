"""Components against references outside this project: formulas by hand, Hugging Face, published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from small import B, T, initial, tokens
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from gpt2lab.components.attend import Mask
from gpt2lab.components.base import params
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.position import alibi_slopes, t5_bucket


def step(length: int = T) -> ForwardContext:
    return ForwardContext(torch.zeros(B, length, dtype=torch.int64))


def test_rotary_is_a_complex_rotation_and_depends_on_distance_only() -> None:
    position = initial(position="rotary").wpe
    x = torch.randn(1, 4, 16, 8)
    turned = position.rotate(x, step(), "q")
    angles = torch.arange(16)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(turned, torch.cat([expected.real, expected.imag], -1), atol=1e-5)
    q, k = torch.randn(8), torch.randn(8)
    spread = [position.rotate(v.expand(1, 1, 16, 8), step(), "q")[0, 0] for v in (q, k)]
    scores = spread[0] @ spread[1].T  # (16, 16): equal along diagonals
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)


def test_partial_rotary_leaves_the_rest_of_a_head_alone() -> None:
    position = initial(position={"name": "rotary", "fraction": 0.5}).wpe
    x = torch.randn(1, 4, 16, 8)
    turned = position.rotate(x, step(), "q")
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.allclose(turned[..., :4], x[..., :4])


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8) == [2.0 ** -(i + 1) for i in range(8)]  # section 3: 1/2, 1/4, ... 1/256
    assert alibi_slopes(12) == [2.0 ** -(i + 1) for i in range(8)] + [2.0 ** -(0.5 + i) for i in range(4)]
    assert len(alibi_slopes(25)) == 25


def test_t5_buckets_equal_hugging_face() -> None:
    distance = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(t5_bucket(distance, 32, 128), theirs)


def test_sinusoids_by_hand() -> None:
    position = initial(position={"name": "sinusoidal", "amplitude": 1.0}).wpe
    waves = position.add(torch.zeros(1, 16, 32), step())[0]
    assert waves[5, 0].item() == pytest.approx(math.sin(5), abs=1e-6)
    assert waves[5, 3].item() == pytest.approx(math.cos(5 / 10000 ** (2 / 32)), abs=1e-6)


def test_window_and_sinks_by_hand() -> None:
    allowed = Mask(window=3, sinks=1).allowed(step(6)).int().tolist()
    assert allowed[5] == [1, 0, 0, 1, 1, 1]
    assert allowed[2] == [1, 1, 1, 0, 0, 0]


def test_a_window_as_long_as_the_text_is_causal() -> None:
    plain = initial()
    windowed = initial(mask={"name": "sliding_window", "window": 16})
    assert torch.allclose(plain(tokens()), windowed(tokens()), atol=1e-6)


def test_gqa_with_all_heads_is_mha_and_with_repeated_heads_too() -> None:
    mha = initial()
    full = initial(attention={"name": "gqa", "n_kv_head": 4})
    assert torch.equal(mha(tokens()), full(tokens()))
    one, mqa = initial(attention={"name": "gqa", "n_kv_head": 1}), initial(attention="mqa")
    assert torch.equal(mqa(tokens()), one(tokens()))
    shared = initial(attention={"name": "gqa", "n_kv_head": 2})
    with torch.no_grad():
        for ours, theirs in zip(mha.h, shared.h, strict=True):
            q, k, v = theirs.attn.c_attn.weight.split([32, 16, 16])
            twice = [x.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for x in (k, v)]
            ours.attn.c_attn.weight.copy_(torch.cat([q, *twice]))
            ours.attn.c_proj.weight.copy_(theirs.attn.c_proj.weight)
    assert torch.allclose(mha(tokens()), shared(tokens()), atol=1e-5)


def test_the_written_out_kernel_equals_the_fused_one() -> None:
    fused = initial(position="alibi")
    # a cap far above every score bends nothing, but takes the written-out form
    written = initial(position="alibi", scores={"name": "plain", "softcap": 1e4})
    assert torch.allclose(fused(tokens()), written(tokens()), atol=1e-5)


def test_experts_that_are_equal_are_one_mlp() -> None:
    model = initial(mlp={"name": "moe", "experts": 4, "top_k": 2})
    moe, x = model.h[0].mlp, torch.randn(2, 16, 32)
    with torch.no_grad():
        for matrix in (moe.c_fc, moe.c_proj):
            matrix.copy_(matrix[:1].expand_as(matrix).clone())
    expected = moe.expert(0, x.view(-1, 32)).view_as(x)
    assert torch.allclose(moe(x, step()), expected, atol=1e-6)


def test_an_even_load_has_balance_one() -> None:
    model = initial(mlp={"name": "moe", "experts": 4, "top_k": 1})
    odds = torch.eye(4).repeat(8, 1)
    assert model.h[0].mlp.imbalance(odds, odds.argmax(-1, keepdim=True)).item() == pytest.approx(1.0)


def test_deepnorm_draws_what_the_paper_scales() -> None:
    deep, pre = (initial(n_embd=256, n_layer=8, residual=r) for r in ("deepnorm", "pre"))
    beta = (8 * 8) ** -0.25
    ratio = {
        name: (p.std() / dict(pre.named_parameters())[name].std()).item()
        for name, p in deep.named_parameters() if p.ndim == 2
    }  # fmt: skip
    q, k, v = (deep.h[0].attn.c_attn.weight.split(256)[i].std().item() / 0.02 for i in range(3))
    assert (q, k) == (pytest.approx(1, rel=0.02), pytest.approx(1, rel=0.02))
    assert v == pytest.approx(beta, rel=0.02)
    assert ratio["h.0.mlp.c_fc.weight"] == pytest.approx(beta, rel=1e-4)
    assert ratio["h.0.mlp.c_proj.weight"] == pytest.approx(beta * 4, rel=1e-4)  # beta instead of 1/sqrt(2 L) = 1/4
    assert ratio["wte.weight"] == pytest.approx(1, rel=1e-6)


def test_arms_start_equal_wherever_shapes_agree() -> None:
    ours, others = initial(seed=3), initial(seed=3, position="rotary", mlp="swiglu", stack=["unet"])
    shared = {n: p for n, p in ours.named_parameters() if n in dict(others.named_parameters())}
    same_shape = {n for n, p in shared.items() if p.shape == dict(others.named_parameters())[n].shape}
    assert "h.1.attn.c_attn.weight" in same_shape
    assert all(torch.equal(shared[n], dict(others.named_parameters())[n]) for n in same_shape)


def test_a_pattern_of_positions_repeats_over_the_layers() -> None:
    model = initial(n_layer=4, position=["rotary", "none"])
    assert [type(p).__name__ for p in model.positions] == ["Rotary", "Position", "Rotary", "Position"]
    assert model.positions[0] is model.positions[2]
    both = initial(position=["learned", "t5_bias"])
    assert {n for n, _ in both.named_parameters() if n.startswith("wpe")} == {"wpe.0.weight", "wpe.1.weight"}
    assert both.max_context == 16


def test_a_matrix_without_a_role_is_refused() -> None:
    model = initial()
    model.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"extra .* has no role"):
        params(model)


def test_dropout_draws_only_while_training() -> None:
    model = initial(dropout=0.5)
    assert torch.equal(model.eval()(tokens()), model(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))
