"""Our GPT-2 and Hugging Face's side by side: the same weights, the same data, the same optimizer; how far apart they
end. Ours trains as the engine does: its loop, its groups, its clipping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from their_gpt2 import their_model
from transformers import GPT2LMHeadModel

from gpt2lab import load_gpt2
from gpt2lab.config import load_config
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.optim import OptimConfig, build_optimizers
from gpt2lab.pretrained.huggingface import from_hf
from gpt2lab.training import TrainingConfig, TrainState, steps

STEPS, WARMUP, LR, BETAS, DECAY, CLIP = 10, 3, 6e-4, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Case:
    """One size of GPT-2 and its batches: sequences of `length` tokens."""

    name: str
    model: ModelConfig
    sequences: int
    length: int


def preset(name: str, sequences: int, length: int, layers: int | None = None) -> Case:
    """A shipped preset, whole or at full width with fewer layers."""
    model = load_config(name).model
    if layers is None:
        return Case(name, model, sequences, length)
    return Case(f"{name}, {layers} layers", model.model_copy(update={"n_layer": layers}), sequences, length)


@dataclass(frozen=True)
class Data:
    """Random batches as a pure function of the step."""

    vocab_size: int
    sequences: int
    length: int

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shape = (self.sequences, self.length + 1)
        drawn = np.random.default_rng([7, step]).integers(0, self.vocab_size, shape)
        return drawn[:, :-1].copy(), drawn[:, 1:].copy()


def their_gpt2(model: ModelConfig) -> GPT2LMHeadModel:
    """transformers' own random start, but for biases and norms."""
    return their_model(
        spread=0.0, n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd, n_positions=model.block_size,
        vocab_size=model.vocab_size,
    )  # fmt: skip


def far(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference of any element, and largest element of theirs."""
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        gaps = [(ours[name] - theirs[name]).abs().max().item() for name in ours]
        sizes = [tensor.abs().max().item() for tensor in theirs.values()]
    return max(gaps), max(sizes)


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Euclidean, over all elements."""
    with torch.no_grad():
        return sum(((a[name] - b[name]).double() ** 2).sum().item() for name in a) ** 0.5


@contextlib.contextmanager
def half(precision: str) -> Iterator[None]:
    """Autocast to bfloat16, if asked for."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


def their_loss(model: GPT2LMHeadModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in float32, as their own loss is, of targets that are shifted already."""
    logits = model(inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def their_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """Matrices and embeddings decay, vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8, fused=False, foreach=False)


def passes(ours: GPT, theirs: GPT2LMHeadModel, data: Data, precision: str) -> dict[str, float]:
    """One forward and backward pass of both: how far logits, loss and gradients lie apart; in bf16 also how far the
    logits of each lie from float32's, on the average of squares."""
    inputs, targets = (torch.as_tensor(x) for x in data.at(0))
    with half(precision), torch.no_grad():
        a, b = ours(inputs).float(), theirs(inputs).logits.float()
    found = {"logits": (a - b).abs().max().item(), "largest logit": b.abs().max().item()}
    if precision == "bf16":
        with torch.no_grad():
            exact = theirs(inputs).logits
        found["ours from fp32"], found["theirs from fp32"] = ((x - exact).square().mean().sqrt().item() for x in (a, b))
    del a, b
    with half(precision):
        loss, reference = ours.loss(inputs, targets), their_loss(theirs, inputs, targets)
    found["loss"] = abs(loss.item() - reference.item())
    loss.backward()
    reference.backward()
    found["gradients"], found["largest gradient"] = far(
        {name: p.grad for name, p in ours.named_parameters() if p.grad is not None},
        from_hf({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}),
    )
    ours.zero_grad()
    theirs.zero_grad()
    return found


def trained(ours: GPT, theirs: GPT2LMHeadModel, data: Data, precision: Any) -> dict[str, float]:
    """Ten steps of both: how far losses lie apart, and weights at the end."""
    optim = OptimConfig(
        lr=LR, warmup_steps=WARMUP, grad_clip=CLIP,
        optimizer={"name": "adamw", "betas": BETAS, "weight_decay": DECAY}, schedule="linear",
    )  # fmt: skip
    training = TrainingConfig(
        steps=STEPS, batch_tokens=data.sequences * data.length, precision=precision, device="cpu", compile="off"
    )
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    state = TrainState(ours, build_optimizers(optim, ours.params()))
    losses = [record.metrics["train/loss"] for record in steps(state, data, optim, training, seed=0)]
    del state
    optimizer, gap = their_optimizer(theirs), 0.0
    theirs.train()
    for step in range(STEPS):
        inputs, targets = (torch.as_tensor(x) for x in data.at(step))
        with half(precision):
            loss = their_loss(theirs, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        for group in optimizer.param_groups:  # by hand: up over 3 steps, then down to 0
            group["lr"] = LR * ((step + 1) / WARMUP if step < WARMUP else 1 - (step - WARMUP) / (STEPS - WARMUP))
        optimizer.step()
        optimizer.zero_grad()
        gap = max(gap, abs(loss.item() - losses[step]))
    after = from_hf(dict(theirs.named_parameters()))
    ends = dict(ours.named_parameters())
    apart, _ = far(ends, after)
    moved, _ = far(after, before)
    share = distance(ends, after) / distance(after, before)
    return {
        "losses": gap,
        "change of loss": abs(losses[0] - losses[-1]),
        "weights": apart,
        "largest move": moved,
        "apart / moved": share,
    }


def compared(case: Case, precision: str) -> dict[str, float]:
    """Every figure of one size in one precision."""
    theirs = their_gpt2(case.model).eval()
    ours = load_gpt2(theirs)
    data = Data(theirs.config.vocab_size, case.sequences, case.length)
    return passes(ours, theirs, data, precision) | trained(ours, theirs, data, precision)
