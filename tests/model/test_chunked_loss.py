"""Head and loss in chunks of rows: the numbers of the direct way, in bounded memory, whatever head and objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lab import testing
from gpt2lab.components import chunked
from gpt2lab.components.base import Builder
from gpt2lab.components.chunked import loss_sums, rows_at_once
from gpt2lab.components.embedding import TokenEmbedding
from gpt2lab.components.objective import CrossEntropy
from gpt2lab.model import GPT
from gpt2lab.registry import SLOTS
from gpt2lab.training.distributed import Objective

N, C, V, SIZE = 32, 32, 97, 7  # rows in a batch, channels, vocabulary, rows in a chunk (the last one has fewer)
HEADS = testing.cases(SLOTS["head"])
OBJECTIVES = [["cross_entropy"], ["cross_entropy", {"name": "z_loss", "weight": 0.02}]]
SHORT = {"head=tied", "head=untied", "head=untied,zero_init=True"}  # scores are rows times a matrix and nothing else


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", SIZE * V)


def targets_with_gaps() -> tuple[Tensor, Tensor]:
    """Of a batch, some targets that do not count; among them a whole chunk."""
    tokens, targets = testing.batch()
    targets = targets.clone()
    targets[0, 3:15] = -100
    targets[1, -2:] = -100
    return tokens, targets


def gradients(model: GPT, tokens: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    objective, parts = model.objective(tokens, targets)
    (objective * scale).backward()
    assert not parts["loss"].requires_grad
    return objective.item(), {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, as a share of it (by 2-norms)."""
    assert found.keys() == expected.keys()
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cross_entropy", "z_loss"])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_loss_and_gradients_are_those_of_the_direct_way(
    head: testing.Case, objective: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (tokens, targets) = testing.disturbed(head.model(objective=objective)), targets_with_gaps()
    logits = model(tokens).flatten(0, 1)
    counted = targets.flatten() != -100
    expected_loss = F.cross_entropy(logits, targets.flatten())
    expected = expected_loss + (len(objective) - 1) * 0.02 * logits.logsumexp(-1).square()[counted].mean()
    expected.backward()
    direct = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rounding = worst(
        gradients(testing.nudged(model), tokens, targets)[1], direct
    )  # a router's is a sum of small differences
    monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", SIZE * V)
    short = spied(monkeypatch, "matrix_sums")
    found, ours = gradients(model, tokens, targets)
    assert bool(short) == (str(head) in SHORT)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    gap = worst(ours, direct)
    assert gap < 1e-6 or gap < 8 * rounding, f"{gap:.1e}, and {rounding:.1e} by the last bit of the weights"
    assert model.objective(tokens, targets)[1]["loss"].item() == pytest.approx(expected_loss.item(), rel=1e-6)
    with torch.no_grad():
        assert model.loss(tokens, targets).item() == pytest.approx(expected_loss.item(), rel=1e-6)


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Grows with each call of a function of `chunked`, which goes on working."""
    calls: list[int] = []
    real = getattr(chunked, name)
    monkeypatch.setattr(chunked, name, lambda *a: (calls.append(1), real(*a))[1])
    return calls


class Smoothed(CrossEntropy):
    """An heir of a known term that computes something else, with a parameter of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.amount = nn.Parameter(torch.tensor(0.1))

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        return nll - self.amount * logits.log_softmax(-1).mean(-1)


