"""A trace tells what really happens: its totals are those of costs, its tensors those of a real pass."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab.components.attention import GroupedAttention
from gpt2lab.errors import ConfigError
from gpt2lab.inspection.costs import costs
from gpt2lab.inspection.trace import Trace, TraceRow, folded
from gpt2lab.inspection.trace import trace as traced
from gpt2lab.model import MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.registry import SLOTS, Slot, load_plugin
from gpt2lab.testing.cases import Case, batch, cases

CASES = cases(c for s in MODEL_SLOTS for c in SLOTS[s] if c.factory.__module__.startswith("gpt2lab."))
OF_MODULES = ("norm", "residual", "attention", "mlp", "embedding", "stack", "head")
trace = functools.lru_cache(maxsize=None)(traced)
NANO: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 256}


@pytest.fixture(scope="module")
def canonical() -> Trace:
    return trace(ModelConfig())


def named(rows: Any, name: str) -> TraceRow:
    """The first row of that name."""
    return next(row for row in rows if row.name == name)


def test_the_canonical_numbers(canonical: Trace) -> None:
    assert canonical.parameters == 124_439_808
    assert canonical.per_token(canonical.forward + canonical.backward) == 854_438_400
    # 2 FLOP for each weight of a product and each product of channels in scores and weighted sums
    assert canonical.per_token(canonical.forward) == 2 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 4 * 768 * 1024


def test_the_walk_through_a_block_of_gpt2(canonical: Trace) -> None:
    block = [row for row in canonical.rows if row.depth == 0]
    C, V = 768, 50257
    expected = [
        ("ln_1", (1, 1024, C), 2 * C, 0),
        ("c_attn", (1, 1024, 3 * C), 3 * C * C + 3 * C, 6 * C * C),
        ("query", (1, 12, 1024, 64), 0, 0),
        ("key", (1, 12, 1024, 64), 0, 0),
        ("value", (1, 12, 1024, 64), 0, 0),
        ("scores", (1, 12, 1024, 1024), 0, 2 * 1024 * C),
        ("weights", (1, 12, 1024, 1024), 0, 0),
        ("heads", (1, 12, 1024, 64), 0, 2 * 1024 * C),
        ("c_proj", (1, 1024, C), C * C + C, 2 * C * C),
        ("ln_2", (1, 1024, C), 2 * C, 0),
        ("c_fc", (1, 1024, 4 * C), 4 * C * C + 4 * C, 8 * C * C),
        ("activation", (1, 1024, 4 * C), 0, 0),
        ("c_proj", (1, 1024, C), 4 * C * C + C, 8 * C * C),
        ("x", (1, 1024, C), 0, 0),
    ]
    tensors = [(r.name, r.shape, r.parameters, r.forward / 1024) for r in block if r.shape is not None]
    assert tensors == expected
    assert all(row.backward == 2 * row.forward for row in canonical.rows)
    assert [row.name for row in canonical.rows if row.depth is None][:3] == ["tokens", "wte", "wpe"]
    head = named(canonical.rows, "lm_head")
    assert (head.shape, head.parameters, head.forward) == ((1024, V), 0, 2 * 1024 * V * C)
    assert "wte.weight again" in head.meaning
    assert canonical.rows[-1].name == "loss" and canonical.rows[-1].shape == ()


def test_meanings_come_from_components_and_roles(canonical: Trace) -> None:
    assert "causal: Every token attends to itself and all earlier tokens" in named(canonical.rows, "scores").meaning
    assert named(canonical.rows, "ln_1").meaning.startswith("layernorm: Subtract the mean over channels")
    assert "query 768, key 768, value 768" in named(canonical.rows, "c_attn").meaning
    assert "writes into the stream" in named(canonical.rows, "c_proj").meaning


@pytest.mark.parametrize("case", CASES, ids=str)
def test_totals_are_those_of_costs_for_every_component(case: Case) -> None:
    config = case.config()
    # a bias on scores is computed once for the whole batch
    seen, expected = trace(config, batch=1 if case.slot == "position" else 2), costs(config)
    assert seen.parameters == expected.parameters
    assert seen.per_token(seen.forward + seen.backward) == expected.flops_per_token
    assert seen.rows[-1].name == "loss" and seen.rows[-1].backward == 0  # all parameters used, all work attributed
    assert seen.forward > 0 and len(seen.rows) > 15
    for row in folded(seen.rows, all_layers=True) + folded(seen.rows):
        assert row.shape is None or row.letters is not None
    for how in ({"all_layers": True}, {"layer": 1}, {}):
        short = folded(seen.rows, **how)  # type: ignore[arg-type]
        assert sum(row.parameters for row in short) == seen.parameters
        assert sum(row.forward + row.backward for row in short) == seen.forward + seen.backward


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.slot in OF_MODULES and c.name != "moe" and not c.options], ids=str
)
def test_modules_come_in_the_order_and_with_the_shapes_of_a_real_pass(case: Case) -> None:
    """Against hooks of our own on a model with data: each module's result that the trace shows, in that order."""
    config = case.config()
    model, (tokens, targets) = build_model(config), batch()
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.append((name.rpartition(".")[2], tuple(out.shape)))
            )
    model.objective(tokens, targets)
    rows = [row for row in trace(config, batch=2).rows if row.shape is not None and "reshaped" not in row.meaning]
    shown = [(row.name.rpartition(".")[2], row.shape) for row in rows]
    known = {name for name, _ in shown}
    told = [item for item in seen if item[0] in known]
    assert len(told) >= 8
    assert [item for item in shown if item[0] in {name for name, _ in told}] == told


