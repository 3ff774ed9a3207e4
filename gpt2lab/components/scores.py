"""Attention scores, from queries and keys to the output before its projection.

Shapes: B batch, H heads, G key/value heads, T new tokens, S all tokens so far, C channels, D channels per head. H and D
are those of the tensors: an attention may have other heads than the model's sizes say.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot


class Scores(nn.Module):
    """softmax(q k^T * scale) v, alone by default. Subclasses override `prepare`, `bias`, `weights`, `finish`.

    Attention builds it with the sizes of its score maps: `builder.dims.n_head` of them, for queries and keys of
    `builder.width` channels (None: dims.head_size).
    """

    def __init__(
        self,
        builder: Builder,
        *,
        qk_norm: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        gate: bool = False,
        sink_logits: bool = False,
    ) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        inner = builder.at(width=builder.width or builder.dims.head_size)
        self.q_norm: nn.Module | None = inner.build("norm") if qk_norm else None
        self.k_norm: nn.Module | None = inner.build("norm") if qk_norm else None
        self.c_gate = builder.linear(builder.dims.n_embd, builder.dims.n_embd) if gate else None
        self.sink = nn.Parameter(torch.zeros(builder.dims.n_head)) if sink_logits else None

    @property
    def fused(self) -> bool:
        """Whether torch's fused kernel computes these scores: it has neither softcap nor sinks, and only a softmax."""
        return self.softcap is None and self.sink is None and type(self).weights is Scores.weights

    def factor(self, q: Tensor, ctx: ForwardContext) -> float:
        """The factor on dot products of queries (B, H, T, D) with keys."""
        return (q.shape[-1] ** -0.5 if self.scale is None else self.scale) * ctx.score_factor

    def prepare(self, q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Change the new tokens' queries and keys before positions rotate them.  (B, H, T, D), (B, G, T, D)"""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            # these views make gradients contiguous: for others, torch.compile mistakes the strides behind a LayerNorm
            q, k = (x.flatten(0, -2).view(x.shape) for x in (q, k))
        return q, k

    def bias(self, q: Tensor, k: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor | None:
        """A bias on scores that depends on content; x is the input of attention. Masked scores stay masked.
        q (B, H, T, D), k (B, H, S, D), x (B, T, C) -> broadcasts to (B, H, T, S), or None"""
        return None

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        """Attention weights from scores in float32, -inf where masked.  (B, H, T, S) -> (B, H, T, S)"""
        if self.sink is None:
            return logits.softmax(-1)
        sink = self.sink.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """Change the concatenated heads y before the output projection; x is the input of attention, v the values of
        the new tokens.  y (B, T, C), x (B, T, C), v (B, G, T, D) -> (B, T, C)"""
        return y if self.c_gate is None else y * torch.sigmoid(self.c_gate(x))


scores = Slot("model.scores", "how attention scores are computed", default="plain", arity="per_layer", base=Scores)


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


@scores.register("forgetting", source="arXiv:2503.02130", needs={"attention": "bias"})
class Forgetting(Scores):
    """Scores that decay by a forget gate of every token in between, as a distance that depends on content.

    softmax(q k^T * scale + F)   with F(t, s) = log f(s+1) + ... + log f(t),  f = sigmoid(W x + b) per head

    qk_norm: normalise the queries and keys of each head, as in the paper's larger block ("Pro").
    gate:    multiply the output of the heads by sigmoid(W x), as in that block.
    The paper uses it without other positions: `model.position: none`. All gates are near 1/2 at the start, as in its
    code; b is there if the model has biases. The block's short convolution of keys and values is left out.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False, gate: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm, gate=gate)
        self.c_forget = builder.linear(builder.dims.n_embd, builder.dims.n_head)

    def bias(self, q: Tensor, k: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
        log_forget = F.logsigmoid(self.c_forget(x).float()).mT  # (B, H, T)
        decay = ctx.cached("forget", log_forget, dim=-1).cumsum(-1)  # (B, H, S)
        return decay[..., -x.shape[1] :, None] - decay[..., None, :]


@scores.register("cope", source="arXiv:2405.18719", needs={"attention": "bias"}, examples=({"positions": 4},))
class ContextualPositions(Scores):
    """Positions that count tokens selected by content, looked up by the query and added to its scores (CoPE).

    s(t, j) + q_t . e[p(t, j)]   with p(t, j) = g(t, j) + ... + g(t, t),  g = sigmoid(s),  s = q k^T * scale

    positions: rows of e, (positions, D), one table for the heads of a layer; counts beyond the last row are set to it.
    null is 64, or block_size if that is smaller.
    qk_norm:   normalise the queries and keys of each head.
    Between rows, the products are interpolated. It counts up to the token itself and takes the place of other
    positions: `model.position: none`. The paper starts e at zero, here it is drawn by the init.
    """

    def __init__(
        self, builder: Builder, *, positions: Annotated[int, Field(ge=2)] | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        rows = positions or max(2, min(64, builder.dims.block_size))
        self.table = builder.table(rows, builder.width or builder.dims.head_size, "position")

    def bias(self, q: Tensor, k: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
        later = ctx.k_positions[None] > ctx.q_positions[:, None]  # (T, S)
        gates = torch.sigmoid((q @ k.mT).float() * self.factor(q, ctx)).masked_fill(later, 0.0)
        places = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.table) - 1)  # (B, H, T, S)
        products = (q @ self.table.mT.to(q.dtype)).float()  # (B, H, T, positions)
        low, high = (products.gather(-1, row.long()) for row in (places.floor(), places.ceil()))
        return torch.lerp(low, high, places - places.floor())


@scores.register("sigmoid", source="arXiv:2409.04431", needs={"attention": "bias"})
class Sigmoid(Scores):
    """A sigmoid of each score in place of the softmax, so that keys do not compete.

    sigmoid(q k^T * scale + b) v

    b:       null is -log(block_size), with which the weights of a fresh model sum to about 1 over a full context.
    qk_norm: normalise the queries and keys of each head, which the paper recommends for stability.
    """

    def __init__(self, builder: Builder, *, b: float | None = None, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.b = -math.log(builder.dims.block_size) if b is None else b

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        return torch.sigmoid(logits + self.b)


@scores.register("talking_heads", source="arXiv:2003.02436", needs={"attention": "bias"})
class TalkingHeads(Scores):
    """Heads that mix their scores before the softmax, and their weights after it.

    (I + W_2) softmax((I + W_1) s)   with s the scores of the H heads and W_1, W_2 (H, H)

    qk_norm: normalise the queries and keys of each head.
    The paper has W_1 and W_2 without the identity; with it, a fresh model has nearly independent heads.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        heads = builder.dims.n_head
        self.before = builder.linear(heads, heads, bias=False)
        self.after = builder.linear(heads, heads, bias=False)

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        masked = logits == -math.inf
        scores = self.mixed(logits.masked_fill(masked, 0.0), self.before.weight)
        return self.mixed(scores.masked_fill(masked, -math.inf).softmax(-1), self.after.weight)

    @staticmethod
    def mixed(maps: Tensor, weight: Tensor) -> Tensor:
        """(I + weight) applied to the heads of maps.  (B, H, T, S), (H, H) -> (B, H, T, S)"""
        return maps + torch.einsum("gh,bhts->bgts", weight, maps)


@scores.register("top_k", source="arXiv:1912.11637", needs={"attention": "bias"})
class TopK(Scores):
    """Each query attends to its k largest scores only (sparse attention by content).

    softmax over the k largest of q k^T * scale; the others have weight 0

    k:       number of keys; the paper found 8 best. Equal scores at the limit all remain.
    qk_norm: normalise the queries and keys of each head.
    Rounding in half precision may change which keys are selected.
    """

    def __init__(self, builder: Builder, *, k: Annotated[int, Field(ge=1)] = 8, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.k = k

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        smallest = logits.detach().topk(min(self.k, logits.shape[-1]), dim=-1).values[..., -1:]
        return logits.masked_fill(logits < smallest, -math.inf).softmax(-1)
