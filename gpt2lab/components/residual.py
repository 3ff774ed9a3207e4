"""Blocks: where the norms are, and how each branch is added to the residual stream.  (B, T, C) -> (B, T, C)

A component of this slot is a whole block, because placements differ in how norms and both branches are combined.
Attention, MLP and norms are built from the choices of their own slots.

Shapes: B batch, T tokens, C channels, L layers, n streams.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims, Role, parameter
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot


class Block(nn.Module):
    """Two branches, attention and MLP, each with a norm. Placements differ in `forward`.

    A branch is None, and has no norm, where `none` is chosen for it.

    final_norm: whether a norm (ln_f) follows the last block.
    """

    final_norm = True

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        attention, mlp = builder.build("attention"), builder.build("mlp")
        self.ln_1: nn.Module | None = None if attention is None else builder.build("norm")
        self.attn = attention
        self.ln_2: nn.Module | None = None if mlp is None else builder.build("norm")
        self.mlp = mlp

    @property
    def branches(self) -> list[tuple[Any, Any]]:
        """Norm and branch of attention and of the MLP, as far as they are switched on."""
        pairs = ((self.ln_1, self.attn), (self.ln_2, self.mlp))
        return [(norm, branch) for norm, branch in pairs if branch is not None]

    def open(self, x: Tensor) -> Tensor:
        """Turn the embedding into the input of the first block, (B, T, C), or several streams."""
        return x

    def close(self, x: Tensor) -> Tensor:
        """Turn the output of the last block into one stream (B, T, C)."""
        return x

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """One block.  (B, T, C) -> (B, T, C)"""
        raise NotImplementedError


residual = Slot(
    "model.residual",
    "where norms are and how branches are added to the stream",
    default="pre",
    arity="per_layer",
    base=Block,
)


@residual.register("pre", source="GPT-2 (Radford et al. 2019); arXiv:2002.04745")
class Pre(Block):
    """Normalise the input of each branch and not the stream itself; GPT-2's block.  (B, T, C) -> (B, T, C)

    x = x + attention(norm(x));  x = x + mlp(norm(x));  a final norm follows the last block.
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, branch in self.branches:
            x = x + branch(norm(x), ctx)
        return x


@residual.register("post", source="arXiv:1706.03762; GPT (Radford et al. 2018)")
class Post(Block):
    """Normalise the stream after adding each branch, as in the first transformer.  (B, T, C) -> (B, T, C)

    x = norm(x + attention(x));  x = norm(x + mlp(x));  no final norm. Needs warm-up (arXiv:2002.04745).
    """

    final_norm = False

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, branch in self.branches:
            x = norm(x + branch(x, ctx))
        return x


@residual.register("deepnorm", source="arXiv:2203.00555")
class DeepNorm(Block):
    """Post-norm with a scaled-up stream and small initial branches, which keeps deep models trainable.

    x = norm(a x + attention(x));  x = norm(a x + mlp(x))   with a = (2L)^(1/4) for a decoder of L layers.
    The initial value and output projections and both MLP matrices are multiplied by (8L)^(-1/4). The paper multiplies
    a Xavier init, here the factor multiplies whatever `model.init` draws.
    """

    final_norm = False

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder.at(gain=(8 * builder.dims.n_layer) ** -0.25))
        self.alpha = (2 * builder.dims.n_layer) ** 0.25

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, branch in self.branches:
            x = norm(self.alpha * x + branch(x, ctx))
        return x


@residual.register("output", source="arXiv:2501.00656 (OLMo 2)")
class Output(Block):
    """Normalise the output of each branch and not its input, as in OLMo 2.  (B, T, C) -> (B, T, C)

    x = x + norm(attention(x));  x = x + norm(mlp(x));  a final norm follows the last block.
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, branch in self.branches:
            x = x + norm(branch(x, ctx))
        return x


@residual.register("sandwich", source="arXiv:2502.02732 (peri-LN); arXiv:2105.13290; Gemma 2 (arXiv:2408.00118)")
class Sandwich(Block):
    """Normalise the input and the output of each branch.  (B, T, C) -> (B, T, C)

    x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)));  a final norm follows the last block.
    Peri-LN also normalises the embedding: `model.embedding: [plain, normed]`.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.ln_1_out = None if self.attn is None else builder.build("norm")
        self.ln_2_out = None if self.mlp is None else builder.build("norm")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        outer = [norm for norm in (self.ln_1_out, self.ln_2_out) if norm is not None]
        for (norm, branch), norm_out in zip(self.branches, outer, strict=True):
            x = x + norm_out(branch(norm(x), ctx))
        return x


