"""What happens to attention scores between the dot product and the output.

Shapes: B batch, H heads, T tokens, C channels, D channels per head.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Site
from gpt2lab.registry import Slot

scores = Slot("model.scores", "how attention scores are formed", default="plain", arity="per_layer")


class Scores(nn.Module):
    """The parts around softmax(q k^T * scale) v that variants change; neutral where an option is off.

    n_score: how many score maps the attention has (its query heads).
    """

    def __init__(
        self, site: Site, *, qk_norm: bool, softcap: float | None, scale: float | None, gate: bool, sink_logits: bool
    ) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        inner = site.at(width=site.dims.head_size)
        self.q_norm: nn.Module | None = inner.make("norm") if qk_norm else None
        self.k_norm: nn.Module | None = inner.make("norm") if qk_norm else None
        self.c_gate = site.linear(site.dims.n_embd, site.dims.n_embd) if gate else None
        self.sink = nn.Parameter(torch.zeros(site.dims.n_head)) if sink_logits else None

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys before positions rotate them.  (B, H, T, D) each"""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads joined again, before the output projection; x is what attention was given.  (B, T, C) -> (B, T, C)"""
        return y if self.c_gate is None else y * torch.sigmoid(self.c_gate(x))


@scores.register(
    "plain",
    source="arXiv:1706.03762; qk_norm 2010.04245; softcap 2408.00118; gate 2505.06708; sink_logits 2508.10925",
    examples=({"softcap": 30.0}, {"scale": 0.125}),
)
def plain(
    site: Site,
    *,
    qk_norm: bool = False,
    softcap: Annotated[float, Field(gt=0)] | None = None,
    scale: float | None = None,
    gate: bool = False,
    sink_logits: bool = False,
) -> nn.Module:
    """Scaled dot product, softmax(q k^T * scale); every option off is GPT-2.  (B, H, T, S) scores

    qk_norm:     normalise each head's queries and keys (with the model's norm) before positions rotate them.
    softcap:     s -> softcap * tanh(s / softcap), which bounds scores.
    scale:       factor on the dot product; null is 1/sqrt(D).
    gate:        multiply the heads' output by sigmoid(W x), element by element, before the output projection.
    sink_logits: one learned score per head that takes part in the softmax and attends to nothing.
    """
    return Scores(site, qk_norm=qk_norm, softcap=softcap, scale=scale, gate=gate, sink_logits=sink_logits)
