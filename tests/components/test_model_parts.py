"""Norms, linear maps, embeddings, parts across layers, inits and objectives against formulas and torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import initial, model, random, site
from torch import Tensor, nn

from gpt2lab import testing
from gpt2lab.components import chunked
from gpt2lab.components.base import Progress
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.linear import ternary
from gpt2lab.components.position import Position
from gpt2lab.optim import OptimConfig, build_optimizers
from gpt2lab.registry import SLOTS


def test_dyt_and_scale_norm_by_their_formulas() -> None:
    x = random(3, 32, seed=1)
    dyt = model(norm={"name": "dyt", "alpha": 0.8}).ln_f
    assert torch.allclose(dyt(x), dyt.weight * torch.tanh(dyt.alpha * x) + dyt.bias, atol=1e-6)
    scale = initial(norm="scale_norm").ln_f
    assert torch.allclose(scale(x), F.rms_norm(x, (32,), eps=1e-12), atol=1e-5)  # g = sqrt(C) makes it an RMS norm


# --- linear ---


def test_ternary_weights_by_hand() -> None:
    weight = torch.tensor([[0.9, -0.2], [0.3, -1.0]])  # mean absolute value 0.6
    assert torch.allclose(ternary(weight), torch.tensor([[0.6, 0.0], [0.0, -0.6]]))
    layer = SLOTS["linear"].build(SLOTS["linear"].read("bitnet"), site(), 2, 2, False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    out = layer(x)
    unit = torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5)
    assert torch.allclose(out, unit @ ternary(weight).T, atol=1e-6)
    out.sum().backward()
    assert torch.allclose(layer.weight.grad, unit.expand(2, 2), atol=1e-6)  # straight through


def test_eight_bit_activations_are_those_of_torch() -> None:
    x = random(5, 16, seed=1)
    layer = SLOTS["linear"].build(
        SLOTS["linear"].read({"name": "quantized", "activation_bits": 8}), site(), 16, 16, False
    )
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
        found = layer(x)
    for row, expected in zip(found, x, strict=True):
        unit = (expected.abs().max() / 127).item()
        assert torch.allclose(row, torch.fake_quantize_per_tensor_affine(expected, unit, 0, -127, 127), atol=1e-6)


def test_quantization_warms_up_with_the_progress() -> None:
    made = model(linear={"name": "bitnet", "norm": False, "warmup": 0.5})
    plain = model()
    plain.load_state_dict(made.state_dict())
    tokens, _ = testing.batch()
    made.progress.set(0.0)
    assert torch.allclose(made(tokens), plain(tokens), atol=1e-6)
    made.progress.set(0.25)
    halfway = made(tokens)
    made.progress.set(0.5)
    done = made(tokens)
    assert not torch.allclose(halfway, done, atol=1e-4)
    made.progress.set(1.0)
    assert torch.equal(made(tokens), done)


def test_heads_routers_and_embeddings_stay_exact() -> None:
    made = model(linear="bitnet", head="untied", mlp="moe", embedding=["plain", "smear"])
    kinds = {name: type(module).__name__ for name, module in made.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Quantized"} == {
        f"h.{i}.attn.{name}" for i in range(2) for name in ("c_attn", "c_proj")
    }
    assert kinds["h.0.mlp.router"] == "Linear"


def test_low_rank_adaptation_begins_as_the_plain_model_and_trains_alone() -> None:
    plain, adapted = (initial(linear=name) for name in ("plain", "lora"))
    tokens, targets = testing.batch()
    assert torch.equal(plain(tokens), adapted(tokens))
    frozen = OptimConfig(freeze=("w*", "ln_f.*", "h.*.weight", "h.*.bias"))
    (optimizer,) = build_optimizers(frozen, adapted.params())
    for _ in range(2):  # a has no gradient before b has moved
        adapted.objective(tokens, targets)[0].backward()
        optimizer.step()
    before = dict(plain.named_parameters())
    for name, weight in adapted.named_parameters():
        assert (name not in before) or torch.equal(weight, before[name]), name
    layer = adapted.h[0].mlp.c_fc
    assert layer.a.grad is not None and layer.b.abs().max() > 0
    x = torch.randn(3, 32)
    merged = F.linear(x, layer.weight + layer.b @ layer.a, layer.bias)
    torch.testing.assert_close(layer(x), merged)


# --- embedding, stack, mlp ---


def test_parts_of_the_embedding_by_their_formulas() -> None:
    tokens, _ = testing.batch()
    made = model(embedding=["factorized", "scaled"])
    x = made.embedding[0](made.wte(tokens, ForwardContext(tokens)), ForwardContext(tokens))
    whole = made.wte.weight @ made.wte.widen.weight.T  # (V, C)
    assert torch.allclose(x, whole[tokens] * 32**0.5, atol=1e-5)
    assert torch.allclose(made.wte.unembed(x[0]), x[0] @ whole.T, atol=1e-5)
    normed = model(embedding=["plain", "normed"])
    ln = normed.embedding[0].ln
    x = normed.wte.weight[tokens]
    assert torch.equal(normed.embedding[0](x, ForwardContext(tokens)), F.layer_norm(x, (32,), ln.weight, ln.bias))


def test_pairs_of_tokens_have_their_own_vectors() -> None:
    made = model(embedding=["plain", {"name": "bigram_hash", "buckets": 100_003}])
    part, tokens = made.embedding[0], torch.tensor([[1, 2, 3, 1, 2, 2, 3]])
    x = part(torch.zeros(1, 7, 32), ForwardContext(tokens))[0]
    assert torch.equal(x[1], x[4])  # (1, 2)
    assert torch.equal(x[2], x[6])  # (2, 3)
    distinct = [x[i] for i in (0, 1, 2, 3, 5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])
    start = initial(embedding=["plain", "bigram_hash"])
    assert start.embedding[0].weight.shape == (5 * 97, 32)
    assert not start.embedding[0].weight.any()


def test_embeddings_reach_later_layers() -> None:
    tokens, _ = testing.batch()
    plain = initial(seed=1)
    skip = initial(stack=["embedding_skip"], seed=1)
    assert torch.equal(plain(tokens), skip(tokens))  # a = 1, b = 0
    values = model(n_layer=3, stack=[{"name": "value_embeddings", "tables": 2}])
    part, ctx = values.stack[0], ForwardContext(tokens)
    v = random(2, 4, 16, 8, seed=1)
    for depth, table in ((0, 0), (1, 1), (2, 0)):
        mix = part.mix[depth]
        extra = part.tables[table][tokens].view(2, 16, 4, 8).transpose(1, 2)
        assert torch.allclose(part.mix_values(depth, v, ctx), mix[0] * v + mix[1] * extra, atol=1e-6)


def test_hidden_widths_by_layer() -> None:
    made = model(mlp=[{"name": "gelu_tanh", "ratio": 2.0}, {"name": "reglu", "two_thirds": False}])
    assert made.h[0].mlp.c_fc.weight.shape == (64, 32)
    assert made.h[1].mlp.c_fc.weight.shape == (256, 32)
    x, mlp = torch.randn(1, 3, 32), made.h[1].mlp
    gate, up = mlp.c_fc(x).chunk(2, -1)
    assert torch.allclose(mlp(x, ForwardContext(torch.zeros(1, 3))), mlp.c_proj(gate.relu() * up), atol=1e-6)
    experts = model(mlp={"name": "moe", "activation": "relu2", "ratio": 2.0}).h[0].mlp
    assert experts.c_fc.shape == (8, 64, 32)
    rows = torch.randn(3, 32)
    assert torch.allclose(
        experts.expert(1, rows), (rows @ experts.c_fc[1].T).relu().square() @ experts.c_proj[1].T, atol=1e-5
    )


# --- init ---


def test_inits_have_the_published_spread() -> None:
    deep = initial(n_embd=256, n_layer=4, init="depth_scaled")
    for layer, block in enumerate(deep.h, 1):
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.02)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for param in initial(n_embd=256, n_layer=4, init="small_init").params():
        if param.role.kind != "vector":
            xavier = math.sqrt(2 / (256 + 4 * 256))  # of a matrix from C to 4 C
            assert param.tensor.std().item() == pytest.approx(xavier, rel=0.02), param.name


# --- objective and progress ---


def test_label_smoothing_is_torchs() -> None:
    tokens, targets = batch()
    made = model(objective=["cross_entropy", {"name": "label_smoothing", "amount": 0.2}])
    expected = F.cross_entropy(made(tokens).flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    assert made.objective(tokens, targets)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def batch() -> tuple[Tensor, Tensor]:
    """A batch in which some targets do not count."""
    tokens, targets = testing.batch()
    targets = targets.clone()
    targets[0, 3:6] = -100
    return tokens, targets


@pytest.mark.parametrize("choices", [{}, {"head": "untied", "residual": "hyper_connections"}, {"residual": "post"}])
@pytest.mark.parametrize("alone", [False, True])
def test_multi_token_by_its_formula(choices: dict[str, Any], alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = [{"name": "multi_token", "tokens": 3, "weight": 0.5}]
    tokens, targets = batch()
    made = model(objective=objective if alone else ["cross_entropy", *objective], **choices)
    term, count = made.terms[-1], (targets != -100).sum()
    x = made.hidden(made.context(tokens))
    expected = 0.0 if alone else F.cross_entropy(made(tokens).flatten(0, 1), targets.flatten())
    for ahead, (block, norm) in enumerate(zip(term.blocks, term.norms, strict=True), 1):
        ctx = made.context(tokens)
        ctx.enter(9, Position())
        logits = made.lm_head(norm(block.close(block(block.open(x), ctx))).flatten(0, 1), made.wte).view(2, 16, -1)
        rows, labels = logits[:, :-ahead].flatten(0, 1), targets[:, ahead:].flatten()
        expected = expected + 0.5 * F.cross_entropy(rows, labels, reduction="sum") / count
    expected.backward()
    direct = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    for size in (10**6, 7 * 97):  # at once, and seven rows at a time
        monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", size)
        made.zero_grad()
        total, parts = made.objective(tokens, targets)
        total.backward()
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert parts["loss"].item() == pytest.approx(made.loss(tokens, targets).item(), rel=1e-6)
        for name, parameter_ in made.named_parameters():
            if name in direct:
                assert torch.allclose(parameter_.grad, direct[name], atol=1e-6), name


def test_progress_is_one_outside_training_and_no_part_of_the_state() -> None:
    made = model(linear={"name": "bitnet", "warmup": 0.5})
    assert made.progress.value.item() == 1.0
    assert not any("progress" in name for name in made.state_dict())
    assert made.context(testing.batch()[0]).progress is made.progress.value
    shared = [module for module in made.modules() if isinstance(module, Progress)]
    assert shared == [made.progress]
    assert ForwardContext(torch.zeros(1, 2, dtype=torch.int64)).progress.item() == 1.0


def test_progress_does_not_compile_again() -> None:
    made = model(linear={"name": "bitnet", "warmup": 0.5}, n_layer=1)
    tokens, _ = testing.batch()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(made.trunk, backend=backend, dynamic=False)
    outputs = []
    for share in (0.0, 0.1, 0.3):
        made.progress.set(share)
        outputs.append(compiled(tokens)[0])
        assert torch.allclose(outputs[-1], made.trunk(tokens)[0], atol=1e-5)
    assert len(graphs) == 1
    assert not torch.allclose(outputs[0], outputs[1])
