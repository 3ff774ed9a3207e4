"""The MLP of a block: what each token computes for itself.  (B, T, C) -> (B, T, C)

Shapes: B batch, T tokens, C channels, F hidden width (mlp_ratio C), E experts, K experts per token, N = B T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Dims, Role, Site, mark
from gpt2lab.components.step import Step
from gpt2lab.registry import Slot

mlp = Slot("model.mlp", "what each token computes for itself", default="gelu_tanh", arity="per_layer")

Activation = Callable[[Tensor], Tensor]


class Plain(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, site: Site, activation: Activation) -> None:
        super().__init__()
        hidden = round(site.dims.mlp_ratio * site.dims.n_embd)
        self.activation = activation
        self.c_fc = site.linear(site.dims.n_embd, hidden)
        self.c_proj = site.linear(hidden, site.dims.n_embd, "residual_out")
        self.dropout = nn.Dropout(site.dims.dropout)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.activation(self.c_fc(x))))
        return out


class Gated(nn.Module):
    """Widen twice, one half bent and multiplied onto the other, narrow."""

    def __init__(self, site: Site, activation: Activation, two_thirds: bool) -> None:
        super().__init__()
        width = site.dims.mlp_ratio * site.dims.n_embd * (2 / 3 if two_thirds else 1)
        hidden = max(8, 8 * round(width / 8))  # multiples of 8 suit tensor cores
        self.activation = activation
        self.c_fc = site.linear(site.dims.n_embd, 2 * hidden, rows={"gate": hidden, "up": hidden})
        self.c_proj = site.linear(hidden, site.dims.n_embd, "residual_out")
        self.dropout = nn.Dropout(site.dims.dropout)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        gate, up = self.c_fc(x).chunk(2, -1)  # (B, T, F) each
        out: Tensor = self.dropout(self.c_proj(self.activation(gate) * up))
        return out


class MixtureOfExperts(nn.Module):
    """A router sends each token to K of E MLPs and adds their answers by the router's weights. No token is dropped."""

    def __init__(self, site: Site, experts: int, top_k: int, balance: float) -> None:
        super().__init__()
        C, hidden = site.dims.n_embd, round(site.dims.mlp_ratio * site.dims.n_embd)
        self.experts, self.top_k, self.balance = experts, top_k, balance
        self.router = site.linear(C, experts, "router", bias=False)
        active = top_k / experts
        self.c_fc = mark(torch.empty(experts, hidden, C), Role("hidden", site.layer, site.gain, active=active))
        self.c_proj = mark(torch.empty(experts, C, hidden), Role("residual_out", site.layer, site.gain, active=active))
        self.dropout = nn.Dropout(site.dims.dropout)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        odds = self.router(rows).float().softmax(-1)  # (N, E)
        weights, chosen = odds.topk(self.top_k, -1)  # (N, K)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        step.losses[f"moe_balance.{step.depth}"] = self.balance * self.imbalance(odds, chosen)
        out: Tensor = self.dropout(self.dispatch(rows, weights, chosen).view(x.shape))
        return out

    # Not compiled, because the sizes of its parts change with every batch. torch.compiler.disable would say the same,
    # but imports the whole compiler at once, which takes a second.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def dispatch(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every row through its K experts, answers added by weight.  (N, C), (N, K), (N, K) -> (N, C)"""
        order = chosen.flatten().argsort(stable=True)  # (N K): the rows of expert 0, then of expert 1, ...
        sent = rows[order // self.top_k].split(self.loads(chosen))
        answers = torch.cat([self.expert(e, part) for e, part in enumerate(sent)])  # (N K, C)
        answers = answers * weights.flatten()[order, None].to(answers.dtype)
        return torch.zeros(rows.shape, dtype=answers.dtype, device=rows.device).index_add(
            0, order // self.top_k, answers
        )

    def expert(self, index: int, rows: Tensor) -> Tensor:
        """One expert's answer.  (n, C) -> (n, C)"""
        return F.linear(F.gelu(F.linear(rows, self.c_fc[index]), approximate="tanh"), self.c_proj[index])

    def loads(self, chosen: Tensor) -> list[int]:
        """How many rows each expert gets."""
        if chosen.is_meta:  # costs are counted without data: assume that the load is even
            share, left = divmod(chosen.numel(), self.experts)
            return [share + (e < left) for e in range(self.experts)]
        return torch.bincount(chosen.flatten(), minlength=self.experts).tolist()

    def imbalance(self, odds: Tensor, chosen: Tensor) -> Tensor:
        """E sum_e (share of choices that fell on e) (mean odds of e); 1 when even. Shares are averaged over ranks, so
        that the gradient does not depend on how a batch is split among them; not in an evaluation, in which they may
        have unequal numbers of batches."""
        share = F.one_hot(chosen.flatten(), self.experts).float().mean(0)  # (E,)
        if odds.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)
            share = share / torch.distributed.get_world_size()
        return self.experts * (share * odds.mean(0)).sum()


