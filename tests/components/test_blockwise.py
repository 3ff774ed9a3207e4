"""Attention in blocks of queries against torch's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.components import attend
from gpt2lab.components.blockwise import QUERIES, causal

LENGTHS = (1, 2, 37, QUERIES - 1, QUERIES, QUERIES + 1, 3 * QUERIES - 5)


def given(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values as an attention has them (views of one tensor), and a gradient.  (2, 3, T, 16)"""
    stream = torch.Generator().manual_seed(tokens)
    joined = torch.randn(2, tokens, 4 * 3 * 16, generator=stream).to(dtype)
    return [part.view(2, tokens, 3, 16).transpose(1, 2) for part in joined.split(3 * 16, -1)]


def torchs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def both_ways(way: object, q: Tensor, k: Tensor, v: Tensor, by_y: Tensor) -> list[Tensor]:
    """Output and the three gradients, in float64."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = way(*leaves, 0.3)  # type: ignore[operator]
    return [x.detach().double() for x in (y, *torch.autograd.grad(y, leaves, by_y))]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_in_float32_it_is_torchs(tokens: int) -> None:
    inputs = given(tokens, torch.float32)
    exact = both_ways(torchs, *(x.double() for x in inputs))
    for ours, theirs in zip(both_ways(causal, *inputs), exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_in_bfloat16_it_errs_no_more_than_torchs(tokens: int) -> None:
    """Numbers of 8 bits: 1/512 of rounding, several times over."""
    inputs = given(tokens, torch.bfloat16)
    exact = both_ways(torchs, *(x.double() for x in inputs))
    ours, theirs = both_ways(causal, *inputs), both_ways(torchs, *inputs)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        error, torchs_error = (float((x - true).norm()) for x in (a, b))
        assert error <= 1.5 * torchs_error + 1e-3
        assert error <= 0.01 * float(true.norm()) + 1e-3


def test_no_token_looks_ahead() -> None:
    q, k, v, _ = given(300, torch.bfloat16)
    later = torch.arange(300) > 140
    changed = [torch.where(later[:, None], 7.0, x) for x in (q, k, v)]
    assert torch.equal(causal(q, k, v, 0.3)[:, :, :141], causal(*changed, 0.3)[:, :, :141])


@pytest.mark.parametrize(
    ("dropout", "length", "ours"), [(0.0, 64, True), (0.1, 64, False), (0.0, attend.SHORT_KEYS + 1, False)]
)
def test_it_takes_the_place_of_torchs_where_it_is_faster(
    dropout: float, length: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(attend, "causal", lambda *inputs: taken.append(1) or causal(*inputs))
    q, k, v, _ = given(length, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend.fused_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=0.3)
    assert bool(taken) == ours and y.dtype == torch.bfloat16
