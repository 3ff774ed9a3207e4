"""Head and loss together, for a chunk of rows at a time, so that the logits of all rows never exist at once.

With a large vocabulary, logits are by far the largest tensor of a training step, and the loss is a sum over rows. So
the gradients of a chunk are computed together with its loss, and only they are kept. Nothing is computed twice, and
results differ from the direct computation only by the order of sums.

All losses here are sums, not means. The gradient of a sum with respect to logits is of order 1, which half precision
can represent; the division by the number of rows (and the factor of a gradient scaler) comes later, in float32.
Gradients of parameters are accumulated in float32, too.

Shapes: n rows, m of them in a chunk, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2lab.components.base import own_method

LOGITS_AT_ONCE = {"cpu": 1 << 25, "meta": 1 << 62}
"""Logits (rows times vocabulary) computed at once, by type of device. On CPU 2^25, or 128 MiB in float32: fewer make
matrix products slow, more make memory slow. Without data (`meta`, where costs are counted) chunks have no use."""
GPU_LOGITS_AT_ONCE = 1 << 28
"""1 GiB in float32, a few thousand rows of GPT-2's vocabulary: enough work for a GPU, and little of its memory."""
ALIGNMENT = 64
"""On CUDA, rows of logits are padded to a multiple of this: a product with 50,257 columns takes eight times as long as
one with 50,304."""

Gradients = Sequence[Tensor | None]
Sums = tuple[Tensor, Tensor, Gradients]
"""Objective, cross entropy, and the objective's gradients."""


