"""Optimizers.

A component receives (params: Sequence[Param], lr: float) and returns a list of torch optimizers, because some recipes
update matrices by one rule and everything else by another. It distinguishes parameters by role, never by name.

Those that torch lacks come from the package pytorch-optimizer where its version is the published one (the extra
`optimizers`); the others are written here. w is a weight, g its gradient, m and v averages of g and g^2.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.errors import ConfigError
from gpt2lab.optim.averaging import AVERAGES
from gpt2lab.optim.groups import decay_groups
from gpt2lab.registry import Slot

optimizer = Slot("optim.optimizer", "how gradients become updates", default="adamw", base=list)

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
FUSED_DEVICES = ("cpu", "cuda", "mps")
IN_BLOCKS = ("hidden", "residual_out")
TABLES = ("embedding", "position", "head")


def library() -> Any:
    """The package pytorch-optimizer. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module("pytorch_optimizer")
    except ImportError:
        what = "this optimizer needs the package pytorch-optimizer"
        raise ConfigError(what, where="optim.optimizer", hint="pip install 'gpt2lab[optimizers]'") from None


@optimizer.register("adamw", source="arXiv:1711.05101", can=("rates",), examples=({"weight_decay": 0.0},))
def adamw(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Annotated[float, Field(gt=0)] = 1e-8,
    weight_decay: Annotated[float, Field(ge=0)] = 0.1,
) -> list[Optimizer]:
    """Adam with decoupled weight decay on matrices and embeddings, as in GPT-3 and most GPT-2 recipes since.

    w -= rate (m / (sqrt(v) + eps) + weight_decay w), with bias-corrected averages m of g and v of g^2.

    betas:        decay factors of the averages of g and g^2.
    eps:          prevents division by zero.
    weight_decay: the share by which a step at rate 1 would decay a weight.
    As in torch, the decay of one step is rate x weight_decay, so a schedule or a sweep of the rate changes both.
    """
    fused = all(param.tensor.device.type in FUSED_DEVICES for param in params)
    groups = decay_groups(params, weight_decay)
    return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)]


@optimizer.register("adamw_independent", source="arXiv:2309.14322, section 3.2.2", can=("rates",))
def adamw_independent(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 1e-4,
) -> list[Optimizer]:
    """AdamW whose decay follows the schedule but not the peak rate, so that a sweep of the rate changes one thing.

    w -= s (lr m / (sqrt(v) + eps) + weight_decay w)   with s the schedule's multiplier

    betas:        as in adamw.
    eps:          as in adamw.
    weight_decay: the share by which a step at the peak of the schedule decays a weight. It equals lr x weight_decay of
                  adamw.
    """
    return adamw(params, lr, betas=betas, eps=eps, weight_decay=weight_decay / lr)


class SharpnessAware(torch.optim.AdamW):
    """AdamW with gradients at the weights w + rho g / |g|, where |g| is the norm of the whole gradient."""

    takes_closure = True

    def __init__(self, groups: Iterable[dict[str, Any]], rho: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.rho = rho

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        """One update. closure: replaces the gradients by those at the present weights."""
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        with torch.no_grad():
            gradients = [weight.grad for weight in weights]
            before = [weight.clone() for weight in weights]
            norm = torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)
            torch._foreach_add_(weights, torch._foreach_mul(gradients, self.rho / norm))
        try:
            closure()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
        super().step()


@optimizer.register("sam", source="arXiv:2010.01412", can=("rates",))
def sam(
    params: Sequence[Param],
    lr: float,
    *,
    rho: Positive = 0.05,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
) -> list[Optimizer]:
    """Sharpness-aware minimisation: AdamW by the gradient at the worst weights nearby, so that minima are flat.

    w -= rate (m / (sqrt(v) + eps) + weight_decay w)   with m and v averages of g(w + rho g / |g|) and its square

    rho:          distance to those weights, in the 2-norm over all weights.
    betas:        as in adamw.
    eps:          as in adamw.
    weight_decay: as in adamw.
    A step has two forward and backward passes, so it takes twice as long. The paper uses it with SGD, and on several
    machines each with the worst weights of its own share of the batch.
    """
    return [SharpnessAware(decay_groups(params, weight_decay), rho, lr=lr, betas=betas, eps=eps)]


