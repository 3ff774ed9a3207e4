"""What training minimises: an ordered list of terms, added up. Every evaluation stays plain cross entropy.

Shapes: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt2lab.components.base import Site
from gpt2lab.registry import Slot

objective = Slot("model.objective", "what training minimises", default=["cross_entropy"], arity="list")


@objective.register("cross_entropy", source="GPT-2 (Radford et al. 2019)")
class CrossEntropy(nn.Module):
    """The negative log probability of the next token, in nats.  -> (n,)

    -log softmax(logits)[target]
    """

    def __init__(self, site: Site) -> None:
        super().__init__()

    def of(self, nll: Tensor, lse: Tensor) -> Tensor:
        """This term from a row's cross entropy and log-sum-exp, which is all it needs.  (n,), (n,) -> (n,)"""
        return nll

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32, targets (n,), nll (n,) their cross entropy -> this term for every row (n,)."""
        return nll


@objective.register("z_loss", source="arXiv:2204.02311, section 5")
class ZLoss(nn.Module):
    """A penalty that keeps the softmax normaliser near 1.  -> (n,)

    weight * log(sum exp(logits))^2;  list it beside cross_entropy

    weight: of this term in the objective.
    """

    def __init__(self, site: Site, *, weight: Annotated[float, Field(gt=0)] = 1e-4) -> None:
        super().__init__()
        self.weight = weight

    def of(self, nll: Tensor, lse: Tensor) -> Tensor:
        """This term from a row's cross entropy and log-sum-exp, which is all it needs.  (n,), (n,) -> (n,)"""
        return self.weight * lse.square()

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32 -> (n,)"""
        return self.of(nll, torch.logsumexp(logits, -1))
