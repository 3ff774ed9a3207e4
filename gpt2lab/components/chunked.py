"""Head and loss together, a chunk of rows at a time, so that the scores of all rows never exist at once.

For a large vocabulary these scores are by far the largest tensor of a training step, and the loss is a sum over rows.
So each chunk's gradients are computed along with its loss, and only they are kept: nothing is computed twice, and
results equal those of the direct way but for the order of sums.

Inside, sums are kept rather than means. The gradient of a sum with respect to scores is of size 1, which half precision
can hold; dividing by the number of rows (and multiplying by a gradient scaler's factor) comes after, in float32. The
gradients of parameters are added up in float32 too.

Shapes: n rows, m of them in a chunk, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2lab.components.base import short_cut

SCORES_AT_ONCE = {"cpu": 1 << 25, "meta": 1 << 62}
"""Scores (rows times vocabulary) computed at once, by type of device. On CPU 2^25, or 128 MiB in float32: with fewer
the products of matrices are small and slow, with more the memory is. Without data (`meta`, where costs are counted)
there is nothing to gain."""
GPU_SCORES_AT_ONCE = 1 << 28
"""1 GiB in float32, a few thousand rows of GPT-2's vocabulary: enough to keep a GPU busy, and small in its memory."""
EVEN = 64
"""On CUDA, rows of scores are made to end at a multiple of so many: a product that makes 50,257 scores to a row takes
eight times as long there as one that makes 50,304."""

Gradients = Sequence[Tensor | None]
Sums = tuple[Tensor, Tensor, Gradients]
"""Objective, cross entropy, and the objective's gradients."""


