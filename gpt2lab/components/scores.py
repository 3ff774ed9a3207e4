"""Attention scores, from queries and keys to the output before its projection.

Shapes: B batch, H heads, T tokens, C channels, D channels per head.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.registry import Slot

scores = Slot("model.scores", "how attention scores are computed", default="plain", arity="per_layer")


class Scores(nn.Module):
    """The operations around softmax(q k^T * scale) v that differ between variants; without effect by default."""

    def __init__(
        self,
        builder: Builder,
        *,
        qk_norm: bool,
        softcap: float | None,
        scale: float | None,
        gate: bool,
        sink_logits: bool,
    ) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        inner = builder.at(width=builder.dims.head_size)
        self.q_norm: nn.Module | None = inner.build("norm") if qk_norm else None
        self.k_norm: nn.Module | None = inner.build("norm") if qk_norm else None
        self.c_gate = builder.linear(builder.dims.n_embd, builder.dims.n_embd) if gate else None
        self.sink = nn.Parameter(torch.zeros(builder.dims.n_head)) if sink_logits else None

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Change queries and keys before positions rotate them.  (B, H, T, D) each"""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Change the concatenated heads y before the output projection; x is the input of attention.  (B, T, C) each"""
        return y if self.c_gate is None else y * torch.sigmoid(self.c_gate(x))


@scores.register(
    "plain",
    source="arXiv:1706.03762; qk_norm 2010.04245; softcap 2408.00118; gate 2505.06708; sink_logits 2508.10925",
    examples=({"softcap": 30.0}, {"scale": 0.125}),
)
def plain(
    builder: Builder,
    *,
    qk_norm: bool = False,
    softcap: Annotated[float, Field(gt=0)] | None = None,
    scale: float | None = None,
    gate: bool = False,
    sink_logits: bool = False,
) -> nn.Module:
    """Scaled dot product, softmax(q k^T * scale); GPT-2's by default.  (B, H, T, S) scores

    qk_norm:     normalise the queries and keys of each head (with the model's norm) before positions rotate them.
    softcap:     bound scores by s -> softcap * tanh(s / softcap).
    scale:       factor on the dot product; null is 1/sqrt(D).
    gate:        multiply the output of the heads elementwise by sigmoid(W x), before the output projection.
    sink_logits: one trained score per head in the softmax, without a value.
    """
    return Scores(builder, qk_norm=qk_norm, softcap=softcap, scale=scale, gate=gate, sink_logits=sink_logits)
