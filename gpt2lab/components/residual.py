"""Blocks: where the norms are, and how each branch is added to the residual stream.  (B, T, C) -> (B, T, C)

A component of this slot is a whole block, because placements differ in how norms and both branches are combined.
Attention, MLP and norms are built from the choices of their own slots.
"""

from __future__ import annotations

from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

residual = Slot("model.residual", "where norms are and how branches are added to the stream", default="pre")


class Block(nn.Module):
    """Two branches, attention and MLP, each with a norm. Placements differ in `forward`.

    final_norm: whether a norm (ln_f) follows the last block.
    """

    final_norm = True

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.ln_1 = builder.build("norm")
        self.attn = builder.build("attention")
        self.ln_2 = builder.build("norm")
        self.mlp = builder.build("mlp")

    def open(self, x: Tensor) -> Tensor:
        """Turn the embedding into the input of the first block, (B, T, C), or several streams."""
        return x

    def close(self, x: Tensor) -> Tensor:
        """Turn the output of the last block into one stream (B, T, C)."""
        return x

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """One block.  (B, T, C) -> (B, T, C)"""
        raise NotImplementedError


@residual.register("pre", source="GPT-2 (Radford et al. 2019); arXiv:2002.04745")
class Pre(Block):
    """Normalise the input of each branch and not the stream itself; GPT-2's block.  (B, T, C) -> (B, T, C)

    x = x + attention(norm(x));  x = x + mlp(norm(x));  a final norm follows the last block.
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.attn(self.ln_1(x), ctx)
        x = x + self.mlp(self.ln_2(x), ctx)
        return x


@residual.register("post", source="arXiv:1706.03762; GPT (Radford et al. 2018)")
class Post(Block):
    """Normalise the stream after adding each branch, as in the first transformer.  (B, T, C) -> (B, T, C)

    x = norm(x + attention(x));  x = norm(x + mlp(x));  no final norm. Needs warm-up (arXiv:2002.04745).
    """

    final_norm = False

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.ln_1(x + self.attn(x, ctx))
        x = self.ln_2(x + self.mlp(x, ctx))
        return x


@residual.register("deepnorm", source="arXiv:2203.00555")
class DeepNorm(Block):
    """Post-norm with a scaled-up stream and small initial branches, which keeps deep models trainable.

    x = norm(a x + attention(x));  x = norm(a x + mlp(x))   with a = (2L)^(1/4) for a decoder of L layers.
    Initial values, output projections and MLP matrices are multiplied by (8L)^(-1/4). The paper multiplies a Xavier
    init, here the factor multiplies whatever `model.init` draws.
    """

    final_norm = False

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder.at(gain=(8 * builder.dims.n_layer) ** -0.25))
        self.alpha = (2 * builder.dims.n_layer) ** 0.25

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.ln_1(self.alpha * x + self.attn(x, ctx))
        x = self.ln_2(self.alpha * x + self.mlp(x, ctx))
        return x