def loss_sums(
    rows: Tensor, targets: Tensor, head: nn.Module, embedding: nn.Module, terms: Sequence[Any], vocab_size: int,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The objective and plain cross entropy, each summed over the rows whose target is not -100.

    rows (n, C), targets (n,) int64 -> (), (). The objective is the sum of `terms`, or the cross entropy without terms.
    Only the objective can be differentiated, once, with respect to rows and the parameters of head, embedding and
    terms; the head may use nothing else. fused: whether operations on logits may be compiled (by torch.compile).
    """
    size = rows_at_once(len(rows), vocab_size, rows.device.type)
    if size < len(rows) or (rows.device.type == "cuda" and vocab_size % ALIGNMENT):
        return in_chunks(rows, targets, head, embedding, terms, size, fused)
    objective, nll = sums(head(rows, embedding), targets, terms)
    return objective, nll.detach()


def rows_at_once(n: int, vocab_size: int, device_type: str) -> int:
    """Rows of a chunk: n divided into the fewest chunks of equal size that a device can take."""
    most = max(1, LOGITS_AT_ONCE.get(device_type, GPU_LOGITS_AT_ONCE) // vocab_size)
    return math.ceil(n / math.ceil(n / most))


def sums(logits: Tensor, targets: Tensor, terms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """As `loss_sums`, from logits (m, V); in float32 even if autocast computed them in half precision."""
    logits = logits.float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    if not terms:
        return nll.sum(), nll.sum()
    counted = targets != -100
    values = [(term.rows(logits, targets, nll) * counted).sum() for term in terms]
    return torch.stack(values).sum(), nll.sum()


# Not compiled: it computes its own gradients. torch.compiler.disable does the same, but imports the whole compiler.
@torch._disable_dynamo  # type: ignore[attr-defined]
def in_chunks(
    rows: Tensor, targets: Tensor, head: nn.Module, embedding: nn.Module, terms: Sequence[Any], size: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """`loss_sums`, `size` rows at a time."""
    trained = trained_parameters(head, embedding, *terms)
    matrix_of = own_method(head, "matrix")
    matrix = matrix_of(embedding) if matrix_of else None
    if not (torch.is_grad_enabled() and (rows.requires_grad or trained)):
        logits_of = logits_function(rows.device, head, embedding, matrix)
        parts = [sums(logits_of(x), y, terms) for x, y in chunks(size, rows, targets)]
        return total_of(objective for objective, _ in parts), total_of(nll for _, nll in parts)
    if matrix is not None and all(own_method(term, "from_nll") for term in terms):
        return with_gradients(lambda: matrix_sums(rows, matrix, targets, terms, size, fused), rows, matrix)
    return with_gradients(lambda: autograd_sums(rows, trained, targets, head, embedding, terms, size), rows, *trained)


def with_gradients(work: Callable[[], Sums], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums that `work` returns, with its gradients as their gradients with respect to `inputs`."""
    return PrecomputedGradients.apply(work, *inputs)  # type: ignore[no-untyped-call, no-any-return]


class PrecomputedGradients(torch.autograd.Function):
    """See `with_gradients`. The backward pass only scales the gradients, in place, so it can run once."""

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
        gradients = zip(ctx.saved_tensors, ctx.types, strict=True)
        return None, *(None if gradient is None else gradient.mul_(scale).to(dtype) for gradient, dtype in gradients)


def autograd_sums(
    rows: Tensor, trained: Sequence[Tensor], targets: Tensor, head: nn.Module, embedding: nn.Module,
    terms: Sequence[Any], size: int,
) -> Sums:  # fmt: skip
    """Sums and gradients for any head, embedding and terms, by autograd on each chunk."""
    d_rows = torch.empty_like(rows, dtype=torch.float32)
    d_trained: list[Tensor | None] = [None] * len(trained)
    chunk_sums = []
    for x, y, d_x in chunks(size, rows.detach(), targets, d_rows):
        with torch.enable_grad():
            x.requires_grad_()
            objective, nll = sums(head(x, embedding), y, terms)
        with torch.autocast(rows.device.type, enabled=False):
            d_part, *others = torch.autograd.grad(objective, [x, *trained], allow_unused=True)
        d_x.copy_(d_part)
        for i, gradient in enumerate(others):
            if gradient is not None:
                total = d_trained[i]
                d_trained[i] = gradient.float() if total is None else total.add_(gradient)
        chunk_sums.append((objective.detach(), nll.detach()))
    return (
        total_of(objective for objective, _ in chunk_sums),
        total_of(nll for _, nll in chunk_sums),
        [d_rows, *d_trained],
    )


def matrix_sums(
    rows: Tensor, matrix: Tensor, targets: Tensor, terms: Sequence[Any], size: int, fused: bool = False
) -> Sums:
    """The same for logits = rows times matrix^T, matrix (V, C), and terms of the form f(nll, lse), in place and in
    buffers that all chunks share. It takes about three quarters of the time of `autograd_sums`.

    With p the softmax of a row, the gradient of f(nll, lse) with respect to its logits is (f_nll + f_lse) p, minus
    f_nll at the target.
    """
    width, table = len(matrix), product_matrix(matrix)
    work = (Fused if fused and rows.device.type == "cuda" else Eager)(size, table)
    d_rows = torch.empty_like(rows, dtype=torch.float32)
    d_matrix: Tensor | None = None
    chunk_sums = []
    with torch.autocast(rows.device.type, enabled=False):
        for x, y, d_x in chunks(size, rows.detach().to(table.dtype), targets, d_rows):
            counted = y != -100
            target = y.where(counted, 0)[:, None]
            logits = torch.mm(x, table.T, out=work.logits[: len(x)])
            logits[:, width:] = float("-inf")
            nll, lse = work.loss(logits, target)
            value, d_nll, d_lse = term_gradients(nll * counted, lse, counted, terms)
            chunk_sums.append((value, (nll * counted).sum()))
            p = work.gradient(logits, target, d_nll, d_lse)
            if d_matrix is None:
                d_matrix = (p.T @ x).float()
            elif table.dtype != torch.float32:
                d_matrix.add_(p.T @ x)
            else:
                d_matrix.addmm_(p.T, x)
            d_x.copy_(p @ table)
    gradients = [d_rows, None if d_matrix is None else d_matrix[:width]]
    return total_of(value for value, _ in chunk_sums), total_of(nll for _, nll in chunk_sums), gradients


def product_matrix(matrix: Tensor) -> Tensor:
    """The matrix (V, C) in autocast's precision, on CUDA with rows of zeros up to a multiple of ALIGNMENT.  -> (V or
    more, C)"""
    kind = matrix.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    table, missing = matrix.detach().to(dtype), -len(matrix) % ALIGNMENT if kind == "cuda" else 0
    return F.pad(table, (0, 0, 0, missing)) if missing else table


def logits_function(
    device: torch.device, head: nn.Module, embedding: nn.Module, matrix: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The head as a function of rows, (m, C) -> (m, V); on CUDA with an aligned matrix."""
    if matrix is None or device.type != "cuda":
        return lambda rows: head(rows, embedding)
    table, width = product_matrix(matrix), len(matrix)
    return lambda rows: F.linear(rows.to(table.dtype), table)[:, :width]


class Eager:
    """Loss and gradient of the logits of a chunk, by single operations, in buffers that all chunks share.

    logits: space for `size` rows of logits, in the precision of the matrix product.
    """

    def __init__(self, size: int, table: Tensor) -> None:
        self.exact = torch.empty(size, len(table), device=table.device)
        # torch's CPU kernel does not read an element again after writing it, so it can work in place
        self.probabilities = self.exact if table.device.type == "cpu" else torch.empty_like(self.exact)
        exact = table.dtype == torch.float32
        self.logits = self.exact if exact else torch.empty_like(self.exact, dtype=table.dtype)

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and log-sum-exp of every row.  (m, V), (m, 1) -> (m,), (m,)"""
        exact, p = self.exact[: len(logits)], self.probabilities[: len(logits)]
        if logits.dtype != torch.float32:
            exact.copy_(logits)
        at_target, highest = exact.gather(1, target)[:, 0], exact.amax(-1)
        torch.softmax(exact, -1, out=p)
        spread = -p.amax(-1).log()  # log sum exp(logits - highest)
        return highest - at_target + spread, highest + spread

    def gradient(self, logits: Tensor, target: Tensor, d_nll: Tensor, d_lse: Tensor) -> Tensor:
        """The gradient with respect to the logits last passed to `loss`, in their precision.  -> (m, V)"""
        p, factor = self.probabilities[: len(logits)], d_nll + d_lse
        if p.device.type != "cpu" or not bool((factor == 1).all()):  # nearly always true; on a GPU the test would wait
            p.mul_(factor[:, None])
        p.scatter_add_(1, target, -d_nll[:, None])
        return p if logits.dtype == torch.float32 else logits.copy_(p)


class Fused:
    """The same with two kernels made by torch.compile, one for the loss and one for the gradient, in place. No float32
    tensor is as wide as the vocabulary."""

    def __init__(self, size: int, table: Tensor) -> None:
        self.logits = torch.empty(size, len(table), dtype=table.dtype, device=table.device)
        self.lse = self.at_target = self.logits[:0, 0].float()

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See Eager."""
        self.at_target, self.lse = logits.gather(1, target)[:, 0].float(), compiled_kernel(log_sum_exp)(logits)
        return self.lse - self.at_target, self.lse.clone()

    def gradient(self, logits: Tensor, target: Tensor, d_nll: Tensor, d_lse: Tensor) -> Tensor:
        """See Eager."""
        factor = d_nll + d_lse
        compiled_kernel(softmax_times_)(logits, self.lse, factor)
        at_target = (self.at_target - self.lse).exp() * factor - d_nll
        return logits.scatter_(1, target, at_target[:, None].to(logits.dtype))


def log_sum_exp(logits: Tensor) -> Tensor:
    """(m, V) of any precision -> (m,) float32"""
    return logits.float().logsumexp(-1)


def softmax_times_(logits: Tensor, lse: Tensor, factor: Tensor) -> None:
    """Replace the logits of each row by factor times their softmax.  (m, V), (m,), (m,)"""
    logits.copy_((logits.float() - lse[:, None]).exp() * factor[:, None])


@cache
def compiled_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, separately for each shape."""
    return torch.compile(function, dynamic=False)


def term_gradients(nll: Tensor, lse: Tensor, counted: Tensor, terms: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `terms` over counted rows, and its derivatives.  (m,), (m,), (m,) -> (), (m,), (m,)"""
    with torch.enable_grad():
        nll, lse = nll.requires_grad_(), lse.requires_grad_()
        values = [(term.from_nll(nll, lse) * counted).sum() for term in terms] or [(nll * counted).sum()]
        value = torch.stack(values).sum()
        d_nll, d_lse = torch.autograd.grad(value, [nll, lse], materialize_grads=True)
    return value.detach(), d_nll, d_lse


def trained_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Every trained parameter of `modules` once, in order."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(parameters.values())


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of `size` rows of all tensors, as views."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def total_of(values: Iterable[Tensor]) -> Tensor:
    """-> ()"""
    return torch.stack(list(values)).sum()
