"""Parts that connect layers with each other: an ordered list, empty in GPT-2.

Shapes: B batch, T tokens, C channels, H heads, D channels per head, L layers, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims
from gpt2lab.components.context import ForwardContext
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Choice, Slot


class CrossLayer(nn.Module):
    """A part without effect; subclasses override what they need. `depth` counts block calls from 0.

    shares: what `weights_from` applies to: a whole block, or its branch `attn` or `mlp`.
    """

    shares: Literal["block", "attn", "mlp"] = "block"

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.n_layer = builder.dims.n_layer

    def weights_from(self, layer: int) -> int:
        """The layer whose weights `layer` uses."""
        return layer

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the stream in front of the block at `depth`.  (B, T, C) -> (B, T, C)"""
        return x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the stream after the block at `depth`.  (B, T, C) -> (B, T, C)"""
        return x

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        """Change the attention values of the block at `depth`.  (B, H, T, D) -> (B, H, T, D)"""
        return v


stack = Slot("model.stack", "connections between layers", default=[], arity="list", base=CrossLayer)


def several_layers(dims: Dims, options: dict[str, Any]) -> list[str]:
    """At least two layers are needed."""
    return ["it connects layers, and there is only one: raise model.n_layer"] if dims.n_layer < 2 else []


def equal_value_heads(dims: Dims, options: dict[str, Any]) -> list[str]:
    """At least two layers, with equal numbers of value heads, as far as their attention has `n_kv_head` or `n_head`."""
    pattern: tuple[Choice, ...] = getattr(dims, "attention", ())
    heads = set[int]()
    if len(set(pattern)) > 1:
        builder = Builder(dims, dims.choices())  # type: ignore[attr-defined]
        with torch.device("meta"):
            parts = [builder.at(layer=layer).build("attention") for layer in range(dims.n_layer)]
        counts = (getattr(part, "n_kv_head", getattr(part, "n_head", None)) for part in parts)
        heads = {count for count in counts if count is not None}
    unequal = f"it mixes values of equal heads, and layers have {' or '.join(map(str, sorted(heads)))} of them"
    return several_layers(dims, options) + ([unequal] if len(heads) > 1 else [])


@stack.register("value_residual", source="arXiv:2410.17897", needs={"attention": "value"}, check=equal_value_heads)
class ValueResidual(CrossLayer):
    """Mix the first layer's attention values into every later layer's.  v (B, H, T, D) -> (B, H, T, D)

    v_l + m_l (v_0 - v_l)   for layers l >= 1, with m_l trained from the initial value `mix`, or fixed

    mix:     initial share of the first layer's values.
    trained: whether m_l is trained, one number for each layer.
    """

    def __init__(self, builder: Builder, *, mix: float = 0.5, trained: bool = True) -> None:
        super().__init__(builder)
        initial = torch.full((self.n_layer - 1,), mix)
        if trained:
            self.mix = nn.Parameter(initial)
        else:
            self.register_buffer("mix", initial, persistent=False)

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        first: Tensor = ctx.carry.setdefault("value_residual", v)  # of the first layer that has attention
        if depth == 0:
            return v
        if first.shape[1] != v.shape[1]:
            raise ConfigError(
                f"value_residual mixes values of equal heads; the first layer has {first.shape[1]} and layer {depth} "
                f"has {v.shape[1]}",
                where="model.attention",
                hint="the same number of key/value heads in all layers",
            )
        return v + self.mix[depth - 1] * (first - v)


@stack.register("unet", source="KellerJordan/modded-nanogpt, record of 2024-11-10 (U-net)", check=several_layers)
class Unet(CrossLayer):
    """Add the output of each early layer to the input of its mirror image.  x (B, T, C) -> (B, T, C)

    layer L-1-i receives x + w_i out_i   for i < L/2 (rounded down), with trained w_i that start at 1
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.pairs = self.n_layer // 2
        self.weight = nn.Parameter(torch.ones(self.pairs))

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        mirror = self.n_layer - 1 - depth
        return x + self.weight[mirror] * ctx.carry[f"unet.{mirror}"] if mirror < self.pairs else x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if depth < self.pairs:
            ctx.carry[f"unet.{depth}"] = x
        return x


@stack.register(
    "shared_layers", source="arXiv:1909.11942", examples=({"what": "attention"}, {"what": "mlp"}, {"every": 2})
)
class SharedLayers(CrossLayer):
    """Use the first layer's weights in every layer, as ALBERT does.

    block_l = block_0   for all l; depth and compute stay, parameters of one layer remain.

    what:  the whole block, or its `attention` or `mlp` alone, whose norms stay separate.
    every: number of layers with weights of their own, used in turns: layer l has those of layer l mod `every`.
    """

    def __init__(
        self, builder: Builder, *, what: Literal["block", "attention", "mlp"] = "block",
        every: Annotated[int, Field(ge=1)] = 1,
    ) -> None:  # fmt: skip
        super().__init__(builder)
        self.shares = "attn" if what == "attention" else what
        self.every = every

    def weights_from(self, layer: int) -> int:
        return layer % self.every


@stack.register(
    "embedding_skip", source="KellerJordan/modded-nanogpt, record of 2024-11-06 (embedding skip)", check=several_layers
)
class EmbeddingSkip(CrossLayer):
    """Mix the embedding into the input of every later block.  x (B, T, C) -> (B, T, C)

    a_l x + b_l x_0   for layers l >= 1, with x_0 the input of the first block; at first a_l is 1 and b_l is `start`

    start: initial share of the embedding.
    """

    def __init__(self, builder: Builder, *, start: float = 0.0) -> None:
        super().__init__(builder)
        self.keep = nn.Parameter(torch.ones(self.n_layer - 1))
        self.add = nn.Parameter(torch.full((self.n_layer - 1,), start))

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        first: Tensor = ctx.carry.setdefault("embedding_skip", x)
        return x if depth == 0 else self.keep[depth - 1] * x + self.add[depth - 1] * first


