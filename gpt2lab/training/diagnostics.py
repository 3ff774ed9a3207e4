"""Numbers that show whether a training is healthy: how large activations, scores and logits are, how far a step moves.

They are taken at evaluations, from one forward pass without gradient and from a copy of the weights around one
optimizer step. Taking them draws no random number and changes no bit of the training.

Shapes: B batch, H heads, T queries, S keys, C channels, V vocabulary, n = B T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gpt2lab.components.attend import score_map
from gpt2lab.components.base import Param
from gpt2lab.components.scores import Scores
from gpt2lab.components.step import Step
from gpt2lab.training.precision import Precision, autocast

ACTIVATIONS, SCORES, LOGITS, MOVED = (
    f"diag/{name}" for name in ("activation_rms", "attention_logit_max", "logit_rms", "update_ratio")
)
TOKENS = 2_048
"""As many tokens tell how large numbers are; more would cost time and say the same."""

ELEMENTS_AT_ONCE = 1 << 22  # of attention scores or of logits: 16 MiB


class Model(Protocol):
    """What of a GPT is looked at."""

    wte: Any
    lm_head: Callable[..., Tensor]

    def step(self, tokens: Tensor) -> Step: ...
    def hidden(self, step: Step) -> Tensor: ...
    def parameters(self) -> Any: ...
    def modules(self) -> Any: ...


class ActivationStatistics:
    """What was seen during one forward pass: by block call, scalars that stay on the device."""

    def __init__(self) -> None:
        self.rms: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}

    def stream(self, depth: int, x: Tensor) -> None:
        """Root mean square of the stream, over all streams where there are several."""
        self.rms[depth] = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """The largest score, some queries at a time; a block may call more than one kernel."""
        B, H, T, _ = q.shape
        size = max(1, ELEMENTS_AT_ONCE // (B * H * k.shape[-2]))
        with torch.autocast(q.device.type, enabled=False):  # fused kernels keep scores in float32, too
            q, k = q.float(), k.float()
            parts = [
                score_map(q[..., start : start + size, :], k, bias[..., start : start + size, :], scores, scale).amax()
                for start in range(0, T, size)
            ]
        self.largest[depth] = torch.stack([*parts, self.largest[depth]] if depth in self.largest else parts).amax()


@torch.no_grad()
def diagnose(model: Model, tokens: Any, precision: Precision) -> dict[str, float]:
    """One forward pass over `tokens` (B, T) int64, an array or a tensor: the metrics `diag/...` by name.

    diag/activation_rms/<i>:      root mean square of the residual stream behind block call i, from 0.
    diag/attention_logit_max/<i>: largest score before the softmax among pairs that may see each other, and over all
                                  block calls without the number; not there where no attention calls `attend`.
    diag/logit_rms:               root mean square of the scores over the vocabulary.

    Every module is in the mode it was in afterwards. Where ranks train together, let all of them call it with the same
    tokens: a component may speak to the other ranks in its forward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(iter(model.parameters())).device
    statistics = ActivationStatistics()
    try:
        for module, _ in modes:
            module.training = False
        step = model.step(torch.as_tensor(tokens, dtype=torch.int64).to(device))
        step.watch = statistics
        with autocast(precision, device):
            found = {LOGITS: logit_rms(model, model.hidden(step).flatten(0, 1))}
    finally:
        for module, training in modes:
            module.training = training
    found |= {f"{ACTIVATIONS}/{depth}": rms for depth, rms in statistics.rms.items()}
    if statistics.largest:
        found[SCORES] = torch.stack(list(statistics.largest.values())).amax()
        found |= {f"{SCORES}/{depth}": largest for depth, largest in statistics.largest.items()}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))  # the only wait for the device


def logit_rms(model: Model, rows: Tensor) -> Tensor:
    """Root mean square of the logits, some rows at a time.  (n, C) -> ()"""
    width = model.lm_head(rows[:1], model.wte).numel()
    parts = rows.split(max(1, ELEMENTS_AT_ONCE // width))
    norms = [torch.linalg.vector_norm(model.lm_head(part, model.wte), dtype=torch.float32) for part in parts]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole / math.sqrt(len(rows) * width)


class Updates:
    """How far one optimizer step moves the weights, against their size.

    Call `before` right before the step and `after` right behind it. In between it holds a second copy of the weights,
    at a time when activations are gone.
    """

    def __init__(self, params: Sequence[Param]) -> None:
        self.groups: dict[str, list[nn.Parameter]] = {}
        for param in params:
            self.groups.setdefault(group_of(param), []).append(param.tensor)
        self.copies: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Copy the weights."""
        self.copies = {group: [tensor.detach().clone() for tensor in own] for group, own in self.groups.items()}

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """rms of the update / rms of the weights before it: `diag/update_ratio` over all weights, and with a group's
        name behind a slash over that group. Groups whose weights were all zero have no ratio and are left out."""
        sizes, moves = [], []
        for group, copies in self.copies.items():
            sizes.append(get_total_norm(copies))
            for tensor, copy in zip(self.groups[group], copies, strict=True):
                copy.sub_(tensor)
            moves.append(get_total_norm(copies))
        names = [f"{MOVED}/{group}" for group in self.copies]
        self.copies = {}
        size, move = torch.stack([*sizes, *moves]).view(2, -1).cpu().double()  # the only wait for the device
        found = {MOVED: float(move.norm() / size.norm())} if size.any() else {}
        return found | {name: float(m / s) for name, s, m in zip(names, size, move, strict=True) if s > 0}


def group_of(param: Param) -> str:
    """What an update is reported under: for a matrix in a block, the branch that it belongs to, as `attention` or
    `mlp`; else what it is for, as `embedding`, `position`, `head` or `vector`."""
    kind, path = param.role.kind, param.name.split(".")
    if kind not in ("hidden", "residual_out", "router"):
        return kind
    part = path[2] if path[0] == "h" and len(path) > 2 else path[0]
    return {"attn": "attention"}.get(part, part)
