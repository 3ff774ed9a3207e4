"""`stacked`: several seeds of one model trained as one, with stacked weights, against one after another.

Small models keep a GPU waiting for the next kernel. Here every kernel computes a layer of all seeds. A prototype, to
find out what that is worth; no run is trained in this way.

Shapes: S seeds, B batch, T tokens, C channels, H heads, N = B x T rows, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import options as o
from benchmarks.plain import PlainGPT
from benchmarks.sides import CLIP, LR, WEIGHT_DECAY, Side, Work, work_named
from benchmarks.turns import time_sides
from gpt2lab.model import build_model
from gpt2lab.training.precision import Precision, autocast

COMPARED_STEPS = 5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of each seed.  (S, N, I), (S, O, I), (S, O) -> (S, N, O)"""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm of each seed.  (S, N, C), (S, C), (S, C) -> (S, N, C)"""
    y = F.layer_norm(x, x.shape[-1:]) * weight[:, None]
    return y if bias is None else y + bias[:, None]


class StackedGPT:
    """Models of equal sizes as one. `weights`: by the names of PlainGPT, each with a first dimension for the seeds."""

    def __init__(self, models: Sequence[PlainGPT]) -> None:
        self.n_layer = len(models[0].h)
        self.n_head: int = models[0].h[0].attn.n_head  # type: ignore[assignment, union-attr]
        states = [dict(model.named_parameters()) for model in models]
        self.weights: dict[str, Tensor] = {
            name: torch.stack([state[name].detach() for state in states]).requires_grad_() for name in states[0]
        }

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of each seed on batches of its own, in nats.  (S, B, T), (S, B, T) -> (S,)"""
        S, B, T = tokens.shape
        w, vocab_size = self.weights, self.weights["wte.weight"].shape[1]
        rows = tokens + vocab_size * torch.arange(S, device=tokens.device)[:, None, None]
        x = F.embedding(rows, w["wte.weight"].flatten(0, 1)) + w["wpe.weight"][:, None, :T]  # (S, B, T, C)
        x = x.flatten(1, 2)  # (S, N, C)
        for layer in range(self.n_layer):
            part = {k.removeprefix(f"h.{layer}."): v for k, v in w.items() if k.startswith(f"h.{layer}.")}
            x = x + self._attention(layer_norm(x, *pair(part, "ln_1")), part, (S, B, T))
            hidden = F.gelu(linear(layer_norm(x, *pair(part, "ln_2")), *pair(part, "mlp.c_fc")), approximate="tanh")
            x = x + linear(hidden, *pair(part, "mlp.c_proj"))
        logits = linear(layer_norm(x, *pair(w, "ln_f")), w["wte.weight"], None)  # (S, N, V)
        each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return each.view(S, B * T).mean(1)

    def _attention(self, x: Tensor, part: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Tensor:
        """All seeds in one call of the kernel, as further sequences of the batch.  (S, N, C) -> (S, N, C)"""
        S, B, T = shape
        qkv = linear(x, *pair(part, "attn.c_attn")).view(S * B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (S B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(y.transpose(1, 2).reshape(S, B * T, -1), *pair(part, "attn.c_proj"))


def pair(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer."""
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Clip the whole gradient of each seed at `limit`, as torch.nn.utils.clip_grad_norm_ does.  each (S, ...)"""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # (S,)
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def model_of(work: Work, seed: int, device: torch.device) -> PlainGPT:
    """The plain model with the weights of a seed."""
    model = PlainGPT(work.n_layer, work.n_head, work.n_embd, work.block_size, work.vocab_size, work.bias)
    model.load_state_dict(build_model(work.model(), seed=seed).state_dict())
    return model.to(device)


def adamw(weights: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """The same for both sides: fused, decaying matrices alone, which names tell."""
    plain = {name: name.endswith("bias") or "ln_" in name for name in weights}
    groups = [
        {"params": [w for name, w in weights.items() if plain[name] is vectors], "weight_decay": decay}
        for vectors, decay in ((False, WEIGHT_DECAY), (True, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)


class SeedsSide:
    """All seeds take a step, each on batches of its own. stacked: as one model, or one after another."""

    def __init__(self, work: Work, seeds: int, precision: Precision, device: torch.device, *, stacked: bool) -> None:
        self.name = f"{seeds} seeds {'stacked' if stacked else 'one after another'}"
        self.precision, self.device, self.taken = precision, device, 0
        self.models = [model_of(work, seed, device) for seed in range(seeds)]
        self.stack = StackedGPT(self.models) if stacked else None
        apart = [dict(model.named_parameters()) for model in self.models]
        self.optimizers = [adamw(weights) for weights in ([self.stack.weights] if self.stack else apart)]
        self.batches = [work.batches(seed) for seed in range(seeds)]

    def losses(self) -> Tensor:
        """One step of every seed; -> the loss of each before it.  (S,)"""
        pairs = [batches.at(self.taken) for batches in self.batches]
        self.taken += 1
        tokens, targets = (torch.from_numpy(np.stack(each)).to(self.device) for each in zip(*pairs, strict=True))
        with autocast(self.precision, self.device):
            if self.stack:
                losses = self.stack.losses(tokens, targets)
            else:
                one = [m.objective(x, y)[0] for m, x, y in zip(self.models, tokens, targets, strict=True)]
                losses = torch.stack(one)
        losses.sum().backward()  # no weight of one seed is in the loss of another
        if self.stack:
            clip_each([w.grad for w in self.stack.weights.values() if w.grad is not None], CLIP)
        else:
            for model in self.models:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    def step(self) -> float:
        return float(self.losses().mean())


@dataclass(frozen=True)
class Seeds:
    """The recipe of such a side."""

    seeds: int
    stacked: bool
    precision: Precision = "fp32"

    def make(self, work: Work, device: torch.device) -> Side:
        """The side, ready to train."""
        return SeedsSide(work, self.seeds, self.precision, device, stacked=self.stacked)


def largest_difference(work: Work, seeds: int, precision: Precision, device: torch.device) -> float:
    """Between the losses of the two ways, in nats, over the first steps and all seeds."""
    ways = [SeedsSide(work, seeds, precision, device, stacked=stacked) for stacked in (True, False)]
    return max(float((ways[0].losses() - ways[1].losses()).abs().max()) for _ in range(COMPARED_STEPS))


def stacked(
    config: o.Size = "nano",
    seeds: Annotated[int, typer.Option("--seeds", help="Models that train at once.", min=1)] = 16,
    precision: o.Precision = "fp32",
    blocks: o.Blocks = 7,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Time several seeds of the plain model trained as one, with stacked weights, against one after another."""
    place = o.chosen_device(device, threads, *o.precisions(precision, "fp32", o.PRECISIONS[:2]))
    work, kind = work_named(config), precision
    difference = largest_difference(work, seeds, kind, place)  # type: ignore[arg-type]
    recipes = [Seeds(seeds, way, kind) for way in (True, False)]  # type: ignore[arg-type]
    timing = time_sides(recipes, work, place, blocks=blocks, first_steps=COMPARED_STEPS)
    if json_:
        print(json.dumps({"config": config, "seeds": seeds, "loss_difference": difference, **asdict(timing)}))
        return
    table = o.table_of("", "ms per step of all", "steps/s of all together")
    for name, taken in zip(timing.names, timing.seconds, strict=True):
        table.add_row(name, f"{1000 * median(taken):.4g}", f"{seeds / median(taken):.4g}")
    together, apart = timing.names
    words = o.verdict(together, apart, timing.ratio, timing.interval)
    counted = f"({blocks} blocks each, {place.type}, {precision}, {torch.get_num_threads()} threads)"
    same = f"losses of the first {COMPARED_STEPS} steps differ by at most {difference:.1e} nats"
    o.show(table, f"configuration {config}: {words} {counted}; {same}")