@residual.register("parallel", source="GPT-J (Wang and Komatsuzaki 2021); two_norms: arXiv:2204.06745 (GPT-NeoX)")
class Parallel(Block):
    """Add attention and MLP of the same input, in one step.  (B, T, C) -> (B, T, C)

    h = norm(x);  x = x + attention(h) + mlp(h);  a final norm follows the last block.

    two_norms: whether each branch has a norm of its own, as in GPT-NeoX.
    """

    def __init__(self, builder: Builder, *, two_norms: bool = False) -> None:
        super().__init__(builder)
        self.two_norms = two_norms
        if not two_norms and len(self.branches) == 2:
            self.ln_2 = None

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        total, h = x, x
        for norm, branch in self.branches:
            h = h if norm is None else norm(x)
            total = total + branch(h, ctx)
        return total


@residual.register("layerscale", source="arXiv:2103.17239")
class LayerScale(Block):
    """Multiply every channel of a branch's output with a small trained gain.  (B, T, C) -> (B, T, C)

    x = x + g_1 * attention(norm(x));  x = x + g_2 * mlp(norm(x))   with gains (C,)

    start: of every gain. The paper starts at 0.1 up to 18 layers, at 1e-5 up to 24, and at 1e-6 beyond.
    """

    def __init__(self, builder: Builder, *, start: float = 0.1) -> None:
        super().__init__(builder)
        self.gain = nn.ParameterList(torch.full((builder.dims.n_embd,), start) for _ in self.branches)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for (norm, branch), gain in zip(self.branches, self.gain, strict=True):
            x = x + gain * branch(norm(x), ctx)
        return x


@residual.register("rezero", source="arXiv:2003.04887")
class ReZero(Block):
    """Multiply each branch with a trained number that starts at zero, without norms.  (B, T, C) -> (B, T, C)

    x = x + a_1 attention(x);  x = x + a_2 mlp(x)   with a = 0 at the beginning; no final norm.
    The paper shares one number between both branches of a layer.
    """

    final_norm = False

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.ln_1 = self.ln_2 = None
        self.scale = nn.ParameterList(torch.zeros(()) for _ in self.branches)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for (_, branch), scale in zip(self.branches, self.scale, strict=True):
            x = x + scale * branch(x, ctx)
        return x


@residual.register("scaled_residual", source="arXiv:2502.05795 (LayerNorm scaling)")
class ScaledResidual(Block):
    """Pre-norm whose norms shrink with depth, so that deep layers do not grow the stream.  (B, T, C) -> (B, T, C)

    x = x + attention(norm(x) / sqrt(l));  x = x + mlp(norm(x) / sqrt(l))   in layer l, counted from 1.
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        factor = (ctx.depth + 1) ** -0.5
        for norm, branch in self.branches:
            x = x + branch(norm(x) * factor, ctx)
        return x


@residual.register("macaron", source="arXiv:1906.02762")
class Macaron(Block):
    """Half an MLP before attention and half of another one after it.  (B, T, C) -> (B, T, C)

    x = x + mlp_1(norm(x)) / 2;  x = x + attention(norm(x));  x = x + mlp_2(norm(x)) / 2;  a final norm at the end.
    The paper has MLPs of the usual width, hence more parameters: halve `model.mlp_ratio` to keep their number.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.mlp_first = builder.build("mlp")
        self.ln_first = None if self.mlp_first is None else builder.build("norm")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        if self.mlp_first is not None and self.ln_first is not None:
            x = x + 0.5 * self.mlp_first(self.ln_first(x), ctx)
            for name in [name for name in ctx.losses if name.endswith(f".{ctx.depth}")]:
                ctx.losses[f"{name}.first"] = ctx.losses.pop(name)
        for norm, branch in self.branches:
            x = x + (0.5 if branch is self.mlp else 1.0) * branch(norm(x), ctx)
        return x


