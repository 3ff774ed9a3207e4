"""What the model itself shows: at its first step, which its seed draws again, and with its newest weights.

Shapes: B batch, H heads, T tokens, S keys, D channels per head, C channels, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.attend import score_map
from gpt2lab.components.base import Param
from gpt2lab.components.scores import Scores
from gpt2lab.components.stack import Across
from gpt2lab.doctor.findings import Finding, NotExamined
from gpt2lab.doctor.patient import Patient
from gpt2lab.model import GPT
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.registry import SLOTS

LEAK = 1e-4
"""Of the logits' size: rounding moves them by a millionth."""
UNEVEN = 0.01
"""Share by which sums of attention weights may differ."""
LEARNED = 0.3
"""Nats by which training must have won more on one target than on another to have learned the one."""
OFF_SCALE = 1.5
"""Times by which the factor on dot products may be off; a wrong one is off by the root of some width."""
TOO_LARGE = 1.25
"""Times the scale of GPT-2 for matrices that write into the stream; without it, one layer has 1.4 times that."""


@torch.no_grad()
def causality(patient: Patient) -> Finding | None:
    """Changing later tokens leaves the logits of earlier ones alone."""
    model = patient.now if patient.step else patient.start
    tokens = patient.tokens[:, :-1]
    middle = tokens.shape[1] // 2
    others = tokens.clone()
    others[:, middle:] = tokens[:, middle:].flip(0, 1)
    before, after = model(tokens)[:, :middle], model(others)[:, :middle]  # (B, T / 2, V)
    moved = (before - after).abs().amax((0, 2)) / before.square().mean().sqrt()  # (T / 2,)
    if not moved.max() > LEAK:
        return None
    touched = int((moved > LEAK).sum())
    return Finding(
        name="causality",
        severity="error",
        evidence=f"changing the tokens from position {middle} on moved the logits of {touched} of the {middle} "
        f"positions before it, by up to {moved.max():.2g} times their size",
        causes=(
            "a causal mask that is off by one, or missing",
            "a softmax, norm or mean over the tokens of a sequence",
            "an embedding or convolution that reads ahead",
        ),
    )


class Constant(Across):
    """Gives attention the same values at every token."""

    def __init__(self, value: float) -> None:
        nn.Module.__init__(self)
        self.constant = value

    def value(self, depth: int, v: Tensor, step: object) -> Tensor:
        return torch.full_like(v, self.constant)


@torch.no_grad()
def softmax_rows(patient: Patient) -> Finding | None:
    """Attention weights of a query sum to one: with equal values everywhere, every token must read the same."""
    for choice in patient.config.model.scores:
        if choice.options.get("gate") or choice.options.get("sink_logits"):
            raise NotExamined(f"scores {choice} weigh what a query reads")
    model = patient.now if patient.step else patient.start
    tokens = patient.tokens[:, :-1]
    with_ones, with_zeros = (read_by_attention(model, tokens, value) for value in (1.0, 0.0))
    for layer, (ones, zeros) in enumerate(zip(with_ones, with_zeros, strict=True)):
        sums = (ones - zeros).norm(dim=-1)  # (B, T), up to a factor that is the same for all
        if not sums.max() > 0:
            continue
        low, high = (sums.min() / sums.max()).item(), 1.0
        if high - low > UNEVEN:
            return Finding(
                name="softmax_rows",
                severity="error",
                evidence=f"in block {layer} the attention weights of some queries sum to {low:.3g} times those of "
                "others; each should sum to one",
                causes=("a softmax along another axis than the keys", "weights masked after the softmax"),
            )
    return None


