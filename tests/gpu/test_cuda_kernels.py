"""Kernels on a CUDA device against the plain way: head and loss in chunks, and every way that attention goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2lab import testing
from gpt2lab.components import chunked
from gpt2lab.components.attend import Mask, attend
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.position import Alibi, Position
from gpt2lab.model import GPT, ModelConfig, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # torch's compiler, of fp32
]
CUDA = torch.device("cuda")
V, C = 50257, 64
OBJECTIVES = [["cross_entropy"], ["cross_entropy", {"name": "z_loss", "weight": 0.02}]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA)


def error(found: Tensor, exact: Tensor) -> float:
    """By 2-norms, as a share of the exact result."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def head_model(objective: Any = ("cross_entropy",), vocab_size: int = V, **head: Any) -> GPT:
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": C, "block_size": 8, "vocab_size": vocab_size}
    model = build_model(ModelConfig(**sizes, objective=list(objective), **head), device="cuda")
    with torch.no_grad():
        model.wte.weight.copy_(0.3 * drawn(vocab_size, C, seed=1))
    return model


def ours(model: GPT, rows: Tensor, wanted: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean objective, and its gradients with respect to rows and the embedding."""
    rows = rows.clone().requires_grad_()
    terms, width = list(model.terms), model.config.vocab_size
    total, _ = chunked.loss_sums(rows, wanted, model.lm_head, model.wte, terms, width, fused)
    mean = total / (wanted != -100).sum()
    mean.backward()
    table = model.wte.weight
    assert rows.grad is not None and table.grad is not None
    found = mean.detach(), rows.grad, table.grad
    table.grad = None
    return found


def plain(
    rows: Tensor, table: Tensor, wanted: Tensor, z: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with all scores at once, products in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.detach().to(wide).requires_grad_() for x in (rows, table)]
    scores = (leaves[0].to(dtype) @ leaves[1].to(dtype).T).to(wide)
    counted = wanted != -100
    mean = F.cross_entropy(scores, wanted) + z * scores.logsumexp(-1).square()[counted].mean()
    by_rows, by_table = torch.autograd.grad(mean, leaves)
    return mean.detach(), by_rows, by_table


@pytest.mark.parametrize("fused", [False, True], ids=["stepwise", "fused"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cross_entropy", "z_loss"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_head_and_loss_in_chunks_are_those_of_all_scores_at_once(
    objective: list[Any], precision: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "GPU_SCORES_AT_ONCE", 700 * V)
    model, rows = head_model(objective), drawn(2000, C)
    wanted = torch.randint(V, (2000,), generator=torch.Generator(CUDA).manual_seed(2), device=CUDA)
    wanted[100:900] = -100  # among them a whole chunk
    z = 0.02 if len(objective) > 1 else 0.0
    exact = plain(rows, model.wte.weight, wanted, z)
    if precision == "fp32":
        found = ours(model, rows, wanted, fused)
        assert max(map(error, found, exact)) < 2e-6
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast("cuda", dtype):
        found = ours(model, rows, wanted, fused)
    direct = plain(rows, model.wte.weight, wanted, z, dtype)
    errors, theirs = list(map(error, found, exact)), list(map(error, direct, exact))
    assert all(mine < 1.3 * other + 1e-6 for mine, other in zip(errors, theirs, strict=True)), (errors, theirs)
    assert max(errors) < 0.01


def test_a_loss_without_gradients_is_that_of_all_scores_at_once() -> None:
    model, rows = head_model(), drawn(2000, C)
    wanted = torch.randint(V, (2000,), device=CUDA)
    exact = plain(rows, model.wte.weight, wanted, 0.0)[0].item()
    with torch.no_grad():
        total, nll = chunked.loss_sums(rows, wanted, model.lm_head, model.wte, [], V)
    assert total.item() / 2000 == pytest.approx(exact, rel=1e-6) and total.item() == nll.item()


@pytest.mark.parametrize("fused", [False, True], ids=["stepwise", "fused"])
def test_the_scores_of_all_rows_never_exist_at_once(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "GPU_SCORES_AT_ONCE", 1024 * V)
    n = 16_384
    model, rows, wanted = head_model(), drawn(n, C), torch.randint(V, (n,), device=CUDA)
    all_scores = n * V * 2  # bytes in bfloat16
    with torch.autocast("cuda", torch.bfloat16):
        ours(model, rows, wanted, fused)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours(model, rows, wanted, fused)
        taken = torch.cuda.max_memory_allocated() - before
    assert taken < (0.15 if fused else 0.35) * all_scores


@pytest.mark.parametrize("slot", [{"head": "tied"}, {"head": {"name": "untied", "bias": True}}], ids=["matrix", "any"])
def test_uneven_and_even_vocabularies_agree_with_the_cpu(slot: dict[str, Any]) -> None:
    for vocab_size in (97, 128):
        tokens, targets = testing.batch(rows=8)
        model = testing.disturbed(testing.Case("norm", "layernorm").model(vocab_size=vocab_size, **slot))
        expected = model.loss(tokens, targets)
        expected.backward()
        by_cpu = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model.to(CUDA)
        found = model.loss(tokens.to(CUDA), targets.to(CUDA))
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        by_cuda = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        assert max(map(error, by_cuda, by_cpu)) < 1e-4


B, H, T, D, SEPARATOR = 2, 4, 96, 64, 3
MASKS = {
    "causal": Mask(),
    "window": Mask(window=17),
    "window and sinks": Mask(window=17, sinks=2),
    "documents": Mask(separator=SEPARATOR),
    "window in documents": Mask(window=9, separator=SEPARATOR),
}
BACKENDS: dict[str, list[SDPBackend] | None] = {
    "default": None,
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}


def by_hand(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, mask: Mask, slopes: Tensor | None) -> Tensor:
    """Attention in float64, from what the words window, sinks and separator mean."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / D**0.5
    far = torch.arange(T, device=CUDA)[:, None] - torch.arange(T, device=CUDA)[None]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * far.clamp(min=0)
    seen = (far >= 0).expand(B, 1, T, T)
    if mask.window is not None:
        seen = seen & ((far < mask.window) | (torch.arange(T, device=CUDA) < mask.sinks))
    if mask.separator is not None:
        document = (tokens == mask.separator).cumsum(-1)
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alibi", [False, True], ids=["no bias", "alibi"])
@pytest.mark.parametrize("groups", [H, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_way_of_attention_is_that_of_the_definition(mask: str, groups: int, alibi: bool, backend: str) -> None:
    """Forward and gradients, in float32 and bfloat16. Flash takes no mask; flash and cuDNN take no float32."""
    tokens = torch.randint(4, 20, (B, T), device=CUDA)
    tokens[:, [20, 50]] = SEPARATOR
    position = Alibi(H) if alibi else Position()
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / H) for i in range(H)], device=CUDA).double() if alibi else None
    whole = mask == "causal" and not alibi
    scores = testing.Case("norm", "layernorm").model().h[0].attn.scores
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        if backend in ("flash", "cudnn") and (dtype == torch.float32 or not whole):
            continue
        leaves = [
            x.to(dtype).requires_grad_() for x in (drawn(B, H, T, D), *(drawn(B, groups, T, D, seed=s) for s in (1, 2)))
        ]
        step = ForwardContext(tokens)
        step.enter(0, position)
        weight = drawn(B, H, T, D, seed=3)

        def run(
            attention: Callable[[], Tensor], leaves: list[Tensor] = leaves, weight: Tensor = weight
        ) -> list[Tensor]:
            y = attention()
            return [y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves)]

        with sdpa_kernel(BACKENDS[backend] or list(SDPBackend.__members__.values())[1:]):
            found = run(lambda step=step, leaves=leaves: attend(*leaves, leaves[0], step, MASKS[mask], scores))  # type: ignore[misc]
        exact = run(lambda leaves=leaves: by_hand(*leaves, tokens, MASKS[mask], slopes))  # type: ignore[misc]
        assert max(map(error, found, exact)) < close, (dtype, [error(a, b) for a, b in zip(found, exact, strict=True)])