@optimizer.register("sgd", source="Sutskever et al. 2013; arXiv:1412.6980, section 6 compares it")
def sgd(
    params: Sequence[Param],
    lr: float,
    *,
    momentum: Decay = 0.9,
    nesterov: bool = True,
    weight_decay: NotNegative = 0.0,
) -> list[Optimizer]:
    """Gradient descent with momentum, torch's; useful rates are 10 to 1000 times those of Adam.

    b = momentum b + g + weight_decay w, then w -= rate b, or rate (g + weight_decay w + momentum b) with Nesterov

    momentum:     decay factor of the sum of gradients; 0 is plain gradient descent.
    nesterov:     look ahead by one more step of the momentum.
    weight_decay: of matrices and embeddings, part of the gradient as in torch (an L2 penalty), not decoupled.
    """
    groups = decay_groups(params, weight_decay)
    return [torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)]


@optimizer.register("adafactor", source="arXiv:1804.04235, as in torch.optim.Adafactor")
def adafactor(
    params: Sequence[Param],
    lr: float,
    *,
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8,
    clip: Annotated[float, Field(ge=1)] = 1.0,
    weight_decay: NotNegative = 0.1,
) -> list[Optimizer]:
    """Adam without momentum, whose second moment of a matrix is an outer product of row and column means.

    w -= a (u / max(1, rms(u) / clip)) + rate weight_decay w   with u = g / sqrt(v), a = min(rate, 1 / sqrt(t)) rms(w)

    beta2_decay:  c in the decay factor 1 - t^c of v at step t.
    clip:         largest root mean square of u.
    weight_decay: as in adamw.
    Steps are relative to the size of a weight (rms(w), at least 1e-3), so rates are larger than Adam's: about 1e-2.
    """
    groups = decay_groups(params, weight_decay)
    return [torch.optim.Adafactor(groups, lr=lr, beta2_decay=beta2_decay, d=clip)]


def agreeing(update: Tensor, gradient: Tensor) -> Tensor:
    """`update` without the numbers whose sign is not that of the gradient; the others are enlarged, so that the mean
    size of a step stays.  Source: arXiv:2411.16085, algorithm 1"""
    mask = update * gradient > 0
    return update * mask * (mask.numel() / (mask.sum() + 1))


class PerWeight(Optimizer, ABC):
    """An optimizer that updates one weight after the other. Subclasses define `update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; gradients are not changed."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, group, self.state[weight])

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        """Update a weight in place. state: of this weight, at first empty."""


class CautiousAdamW(PerWeight):
    """torch's AdamW, with `agreeing` on the update."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def update(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        first, second = group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        average, squares = state["exp_avg"], state["exp_avg_sq"]
        average.lerp_(gradient, 1 - first)
        squares.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (squares / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] / (1 - first ** state["step"])
        weight.addcdiv_(agreeing(average, gradient), root, value=-rate)


@optimizer.register("adamw_cautious", source="arXiv:2411.16085", can=("rates",))
def adamw_cautious(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
) -> list[Optimizer]:
    """AdamW that moves only those weights whose momentum and gradient have the same sign.

    w -= rate (k m / (sqrt(v) + eps) + weight_decay w)   with k = n / (a + 1) for the a of n numbers of a tensor that
    agree, else 0

    betas:        as in adamw.
    eps:          as in adamw.
    weight_decay: as in adamw; it is not masked.
    """
    return [CautiousAdamW(decay_groups(params, weight_decay), lr, betas, eps)]


