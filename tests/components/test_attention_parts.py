"""Scores, attentions, positions and masks against other implementations, and the hooks for parts of one's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import LATER, B, D, H, T, V, config, context, model, random, tokens
from torch import Tensor, nn
from transformers import DeepseekV3Config, DiffLlamaConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

from gpt2lab import testing
from gpt2lab.components import attend as kernels
from gpt2lab.components.attend import Mask
from gpt2lab.components.base import Builder
from gpt2lab.components.blockwise import causal
from gpt2lab.components.context import Cache, ForwardContext
from gpt2lab.components.position import rotary_limits
from gpt2lab.components.scores import Scores
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT


def attended(made: GPT, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the first layer's scores and mask make of these.  -> (B, H, T, D)"""
    attn = made.h[0].attn
    return kernels.attend(q, k, v, x, context(made), attn.mask, attn.scores)


@pytest.fixture
def qkvx() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = random(3, B, H, T, D).unbind(0)
    return q, k, v, random(B, T, H * D)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


# positions


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_stretched_rotations_are_those_of_hugging_face(scaling: str) -> None:
    factor, trained, width, theta = 4.0, 2048, 64, 10000.0
    their = {"rope_type": scaling, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": trained}
    if scaling == "ntk":  # theirs depends on the length of the text: at (2 factor - 1) / factor contexts it is ours
        their["rope_type"] = "dynamic"
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=their
    )
    length = {"seq_len": round(trained * (2 * factor - 1) / factor)} if scaling == "ntk" else {}
    speeds, size = ROPE_INIT_FUNCTIONS[their["rope_type"]](config, "cpu", **length)
    options = {"name": "rotary", "theta": theta, "scaling": scaling, "factor": factor}
    rotary = model(n_embd=2 * width, n_head=2, block_size=round(factor * trained), position=options).wpe
    cos, sin = rotary.tables(torch.arange(100), width, "q")
    angles = torch.arange(100)[:, None] * speeds
    torch.testing.assert_close(cos, angles.cos() * size, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * size, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scaling": "linear"}, "scaling only"),
        ({"factor": 2.0}, "factor only"),
        ({"trained": 8}, "trained without scaling"),
    ],
)
def test_incomplete_scalings_are_refused(options: dict[str, Any], what: str) -> None:
    (problem,) = rotary_limits(config(), {"fraction": 1.0, **options})
    assert what in problem


def test_xpos_scores_decay_with_distance() -> None:
    """score of equal unit vectors in pair i: z_i^(distance / decay) cos(distance w_i)."""
    xpos = model(position={"name": "xpos", "decay": 8.0}).wpe
    for pair in range(D // 2):
        x = torch.zeros(1, 1, T, D)
        x[..., pair] = 1.0
        scores = xpos.rotate(x, context(model()), "q") @ xpos.rotate(x, context(model()), "k").mT
        distance = torch.arange(T)[:, None] - torch.arange(T)
        size = ((2 * pair / D + 0.4) / 1.4) ** (distance / 8.0)
        expected = size * torch.cos(distance * 10000.0 ** (-2 * pair / D))
        torch.testing.assert_close(scores[0, 0].tril(), expected.tril(), atol=1e-5, rtol=1e-4)


def test_kerple_by_hand() -> None:
    kerple = model(position="kerple").wpe
    with torch.no_grad():
        kerple.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -3.0]))
        kerple.growth.copy_(torch.tensor([1.0, 0.5, 4.0, 1.0]))
    bias = kerple.bias(torch.arange(T), torch.arange(T))
    assert bias[1, 9, 3].item() == pytest.approx(-2.0 * math.log(1 + 0.5 * 6))
    assert bias[3, 9, 3].item() == pytest.approx(-0.01 * math.log(7))  # negative weights count as 0.01