def test_letters_tell_tokens_from_channels_of_equal_size() -> None:
    rows = trace(ModelConfig(**NANO)).rows  # T = C = 128
    assert named(rows, "ln_1").letters == ("B", "T", "C")
    assert named(rows, "scores").letters == ("B", "H", "T", "T")
    assert named(rows, "query").letters == ("B", "H", "T", "D")
    assert named(rows, "lm_head").letters == ("n", "V")
    grouped = trace(ModelConfig(**NANO, attention={"name": "gqa", "n_kv_head": 2})).rows
    assert named(grouped, "c_attn").letters == ("B", "T", "256")  # as large as the vocabulary, but not it
    twins = trace(ModelConfig(**{**NANO, "n_head": 4, "n_embd": 16})).rows  # H = D = 4: no letter, the number
    assert named(twins, "query").letters == ("B", "4", "T", "4")


def test_batch_and_tokens() -> None:
    config = ModelConfig(**NANO)
    one, more = trace(config), trace(config, batch=3, tokens=64)
    assert named(more.rows, "scores").shape == (3, 4, 64, 64)
    assert more.parameters == one.parameters
    saved = one.per_token(one.forward) - more.per_token(more.forward)
    assert saved == 2 * 4 * 128 * 64  # L layers: 4 C operations for each token that can no longer be looked at
    assert trace(config, tokens=1).rows[0].shape == (1, 1)
    with pytest.raises(ConfigError, match="129 tokens of context, but the positions are limited to 128"):
        trace(config, tokens=129)
    far = ModelConfig(**{**NANO, "position": "rotary"})
    assert named(trace(far, tokens=200).rows, "scores").shape == (1, 4, 200, 200)
    with pytest.raises(ConfigError, match="too large to count"):
        trace(far, tokens=10**9)


def test_dropout_has_rows_only_where_there_is_any() -> None:
    def dropped(rate: float) -> list[str]:
        return [r.name for r in trace(ModelConfig(**NANO, dropout=rate)).rows if "drop" in r.name]

    assert dropped(0.0) == []
    assert dropped(0.1)[0] == "drop" and len(dropped(0.1)) == 1 + 2 * 2


def test_variants_of_attention() -> None:
    def rows(**parts: Any) -> tuple[TraceRow, ...]:
        return trace(ModelConfig(**NANO, **parts)).rows

    assert "position rotary: Rotate pairs" in named(rows(position="rotary"), "scores").meaning
    fire = named(rows(position="fire"), "wpe.out")  # a bias for all blocks
    assert (fire.depth, fire.shape) == (None, (128, 128, 4)) and fire.forward == 2 * 128 * 128 * 32 * 4
    assert "sliding_window" in named(rows(mask={"name": "sliding_window", "window": 8}), "scores").meaning
    capped = rows(scores={"name": "plain", "softcap": 30.0, "sink_logits": True})
    for name, shape in {"scores": (1, 4, 128, 128), "weights": (1, 4, 128, 129), "heads": (1, 4, 128, 32)}.items():
        assert named(capped, name).shape == shape
    normed = [row for row in rows(scores={"name": "plain", "qk_norm": True}) if "q_norm" in row.name]
    assert len(normed) == 2 and normed[0].parameters == 2 * 32
    assert "query 128, key 64, value 64" in named(rows(attention={"name": "gqa", "n_kv_head": 2}), "c_attn").meaning