class Lion(PerWeight):
    """w -= rate (sign(b1 m + (1 - b1) g) + weight_decay w), then m = b2 m + (1 - b2) g. torch has no Lion.

    Source: arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], cautious: bool) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "cautious": cautious, "weight_decay": 0.0})

    def update(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        first, second = group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
        average = state["exp_avg"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        update = average.lerp(gradient, 1 - first).sign_()
        weight.add_(agreeing(update, gradient) if group["cautious"] else update, alpha=-group["lr"])
        average.lerp_(gradient, 1 - second)


@optimizer.register("lion", source="arXiv:2302.06675", examples=({"weight_decay": 0.0},))
def lion(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.95, 0.98),
    weight_decay: Annotated[float, Field(ge=0)] = 1.0,
    cautious: bool = False,
) -> list[Optimizer]:
    """The sign of an average of gradients: every weight changes by the full rate, so rates are smaller than Adam's.

    betas:        factors of the old average in the update and in the new average (the paper's values for language).
    weight_decay: as in adamw; the smaller rate needs a proportionally larger value for the same decay.
    cautious:     leave out what the sign of the gradient contradicts (arXiv:2411.16085).
    """
    return [Lion(decay_groups(params, weight_decay), lr, betas, cautious)]


NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of five equal steps.  Source: kellerjordan.github.io/posts/muon"""
POLAR_EXPRESS = (
    (8.2373, -23.1577, 16.6806), (4.0824, -2.8930, 0.5253), (3.9263, -2.8547, 0.5318), (3.2982, -2.4245, 0.4863),
    (2.2970, -1.6366, 0.4003),
)  # fmt: skip
"""Coefficients of five steps, each of least error for what the one before leaves.  Source: arXiv:2505.16932"""


def orthogonal(x: Tensor, coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ) -> Tensor:
    """The nearest orthogonal matrix, roughly: most singular values between 0.7 and 1.2.  (..., A, B) -> (..., A, B)

    Polynomial steps in bfloat16, by default those of torch.optim.Muon, which takes one matrix at a time.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.bfloat16().reshape(-1, *x.shape[-2:])
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


class Muon(PerWeight):
    """torch.optim.Muon with `match_rms_adamw`, for stacks of matrices too.

    heights: of a group, the rows of each matrix stacked in its tensors; tensors (E, A, B) are E matrices.
    rows_beta: decay factor of the averages of squares of every row (NorMuon), None without them.
    warmup_steps: of the momentum, from 0.85.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, nesterov: bool, *, polar: bool = False,
        rows_beta: float | None = None, warmup_steps: int = 0, cautious_decay: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})
        self.coefficients = POLAR_EXPRESS if polar else NEWTON_SCHULZ
        self.rows_beta, self.warmup_steps, self.cautious_decay = rows_beta, warmup_steps, cautious_decay

    def update(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        momentum = group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            if self.rows_beta is not None:
                state["row_squares"] = weight.new_zeros(*weight.shape[:-1], 1)
            if self.warmup_steps:
                state["step"] = 0
        if self.warmup_steps:
            momentum = 0.85 + (momentum - 0.85) * min(1.0, state["step"] / self.warmup_steps)
            state["step"] += 1
        average = state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        heights = group["heights"] or weight.shape[-2]
        parts = [orthogonal(matrix, self.coefficients) for matrix in update.split(heights, -2)]
        if self.rows_beta is not None:
            parts = list(self.normalised(torch.cat(parts, -2), state["row_squares"]).split(heights, -2))
        if not self.cautious_decay:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        for part, matrix in zip(weight.split(heights, -2), parts, strict=True):
            size = 0.2 * math.sqrt(max(part.shape[-2:]))
            if self.rows_beta is not None:  # the rms of the rows is not that of an orthogonal matrix any more
                size = 0.2 * math.sqrt(math.prod(part.shape[-2:]))
                matrix = matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10)
            if self.cautious_decay:
                part.sub_(part * (part * matrix > 0), alpha=group["lr"] * group["weight_decay"])
            part.add_(matrix, alpha=-group["lr"] * size)

    def normalised(self, update: Tensor, squares: Tensor) -> Tensor:
        """Every row over the root of its average of squares.  (..., A, B), (..., A, 1) -> (..., A, B)"""
        assert self.rows_beta is not None
        squares.lerp_(update.float().square().mean(-1, keepdim=True), 1 - self.rows_beta)
        return update.float() / (squares.sqrt() + 1e-10)


