"""What reads few tokens at a time, as fast as memory allows.

With few rows a matrix product takes as long as its matrix takes to come from memory, and what is left to win is how
the matrix lies there. On CPU, oneDNN lays it out anew once and then reads it in order; torch's own linear layer does so
too late, for each product (docs/generation.md has the figures). In half precision the matrices are converted once, not
for each token as autocast would. Pages of 2 MiB spare the processor the look-ups that those of 4 KiB cost.

Shapes: B batch, T new tokens, C channels, V vocabulary, n rows.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.components.base import own_method
from gpt2lab.components.context import Cache
from gpt2lab.model import GPT
from gpt2lab.training.precision import AUTOCAST, Precision, autocast

Product = Callable[[Tensor], Tensor]
PRIVATE = ("_reorder_linear_weight", "_linear_pointwise", "data_ptr", "_nbytes")
"""Operations of torch.ops.mkldnn that are used here."""
HUGE_BYTES = 1 << 21
MADV_COLLAPSE = 25
"""Of Linux 6.1 on (include/uapi/asm-generic/mman-common.h); Python's mmap has no name for it."""


class Reader:
    """Reads for `generate`. Its model is a twin of the one given, which is left alone: they share all parameters but
    the matrices that are laid out or converted anew. These take their size in memory once more, and up to a second
    for GPT-2 124M.

    rows:      of a usual matrix product, which is how many samples there will be.
    precision: of matrix products.
    """

    def __init__(self, model: GPT, *, rows: int = 1, precision: Precision = "fp32") -> None:
        shared = [*model.parameters(), *model.buffers()]
        self.model: GPT = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
        self.precision, self.device = precision, shared[0].device
        dtype = AUTOCAST.get(precision, torch.float32)
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:  # heirs may compute more
                layer.forward = product(layer.weight, layer.bias, rows, dtype)  # type: ignore[assignment, method-assign]
        matrix_of = own_method(self.model.lm_head, "matrix")
        matrix = matrix_of(self.model.wte) if matrix_of else None
        self._head: Product = (
            partial(self.model.lm_head, embedding=self.model.wte)
            if matrix is None
            else product(matrix, None, rows, dtype)
        )

    def scores(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Scores of the token after the last, the head having read no other.  (B, T) -> (B, V) float32"""
        with autocast(self.precision, self.device):
            x = self.model.hidden(self.model.context(tokens, cache))  # (B, T, C)
            return self._head(x[:, -1]).float()


def product(weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype) -> Product:
    """x -> x weight^T + bias, computed in `dtype` and fastest for so many rows.  (..., n_in) -> (..., n_out)"""
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    if weight.device.type != "cpu" or not has_packed_products(dtype):
        return lambda x: F.linear(x.to(dtype), weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    in_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's products with a matrix laid out beforehand; they are what torch.compile uses, and
    not part of torch's public interface, so they may be missing."""
    there = all(hasattr(torch.ops.mkldnn, name) for name in PRIVATE)
    if not (torch.backends.mkldnn.is_available() and there):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_huge_pages(address: int, size_bytes: int) -> bool:
    """Ask that all whole huge pages within this memory be such; -> whether they are. What lies there stays as it is,
    and where the system cannot do it, all stays as it was."""
    begin = -(-address // HUGE_BYTES) * HUGE_BYTES
    length = (address + size_bytes) // HUGE_BYTES * HUGE_BYTES - begin
    if sys.platform != "linux" or length <= 0:
        return False
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    return advise is not None and advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_COLLAPSE) == 0