def test_fire_is_the_papers_mlp_of_relative_distance() -> None:
    fire = model(position={"name": "fire", "threshold": 6.0}).wpe
    mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, H))
    with torch.no_grad():
        mlp[0].weight.copy_(fire.slope[:, None])
        mlp[0].bias.copy_(fire.offset)
        mlp[2].weight.copy_(fire.out.weight)
        mlp[2].bias.zero_()
        bias, c, L = fire.bias(torch.arange(T), torch.arange(T)), fire.c.item(), 6.0 * fire.share.item()
        for t, s in [(0, 0), (3, 1), (15, 2), (15, 15)]:
            x = math.log(1 + c * (t - s)) / math.log(1 + c * max(t, L))
            torch.testing.assert_close(bias[:, t, s], mlp(torch.tensor([x])), atol=1e-6, rtol=1e-5)


# scores


def test_forgetting_multiplies_by_the_gates_in_between(qkvx: Inputs) -> None:
    q, k, v, x = qkvx
    made = model(scores="forgetting")
    gates = torch.sigmoid(made.h[0].attn.scores.c_forget(x)).mT  # (B, H, T)
    decay = torch.ones(B, H, T, T)
    for t in range(T):
        for s in range(t):
            decay[:, :, t, s] = gates[:, :, s + 1 : t + 1].prod(-1)
    odds = ((q @ k.mT) * D**-0.5).exp() * decay.masked_fill(LATER, 0.0)
    torch.testing.assert_close(attended(made, x, q, k, v), odds / odds.sum(-1, keepdim=True) @ v, atol=1e-5, rtol=1e-4)


def test_cope_counts_what_its_gates_select(qkvx: Inputs) -> None:
    q, k, v, x = qkvx
    made = model(scores={"name": "cope", "positions": 4})
    table, scores = made.h[0].attn.scores.table, (q @ k.mT) * D**-0.5
    gates, biased = torch.sigmoid(scores), scores.clone()
    for t in range(T):
        for s in range(t + 1):
            place = gates[:, :, t, s : t + 1].sum(-1).clamp(max=3)  # (B, H)
            low = (q[:, :, t] * table[place.floor().long()]).sum(-1)
            high = (q[:, :, t] * table[place.ceil().long()]).sum(-1)
            biased[:, :, t, s] += low + (place - place.floor()) * (high - low)
    expected = biased.masked_fill(LATER, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(attended(made, x, q, k, v), expected, atol=1e-5, rtol=1e-4)


def test_sigmoid_attention_by_its_formula(qkvx: Inputs) -> None:
    q, k, v, x = qkvx
    weights = torch.sigmoid((q @ k.mT) * D**-0.5 - math.log(16)).masked_fill(LATER, 0.0)
    torch.testing.assert_close(attended(model(scores="sigmoid"), x, q, k, v), weights @ v, atol=1e-5, rtol=1e-4)


def test_talking_heads_mix_before_and_after_the_softmax(qkvx: Inputs) -> None:
    q, k, v, x = qkvx
    made = model(scores="talking_heads")
    before, after = (torch.eye(H) + getattr(made.h[0].attn.scores, name).weight for name in ("before", "after"))
    scores = torch.einsum("gh,bhts->bgts", before, (q @ k.mT) * D**-0.5).masked_fill(LATER, -math.inf)
    expected = torch.einsum("gh,bhts->bgts", after, scores.softmax(-1)) @ v
    torch.testing.assert_close(attended(made, x, q, k, v), expected, atol=1e-5, rtol=1e-4)


def test_top_k_leaves_the_largest_scores(qkvx: Inputs) -> None:
    q, k, v, x = qkvx
    scores = ((q @ k.mT) * D**-0.5).masked_fill(LATER, -math.inf)
    expected = torch.zeros(B, H, T, D)
    for t in range(T):
        largest, index = scores[:, :, t].topk(min(3, t + 1), -1)  # (B, H, 3)
        values = v.gather(2, index[..., None].expand(-1, -1, -1, D))
        expected[:, :, t] = (largest.softmax(-1)[..., None] * values).sum(2)
    made = model(scores={"name": "top_k", "k": 3})
    torch.testing.assert_close(attended(made, x, q, k, v), expected, atol=1e-5, rtol=1e-4)


# attention


def test_mla_is_that_of_deepseek() -> None:
    latent, rotated = 12, 4
    made = model(
        bias=False, norm={"name": "rmsnorm", "eps": 1e-6}, position="rotary",
        attention={"name": "mla", "latent": latent, "rotated": rotated},
    )  # fmt: skip
    config = DeepseekV3Config(
        hidden_size=H * D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=None, kv_lora_rank=latent,
        qk_rope_head_dim=rotated, qk_nope_head_dim=D, v_head_dim=D, rope_interleave=False, attention_bias=False,
        attn_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs, ours, x = DeepseekV3Attention(config, 0), made.h[0].attn, random(B, T, H * D)
    with torch.no_grad():
        theirs.q_proj.weight.copy_(ours.c_q.weight)
        theirs.kv_a_proj_with_mqa.weight.copy_(ours.c_latent.weight)
        theirs.kv_a_layernorm.weight.copy_(ours.ln.weight)
        heads = ours.c_kv.weight.view(2, H, D, latent).transpose(0, 1)  # keys and values by head
        theirs.kv_b_proj.weight.copy_(heads.reshape(-1, latent))
        theirs.o_proj.weight.copy_(ours.c_proj.weight)
        angles = DeepseekV3RotaryEmbedding(config)(x, torch.arange(T)[None])
        hidden = torch.zeros(T, T).masked_fill(LATER, -math.inf)[None, None]
        expected, _ = theirs(x, position_embeddings=angles, attention_mask=hidden)
        torch.testing.assert_close(ours(x, context(made)), expected, atol=1e-5, rtol=1e-4)


def test_the_cache_of_mla_holds_its_latent() -> None:
    made, cache = model(position="rotary", attention={"name": "mla", "latent": 12, "rotated": 4}), Cache()
    made(tokens(), cache=cache)
    assert {name: rows.shape[-1] for name, rows in cache.rows.items() if name.startswith("0.")} == {
        "0.latent": 12, "0.k_rotated": 4,
    }  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1])