def read_by_attention(model: GPT, tokens: Tensor, value: float) -> list[Tensor]:
    """What every block's attention hands on when all values are `value`.  -> (B, T, C) for each block"""
    found: list[Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda _, __, out: found.append(out.float()))  # type: ignore[union-attr]
        for block in model.h
    ]
    try:
        step = model.step(tokens)
        step.stack = [*step.stack, Constant(value)]
        model.hidden(step)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Scale:
    """Looks on: by how much attention multiplies the dot products, by block call."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, int]] = {}

    def stream(self, depth: int, x: Tensor) -> None:
        """Not of interest."""

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """Factor and D."""
        q, k = q.float(), k.float()
        plain, made = q @ k.mT, score_map(q, k, torch.zeros((), device=q.device), scores, scale)
        self.found[depth] = (float(made.norm() / plain.norm()), q.shape[-1])


@torch.no_grad()
def attention_scale(patient: Patient) -> Finding | None:
    """Dot products of queries and keys are divided by sqrt(D), unless the config says otherwise."""
    watch, pattern = Scale(), patient.config.model.scores
    step = patient.start.step(patient.tokens[:, :-1])
    step.watch = watch
    patient.start.hidden(step)
    if not watch.found:
        raise NotExamined("its attention does not show its scores")
    for depth, (factor, size) in watch.found.items():
        written = pattern[depth % len(pattern)].options.get("scale")
        wanted = (size**-0.5 if written is None else float(written)) * step.score_factor
        if not wanted / OFF_SCALE < factor < wanted * OFF_SCALE:
            largest = patient.series("diag/attention_logit_max")
            grown = f"; the largest score of the run is {max(largest.values()):.1f}" if largest else ""
            return Finding(
                name="attention_scale",
                severity="error",
                evidence=f"in block {depth} dot products are multiplied by {factor:.3g}, where 1/sqrt({size}) is "
                f"{size**-0.5:.3g}{grown}",
                causes=("no 1/sqrt(D)", "the width of the model in the place of the head size", "a scale used twice"),
            )
    return None


@torch.no_grad()
def targets(patient: Patient) -> Finding | None:
    """Training makes the next token likelier, not the token that was just read."""
    inputs, following = patient.tokens[:, :-1], patient.tokens[:, 1:]
    losses = {}
    for name, model in (("start", patient.start), ("now", patient.now)):
        logits = model(inputs).float().flatten(0, 1)
        losses[name] = [F.cross_entropy(logits, y.flatten()).item() for y in (inputs, following)]
    (own_then, next_then), (own, after) = losses["start"], losses["now"]
    if own > after or (own_then - own) - (next_then - after) < LEARNED:
        return None
    return Finding(
        name="targets",
        severity="error",
        evidence=f"training took the loss on the input token itself from {own_then:.3f} to {own:.3f} nats, and that on "
        f"the next token from {next_then:.3f} to {after:.3f}",
        causes=("targets that are not shifted by one", "targets shifted the other way", "labels shifted twice"),
    )


@torch.no_grad()
def tie(patient: Patient) -> Finding | None:
    """Head and embedding that start as one matrix stay one."""
    then, now = ({p.role.kind: p.tensor for p in model.params()} for model in (patient.start, patient.now))
    if "head" not in then or then["head"].shape != then["embedding"].shape:
        return None
    if not torch.equal(then["head"], then["embedding"]) or torch.equal(now["head"], now["embedding"]):
        return None
    apart = float((now["head"] - now["embedding"]).norm() / now["embedding"].norm())
    return Finding(
        name="tie",
        severity="error",
        evidence=f"head and embedding began equal and are two tensors, by now {apart:.2f} of their size apart",
        causes=("a tie that loading broke (new tensors in the place of one)", "a copy where a reference was meant"),
    )


@torch.no_grad()
def decay(patient: Patient) -> Finding | None:
    """Weight decay moves matrices and tables, and no gain, bias or scalar."""
    twin = copy.deepcopy(patient.start)
    optim = patient.config.optim
    before = {param.name: param.tensor.clone() for param in twin.params()}
    for optimizer in build_optimizers(optim, twin.params()):
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
    moved = [
        param for param in twin.params()
        if param.role.kind == "vector" and not torch.equal(before[param.name], param.tensor)
    ]  # fmt: skip
    if not moved:
        return None
    first = moved[0]
    share = float((first.tensor - before[first.name]).norm() / before[first.name].norm())
    return Finding(
        name="decay",
        severity="warning",
        evidence=f"with no gradient at all, a step at the peak rate takes {share:.1e} off {len(moved)} gains or biases "
        f"that are not zero, {first.name} the first{gains(patient)}",
        causes=(
            "one parameter group for everything",
            "a list of exceptions that does not match the names of the norms",
        ),
    )


def gains(patient: Patient) -> str:
    """How large what began at one is now."""
    try:
        now = {param.name: param.tensor for param in patient.now.params()}
    except NotExamined:
        return ""
    vectors = [p for p in patient.start.params() if p.role.kind == "vector"]
    ones = [now[p.name].mean().item() for p in vectors if bool((p.tensor == 1).all())]
    return f"; gains that began at 1 are {statistics.fmean(ones):.3f} on average now" if ones else ""


@torch.no_grad()
def residual_scaling(patient: Patient) -> Finding | None:
    """Matrices that write into the stream start smaller than the others, by 1/sqrt(2 L)."""
    if not patient.start.h[-1].final_norm:
        raise NotExamined("its blocks normalise the stream themselves")
    if "even" in SLOTS["init"][patient.config.model.init.name].can:
        raise NotExamined(f"{patient.config.model.init} starts all matrices alike on purpose")
    params = patient.start.params()
    written = [p for p in params if p.role.kind == "residual_out" and p.role.gain is None]
    others = [p for p in params if p.role.kind == "hidden" and p.role.layer is not None]
    if not written or not others:
        return None
    found, usual = spread(written) / spread(others), (2 * patient.config.model.n_layer) ** -0.5
    if found <= TOO_LARGE * usual:
        return None
    rms = {int(k.rpartition("/")[2]): v for k, v in first_row(patient).items() if k.startswith("diag/activation_rms/")}
    grown = f"; the stream grows from {rms[min(rms)]:.3f} to {rms[max(rms)]:.3f} rms through the blocks" if rms else ""
    return Finding(
        name="residual_scaling",
        severity="warning",
        evidence=f"matrices that write into the stream start {found:.2f} times as large as the others, and 1/sqrt(2 L) "
        f"is {usual:.2f}{grown}",
        causes=("the scaling of GPT-2's initialisation left out", "a rule on names that matches no matrix"),
    )


def spread(params: Sequence[Param]) -> float:
    """Root mean square over all entries."""
    squares = sum(float(param.tensor.double().square().sum()) for param in params)
    return math.sqrt(squares / sum(param.tensor.numel() for param in params))


def first_row(patient: Patient) -> dict[str, float]:
    """The journal's metrics before the first step."""
    return next((dict(row["metrics"]) for row in patient.rows if row["step"] == 0), {})