class Factorized(TokenEmbedding):
    """An heir of a known embedding that scores in another way."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(V, 4, generator=generator))
        self.wide = nn.Parameter(torch.randn(4, C, generator=generator))

    def unembed(self, rows: Tensor) -> Tensor:
        return rows @ (self.weight @ self.wide).T


@pytest.mark.parametrize("part", ["term", "embedding"])
@pytest.mark.usefixtures("small_chunks")
def test_heirs_of_known_parts_are_asked_themselves(part: str) -> None:
    model = testing.Case("head", "tied").model()
    rows, wanted = torch.randn(N, C, generator=torch.Generator().manual_seed(1)), torch.arange(N)
    embedding = Factorized() if part == "embedding" else model.wte
    terms = [Smoothed()] if part == "term" else list(model.terms)

    def run(size: int) -> dict[str, Tensor]:
        leaves = {"rows": rows.clone().requires_grad_()}
        for module in (embedding, *terms):
            module.zero_grad()
            leaves |= dict(module.named_parameters())
        chunked.LOGITS_AT_ONCE["cpu"] = size * V
        objective, _ = loss_sums(leaves["rows"], wanted, model.lm_head, embedding, terms, V)
        (objective / N).backward()
        return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}

    direct = run(N)
    assert len(direct) == 3
    assert worst(run(SIZE), direct) < 1e-6


@pytest.mark.parametrize("head", ["tied", {"name": "tied", "softcap": 15.0}], ids=["matrix", "any"])
def test_bf16_agrees_with_the_direct_way(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, targets) = (
        testing.disturbed(testing.Case("norm", "layernorm").model(head=head)),
        targets_with_gaps(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, direct = gradients(model, tokens, targets)
        monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", SIZE * V)
        found, ours = gradients(model, tokens, targets)
    assert found == pytest.approx(loss, rel=1e-5)
    assert worst(ours, direct) < 0.02  # a bfloat16 number has 8 bits


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["matrix", "any"])
@pytest.mark.usefixtures("small_chunks")
def test_small_gradients_survive_fp16(softcap: float | None, scale: float) -> None:
    # token 5 is never a target, and improbable: its row's gradient is a sum of p x, with p about 1e-6. Divided by the
    # number of rows first, these would be below the smallest number of half precision
    site = testing.Case("head", "untied").model()
    choice = SLOTS["head"].read({"name": "untied", **({"softcap": softcap} if softcap else {})})
    head = SLOTS["head"].build(choice, Builder(site.config, site.config.choices()))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, C, generator=generator) * 0.1)
        head.weight[5] = -0.27
    rows = 1 + 0.1 * torch.randn(N, C, generator=generator)
    wanted = torch.arange(10, 10 + N)

    def gradient(half: bool) -> Tensor:
        head.weight.grad = None
        with torch.autocast("cpu", torch.float16, enabled=half):
            objective, _ = loss_sums(rows, wanted, head, site.wte, list(site.terms), V)
        (objective / 4096 * scale).backward()
        return head.weight.grad[5] / scale * 4096

    exact, ours = gradient(half=False), gradient(half=True)
    assert 1e-6 < exact.abs().max() / N < 1e-5
    assert ((ours - exact).abs().max() / exact.abs().max()).item() < 0.05


@pytest.mark.usefixtures("small_chunks")
def test_a_gradient_scaler_finds_the_same_step() -> None:
    model, (tokens, targets) = testing.disturbed(testing.Case("norm", "layernorm").model()), targets_with_gaps()
    _, plain = gradients(model, tokens, targets)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    scaler.scale(model.objective(tokens, targets)[0]).backward()
    scaler.unscale_(optimizer)
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain) < 1e-6


def two_passes_in_ddp(model: nn.Module, tokens: Tensor, targets: Tensor) -> None:
    """Add the gradients of two passes. DDP ends here, before its group: see `ranks._group`."""
    replica = DistributedDataParallel(Objective(model))
    for _ in range(2):  # the second one raises an error if the first left a parameter without a gradient
        replica(tokens, targets)[0].backward()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("head", ["tied", {"name": "untied", "bias": True}], ids=["matrix", "any"])
def test_ddp_reduces_every_gradient_once(head: Any, tmp_path: Path) -> None:
    model, (tokens, targets) = testing.disturbed(testing.Case("norm", "layernorm").model(head=head)), testing.batch()
    _, alone = gradients(model, tokens, targets)
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        two_passes_in_ddp(model, tokens, targets)
    finally:
        dist.destroy_process_group()
    twice = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    assert worst(twice, alone) < 1e-6


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("softcap", [None, 15.0], ids=["matrix", "any"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_tensor_holds_the_scores_of_all_rows(
    softcap: float | None, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = testing.Case("norm", "layernorm").model(head={"name": "tied", "softcap": softcap})
    rows = 20 * N

    def largest() -> int:
        hidden = torch.zeros(rows, C, requires_grad=training)
        with Largest() as seen, torch.set_grad_enabled(training):
            objective, _ = loss_sums(hidden, torch.arange(rows) % V, model.lm_head, model.wte, list(model.terms), V)
            if training:
                objective.backward()
        return seen.elements

    assert largest() == rows * V
    monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", SIZE * V)
    assert largest() == rows * C if training else SIZE * V  # rows x C: their gradient


def test_terms_that_see_the_stream_hold_no_more_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    width, (tokens, targets) = 2000, testing.batch(rows=4)
    model = testing.Case("objective", "multi_token", {"tokens": 3}).model(vocab_size=width)

    def largest() -> int:
        with Largest() as seen:
            model.objective(tokens, targets)[0].backward()
        return seen.elements

    assert largest() == 4 * 16 * width
    monkeypatch.setitem(chunked.LOGITS_AT_ONCE, "cpu", SIZE * width)
    assert largest() == width * C  # the gradient of the head


@pytest.mark.usefixtures("small_chunks")
def test_going_backward_twice_is_an_error() -> None:
    model, (tokens, targets) = testing.Case("norm", "layernorm").model(), testing.batch()
    loss = model.loss(tokens, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_are_equally_large_within_what_a_device_takes() -> None:
    assert rows_at_once(1024, 256, "cpu") == 1024  # a small vocabulary needs no chunks
    most = chunked.LOGITS_AT_ONCE["cpu"] // 50304
    for n in (most + 1, 2 * most, 2048, 10_000):
        size = rows_at_once(n, 50304, "cpu")
        assert size <= most
        assert 0 <= -n % size < -(-n // size)  # the last chunk lacks less than a row for each of the others
    assert rows_at_once(10**6, 50304, "meta") == 10**6
    assert rows_at_once(3, 10**9, "cpu") == 1
