"""Diagnostics: measurements of a model while it trains, such as the size of activations, scores, logits and updates.

    @diagnostic.register("stream_max", source="...")
    class StreamMax(Diagnostic):
        "Largest absolute value of the residual stream after every block."

        def stream(self, depth: int, x: Tensor) -> None:
            self.values[depth] = x.abs().amax()

They are made at evaluations, from one forward pass without gradients and from one optimizer step, and go into the run's
journal as `diag/<name>` or `diag/<name>/<part>`, where options that differ from their defaults belong to the name. They
do not change the training: random numbers are seeded before each micro-batch, and every module is put back into its
mode.

Shapes: B batch, H heads, T queries, S keys, C channels, V vocabulary, n = B T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gpt2lab.components.attend import score_map
from gpt2lab.components.base import Param
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.scores import Scores
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Choice, Slot
from gpt2lab.training.precision import Precision, autocast

DEFAULT = ("activation_rms", "attention_logit_max", "logit_rms", "update_ratio")
diagnostic = Slot(
    "evaluation.diagnostic", "measurements while a run trains", default=DEFAULT, arity="list", in_config=False
)

TOKENS = 2_048
"""Tokens of the forward pass: enough for the size of numbers."""
ELEMENTS_AT_ONCE = 1 << 22  # of attention scores or of logits: 16 MiB


class Diagnostic:
    """One measurement, made anew at every evaluation. Subclasses override the methods that they need, and put scalars
    into `values`: under "" for the model, or under the number of a block or another name."""

    def __init__(self) -> None:
        self.values: dict[str | int, Tensor | float] = {}
        self.name = ""

    def stream(self, depth: int, x: Tensor) -> None:
        """The residual stream after the block call `depth`, from 0.  (B, T, C), or several streams"""

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """The arguments of `score_map`, once per attention kernel; bias is -inf where attention is masked."""

    def output(self, name: str, module: nn.Module, x: Any) -> None:
        """What `module` returned, for every module of the model; `name` as in `model.named_modules()`, such as
        "h.0.mlp.activation". A module that is called several times reports every call."""

    def logits(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        """parts() yields all logits (m, V), some rows at a time."""

    def before_update(self, params: Sequence[Param]) -> None:
        """Right before the weights are updated; gradients are clipped."""

    def after_update(self, params: Sequence[Param]) -> None:
        """Right after the weights are updated."""

    def metrics(self) -> dict[str, float]:
        """The values by their names in the journal; waits for the device once. Raises ConfigError for one that is not
        a number."""
        values, self.values = self.values, {}
        tensors = {part: value for part, value in values.items() if isinstance(value, Tensor)}
        for part, value in tensors.items():
            if value.numel() != 1:
                what = f"the value '{part}' has the shape {tuple(value.shape)}; a number is expected"
                raise ConfigError(what, where=f"diagnostic '{self.name}'", hint="a mean over it, or a value for each")
        tensors = {part: value.reshape(()) for part, value in tensors.items()}
        numbers = torch.stack(list(tensors.values())).tolist() if tensors else []
        values |= dict(zip(tensors, numbers, strict=True))
        return {f"diag/{self.name}" + (f"/{part}" if part != "" else ""): float(x) for part, x in values.items()}


class Observers:
    """Passes the values of a forward pass to several diagnostics."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = diagnostics

    def stream(self, depth: int, x: Tensor) -> None:
        """See Diagnostic."""
        for part in self.diagnostics:
            part.stream(depth, x)

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """See Diagnostic."""
        for part in self.diagnostics:
            part.attention(depth, q, k, bias, scores, scale)


class Model(Protocol):
    """The part of a GPT that diagnostics use."""

    wte: Any
    lm_head: Callable[..., Tensor]

    def context(self, tokens: Tensor) -> ForwardContext: ...
    def hidden(self, ctx: ForwardContext) -> Tensor: ...
    def parameters(self) -> Any: ...
    def modules(self) -> Any: ...
    def named_modules(self) -> Any: ...


def build(choices: Iterable[Choice] | None = None) -> list[Diagnostic]:
    """New instances of the chosen diagnostics, by default of DEFAULT."""
    built: list[Diagnostic] = []
    for choice in diagnostic.read_all(DEFAULT) if choices is None else choices:
        made: Diagnostic = diagnostic.build(choice)
        made.name = str(choice)
        built.append(made)
    return built


def overrides(part: Diagnostic, *methods: str) -> bool:
    """Whether a diagnostic overrides one of these methods."""
    return any(getattr(type(part), method) is not getattr(Diagnostic, method) for method in methods)


def observes_updates(part: Diagnostic) -> bool:
    """Whether a diagnostic overrides a method that is called around updates."""
    return overrides(part, "before_update", "after_update")