@residual.register("orthogonal", source="arXiv:2505.11881")
class Orthogonal(Block):
    """Add only the part of a branch's output that is orthogonal to the stream.  (B, T, C) -> (B, T, C)

    x = x + f - (f . x) x / |x|^2   with f = attention(norm(x)), then with f = mlp(norm(x)), for every token
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, branch in self.branches:
            update = branch(norm(x), ctx).to(x.dtype)
            along = (update * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-6)
            x = x + update - along * x
        return x


@residual.register("token_shift", source="RWKV (arXiv:2305.13048); github.com/BlinkDL")
class TokenShift(Block):
    """Each branch sees half of the previous token's channels in the place of its own.  (B, T, C) -> (B, T, C)

    h = norm(x);  x_t = x_t + branch([h_(t-1)[: C/2], h_t[C/2 :]])   with zeros in front of the first token
    """

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for index, (norm, branch) in enumerate(self.branches):
            h = norm(x)
            half = h.shape[-1] // 2
            earlier = ctx.previous(f"token_shift.{index}", h[..., :half])
            x = x + branch(torch.cat([earlier, h[..., half:]], -1), ctx)
        return x


class Connection(nn.Module):
    """How one branch reads n streams, how they mix, and how the branch's output is added to each.

    static: (n + 2, n). Rows: weights of the streams in the branch's input; mixing, n rows; weights of the output.
    """

    def __init__(self, builder: Builder, n: int, index: int, dynamic: bool) -> None:
        super().__init__()
        first = torch.eye(n)[index % n][None]
        role = Role("vector", builder.layer)
        self.static = parameter(torch.cat([first, torch.eye(n), torch.ones(1, n)]), role)
        self.norm = builder.build("norm") if dynamic else None
        if dynamic:
            self.change = parameter(torch.empty(n + 2, builder.dims.n_embd), Role("hidden", builder.layer, 0.0))
            self.size = nn.Parameter(torch.full((2,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """The weights for every token.  (B, n, T, C) -> (B, T, n + 2, n), or (1, 1, n + 2, n) without `dynamic`"""
        if self.norm is None:
            return self.static[None, None]
        seen = torch.tanh(torch.einsum("bntc,kc->btkn", self.norm(x), self.change))
        inner, output = seen[..., :-1, :] * self.size[0], seen[..., -1:, :] * self.size[1]
        return self.static + torch.cat([inner, output], -2)


def exact(kind: str) -> AbstractContextManager[object]:
    """Autocast off on a type of device, so that streams stay in float32. Where costs are counted there is none."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def alike_in_all_layers(dims: Dims, options: dict[str, Any]) -> list[str]:
    """Several streams must pass through every block."""
    if len(set(getattr(dims, "residual", ()))) > 1:
        return ["its streams pass through all blocks: choose it, with the same options, for every layer"]
    return []


@residual.register("hyper_connections", source="arXiv:2409.19606", check=alike_in_all_layers)
class HyperConnections(Block):
    """Several residual streams, with trained weights of reading, mixing and writing.  (B, n, T, C) -> (B, n, T, C)

    x_j = sum_i A_ij x_i + b_j branch(norm(sum_i a_i x_i))   for attention, then for the MLP
    All streams start as the embedding and are summed after the last block. At first a branch reads one stream, A is
    the identity and b is 1, so the model computes what `pre` does.

    streams: n.
    dynamic: whether a, A and b also depend on the token: a + 0.01 tanh(norm(x) W) with a trained 0.01, and W initially
    zero.
    """

    def __init__(self, builder: Builder, *, streams: Annotated[int, Field(ge=2)] = 4, dynamic: bool = True) -> None:
        super().__init__(builder)
        self.streams, first = streams, 2 * (builder.layer or 0)
        self.connections = nn.ModuleList(
            Connection(builder, streams, first + i, dynamic) for i in range(len(self.branches))
        )

    def open(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.streams, -1, -1)

    def close(self, x: Tensor) -> Tensor:
        return x.sum(1)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for (norm, branch), connection in zip(self.branches, self.connections, strict=True):
            with exact(x.device.type):
                weights = connection(x)  # (B, T, n + 2, n)
                read, *mixed = torch.einsum("btkn,bntc->kbtc", weights[..., :-1, :], x)
            out = branch(norm(read), ctx)
            x = torch.stack(mixed, 1) + weights[..., -1, :].mT[..., None] * out[:, None]
        return x


@residual.register("residual_dual", source="arXiv:2304.14802 (ResiDual)", check=alike_in_all_layers)
class ResiDual(Block):
    """Post-norm, and beside it the plain sum of all branches, which joins after the last block.  (B, 2, T, C)

    p = norm(p + f), s = s + f   with f = attention(p), then with f = mlp(p);  output p + layernorm(s)
    Both streams start as the embedding. The last layernorm has neither gain nor bias.
    """

    final_norm = False

    def open(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, 2, -1, -1)

    def close(self, x: Tensor) -> Tensor:
        post, total = x.unbind(1)
        return post + F.layer_norm(total, total.shape[-1:])

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        post, total = x.unbind(1)
        for norm, branch in self.branches:
            update = branch(post, ctx)
            post, total = norm(post + update), total + update
        return torch.stack([post, total], 1)
