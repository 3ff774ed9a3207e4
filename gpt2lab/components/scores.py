"""Attention scores, from queries and keys to the output before its projection.

Shapes: B batch, H heads, G key/value heads, T new tokens, S all tokens so far, C channels, D channels per head. H and D
are those of the tensors: an attention may have other heads than the model's sizes say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

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
            # these views make gradients contiguous: for others, torch.compile mistakes the strides after a LayerNorm
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
        return maps + torch.einsum("gh,bhts->bgts", weight.to(maps.dtype), maps)


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


@scores.register(
    "off_by_one", source="Miller 2023 (attention is off by one); add_zero_attn of torch", needs={"attention": "bias"}
)
class OffByOne(Scores):
    """A softmax that may attend to nothing: one score of zero without a value.

    exp(s_i) / (1 + sum_j exp(s_j))   `sink_logits` of plain trains that score, one for each head

    qk_norm: normalise the queries and keys of each head.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        return F.pad(logits, (0, 1)).softmax(-1)[..., :-1]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda s: torch.relu(s).square(),
    "softplus": F.softplus,
    "squareplus": lambda s: (s + (s.square() + 4).sqrt()) / 2,
}


@scores.register(
    "pointwise",
    source="relu: arXiv:2309.08586; relu2: arXiv:2202.10447; squareplus: arXiv:2112.11687",
    needs={"attention": "bias"},
    examples=({"function": "squareplus"},),
)
class Pointwise(Scores):
    """A function of each score by itself in place of the softmax, divided by a constant.

    f(q k^T * scale) / divisor   and 0 where attention is masked

    function: f. squareplus is (s + sqrt(s^2 + 4)) / 2, a smooth relu without exponentials.
    divisor:  null is block_size, as in the first source.
    qk_norm:  normalise the queries and keys of each head.
    """

    def __init__(
        self, builder: Builder, *, function: Literal["relu", "relu2", "softplus", "squareplus"] = "relu",
        divisor: Annotated[float, Field(gt=0)] | None = None, qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(builder, qk_norm=qk_norm)
        self.function, self.divisor = FUNCTIONS[function], divisor or builder.dims.block_size

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        masked = logits == -math.inf
        return self.function(logits.masked_fill(masked, 0.0)).masked_fill(masked, 0.0) / self.divisor


@scores.register("consmax", source="arXiv:2402.10930", needs={"attention": "bias"})
class ConSmax(Scores):
    """A softmax whose maximum and sum are replaced by two trained numbers per head, so that keys need no reduction.

    exp(s - b_h) / g_h   with b = 2.5 and g = block_size / 4 at the beginning

    qk_norm: normalise the queries and keys of each head.
    The paper starts g at 100 for contexts of 256. exp is bounded at s - b = 20, where a step would be lost.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.b = nn.Parameter(torch.full((builder.dims.n_head,), 2.5))
        self.g = nn.Parameter(torch.full((builder.dims.n_head,), builder.dims.block_size / 4))

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        b, g = (x.float()[:, None, None] for x in (self.b, self.g))
        return (logits - b).clamp(max=20.0).exp() / g


@scores.register("distance", source="arXiv:2006.04710 (L2 attention)", needs={"attention": "bias"})
class Distance(Scores):
    """Minus half the squared distance of query and key in place of their product.

    softmax(-|q - k|^2 / 2 * scale)   in which |q|^2 cancels

    qk_norm: normalise the queries and keys of each head, with which it is the product again, up to a constant.
    The paper also ties the projections of queries and keys, for a Lipschitz bound.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)

    def bias(self, q: Tensor, k: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
        return -0.5 * self.factor(q, ctx) * k.float().square().sum(-1)[:, :, None]


@scores.register("residual_scores", source="arXiv:2012.11747 (RealFormer)", needs={"attention": "bias"})
class ResidualScores(Scores):
    """Add the scores of the layer before, so that layers refine one map of attention.

    s_l = q k^T * scale + s_(l-1), then softmax   where both layers have equal numbers of heads

    qk_norm: normalise the queries and keys of each head.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        earlier = ctx.carry.get("residual_scores")
        if earlier is not None and earlier.shape == logits.shape:
            logits = logits + earlier
        ctx.carry["residual_scores"] = logits.masked_fill(logits == -math.inf, 0.0)
        return logits.softmax(-1)


@scores.register("z_loss", source="arXiv:2202.08906 (ST-MoE's z-loss, of attention)", needs={"attention": "bias"})
class ZLoss(Scores):
    """A penalty that keeps the normaliser of the attention softmax near 1.

    weight mean(log(sum exp s)^2) is added to the training objective, over sequences, heads and tokens of each layer

    weight:  of the penalty.
    qk_norm: normalise the queries and keys of each head.
    """

    def __init__(
        self, builder: Builder, *, weight: Annotated[float, Field(gt=0)] = 1e-4, qk_norm: bool = False
    ) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.weight = weight

    def weights(self, logits: Tensor, ctx: ForwardContext) -> Tensor:
        ctx.losses[f"attention_z.{ctx.depth}"] = self.weight * logits.logsumexp(-1).square().mean()
        return logits.softmax(-1)


@scores.register(
    "head_gate", source="KellerJordan/modded-nanogpt, record of 2025-08-23 (sparse attention gate); arXiv:2505.06708"
)
class HeadGate(Scores):
    """Multiply the output of each head by a gate that depends on a few channels of the input.

    sigmoid(W x[: inputs])_h y_h   with W (H, inputs)

    inputs:  channels that the gates see; null is all of them.
    qk_norm: normalise the queries and keys of each head.
    Gates are near 1/2 in a fresh model; the first source starts W at zero.
    """

    def __init__(
        self, builder: Builder, *, inputs: Annotated[int, Field(ge=1)] | None = 12, qk_norm: bool = False
    ) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.inputs = min(inputs or builder.dims.n_embd, builder.dims.n_embd)
        self.head_gate = builder.linear(self.inputs, builder.dims.n_head, bias=False)

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        gates = torch.sigmoid(self.head_gate(x[..., : self.inputs]))  # (B, T, H)
        heads: Tensor = y.unflatten(-1, (gates.shape[-1], -1))
        return (heads * gates[..., None]).flatten(-2)


@scores.register("head_scale", source="arXiv:2110.09456 (NormFormer)")
class HeadScale(Scores):
    """Multiply the output of each head by a trained number.

    g_h y_h   with g = 1 at the beginning

    qk_norm: normalise the queries and keys of each head.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.gain = nn.Parameter(torch.ones(builder.dims.n_head))

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        heads: Tensor = y.unflatten(-1, (len(self.gain), -1))
        return (heads * self.gain[:, None]).flatten(-2)


@scores.register("xsa", source="arXiv:2603.09078; trained: KellerJordan/modded-nanogpt, record of 2026-04-29")
class Exclusive(Scores):
    """Remove from the output of each head its share along the token's own value, which the stream carries anyway.

    y_h - tanh(a_h) (y_h . v_h) v_h / |v_h|^2   with v_h the value of the token itself

    trained: whether a_h is trained, from 0; false removes the whole share, as in the paper.
    qk_norm: normalise the queries and keys of each head.
    """

    def __init__(self, builder: Builder, *, trained: bool = True, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)
        self.share = nn.Parameter(torch.zeros(builder.dims.n_head)) if trained else None

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        v = v.transpose(1, 2)  # (B, T, G, D)
        heads: Tensor = y.unflatten(-1, (-1, v.shape[-1]))  # (B, T, H, D)
        v = v.repeat_interleave(heads.shape[2] // v.shape[2], 2)
        along = (heads * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
        removed = (along * v).flatten(-2).to(y.dtype)
        if self.share is not None:
            removed = removed * torch.tanh(self.share).repeat_interleave(y.shape[-1] // len(self.share))
        return y - removed


@scores.register("key_offset", source="KellerJordan/modded-nanogpt, record of 2025-12-14 (partial key offset)")
class KeyOffset(Scores):
    """Keys whose second half of channels is that of the token before, so that one layer can act as an induction head.

    k_t = [k_t[: D/2], k_(t-1)[D/2 :]]   with zeros in front of the first token of the context, or of a document

    qk_norm: normalise the queries and keys of each head, before the shift.
    In the source those channels are not rotated: `position: {name: rotary, fraction: 0.5}`, whose unrotated channels
    are the second half.
    """

    def __init__(self, builder: Builder, *, qk_norm: bool = False) -> None:
        super().__init__(builder, qk_norm=qk_norm)

    def prepare(self, q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        q, k = super().prepare(q, k, ctx)
        half = k.shape[-1] // 2
        if k.shape[-2] > len(ctx.q_positions):  # those of all tokens, for an attention that computes them anew
            earlier = F.pad(k[:, :, :-1, half:], (0, 0, 1, 0))
            if ctx.documents is not None:
                begins = F.pad(ctx.documents.diff(dim=1) != 0, (1, 0))  # (B, S)
                earlier = earlier.masked_fill(begins[:, None, :, None], 0.0)
        else:
            earlier = ctx.previous("key_offset", k[..., half:].transpose(1, 2)).transpose(1, 2)
        return q, torch.cat([k[..., :half], earlier], -1)