@optimizer.register(
    "muon",
    source="arXiv:2502.16982; kellerjordan.github.io/posts/muon; rows 2510.05491; polar 2505.16932; decay 2510.12402",
    examples=({"momentum_warmup_steps": 3},),
)
def muon(
    params: Sequence[Param],
    lr: float,
    *,
    momentum: Decay = 0.95,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    weight_decay: NotNegative = 0.1,
    split_rows: bool = True,
    nesterov: bool = True,
    normed_rows: bool = False,
    polar_express: bool = False,
    momentum_warmup_steps: Annotated[int, Field(ge=0)] = 0,
    cautious_decay: bool = False,
) -> list[Optimizer]:
    """Orthogonalised momentum for the matrices in blocks, with updates of Adam's size; adamw for everything else.

    w -= rate (0.2 sqrt(max(A, B)) orthogonal(m) + weight_decay w)   for a matrix w (A, B)

    momentum:     decay factor of the average of gradients.
    betas:        those of adamw, for embeddings, head, gains and biases.
    weight_decay: of matrices and embeddings, as in adamw.
    split_rows:   orthogonalise stacked matrices, such as query, key and value in c_attn, each by itself.
    nesterov:     orthogonalise momentum m + (1 - momentum) g instead of m.
    normed_rows:  divide every row of the orthogonal matrix by the root of its average of squares, then scale the matrix
                  to an rms of 0.2 (NorMuon). The average has the decay factor betas[1].
    polar_express: five different steps towards the orthogonal matrix in the place of five equal ones.
    momentum_warmup_steps: steps over which momentum grows from 0.85, as in modded-nanogpt (300 there).
    cautious_decay: decay only those weights that the update moves towards zero as well.
    The matrices of experts (E, A, B) are always orthogonalised each by itself. Updates are scaled to the rms of Adam's,
    so that the same rate suits both (section 2.2).
    """
    in_blocks = [p for p in params if p.role.kind in IN_BLOCKS and p.tensor.ndim >= 2]
    chosen = {id(param.tensor) for param in in_blocks}
    others = [p for p in params if id(p.tensor) not in chosen]

    def heights(param: Param) -> tuple[int, ...]:
        rows = tuple(height for _, height in param.role.rows)
        return rows if split_rows and sum(rows) == param.tensor.shape[-2] else ()

    groups = [
        group | {"heights": list(shared)}
        for shared, alike in groupby(sorted(in_blocks, key=heights), key=heights)
        for group in decay_groups(list(alike), weight_decay)
    ]
    made: list[Optimizer] = []
    if groups:
        made = [
            Muon(
                groups, lr, momentum, nesterov, polar=polar_express, rows_beta=betas[1] if normed_rows else None,
                warmup_steps=momentum_warmup_steps, cautious_decay=cautious_decay,
            )
        ]  # fmt: skip
    return [*made, *(adamw(others, lr, betas=betas, weight_decay=weight_decay) if others else [])]


@optimizer.register("soap", source="arXiv:2409.11321, by pytorch-optimizer")
def soap(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.95, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
    every_steps: Annotated[int, Field(ge=1)] = 10,
    max_size: Annotated[int, Field(ge=1)] = 10_000,
) -> list[Optimizer]:
    """Adam in the eigenbasis of Shampoo's averages L of g g' and R of g' g, which are updated every step.

    w -= rate (Q_L (m' / (sqrt(v') + eps)) Q_R' + weight_decay w)   with m' and v' averages in that basis

    betas:        decay factors of the average of g, and of those of squares, L and R.
    eps:          prevents division by zero.
    weight_decay: as in adamw.
    every_steps:  steps between updates of the basis, by one power iteration and a QR decomposition.
    max_size:     a side with more rows keeps its basis, and so do the tokens of an embedding or head.
    The first step only initialises the averages and moves no weight. Memory for a matrix (A, B): 2 A B + 2 A^2 + 2 B^2.
    """
    tables = [p for p in params if p.role.kind in TABLES]
    channels = min((p.tensor.shape[-1] for p in tables), default=max_size)
    parts = ((tables, min(max_size, channels)), ([p for p in params if p.role.kind not in TABLES], max_size))
    groups = [
        group | {"max_precondition_dim": size}
        for part, size in parts if part
        for group in decay_groups(part, weight_decay)
    ]  # fmt: skip
    return [library().SOAP(groups, lr=lr, betas=betas, eps=eps, precondition_frequency=every_steps)]


@optimizer.register("adopt", source="arXiv:2411.02853, algorithm 2, by pytorch-optimizer", can=("rates",))
def adopt(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.9, 0.9999),
    eps: Positive = 1e-6,
    weight_decay: NotNegative = 0.1,
    cautious: bool = False,
) -> list[Optimizer]:
    """Adam that divides by the average of squares from before this gradient, and averages the quotient.

    m = b1 m + (1 - b1) clip(g / max(sqrt(v), eps), t^(1/4)), then w -= rate (m + weight_decay w), then v as in Adam

    betas:        b1, and the decay factor of v.
    eps:          the smallest divisor.
    weight_decay: as in adamw.
    cautious:     leave out what the sign of the gradient contradicts (arXiv:2411.16085).
    The first step sets v = g^2 and moves weights only by their decay.
    """
    groups = decay_groups(params, weight_decay)
    made: Optimizer = library().ADOPT(
        groups, lr=lr, betas=betas, eps=eps, weight_decouple=True, cautious=cautious,
        clip_lambda=lambda count: (count - 1) ** 0.25,  # the package counts the first step, the paper does not
    )  # fmt: skip
    return [made]


