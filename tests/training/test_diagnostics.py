"""What a training says of its health, against Hugging Face's GPT-2, sums written out, and torch's AdamW."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from their_gpt2 import their_model
from torch import Tensor
from trainings import BATCHES, fresh, training
from transformers import GPT2LMHeadModel

from gpt2lab import testing
from gpt2lab.components.attend import Mask, attend
from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.scores import plain
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.optim import OptimConfig
from gpt2lab.pretrained.huggingface import load_gpt2
from gpt2lab.registry import SLOTS
from gpt2lab.testing.cases import CONTEXT, VOCABULARY, batch, disturbed
from gpt2lab.training import diagnostics
from gpt2lab.training.diagnostics import (
    AttentionLogitMax,
    UpdateRatio,
    build,
    diagnose,
    diagnostic,
    group_of,
)

B, H, T, D = 2, 4, 9, 8
CASES = [case for slot in MODEL_SLOTS for case in testing.cases(SLOTS[slot])]


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    """With weights large enough to matter."""
    return their_model(n_embd=32, vocab_size=VOCABULARY, initializer_range=0.3)


def reference(model: GPT2LMHeadModel, tokens: Tensor) -> dict[str, float]:
    """The same numbers from hidden states and attention scores of Hugging Face's model."""
    rms: dict[str, float] = {}
    largest: dict[str, float] = {}
    hooks = []
    for i, block in enumerate(model.transformer.h):

        def scores(_module: object, _inputs: object, out: Tensor, name: str = f"diag/attention_logit_max/{i}") -> None:
            q, k, _ = (part.view(*tokens.shape, 4, 8).transpose(1, 2) for part in out.split(32, -1))
            above = torch.triu(torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool), 1)
            largest[name] = float((q @ k.mT / math.sqrt(8)).masked_fill(above, -math.inf).max())

        def stream(_module: object, _inputs: object, out: object, name: str = f"diag/activation_rms/{i}") -> None:
            x = out[0] if isinstance(out, tuple) else out
            rms[name] = float(x.square().mean().sqrt())

        hooks += [block.attn.c_attn.register_forward_hook(scores), block.register_forward_hook(stream)]
    with torch.no_grad():
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    overall = {
        "diag/attention_logit_max": max(largest.values()),
        "diag/logit_rms": float(logits.square().mean().sqrt()),
    }
    return rms | largest | overall


def test_numbers_are_those_of_hugging_face(theirs: GPT2LMHeadModel) -> None:
    tokens, _ = batch(rows=3)
    found = diagnose(load_gpt2(theirs), tokens, "fp32")
    assert found == pytest.approx(reference(theirs, tokens), rel=1e-5)
    assert all(type(value) is float for value in found.values())


def test_an_array_will_do_and_chunks_change_nothing(theirs: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, _) = load_gpt2(theirs), batch(rows=3)
    whole = diagnose(model, tokens, "fp32")
    for elements in (1, 3 * 4 * CONTEXT * 5, VOCABULARY * 7):  # one query and one row; 5 queries; 7 rows
        monkeypatch.setattr(diagnostics, "ELEMENTS_AT_ONCE", elements)
        assert diagnose(model, np.asarray(tokens), "fp32") == pytest.approx(whole, rel=1e-6)