@contextmanager
def output_hooks(model: Model, diagnostics: Sequence[Diagnostic]) -> Iterator[None]:
    """While it is open, diagnostics that override `output` receive what every module returns."""
    parts = [part for part in diagnostics if overrides(part, "output")]
    hooks = [
        module.register_forward_hook(lambda module, _, x, name=name, part=part: part.output(name, module, x))
        for part in parts
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def diagnose(
    model: Model, tokens: Any, precision: Precision, diagnostics: Sequence[Diagnostic] | None = None
) -> dict[str, float]:
    """Run one forward pass over `tokens` (B, T) int64, an array or tensor, and return the metrics by name.

    If ranks train together, all must call it with the same tokens, because components may communicate in their forward
    pass.
    """
    diagnostics = build() if diagnostics is None else diagnostics
    modes = [(module, module.training) for module in model.modules()]
    device = next(iter(model.parameters())).device
    try:
        for module, _ in modes:
            module.training = False
        ctx = model.context(torch.as_tensor(tokens, dtype=torch.int64).to(device))
        ctx.observer = Observers(diagnostics)
        with autocast(precision, device), output_hooks(model, diagnostics):
            rows = model.hidden(ctx).flatten(0, 1)  # (n, C)
            width = model.lm_head(rows[:1], model.wte).numel()
            for part in diagnostics:
                part.logits(lambda: logits_of(model, rows, width))
    finally:
        for module, training in modes:
            module.training = training
    return {name: value for part in diagnostics for name, value in part.metrics().items()}


def logits_of(model: Model, rows: Tensor, width: int) -> Iterable[Tensor]:
    """The logits of `rows` (n, C), a bounded number at a time.  -> parts of (m, V)"""
    return (model.lm_head(part, model.wte) for part in rows.split(max(1, ELEMENTS_AT_ONCE // width)))


def rms(x: Tensor) -> Tensor:
    """Root mean square of all elements.  -> ()"""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
    return norm / math.sqrt(x.numel())


@diagnostic.register("activation_rms", source="arXiv:2203.03466, appendix D.1 (coordinate check)")
class ActivationRms(Diagnostic):
    """Root mean square of the residual stream after every block."""

    def stream(self, depth: int, x: Tensor) -> None:
        self.values[depth] = rms(x)


@diagnostic.register("attention_logit_max", source="arXiv:2302.05442, section 2")
class AttentionLogitMax(Diagnostic):
    """Largest attention score before the softmax, over all blocks and in each.

    Masked scores do not count. A block without `attend` has no value.
    """

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        B, H, T, _ = q.shape
        size = max(1, ELEMENTS_AT_ONCE // (B * H * k.shape[-2]))
        with torch.autocast(q.device.type, enabled=False):  # fused kernels compute scores in float32, too
            q, k = q.float(), k.float()
            parts = [
                score_map(q[..., start : start + size, :], k, bias[..., start : start + size, :], scores, scale).amax()
                for start in range(0, T, size)  # some queries at a time
            ]
        for key in (depth, ""):
            earlier = [self.values[key]] if key in self.values else []
            self.values[key] = torch.stack([*parts, *(torch.as_tensor(value) for value in earlier)]).amax()


@diagnostic.register("logit_rms", source="arXiv:2203.03466, appendix D.1 (coordinate check)")
class LogitRms(Diagnostic):
    """Root mean square of the output logits."""

    def logits(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        norms, elements = [], 0
        for part in parts():
            norms.append(torch.linalg.vector_norm(part, dtype=torch.float32))
            elements += part.numel()
        self.values[""] = torch.linalg.vector_norm(torch.stack(norms)) / math.sqrt(elements)


@diagnostic.register("update_ratio", source="A. Karpathy, makemore part 3 (2022): update to data ratio")
class UpdateRatio(Diagnostic):
    """Size of one update relative to the weights before it, for all weights and for each group of them.

    |after - before| / |before|, 2-norms. Groups with only zero weights have no value. During the update it holds a copy
    of the weights, at a time when activations are freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, list[nn.Parameter]] = {}
        self.copies: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def before_update(self, params: Sequence[Param]) -> None:
        for param in params:
            self.groups.setdefault(group_of(param), []).append(param.tensor)
        self.copies = {group: [x.detach().clone() for x in tensors] for group, tensors in self.groups.items()}

    @torch.no_grad()
    def after_update(self, params: Sequence[Param]) -> None:
        sizes, changes = [], []
        for group, copies in self.copies.items():
            sizes.append(get_total_norm(copies))
            for tensor, copy in zip(self.groups[group], copies, strict=True):
                copy.sub_(tensor)
            changes.append(get_total_norm(copies))
        size, change = torch.stack([*sizes, *changes]).view(2, -1).cpu().double()
        if size.any():
            self.values[""] = float(change.norm() / size.norm())
        self.values |= {g: float(c / s) for g, s, c in zip(self.copies, size, change, strict=True) if s > 0}
        self.groups, self.copies = {}, {}


def group_of(param: Param) -> str:
    """The group of a parameter in reports: for a matrix in a block its branch, such as `attention` or `mlp`, else the
    kind of its role, such as `embedding`, `position`, `head` or `vector`."""
    kind, path = param.role.kind, param.name.split(".")
    if kind not in ("hidden", "residual_out", "router"):
        return kind
    part = path[2] if path[0] == "h" and len(path) > 2 else path[0]
    return {"attn": "attention"}.get(part, part)