@optimizer.register(
    "ademamix", source="arXiv:2409.03137, by pytorch-optimizer", can=("rates",), examples=({"horizon_steps": None},)
)
def ademamix(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999),
    eps: Positive = 1e-8,
    alpha: NotNegative = 5.0,
    horizon_steps: Annotated[int, Field(ge=1)] | None = 1_000,
    weight_decay: NotNegative = 0.1,
    cautious: bool = False,
) -> list[Optimizer]:
    """Adam with a second, very slow average of gradients, whose weight and slowness grow.

    w -= rate ((m + alpha_t s) / (sqrt(v) + eps) + weight_decay w)   with s the slow average, without bias correction

    betas:         decay factors of m, v and s.
    eps:           prevents division by zero.
    alpha:         weight of s.
    horizon_steps: steps over which alpha grows from 0, and the decay factor of s from that of m; the paper takes the
                   length of the training. Null: both are constant.
    weight_decay:  as in adamw.
    cautious:      leave out of m what the sign of the gradient contradicts (arXiv:2411.16085).
    """
    groups = decay_groups(params, weight_decay)
    made: Optimizer = library().AdEMAMix(
        groups, lr=lr, betas=betas, eps=eps, alpha=alpha, t_alpha_beta3=horizon_steps, weight_decouple=True,
        cautious=cautious,
    )  # fmt: skip
    return [made]


@optimizer.register("schedule_free", source="arXiv:2405.15682, by pytorch-optimizer", can=("rates", AVERAGES))
def schedule_free(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], Decay] = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
) -> list[Optimizer]:
    """AdamW with an average of its iterates in the place of a falling rate; the average is what is evaluated.

    y = (1 - b1) z + b1 x; z -= rate (g(y) / (sqrt(v) + eps) + weight_decay y); x = (1 - c) x + c z

    betas:        b1, how far the point y of gradients is towards the average x; and the decay factor of v.
    eps:          prevents division by zero.
    weight_decay: as in adamw, of y.
    c is rate_max^2 over its sum so far, so that the warm-up counts little. Use it with `schedule: constant`; the model
    in training holds y, and the one that is evaluated, saved and exported holds x.
    """
    made: Optimizer = library().ScheduleFreeAdamW(decay_groups(params, weight_decay), lr=lr, betas=betas, eps=eps)
    for counter in ("weight_sum", "lr_max"):
        del made.defaults[counter]  # which says that they are no settings
    return [made]


@optimizer.register("library", source="torch.optim; pytorch-optimizer (github.com/kozistr/pytorch_optimizer)")
def by_library(
    params: Sequence[Param],
    lr: float,
    *,
    optimizer: str = "NAdam",
    weight_decay: NotNegative = 0.1,
    settings: Mapping[str, Any] = {},
) -> list[Optimizer]:
    """Any optimizer of torch.optim or of the package pytorch-optimizer, by the name of its class.

    optimizer:    the class, such as NAdam, RAdam, Adamax, RMSprop; of the package Lamb, Adan, AdaBelief, Shampoo,
                  Prodigy, MARS, CAME and a hundred others.
    weight_decay: of matrices and embeddings, in the sense of that class; decoupled where it can be.
    settings:     further arguments of the class, such as {betas: [0.98, 0.92, 0.99]}, as numbers or lists.
    Nothing here checks that the class computes what its paper says: compare it with the paper before you conclude.
    """
    kinds = (vars(torch.optim), vars(library()) if optimizer not in vars(torch.optim) else {})
    kind: Any = next((names[optimizer] for names in kinds if optimizer in names), None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        what = f"neither torch.optim nor pytorch-optimizer has an optimizer {optimizer}"
        raise ConfigError(what, where="optim.optimizer", hint="the name of the class, such as NAdam or Lamb")
    make: Callable[..., Optimizer] = kind
    accepted = inspect.signature(make).parameters
    given = {name: number(value) for name, value in settings.items()}
    decoupled = {name: True for name in ("decoupled_weight_decay", "weight_decouple") if name in accepted}
    try:
        return [make(decay_groups(params, weight_decay), lr=lr, **{**decoupled, **given})]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{optimizer}: {error}", where="optim.optimizer.settings") from None


def number(value: Any) -> Any:
    """A setting as YAML writes it, as a number, boolean or tuple of numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(map(number, value))
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        try:
            return float(value)  # 1e-3 is a number, and .5
        except ValueError:
            return value
