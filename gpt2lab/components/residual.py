"""Blocks: where the norms sit, and how each branch joins the residual stream.  (B, T, C) -> (B, T, C)

A component of this slot is one whole block, because that is what placements differ in; attention, MLP and norm are made
from whatever their slots chose.
"""

from __future__ import annotations

from torch import Tensor, nn

from gpt2lab.components.base import Site
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

residual = Slot("model.residual", "where norms sit and how branches join the stream", default="pre")


class Block(nn.Module):
    """Two branches, attention and MLP, each with a norm. Placements differ in `forward`.

    final_norm: whether the stream still needs a norm (ln_f) after the last block.
    """

    final_norm = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ln_1 = site.make("norm")
        self.attn = site.make("attention")
        self.ln_2 = site.make("norm")
        self.mlp = site.make("mlp")

    def open(self, x: Tensor) -> Tensor:
        """What the embedding hands to the first block, in the form that blocks pass on."""
        return x

    def close(self, x: Tensor) -> Tensor:
        """What the last block hands on, as one stream (B, T, C) again."""
        return x

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """One block.  (B, T, C) -> (B, T, C)"""
        raise NotImplementedError


@residual.register("pre", source="GPT-2 (Radford et al. 2019); arXiv:2002.04745")
class Pre(Block):
    """Normalise what each branch reads and leave the stream itself alone; GPT-2's block.  (B, T, C) -> (B, T, C)

    x = x + attention(norm(x));  x = x + mlp(norm(x));  a last norm follows the last block.
    """

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.attn(self.ln_1(x), step)
        x = x + self.mlp(self.ln_2(x), step)
        return x


@residual.register("post", source="arXiv:1706.03762; GPT (Radford et al. 2018)")
class Post(Block):
    """Normalise the stream after each branch was added, as the first transformers did.  (B, T, C) -> (B, T, C)

    x = norm(x + attention(x));  x = norm(x + mlp(x));  no last norm. It needs warm-up (arXiv:2002.04745).
    """

    final_norm = False

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = self.ln_1(x + self.attn(x, step))
        x = self.ln_2(x + self.mlp(x, step))
        return x


@residual.register("deepnorm", source="arXiv:2203.00555")
class DeepNorm(Block):
    """Post-norm with the stream scaled up and branches drawn small, so that depth stays trainable.

    x = norm(a x + attention(x));  x = norm(a x + mlp(x))   with a = (2L)^(1/4) for a decoder of L layers.
    Values, output projections and MLP matrices start (8L)^(-1/4) times as large as the init says; the paper applies the
    factor to Xavier draws, here it multiplies whatever `model.init` draws.
    """

    final_norm = False

    def __init__(self, site: Site) -> None:
        super().__init__(site.at(gain=(8 * site.dims.n_layer) ** -0.25))
        self.alpha = (2 * site.dims.n_layer) ** 0.25

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = self.ln_1(self.alpha * x + self.attn(x, step))
        x = self.ln_2(self.alpha * x + self.mlp(x, step))
        return x
