"""The training objective: an ordered list of terms, summed. Evaluations always use plain cross entropy.

Shapes: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Builder
from gpt2lab.registry import Slot

objective = Slot("model.objective", "terms of the training objective", default=["cross_entropy"], arity="list")


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