@stack.register(
    "value_embeddings",
    source="KellerJordan/modded-nanogpt, record of 2024-12-04 (value embeddings)",
    needs={"attention": "value"},
    check=several_layers,
)
class ValueEmbeddings(CrossLayer):
    """Add a further embedding of each token to the attention values of the outer layers.  v (B, H, T, D) -> the same

    a_l v_l + b_l table_i[token]   in layers l = i and l = L-1-i for tables i < `tables`; a_l and b_l start at 1/2

    tables: of shape (V, C), each for one of the first layers and its mirror image.
    With fewer value heads than query heads, the first channels of a table are used.
    """

    def __init__(self, builder: Builder, *, tables: Annotated[int, Field(ge=1)] = 1) -> None:
        super().__init__(builder)
        tables = min(tables, (self.n_layer + 1) // 2)
        dims = builder.dims
        self.tables = nn.ParameterList(builder.table(dims.vocab_size, dims.n_embd, "embedding") for _ in range(tables))
        self.mix = nn.ParameterList(torch.full((2,), 0.5) for _ in range(min(2 * tables, self.n_layer)))

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        index = min(depth, self.n_layer - 1 - depth)
        if not 0 <= index < len(self.tables):
            return v
        B, H, T, D = v.shape
        mix = self.mix[index if depth == index else len(self.mix) - 1 - index]
        extra = F.embedding(ctx.tokens, self.tables[index])[..., : H * D].view(B, T, H, D).transpose(1, 2)
        mixed: Tensor = mix[0] * v + mix[1] * extra.to(v.dtype)
        return mixed


@stack.register(
    "value_norm", source="KellerJordan/modded-nanogpt, track 2, record of 2025-03-25", needs={"attention": "value"}
)
class ValueNorm(CrossLayer):
    """Divide attention values by their root mean square, head by head.  v (B, H, T, D) -> the same

    v / sqrt(mean(v^2) + 1e-5)   without a gain; `scores: {name: plain, qk_norm: true}` does it for queries and keys
    """

    def mix_values(self, depth: int, v: Tensor, ctx: ForwardContext) -> Tensor:
        return F.rms_norm(v, v.shape[-1:], eps=1e-5)


@stack.register("backout", source="KellerJordan/modded-nanogpt, record of 2025-10-04 (backout)", check=several_layers)
class Backout(CrossLayer):
    """Subtract from the final stream a share of what it was at two thirds of the layers.  x (B, T, C) -> the same

    x_L - w x_m   with m = round(2 L / 3), at least one layer before the last, and a trained number w

    start: w at the beginning.
    """

    def __init__(self, builder: Builder, *, start: float = 0.5) -> None:
        super().__init__(builder)
        self.source = max(0, min(round(self.n_layer * 2 / 3), self.n_layer - 1) - 1)
        self.share = nn.Parameter(torch.tensor(start))

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if depth == self.source:
            ctx.carry["backout"] = x
        return x - self.share * ctx.carry["backout"] if depth == self.n_layer - 1 else x


@stack.register("depth_average", source="arXiv:2402.02622 (DenseFormer)")
class DepthAverage(CrossLayer):
    """After every block, a trained sum of the embedding and the outputs of all blocks so far.  x (B, T, C) -> the same

    x_l = sum_(i <= l) a_li h_i   with h_0 the embedding, h_l the output of block l; a_ll = 1, others 0 at first

    The paper's period and dilation, which leave out some of the sums, are 1 here.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        identity = torch.eye(self.n_layer + 1)
        self.weights = nn.ParameterList(identity[layer, : layer + 1].clone() for layer in range(1, self.n_layer + 1))

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if depth == 0:
            ctx.carry["depth_average"] = [x]
        return x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        outputs: list[Tensor] = ctx.carry["depth_average"]
        outputs.append(x)
        return torch.einsum("n,n...->...", self.weights[depth], torch.stack(outputs))


@stack.register("attention_residuals", source="arXiv:2603.15031", check=several_layers)
class AttentionResiduals(CrossLayer):
    """The input of a block attends, over depth, to the embedding and what each earlier block added.  x (B, T, C)

    x_l = sum_i softmax_i(w_l . v_i / rms(v_i)) v_i   with v_0 the embedding, v_i the change by block i, w_l (C,) from 0

    The sums are means at first. The head reads such a sum, too. The paper does it for every branch, here for blocks.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.queries = nn.ParameterList(torch.zeros(builder.dims.n_embd) for _ in range(self.n_layer))

    def before(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        if depth == 0:
            ctx.carry["attention_residuals"] = []
        x = self.mixed(depth - 1, ctx) if depth else x
        ctx.carry["attention_residuals.input"] = x
        if depth == 0:
            ctx.carry["attention_residuals"].append(x)
        return x

    def after(self, depth: int, x: Tensor, ctx: ForwardContext) -> Tensor:
        ctx.carry["attention_residuals"].append(x - ctx.carry["attention_residuals.input"])
        return self.mixed(depth, ctx) if depth == self.n_layer - 1 else x

    def mixed(self, index: int, ctx: ForwardContext) -> Tensor:
        """The sum by the query `index`.  -> (B, T, C)"""
        parts = torch.stack(ctx.carry["attention_residuals"])  # (N, B, T, C)
        scores = F.rms_norm(parts, parts.shape[-1:], eps=1e-5) @ self.queries[index].to(parts.dtype)
        return torch.einsum("n...c,n...->...c", parts, scores.softmax(0))