def test_differential_attention_is_that_of_hugging_face(layer: int) -> None:
    made = model(
        bias=False, norm={"name": "rmsnorm", "eps": 1e-5, "scale": False}, position="rotary", attention="differential"
    )
    config = DiffLlamaConfig(
        hidden_size=H * D, num_attention_heads=2 * H, num_key_value_heads=2 * H, rms_norm_eps=1e-5,
        attention_bias=False, attn_implementation="eager",
    )  # fmt: skip
    theirs, ours, x = DiffLlamaAttention(config, layer), made.h[layer].attn, random(B, T, H * D)
    with torch.no_grad():
        for their, our in zip((theirs.q_proj, theirs.k_proj, theirs.v_proj), ours.c_attn.weight.chunk(3), strict=True):
            # a pair of maps: neighbours here, H heads apart there; values are split in the same way
            their.weight.copy_(our.view(H, 2, D // 2, -1).transpose(0, 1).reshape(H * D, -1))
        theirs.o_proj.weight.copy_(ours.c_proj.weight)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(theirs, name).copy_(getattr(ours, name))
        angles = DiffLlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
        hidden = torch.zeros(T, T).masked_fill(LATER, -math.inf)[None, None]
        expected, _ = theirs(x, position_embeddings=angles, attention_mask=hidden)
        torch.testing.assert_close(ours(x, context(made, layer)), expected, atol=1e-5, rtol=1e-4)


def test_values_of_other_heads_are_refused() -> None:
    mixed = model(attention=["gqa", "mha"], stack=["value_residual"])
    with pytest.raises(ConfigError, match="the first layer has 2 and layer 1 has 4"):
        mixed(tokens())


# hooks


class Exclusive(Scores):
    """Removes from every head's output its part along the token's own value (arXiv:2603.09078)."""

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        heads = y.unflatten(-1, (-1, v.shape[-1])).transpose(1, 2)  # (B, H, T, D)
        unit = nn.functional.normalize(v.repeat_interleave(heads.shape[1] // v.shape[1], 1), dim=-1)
        return (heads - (heads * unit).sum(-1, keepdim=True) * unit).transpose(1, 2).flatten(2)


class Penalised(Scores):
    """A penalty on large normalisers of the softmax."""

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        ctx.losses[f"attention_z.{ctx.depth}"] = logits.logsumexp(-1).square().mean()
        return super().weights(logits, ctx)


def with_scores(kind: type[Scores], **parts: Any) -> GPT:
    made = model(**parts)
    for layer, block in enumerate(made.h):
        block.attn.scores = kind(Builder(made.config, made.config.choices(), layer=layer))
    return made


@pytest.mark.parametrize("attention", ["mha", "gqa", "mla", "differential"])
def test_finish_gets_the_values_of_the_new_tokens(attention: str) -> None:
    made, cache = with_scores(Exclusive, attention=attention, position="rotary"), Cache()
    with torch.no_grad():
        pieces = [made(piece, cache=cache) for piece in tokens().split([5, 1, 10], 1)]
        assert testing.distance(torch.cat(pieces, 1), made(tokens())) < 2e-5
        assert testing.distance(made(tokens()), model(attention=attention, position="rotary")(tokens())) > 1e-4


def test_weights_may_add_a_loss() -> None:
    made = with_scores(Penalised)
    total, parts = made.objective(tokens(), tokens())
    assert total.item() == pytest.approx((parts["loss"] + parts["attention_z"]).item(), abs=1e-5)
    assert parts["loss"].item() == pytest.approx(model().loss(tokens(), tokens()).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("choice", "fused"),
    [
        ("plain", True), ({"name": "plain", "qk_norm": True, "gate": True}, True), ("forgetting", True),
        ("cope", True), ({"name": "plain", "softcap": 30.0}, False), ({"name": "plain", "sink_logits": True}, False),
        ("sigmoid", False), ("top_k", False),
    ],
)  # fmt: skip
def test_torchs_kernel_is_used_where_it_can_be(choice: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("fused_attention", "unfused_attention"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=function, n=name, **k: used.append(n) or f(*a, **k))
    model(scores=choice)(tokens())
    assert set(used) == {"fused_attention" if fused else "unfused_attention"}


# masks and values of another width


class Dilated(Mask):
    """Every so-many-th token."""

    def __init__(self, every: int) -> None:
        super().__init__()
        object.__setattr__(self, "every", every)

    def allowed(self, ctx: ForwardContext) -> Tensor:
        distance = ctx.q_positions[:, None] - ctx.k_positions
        return (distance >= 0) & (distance % self.every == 0)


def with_masks(*every: int) -> GPT:
    made = model()
    for block, distance in zip(made.h, every, strict=True):
        block.attn.mask = Dilated(distance)
    return made


def test_masks_of_ones_own_are_used_each_by_itself() -> None:
    made, cache = with_masks(2, 3), Cache()
    with torch.no_grad():
        whole = made(tokens())
        for place, seen in ((14, False), (13, True), (12, True)):  # from 15, by 3 m + 2 n
            changed = tokens()
            changed[:, place] = (changed[:, place] + 1) % V
            assert (testing.distance(whole[:, 15], made(changed)[:, 15]) > 1e-4) == seen
        assert testing.distance(whole, with_masks(2, 2)(tokens())) > 1e-4
        pieces = [made(piece, cache=cache) for piece in tokens().split([5, 1, 10], 1)]
    assert testing.distance(torch.cat(pieces, 1), whole) < 2e-5


def test_values_may_be_wider_than_queries() -> None:
    """In half precision on CPU, where the kernel is our own."""
    q, k, v = (random(B, H, 200, width).to(torch.bfloat16).requires_grad_() for width in (8, 8, 12))
    y = causal(q, k, v, 0.3)
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.3)
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
    upstream = random(B, H, 200, 12)
    ours, theirs = (torch.autograd.grad((out * upstream).sum(), (q, k, v)) for out in (y, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b.double()).norm() < 0.01 * b.double().norm()