def test_outputs_of_modules_are_those_of_hugging_face(theirs: GPT2LMHeadModel) -> None:
    class DeadShare(diagnostics.Diagnostic):
        """Share of hidden MLP activations at or below zero."""

        def output(self, name: str, module: torch.nn.Module, x: Tensor) -> None:
            if name.endswith("mlp.activation"):
                self.values[name.split(".")[1]] = (x <= 0).float().mean()

    expected: dict[str, float] = {}
    hooks = [
        block.mlp.act.register_forward_hook(
            lambda _module, _inputs, x, i=i: expected.update({f"diag/dead/{i}": float((x <= 0).float().mean())})
        )
        for i, block in enumerate(theirs.transformer.h)
    ]
    tokens, _ = batch(rows=3)
    with torch.no_grad():
        theirs(tokens)
    for hook in hooks:
        hook.remove()
    part, model = DeadShare(), load_gpt2(theirs)
    part.name = "dead"
    assert diagnose(model, tokens, "fp32", [part]) == pytest.approx(expected, abs=2e-3)
    assert len(expected) == 3
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_come_close(theirs: GPT2LMHeadModel, precision: diagnostics.Precision) -> None:
    tokens, _ = batch()
    found = diagnose(load_gpt2(theirs), tokens, precision)
    assert found == pytest.approx(reference(theirs, tokens), rel=0.03)
    assert found != pytest.approx(reference(theirs, tokens), rel=1e-5)  # it did compute in that precision


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scheme", ["none", "alibi"])
def test_the_largest_score_is_that_of_pairs_that_may_see_each_other(
    window: int | None, sinks: int, softcap: float | None, scheme: str
) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, 2, T, D), torch.randn(B, 2, T, D)
    config = ModelConfig(n_layer=1, n_head=H, n_embd=H * D, block_size=T, vocab_size=VOCABULARY, position=scheme)
    site = Builder(config, config.choices(), layer=0)
    step, seen = ForwardContext(torch.zeros(B, T, dtype=torch.int64)), AttentionLogitMax()
    step.observer = seen
    step.enter(0, site.build("position"))
    unwatched = ForwardContext(step.tokens)
    unwatched.enter(0, step.position)
    arguments, x = (Mask(window, sinks), plain(site, softcap=softcap, scale=0.7)), torch.zeros(B, T, H * D)
    assert torch.equal(attend(q, k, v, x, step, *arguments), attend(q, k, v, x, unwatched, *arguments))
    slopes = [2 ** (-8 * (h + 1) / H) if scheme == "alibi" else 0.0 for h in range(H)]
    best = -math.inf
    for b, h, i, j in itertools.product(range(B), range(H), range(T), range(T)):
        if j > i or (window is not None and i - j >= window and j >= sinks):
            continue
        score = 0.7 * float(q[b, h, i].double() @ k[b, h // 2, j].double())
        score = softcap * math.tanh(score / softcap) if softcap else score
        best = max(best, score - slopes[h] * (i - j))
    assert float(seen.values[0]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("larger", [0, 1])
def test_a_block_may_attend_more_than_once(larger: int) -> None:
    q = torch.ones(1, H, T, D)
    config = ModelConfig(n_layer=1, n_head=H, n_embd=H * D, block_size=T, vocab_size=VOCABULARY)
    site = Builder(config, config.choices(), layer=0)
    step, seen = ForwardContext(torch.zeros(1, T, dtype=torch.int64)), AttentionLogitMax()
    step.observer = seen
    step.enter(0, site.build("position"))
    for call in range(2):
        attend(q * (3 if call == larger else 1), q, q, torch.zeros(1, T, H * D), step, Mask(), plain(site, scale=1.0))
    assert float(seen.values[0]) == 3 * D


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case.options else case for case in CASES], ids=str
)
def test_every_component_can_be_looked_at_and_is_left_alone(case: testing.Case) -> None:
    model = disturbed(case.model(dropout=0.1)).train()
    groups = {group_of(param) for param in model.params()}
    off = {case.slot} if case.name == "none" else set()
    assert {"embedding", "attention", "mlp"} <= groups | off | ({"mlp"} if "moe" in case.name else set())
    assert all(name.isidentifier() for name in groups)
    model.wte.eval()  # modules may be in different modes
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    tokens, targets = batch(rows=4)
    generator = torch.get_rng_state()
    found = diagnose(model, tokens, "fp32")
    assert torch.equal(generator, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    layers = range(model.config.n_layer)
    assert {f"diag/activation_rms/{i}" for i in layers} <= found.keys()
    layers = range(0 if model.h[0].attn is None else model.config.n_layer)
    assert {f"diag/attention_logit_max/{i}" for i in layers} <= found.keys()
    assert all(map(math.isfinite, found.values()))
    assert gradients(model, tokens, targets) == gradients(disturbed(case.model(dropout=0.1)), tokens, targets)


def gradients(model: GPT, tokens: Tensor, targets: Tensor) -> list[bytes]:
    """Bits of what a training step would use, after the same random numbers."""
    model.train()
    torch.manual_seed(3)
    model.objective(tokens, targets)[0].backward()
    return [b"" if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]


def test_modes_are_restored_when_something_breaks() -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9)).train()
    with pytest.raises(IndexError):
        diagnose(model, torch.tensor([[9]]), "fp32")  # no such token
    assert all(module.training for module in model.modules())


