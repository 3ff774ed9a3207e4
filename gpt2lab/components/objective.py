"""The training objective: an ordered list of terms, summed. Evaluations always use plain cross entropy.

A term either has `rows`, and receives logits for a chunk of rows at a time, or `from_hidden`, and receives the stream
below the head, the tokens with their positions, and a function for cross entropies by the model's head.

Shapes: B batch, T tokens, C channels, n rows (tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.registry import Slot

CrossEntropyOf = Callable[[Tensor, Tensor], Tensor]
"""Cross entropy of rows (..., C) for targets (...), summed over those that are not -100, by the model's head and in
chunks.  -> ()"""

objective = Slot(
    "model.objective", "terms of the training objective", default=["cross_entropy"], arity="list", base=nn.Module
)


@objective.register("cross_entropy", source="GPT-2 (Radford et al. 2019)")
class CrossEntropy(nn.Module):
    """The negative log probability of the next token, in nats.  -> (n,)

    -log softmax(logits)[target]
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()

    def from_nll(self, nll: Tensor, lse: Tensor) -> Tensor:
        """This term from each row's cross entropy and log-sum-exp, without its logits.  (n,), (n,) -> (n,)"""
        return nll

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """This term for every row.  logits (n, V) float32, targets (n,), their cross entropy nll (n,) -> (n,)"""
        return nll


@objective.register("z_loss", source="arXiv:2204.02311, section 5")
class ZLoss(nn.Module):
    """A penalty that keeps the normaliser of the softmax near 1.  -> (n,)

    weight * log(sum exp(logits))^2, used together with cross_entropy

    weight: factor of this term in the objective.
    """

    def __init__(self, builder: Builder, *, weight: Annotated[float, Field(gt=0)] = 1e-4) -> None:
        super().__init__()
        self.weight = weight

    def from_nll(self, nll: Tensor, lse: Tensor) -> Tensor:
        """This term from each row's cross entropy and log-sum-exp, without its logits.  (n,), (n,) -> (n,)"""
        return self.weight * lse.square()

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32 -> (n,)"""
        return self.from_nll(nll, torch.logsumexp(logits, -1))


@objective.register("label_smoothing", source="arXiv:1512.00567, section 7")
class LabelSmoothing(nn.Module):
    """What smooth targets add to cross entropy: a share of each target is spread over the vocabulary.  -> (n,)

    amount (mean over tokens of -log softmax(logits) + log softmax(logits)[target]), used together with cross_entropy

    amount: the share.
    """

    def __init__(self, builder: Builder, *, amount: Annotated[float, Field(gt=0, lt=1)] = 0.1) -> None:
        super().__init__()
        self.amount = amount

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32, targets (n,), their cross entropy nll (n,) -> (n,)"""
        return self.amount * (torch.logsumexp(logits, -1) - logits.mean(-1) - nll)


@objective.register("focal", source="arXiv:1708.02002")
class Focal(nn.Module):
    """What focal loss subtracts from cross entropy: tokens that the model is sure of count less.  -> (n,)

    ((1 - p)^gamma - 1) (-log p)   with p = softmax(logits)[target], used together with cross_entropy

    gamma: 0 is cross entropy.
    """

    def __init__(self, builder: Builder, *, gamma: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def from_nll(self, nll: Tensor, lse: Tensor) -> Tensor:
        """This term from each row's cross entropy and log-sum-exp, without its logits.  (n,), (n,) -> (n,)"""
        return ((-torch.expm1(-nll)).clamp(min=1e-6) ** self.gamma - 1) * nll

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32, targets (n,), their cross entropy nll (n,) -> (n,)"""
        return self.from_nll(nll, nll)


@objective.register("multi_token", source="arXiv:2404.19737", examples=({"tokens": 3, "weight": 0.3},))
class MultiToken(nn.Module):
    """Predict tokens further ahead as well, each distance by a further block and the model's own head.

    weight sum_k -log softmax(head(norm(block_k(x_t))))[token_(t+k)]   for k = 2 ... tokens;  cross_entropy is k = 1

    tokens: the farthest distance that is predicted.
    weight: of each distance. The paper weights all alike.
    x is the normalised stream that the model's head reads. In the paper the next token has a block of its own, too, and
    the trunk is shorter by all of these blocks. Sums are divided by the number of next tokens.
    """

    def __init__(
        self, builder: Builder, *, tokens: Annotated[int, Field(ge=2)] = 2, weight: Annotated[float, Field(gt=0)] = 1.0
    ) -> None:
        super().__init__()
        last = builder.at(layer=builder.dims.n_layer - 1)
        self.weight = weight
        self.blocks = nn.ModuleList(last.build("residual") for _ in range(tokens - 1))
        self.norms = nn.ModuleList(
            builder.build("norm") if block.final_norm else nn.Identity() for block in self.blocks
        )

    def from_hidden(self, x: Tensor, targets: Tensor, ctx: ForwardContext, cross_entropy: CrossEntropyOf) -> Tensor:
        """This term summed over tokens.  x (B, T, C), targets (B, T) -> ()"""
        total = x.new_zeros((), dtype=torch.float32)
        for ahead, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True), 1):
            if ahead >= x.shape[1]:
                break
            ctx.depth += 1
            later = norm(block.close(block(block.open(x), ctx)))  # type: ignore[operator]  # (B, T, C)
            total = total + cross_entropy(later[:, :-ahead], targets[:, ahead:])
        return self.weight * total
