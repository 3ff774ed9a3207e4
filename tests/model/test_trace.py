"""A trace tells what really happens: its totals are those of costs, its modules those of a real pass."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.errors import ConfigError
from gpt2lab.inspection.costs import costs
from gpt2lab.inspection.trace import Trace, TraceRow, folded
from gpt2lab.inspection.trace import trace as traced
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.registry import SLOTS, Slot, load_plugin
from gpt2lab.testing.assemblies import config as assembly
from gpt2lab.testing.assemblies import covering_array
from gpt2lab.testing.cases import Case, batch, cases

CASES = {s: cases(c for c in SLOTS[s] if c.factory.__module__.startswith("gpt2lab.")) for s in MODEL_SLOTS}
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
    assert canonical.as_record()["flops_per_token"] == 854_438_400
    # 2 FLOP for each weight of a product and each product of channels in scores and weighted sums
    assert canonical.per_token(canonical.forward) == 2 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 4 * 768 * 1024


def test_the_walk_through_a_block_of_gpt2(canonical: Trace) -> None:
    block = [row for row in canonical.rows if row.block == 0]
    C, V = 768, 50257
    expected = [
        ("h.0", None, 0, 0),
        ("ln_1", (1, 1024, C), 2 * C, 0),
        ("attn", None, 0, 4 * 1024 * C),
        ("c_attn", (1, 1024, 3 * C), 3 * C * C + 3 * C, 6 * C * C),
        ("scores", (1, 12, 1024, 1024), 0, 0),
        ("c_proj", (1, 1024, C), C * C + C, 2 * C * C),
        ("ln_2", (1, 1024, C), 2 * C, 0),
        ("mlp", None, 0, 0),
        ("c_fc", (1, 1024, 4 * C), 4 * C * C + 4 * C, 8 * C * C),
        ("activation", (1, 1024, 4 * C), 0, 0),
        ("c_proj", (1, 1024, C), 4 * C * C + C, 8 * C * C),
    ]
    assert [(r.name, r.shape, r.parameters, r.forward / 1024) for r in block] == expected
    assert [row.name for row in canonical.rows if row.block is None] == [
        "tokens", "wpe", "wte", "ln_f", "lm_head", "loss",
    ]  # fmt: skip
    head = named(canonical.rows, "lm_head")
    assert (head.shape, head.parameters, head.forward) == ((1024, V), 0, 2 * 1024 * V * C)
    assert named(canonical.rows, "wpe").parameters == 1024 * C
    assert canonical.rows[-1].shape == ()


def test_meanings_come_from_components_and_roles(canonical: Trace) -> None:
    assert named(canonical.rows, "ln_1").meaning.startswith("layernorm: Subtract the mean over channels")
    assert named(canonical.rows, "c_attn").meaning == "hidden (2304, 768): query 768, key 768, value 768"
    assert named(canonical.rows, "c_proj").meaning == "residual_out (768, 768)"


def every_component(*slots: str, without: str = "") -> list[ModelConfig]:
    """A few assemblies in which each component occurs at least once."""
    plain = {slot: [c for c in CASES[slot] if not c.options and c.name != without] for slot in slots}
    rows = covering_array(plain, {frozenset([str(case)]) for row in plain.values() for case in row})
    return [assembly(row, n_layer=2) for row in rows]


def same_totals(config: ModelConfig) -> None:
    seen = trace(config)
    assert seen.parameters == costs(config).parameters
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        tokens = torch.zeros(1, config.block_size, dtype=torch.int64)
        GPT(config).objective(tokens, tokens)
    assert seen.forward == counter.get_total_flops() > 0
    for how in ({"all_layers": True}, {"layer": 1}, {}):
        short = folded(seen.rows, **how)  # type: ignore[arg-type]
        assert sum(row.parameters for row in short) == seen.parameters
        assert sum(row.forward for row in short) == seen.forward


def test_totals_are_those_of_costs_for_every_component() -> None:
    for config in every_component(*MODEL_SLOTS):
        same_totals(config)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(itertools.chain(*CASES.values())), ids=str)
def test_totals_are_those_of_costs_for_every_variant(case: Case) -> None:
    same_totals(case.config())


def test_modules_come_in_the_order_and_with_the_shapes_of_a_real_pass() -> None:
    """Against hooks of our own on models with data."""
    tokens, targets = batch()
    for config in every_component(*OF_MODULES, without="moe"):
        model, seen = build_model(config), dict[str, tuple[int, ...]]()

        def note(name: str, _: Any, __: Any, out: torch.Tensor, seen: dict[str, tuple[int, ...]] = seen) -> None:
            seen.setdefault(name, tuple(out.shape))

        for name, module in model.named_modules():
            if name and not list(module.children()) and not isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(functools.partial(note, name))
        model.objective(tokens, targets)
        rows = [row for row in trace(config, batch=2).rows if row.path in seen and row.shape is not None]
        assert [(row.path, row.shape) for row in rows] == list(seen.items())


def test_letters_tell_tokens_from_channels_of_equal_size() -> None:
    rows = trace(ModelConfig(**NANO)).rows  # T = C = 128
    assert named(rows, "ln_1").letters == ("B", "T", "C")
    assert named(rows, "scores").letters == ("B", "H", "T", "T")
    assert named(rows, "lm_head").letters == ("n", "V")
    grouped = trace(ModelConfig(**NANO, attention={"name": "gqa", "n_kv_head": 2})).rows
    assert named(grouped, "c_attn").letters == ("B", "T", "256")  # as large as the vocabulary, but not it


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
    assert len(dropped(0.1)) == 1 + 2 * 2


def test_blocks_alike_are_shown_once() -> None:
    def short(**parts: Any) -> list[TraceRow]:
        return folded(trace(ModelConfig(**{**NANO, "n_layer": 4}, **parts)).rows)

    fold = named(short(), "blocks 1 to 3")
    assert fold.parameters == 3 * (12 * 128**2 + 13 * 128)
    mixed = short(mlp=["gelu", "swiglu"])
    assert [row.name for row in mixed if row.name.startswith("block")] == ["blocks 2 to 3"]
    shared = named(short(stack=["shared_layers"]), "h.0")
    assert shared.calls == 4
    third = folded(trace(ModelConfig(**{**NANO, "n_layer": 4})).rows, layer=2)
    assert [row.name for row in third if row.shape is None and "block" in row.name] == ["blocks 0 to 1", "block 3"]


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
    assert (heading.shape, heading.parameters) == (None, 3)
    assert heading.meaning == "trace_mixer: Turn the channels by one matrix and look at the result twice"
    turn = named(seen.rows, "turn")
    assert (turn.parameters, turn.forward) == (128 * 128, 2 * 128 * 128 * 128)


def test_slots_build_as_before() -> None:
    before = Slot.build
    traced(ModelConfig(**NANO))
    assert Slot.build is before
