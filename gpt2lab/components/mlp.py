"""The MLP of a block, applied to every token separately.  (B, T, C) -> (B, T, C)

Shapes: B batch, T tokens, C channels, F hidden width (mlp_ratio C), E experts, K experts per token, N = B T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder, Dims, Role, parameter
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

mlp = Slot("model.mlp", "the feed-forward network of a block", default="gelu_tanh", arity="per_layer")

Activation = Callable[[Tensor], Tensor]
Ratio = Annotated[float, Field(gt=0)] | None
"""Hidden width over C in place of `model.mlp_ratio`."""


class ReluSquared(nn.Module):
    """max(0, u)^2, element by element."""

    def forward(self, u: Tensor) -> Tensor:
        return F.relu(u).square()


ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "relu2": ReluSquared,
}


class MLP(nn.Module):
    """Linear map to the hidden width, activation, linear map back."""

    def __init__(self, builder: Builder, activation: Activation, ratio: float | None = None) -> None:
        super().__init__()
        hidden = round((ratio or builder.dims.mlp_ratio) * builder.dims.n_embd)
        self.activation = activation
        self.c_fc = builder.linear(builder.dims.n_embd, hidden)
        self.c_proj = builder.linear(hidden, builder.dims.n_embd, "residual_out")
        self.dropout = nn.Dropout(builder.dims.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.activation(self.c_fc(x))))
        return out


class GatedMLP(nn.Module):
    """Linear map to twice the hidden width, one half activated and multiplied with the other, linear map back."""

    def __init__(self, builder: Builder, activation: Activation, two_thirds: bool, ratio: float | None = None) -> None:
        super().__init__()
        width = (ratio or builder.dims.mlp_ratio) * builder.dims.n_embd * (2 / 3 if two_thirds else 1)
        hidden = max(8, 8 * round(width / 8))  # multiples of 8 suit tensor cores
        self.activation = activation
        self.c_fc = builder.linear(builder.dims.n_embd, 2 * hidden, rows={"gate": hidden, "up": hidden})
        self.c_proj = builder.linear(hidden, builder.dims.n_embd, "residual_out")
        self.dropout = nn.Dropout(builder.dims.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        gate, up = self.c_fc(x).chunk(2, -1)  # (B, T, F) each
        out: Tensor = self.dropout(self.c_proj(self.activation(gate) * up))
        return out


class MixtureOfExperts(nn.Module):
    """A router selects K of E MLPs for each token and sums their outputs with its weights. No token is dropped."""

    def __init__(
        self, builder: Builder, experts: int, top_k: int, balance: float, activation: Activation, ratio: float | None
    ) -> None:
        super().__init__()
        C, hidden = builder.dims.n_embd, round((ratio or builder.dims.mlp_ratio) * builder.dims.n_embd)
        self.activation = activation
        self.experts, self.top_k, self.balance = experts, top_k, balance
        self.router = builder.linear(C, experts, "router", bias=False)
        active = top_k / experts
        self.c_fc = parameter(
            torch.empty(experts, hidden, C), Role("hidden", builder.layer, builder.gain, active=active)
        )
        self.c_proj = parameter(
            torch.empty(experts, C, hidden), Role("residual_out", builder.layer, builder.gain, active=active)
        )
        self.dropout = nn.Dropout(builder.dims.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        probabilities = self.router(rows).float().softmax(-1)  # (N, E)
        weights, chosen = probabilities.topk(self.top_k, -1)  # (N, K)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        ctx.losses[f"moe_balance.{ctx.depth}"] = self.balance * self.imbalance(probabilities, chosen)
        out: Tensor = self.dropout(self.dispatch(rows, weights, chosen).view(x.shape))
        return out

    # Not compiled, because sizes change with every batch. torch.compiler.disable does the same, but imports the whole
    # compiler, which takes a second.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def dispatch(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of K experts for every row.  (N, C), (N, K), (N, K) -> (N, C)"""
        order = chosen.flatten().argsort(stable=True)  # (N K): the rows of expert 0, then of expert 1, ...
        inputs = rows[order // self.top_k].split(self.loads(chosen))
        outputs = torch.cat([self.expert(e, part) for e, part in enumerate(inputs)])  # (N K, C)
        outputs = outputs * weights.flatten()[order, None].to(outputs.dtype)
        total = torch.zeros(rows.shape, dtype=outputs.dtype, device=rows.device)
        return total.index_add(0, order // self.top_k, outputs)

    def expert(self, index: int, rows: Tensor) -> Tensor:
        """The output of one expert.  (n, C) -> (n, C)"""
        return F.linear(self.activation(F.linear(rows, self.c_fc[index])), self.c_proj[index])

    def loads(self, chosen: Tensor) -> list[int]:
        """Number of rows of each expert."""
        if chosen.is_meta:  # costs are counted without data: assume equal loads
            share, remainder = divmod(chosen.numel(), self.experts)
            return [share + (e < remainder) for e in range(self.experts)]
        return torch.bincount(chosen.flatten(), minlength=self.experts).tolist()

    def imbalance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """E sum_e (share of choices that are e) (mean probability of e); 1 for equal loads.

        Shares are averaged over ranks, so that the gradient does not depend on how a batch is split among them. In an
        evaluation they are not, as ranks may have different numbers of batches.
        """
        share = F.one_hot(chosen.flatten(), self.experts).float().mean(0)  # (E,)
        if probabilities.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)
            share = share / torch.distributed.get_world_size()
        return self.experts * (share * probabilities.mean(0)).sum()


@mlp.register("gelu_tanh", source="arXiv:1606.08415; tanh form: openai/gpt-2")
def gelu_tanh(builder: Builder, *, ratio: Ratio = None) -> nn.Module:
    """One hidden layer with the tanh approximation of GELU; GPT-2's.  (B, T, C) -> (B, T, C)

    c_proj(g(c_fc(x)))   with g(u) = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return MLP(builder, nn.GELU(approximate="tanh"), ratio)


@mlp.register("gelu", source="arXiv:1606.08415")
def gelu(builder: Builder, *, ratio: Ratio = None) -> nn.Module:
    """One hidden layer with exact GELU, u Phi(u).  (B, T, C) -> (B, T, C)

    c_proj(g(c_fc(x)))   with g(u) = u Phi(u), Phi the normal distribution function
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return MLP(builder, nn.GELU(), ratio)


@mlp.register("relu", source="arXiv:1706.03762")
def relu(builder: Builder, *, ratio: Ratio = None) -> nn.Module:
    """One hidden layer with ReLU, as in the first transformer.  (B, T, C) -> (B, T, C)

    c_proj(max(0, c_fc(x)))
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return MLP(builder, nn.ReLU(), ratio)


@mlp.register("silu", source="arXiv:1606.08415; arXiv:1710.05941 (swish)")
def silu(builder: Builder, *, ratio: Ratio = None) -> nn.Module:
    """One hidden layer with SiLU, also called swish.  (B, T, C) -> (B, T, C)

    c_proj(g(c_fc(x)))   with g(u) = u / (1 + e^-u)
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return MLP(builder, nn.SiLU(), ratio)


@mlp.register("relu2", source="arXiv:2109.08668")
def relu2(builder: Builder, *, ratio: Ratio = None) -> nn.Module:
    """One hidden layer with squared ReLU, from Primer.  (B, T, C) -> (B, T, C)

    c_proj(max(0, c_fc(x))^2)
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return MLP(builder, ReluSquared(), ratio)


@mlp.register("swiglu", source="arXiv:2002.05202")
def swiglu(builder: Builder, *, two_thirds: bool = True, ratio: Ratio = None) -> nn.Module:
    """One hidden layer gated by SiLU.  (B, T, C) -> (B, T, C)

    c_proj(silu(gate) * up)   with gate and up the two halves of c_fc(x)
    two_thirds: reduce the hidden width to 2/3 of its value (rounded to a multiple of 8), to keep the number of
    parameters.
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return GatedMLP(builder, nn.SiLU(), two_thirds, ratio)


@mlp.register("geglu", source="arXiv:2002.05202")
def geglu(builder: Builder, *, two_thirds: bool = True, ratio: Ratio = None) -> nn.Module:
    """One hidden layer gated by exact GELU.  (B, T, C) -> (B, T, C)

    c_proj(gelu(gate) * up)   with gate and up the two halves of c_fc(x)
    two_thirds: reduce the hidden width to 2/3 of its value (rounded to a multiple of 8), to keep the number of
    parameters.
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return GatedMLP(builder, nn.GELU(), two_thirds, ratio)


@mlp.register("reglu", source="arXiv:2002.05202")
def reglu(builder: Builder, *, two_thirds: bool = True, ratio: Ratio = None) -> nn.Module:
    """One hidden layer gated by ReLU.  (B, T, C) -> (B, T, C)

    c_proj(relu(gate) * up)   with gate and up the two halves of c_fc(x)
    two_thirds: reduce the hidden width to 2/3 of its value (rounded to a multiple of 8), to keep the number of
    parameters.
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    """
    return GatedMLP(builder, nn.ReLU(), two_thirds, ratio)


def moe_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """top_k is at most the number of experts."""
    if options["top_k"] > options["experts"]:
        return [f"top_k {options['top_k']} exceeds experts {options['experts']}"]
    return []


@mlp.register(
    "moe",
    source="arXiv:2101.03961; top-k: arXiv:1701.06538",
    check=moe_limits,
    examples=({"experts": 4, "top_k": 1},),
)
def moe(
    builder: Builder,
    *,
    experts: Annotated[int, Field(ge=2)] = 8,
    top_k: Annotated[int, Field(ge=1)] = 2,
    balance: Annotated[float, Field(ge=0)] = 0.01,
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "relu2"] = "gelu_tanh",
    ratio: Ratio = None,
) -> nn.Module:
    """A router selects `top_k` of `experts` MLPs (without biases) for each token.  (B, T, C) -> (B, T, C)

    sum over the selected e of w_e mlp_e(x);   w = the K largest of softmax(router(x)), normalised to sum 1 if K > 1
    experts: number of MLPs.
    top_k:   number of MLPs applied to each token.
    balance: weight of the load-balancing loss E sum_e share_e probability_e, computed per micro-batch.
    activation: of every expert.
    ratio:   hidden width of an expert over C; null follows `model.mlp_ratio`.
    Unlike in Switch Transformer, experts have no capacity limit: by dropping tokens, later tokens would change earlier
    ones.
    """
    return MixtureOfExperts(builder, experts, top_k, balance, ACTIVATIONS[activation](), ratio)


class Solu(nn.Module):
    """u softmax(u), with the softmax over channels."""

    def forward(self, u: Tensor) -> Tensor:
        return u * u.softmax(-1)


FURTHER_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU, "elu": nn.ELU, "hardswish": nn.Hardswish, "identity": nn.Identity, "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish, "prelu": nn.PReLU, "relu6": nn.ReLU6, "selu": nn.SELU, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "softsign": nn.Softsign, "solu": Solu, "tanh": nn.Tanh,
}  # fmt: skip


class Activated(nn.Module):
    """A linear map to the hidden width, an activation and optionally a gate and a norm, a linear map back."""

    def __init__(self, builder: Builder, activation: nn.Module, gated: bool, norm: bool, ratio: float | None) -> None:
        super().__init__()
        C, hidden = builder.dims.n_embd, round((ratio or builder.dims.mlp_ratio) * builder.dims.n_embd)
        hidden = max(8, 8 * round(hidden * 2 / 3 / 8)) if gated else hidden
        self.activation, self.gated = activation, gated
        self.c_fc = builder.linear(C, hidden * (1 + gated), rows={"gate": hidden, "up": hidden} if gated else None)
        self.ln = builder.at(width=hidden).build("norm") if norm else nn.Identity()
        self.c_proj = builder.linear(hidden, C, "residual_out")
        self.dropout = nn.Dropout(builder.dims.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        gate, *up = self.c_fc(x).chunk(2, -1) if self.gated else (self.c_fc(x),)
        hidden = self.activation(gate) * up[0] if up else self.activation(gate)
        out: Tensor = self.dropout(self.c_proj(self.ln(hidden)))
        return out


@mlp.register(
    "activated",
    source="torch.nn (its activations); norm: arXiv:2110.09456 (NormFormer); solu: Elhage et al. 2022",
    examples=({"activation": "solu", "norm": True}, {"activation": "prelu"}),
)
def activated(
    builder: Builder,
    *,
    activation: Literal[
        "celu", "elu", "hardswish", "identity", "leaky_relu", "mish", "prelu", "relu6", "selu", "sigmoid", "softplus",
        "softsign", "solu", "tanh",
    ] = "mish",
    gated: bool = False,
    norm: bool = False,
    ratio: Ratio = None,
) -> nn.Module:  # fmt: skip
    """One hidden layer with any of torch's further activations.  (B, T, C) -> (B, T, C)

    c_proj(norm(g(c_fc(x))))   or, gated, c_proj(norm(g(gate) * up)) with gate and up the two halves of c_fc(x)
    activation: g, by torch's name; solu is u softmax(u) over channels, which its source uses with `norm`.
    gated: multiply with a second half; the hidden width is 2/3 as in swiglu, `activation: sigmoid` is GLU.
    norm:  the model's norm after the activation.
    ratio: hidden width over C; null follows `model.mlp_ratio`.
    The ordinary activations have names of their own: gelu, relu, silu, relu2, swiglu, geglu, reglu.
    """
    return Activated(builder, FURTHER_ACTIVATIONS[activation](), gated, norm, ratio)


@mlp.register("none", source="Elhage et al. 2021 (attention-only transformers)")
def none(builder: Builder) -> None:
    """No MLP in this layer, nor its norm.

    x = x
    """