def loss_sums(
    rows: Tensor, wanted: Tensor, head: nn.Module, embedding: nn.Module, terms: Sequence[Any], vocab_size: int,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The objective and plain cross entropy, each summed over the rows whose target counts (is not -100).

    rows (n, C), wanted (n,) int64 -> (), (). The objective is the sum of `terms`; without any it is the cross entropy.
    It alone can be differentiated, and once: with respect to rows and the parameters of head, embedding and terms, from
    which alone the head must make its scores. fused: what is done to scores may be compiled (by torch.compile).
    """
    size = rows_at_once(len(rows), vocab_size, rows.device.type)
    if size < len(rows) or (rows.device.type == "cuda" and vocab_size % EVEN):
        return in_chunks(rows, wanted, head, embedding, terms, size, fused)
    objective, nll = sums(head(rows, embedding), wanted, terms)
    return objective, nll.detach()


def rows_at_once(n: int, vocab_size: int, device_type: str) -> int:
    """How many of n rows a chunk has: as few as make the chunks equally large, within what a device has at once."""
    most = max(1, SCORES_AT_ONCE.get(device_type, GPU_SCORES_AT_ONCE) // vocab_size)
    return math.ceil(n / math.ceil(n / most))


def sums(scores: Tensor, wanted: Tensor, terms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """As `loss_sums`, from scores (m, V), in float32 also where autocast computed the scores in half precision."""
    scores = scores.float()
    nll = F.cross_entropy(scores, wanted, reduction="none")
    if not terms:
        return nll.sum(), nll.sum()
    counted = wanted != -100
    values = [(term.rows(scores, wanted, nll) * counted).sum() for term in terms]
    return torch.stack(values).sum(), nll.sum()


# not compiled: it has its own gradients. torch.compiler.disable would say the same, but imports the whole compiler
@torch._disable_dynamo  # type: ignore[attr-defined]
def in_chunks(
    rows: Tensor, wanted: Tensor, head: nn.Module, embedding: nn.Module, terms: Sequence[Any], size: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """`loss_sums`, `size` rows at a time."""
    trained = trained_parameters(head, embedding, *terms)
    matrix_of = short_cut(head, "matrix")
    matrix = matrix_of(embedding) if matrix_of else None
    if not (torch.is_grad_enabled() and (rows.requires_grad or trained)):
        score = scorer(rows.device, head, embedding, matrix)
        parts = [sums(score(x), y, terms) for x, y in chunks(size, rows, wanted)]
        return sum_up(objective for objective, _ in parts), sum_up(nll for _, nll in parts)
    if matrix is not None and all(short_cut(term, "of") for term in terms):
        return known(lambda: of_matrix(rows, matrix, wanted, terms, size, fused), rows, matrix)
    return known(lambda: of_any(rows, trained, wanted, head, embedding, terms, size), rows, *trained)


def known(work: Callable[[], Sums], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of what `work` returns; its gradients are those with respect to `inputs`."""
    return Known.apply(work, *inputs)  # type: ignore[no-untyped-call, no-any-return]


class Known(torch.autograd.Function):
    """See `known`. Going backward only scales the gradients, in place, hence once."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[], Sums], *inputs: Tensor) -> tuple[Tensor, ...]:
        objective, nll, gradients = work()
        ctx.save_for_backward(*gradients)
        ctx.types = [x.dtype for x in inputs]
        ctx.mark_non_differentiable(nll)
        return objective, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        known = zip(ctx.saved_tensors, ctx.types, strict=True)
        return None, *(None if gradient is None else gradient.mul_(scale).to(dtype) for gradient, dtype in known)


def of_any(
    rows: Tensor, trained: Sequence[Tensor], wanted: Tensor, head: nn.Module, embedding: nn.Module,
    terms: Sequence[Any], size: int,
) -> Sums:  # fmt: skip
    """Sums and gradients for any head, embedding and terms, by torch's own differentiation of each chunk."""
    to_rows = torch.empty_like(rows, dtype=torch.float32)
    to_trained: list[Tensor | None] = [None] * len(trained)
    found = []
    for x, y, to_x in chunks(size, rows.detach(), wanted, to_rows):
        with torch.enable_grad():
            x.requires_grad_()
            objective, nll = sums(head(x, embedding), y, terms)
        with torch.autocast(rows.device.type, enabled=False):
            to_part, *others = torch.autograd.grad(objective, [x, *trained], allow_unused=True)
        to_x.copy_(to_part)
        for i, gradient in enumerate(others):
            if gradient is not None:
                so_far = to_trained[i]
                to_trained[i] = gradient.float() if so_far is None else so_far.add_(gradient)
        found.append((objective.detach(), nll.detach()))
    return sum_up(objective for objective, _ in found), sum_up(nll for _, nll in found), [to_rows, *to_trained]


def of_matrix(
    rows: Tensor, matrix: Tensor, wanted: Tensor, terms: Sequence[Any], size: int, fused: bool = False
) -> Sums:
    """The same for scores = rows times matrix^T, matrix (V, C), and terms in closed form: each chunk in place, in
    buffers that all chunks share. It takes about three quarters of `of_any`'s time.

    With p the softmax of a row, the gradient of a f(nll, lse) with respect to its scores is (f_nll + f_lse) p, less
    f_nll at the target.
    """
    width, table = len(matrix), table_of(matrix)
    work = (Fused if fused and rows.device.type == "cuda" else Stepwise)(size, table)
    to_rows = torch.empty_like(rows, dtype=torch.float32)
    to_matrix: Tensor | None = None
    found = []
    with torch.autocast(rows.device.type, enabled=False):
        for x, y, to_x in chunks(size, rows.detach().to(table.dtype), wanted, to_rows):
            counted = y != -100
            target = y.where(counted, 0)[:, None]
            scores = torch.mm(x, table.T, out=work.scores[: len(x)])
            scores[:, width:] = float("-inf")
            nll, lse = work.read(scores, target)
            value, by_nll, by_lse = slopes(nll * counted, lse, counted, terms)
            found.append((value, (nll * counted).sum()))
            p = work.turn(scores, target, by_nll, by_lse)
            if to_matrix is None:
                to_matrix = (p.T @ x).float()
            elif table.dtype != torch.float32:
                to_matrix.add_(p.T @ x)
            else:
                to_matrix.addmm_(p.T, x)
            to_x.copy_(p @ table)
    gradients = [to_rows, None if to_matrix is None else to_matrix[:width]]
    return sum_up(value for value, _ in found), sum_up(nll for _, nll in found), gradients


def table_of(matrix: Tensor) -> Tensor:
    """The matrix (V, C) as its products want it: in autocast's precision, on CUDA with rows of zeros up to an even
    number.  -> (V or more, C)"""
    kind = matrix.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    table, missing = matrix.detach().to(dtype), -len(matrix) % EVEN if kind == "cuda" else 0
    return F.pad(table, (0, 0, 0, missing)) if missing else table


def scorer(
    device: torch.device, head: nn.Module, embedding: nn.Module, matrix: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The head as a function of rows alone, (m, C) -> (m, V); on CUDA through a table of even length."""
    if matrix is None or device.type != "cuda":
        return lambda rows: head(rows, embedding)
    table, width = table_of(matrix), len(matrix)
    return lambda rows: F.linear(rows.to(table.dtype), table)[:, :width]


class Stepwise:
    """What is done to the scores of a chunk, one operation after the other, in buffers that all chunks share.

    scores: room for `size` rows, as the product of matrices makes them.
    """

    def __init__(self, size: int, table: Tensor) -> None:
        self.exact = torch.empty(size, len(table), device=table.device)
        # torch's CPU kernel reads a number of a row last when it writes it, so it may do so in place
        self.odds = self.exact if table.device.type == "cpu" else torch.empty_like(self.exact)
        exact = table.dtype == torch.float32
        self.scores = self.exact if exact else torch.empty_like(self.exact, dtype=table.dtype)

    def read(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and log-sum-exp of every row.  (m, V), (m, 1) -> (m,), (m,)"""
        logits, p = self.exact[: len(scores)], self.odds[: len(scores)]
        if scores.dtype != torch.float32:
            logits.copy_(scores)
        at_target, highest = logits.gather(1, target)[:, 0], logits.amax(-1)
        torch.softmax(logits, -1, out=p)
        spread = -p.amax(-1).log()  # log sum exp(logits - highest)
        return highest - at_target + spread, highest + spread

    def turn(self, scores: Tensor, target: Tensor, by_nll: Tensor, by_lse: Tensor) -> Tensor:
        """The gradient with respect to the scores that were read last, in their precision.  -> (m, V)"""
        p, factor = self.odds[: len(scores)], by_nll + by_lse
        if p.device.type != "cpu" or not bool((factor == 1).all()):  # it nearly always is; a GPU would have to wait
            p.mul_(factor[:, None])
        p.scatter_add_(1, target, -by_nll[:, None])
        return p if scores.dtype == torch.float32 else scores.copy_(p)


class Fused:
    """The same in two kernels that torch.compile makes: one reads the scores, one turns them, in place. Nothing as wide
    as the vocabulary is ever held in float32."""

    def __init__(self, size: int, table: Tensor) -> None:
        self.scores = torch.empty(size, len(table), dtype=table.dtype, device=table.device)
        self.lse = self.at_target = self.scores[:0, 0].float()

    def read(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See Stepwise."""
        self.at_target, self.lse = scores.gather(1, target)[:, 0].float(), one_kernel(log_sum_exp)(scores)
        return self.lse - self.at_target, self.lse.clone()

    def turn(self, scores: Tensor, target: Tensor, by_nll: Tensor, by_lse: Tensor) -> Tensor:
        """See Stepwise."""
        factor = by_nll + by_lse
        one_kernel(weigh_odds)(scores, self.lse, factor)
        at_target = (self.at_target - self.lse).exp() * factor - by_nll
        return scores.scatter_(1, target, at_target[:, None].to(scores.dtype))


def log_sum_exp(scores: Tensor) -> Tensor:
    """(m, V) of any precision -> (m,) float32"""
    return scores.float().logsumexp(-1)


def weigh_odds(scores: Tensor, lse: Tensor, factor: Tensor) -> None:
    """Put factor times the softmax of a row in the place of its scores.  (m, V), (m,), (m,)"""
    scores.copy_((scores.float() - lse[:, None]).exp() * factor[:, None])


@cache
def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, for each shape on its own."""
    return torch.compile(function, dynamic=False)


def slopes(nll: Tensor, lse: Tensor, counted: Tensor, terms: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `terms` over rows that count, and its derivatives.  (m,), (m,), (m,) -> (), (m,), (m,)"""
    with torch.enable_grad():
        nll, lse = nll.requires_grad_(), lse.requires_grad_()
        values = [(term.of(nll, lse) * counted).sum() for term in terms] or [(nll * counted).sum()]
        value = torch.stack(values).sum()
        by_nll, by_lse = torch.autograd.grad(value, [nll, lse], materialize_grads=True)
    return value.detach(), by_nll, by_lse


def trained_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Every parameter of `modules` that is trained, once, in order."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `size` rows of all tensors, as views."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def sum_up(values: Iterator[Tensor]) -> Tensor:
    """-> ()"""
    return torch.stack(list(values)).sum()