def test_blocks_alike_are_told_once() -> None:
    def short(**parts: Any) -> list[TraceRow]:
        return folded(trace(ModelConfig(**{**NANO, "n_layer": 4}, **parts)).rows)

    plain = short()
    assert [row.name for row in plain if "more like" in row.name] == ["3 more like block 0"]
    fold = named(plain, "3 more like block 0")
    assert fold.meaning == "blocks 1 to 3" and fold.parameters == 3 * (12 * 128**2 + 13 * 128)
    mixed = short(mask=["sliding_window", "causal"])
    assert [row.name for row in mixed if "more like" in row.name] == ["2 more like block 0 and 1"]
    shared = named(short(stack=["shared_layers"]), "3 more like block 0")
    assert shared.parameters == 0 and "weights that were counted before" in shared.meaning


def test_experts_are_shown_one_by_one_and_counted_once() -> None:
    seen = trace(ModelConfig(**NANO, mlp={"name": "moe", "experts": 8, "top_k": 2}))
    products = [row for row in seen.rows if row.depth == 0 and row.name == "c_fc"]
    assert [row.parameters for row in products] == [8 * 4 * 128 * 128, *[0] * 7]
    # the batch of 128 tokens is sent to 2 experts each
    assert sum(row.forward for row in products) == 128 * 2 * 2 * 4 * 128 * 128


def test_one_layer_or_all_of_them(canonical: Trace) -> None:
    third = folded(canonical.rows, layer=3)
    assert [row.name for row in third if row.shape is None and "block" in row.name] == ["3 blocks", "8 blocks"]
    assert len(folded(canonical.rows, all_layers=True)) == len(canonical.rows)


PLUGIN = '''
import torch
from torch import nn
from gpt2lab.components import mlp, norm

@norm.register("trace_scale", source="a test")
class Scale(nn.Module):
    """Divide by the largest size of any channel.  (..., C) -> (..., C)"""

    def __init__(self, site):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(site.width or site.dims.n_embd))

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True) * self.gain

@mlp.register("trace_mixer", source="a test")
class Mixer(nn.Module):
    """Turn the channels by one matrix and look at the result twice.  (B, T, C) -> (B, T, C)"""

    def __init__(self, site):
        super().__init__()
        self.turn = site.linear(site.dims.n_embd, site.dims.n_embd, "residual_out", bias=False)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x, step):
        turned = self.turn(x)
        return turned + torch.tanh(turned)
'''


@pytest.mark.usefixtures("no_plugins_after")
def test_a_plugin_is_traced_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PLUGIN, encoding="utf-8")
    load_plugin(tmp_path / "parts.py")
    seen = trace(ModelConfig(**NANO, norm="trace_scale", mlp="trace_mixer"))
    assert named(seen.rows, "ln_1").meaning == "trace_scale: Divide by the largest size of any channel"
    assert named(seen.rows, "ln_1").parameters == 128
    heading = named(seen.rows, "mlp")
    assert heading.shape is None
    assert heading.meaning == "trace_mixer: Turn the channels by one matrix and look at the result twice"
    turn = named(seen.rows, "turn")
    assert (turn.parameters, turn.forward) == (128 * 128, 2 * 128 * 128 * 128)
    assert seen.rows[-1].name == "not used" and seen.rows[-1].parameters == 2 * 3
    assert "h.0.mlp.spare" in seen.rows[-1].meaning


def test_slots_build_as_before() -> None:
    before = Slot.build
    traced(ModelConfig(**NANO))
    assert Slot.build is before


def test_the_written_sizes_of_scores_are_those_that_attention_computes() -> None:
    """The three steps in place of the fused kernel, against a product of real queries and keys."""
    model = build_model(ModelConfig(**NANO))
    attention = model.h[0].attn
    assert isinstance(attention, GroupedAttention)
    x = torch.randn(1, 128, 128)
    q, k, v = (p.view(1, 128, 4, 32).transpose(1, 2) for p in attention.c_attn(x).split(128, -1))
    rows = trace(ModelConfig(**NANO)).rows
    scores = q @ k.mT
    assert named(rows, "scores").shape == tuple(scores.shape)
    assert named(rows, "heads").shape == tuple((scores.softmax(-1) @ v).shape)
    assert named(rows, "scores").forward == 2 * math.prod(scores.shape) * 32