@mlp.register("gelu_tanh", source="arXiv:1606.08415; tanh form: openai/gpt-2")
def gelu_tanh(site: Site) -> nn.Module:
    """One hidden layer with the tanh approximation of GELU; GPT-2's.  (B, T, C) -> (B, T, C)

    c_proj(g(c_fc(x)))   with g(u) = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))
    """
    return Plain(site, nn.GELU(approximate="tanh"))


@mlp.register("gelu", source="arXiv:1606.08415")
def gelu(site: Site) -> nn.Module:
    """One hidden layer with exact GELU, u Phi(u).  (B, T, C) -> (B, T, C)

    c_proj(g(c_fc(x)))   with g(u) = u Phi(u), Phi the normal distribution function
    """
    return Plain(site, nn.GELU())


class ReluSquared(nn.Module):
    """max(0, u)^2, element by element."""

    def forward(self, u: Tensor) -> Tensor:
        return F.relu(u).square()


@mlp.register("relu2", source="arXiv:2109.08668")
def relu2(site: Site) -> nn.Module:
    """One hidden layer with squared ReLU, from Primer.  (B, T, C) -> (B, T, C)

    c_proj(max(0, c_fc(x))^2)
    """
    return Plain(site, ReluSquared())


@mlp.register("swiglu", source="arXiv:2002.05202")
def swiglu(site: Site, *, two_thirds: bool = True) -> nn.Module:
    """One hidden layer gated by SiLU.  (B, T, C) -> (B, T, C)

    c_proj(silu(gate) * up)   with gate and up the two halves of c_fc(x)
    two_thirds: make the hidden width 2/3 of mlp_ratio C (rounded to a multiple of 8), so that parameters stay equal.
    """
    return Gated(site, nn.SiLU(), two_thirds)


def moe_limits(dims: Dims, options: dict[str, Any]) -> list[str]:
    """A token cannot be sent to more experts than there are."""
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
    site: Site,
    *,
    experts: Annotated[int, Field(ge=2)] = 8,
    top_k: Annotated[int, Field(ge=1)] = 2,
    balance: Annotated[float, Field(ge=0)] = 0.01,
) -> nn.Module:
    """A router sends each token to `top_k` of `experts` MLPs (GELU, no biases).  (B, T, C) -> (B, T, C)

    sum over the chosen e of w_e mlp_e(x);   w = the K largest of softmax(router(x)), made to sum to 1 if K > 1
    experts: how many MLPs there are.
    top_k:   how many of them serve a token.
    balance: weight of the load-balancing loss E sum_e share_e odds_e, computed per micro-batch.
    Unlike in Switch Transformer no expert has a capacity: dropping tokens would let later tokens change earlier ones.
    """
    return MixtureOfExperts(site, experts, top_k, balance)