def test_numbers_that_are_not_finite_are_told_not_raised() -> None:
    model = build_model(ModelConfig(n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight[0, 0] = math.inf
    found = diagnose(model, torch.zeros(1, 8, dtype=torch.int64), "fp32")
    assert math.isfinite(found["diag/activation_rms/0"])
    assert not math.isfinite(found["diag/activation_rms/1"])
    assert not math.isfinite(found["diag/logit_rms"])


def test_a_value_that_is_no_number_is_refused_by_the_name_of_its_diagnostic() -> None:
    part = diagnostics.Diagnostic()
    part.name, part.values = "rows", {"": torch.zeros(2, 3)}
    with pytest.raises(ConfigError, match=r"diagnostic 'rows': the value '' has the shape \(2, 3\)"):
        part.metrics()
    part.values = {"": torch.ones(1), 0: torch.tensor(2.0)}
    assert part.metrics() == {"diag/rows": 1.0, "diag/rows/0": 2.0}


def test_update_ratios_of_adamw_by_hand() -> None:
    state = fresh(OptimConfig(lr=1e-2, optimizer={"name": "adamw", "weight_decay": 0.1}))
    model, (tokens, targets) = state.model, (torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8))
    double = copy.deepcopy(model).double()
    own = dict(double.named_parameters())
    matrices, rest = ([t for t in own.values() if (t.ndim > 1) is wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 1e-2,
                              betas=state.optimizers[0].param_groups[0]["betas"],
                              eps=state.optimizers[0].param_groups[0]["eps"])  # fmt: skip
    (updates,) = build([diagnostic.read("update_ratio")])
    for one in (model, double):
        one.objective(tokens, targets)[0].backward()
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    adamw.step()
    updates.before_update(model.params())
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    updates.after_update(model.params())
    found = updates.metrics()

    def ratio(*parts: str) -> float:
        named = [name for name in own if any(part in name for part in parts)]
        moved = torch.cat([(own[name].detach() - before[name]).flatten() for name in named])
        size = torch.cat([before[name].flatten() for name in named])
        return float(moved.square().mean().sqrt() / size.square().mean().sqrt())

    expected = {
        "diag/update_ratio": ratio(""),
        "diag/update_ratio/embedding": ratio("wte"),
        "diag/update_ratio/position": ratio("wpe"),
        "diag/update_ratio/attention": ratio("attn.c_attn.weight", "attn.c_proj.weight"),
        "diag/update_ratio/mlp": ratio("mlp.c_fc.weight", "mlp.c_proj.weight"),
        "diag/update_ratio/vector": ratio("bias", "ln_"),
    }
    assert found == pytest.approx(expected, rel=2e-4)
    assert isinstance(updates, UpdateRatio) and updates.copies == {}


def test_a_training_that_is_looked_at_has_the_bits_of_one_that_is_not() -> None:
    ends = []
    for watched in (True, False):
        state = fresh(dropout=0.2)
        for record in training(state, diagnostics=lambda step, on=watched: build() if on and step % 2 == 0 else ()):
            ratios = [name for name in record.metrics if name.startswith("diag/update_ratio")]
            assert bool(ratios) is (watched and record.step % 2 == 0)
            if watched:
                diagnose(state.model, BATCHES.at(0)[0], "fp32")
        ends.append([tensor.numpy().tobytes() for tensor in state.model.state_dict().values()])
        ends[-1] += [t.numpy().tobytes() for o in state.optimizers for s in o.state.values() for t in s.values()]
    assert ends[0] == ends[1]


def test_weights_that_are_zero_have_no_ratio_and_no_step_is_a_ratio_of_zero() -> None:
    head = {"name": "untied", "zero_init": True}
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, head=head))
    (updates,) = build([diagnostic.read("update_ratio")])
    updates.before_update(model.params())
    updates.after_update(model.params())
    found = updates.metrics()
    assert "diag/update_ratio/head" not in found
    assert set(found.values()) == {0.0}
    assert "diag/update_ratio/embedding" in found
