"""The forward pass for generation: few tokens at a time, at the speed of memory.

With few rows a matrix product is bound by the memory bandwidth of reading its matrix, which depends on the matrix's
layout. On CPU, oneDNN packs it once and then reads it sequentially; torch's linear layer repacks it for each product
(docs/generation.md has the figures). In half precision the matrices are converted once, not for each token as autocast
would. Pages of 2 MiB avoid TLB misses of pages of 4 KiB.

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
"""Private operations of torch.ops.mkldnn that are used here."""
HUGE_BYTES = 1 << 21
MADV_COLLAPSE = 25
"""Since Linux 6.1 (include/uapi/asm-generic/mman-common.h); not in Python's mmap."""


class Reader:
    """The model as `generate` uses it: a copy that shares all parameters except the matrices that are packed or
    converted, which take additional memory, and up to a second for GPT-2 124M. The original model is unchanged.

    rows:      usual rows of a matrix product: the number of samples.
    precision: of matrix products.
    """

    def __init__(self, model: GPT, *, rows: int = 1, precision: Precision = "fp32") -> None:
        shared = [*model.parameters(), *model.buffers()]
        self.model: GPT = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
        self.precision, self.device = precision, shared[0].device
        dtype = AUTOCAST.get(precision, torch.float32)
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:  # subclasses may compute more
                layer.forward = product(layer.weight, layer.bias, rows, dtype)  # type: ignore[assignment, method-assign]
        matrix_of = own_method(self.model.lm_head, "matrix")
        matrix = matrix_of(self.model.wte) if matrix_of else None
        self._head: Product = (
            partial(self.model.lm_head, embedding=self.model.wte)
            if matrix is None
            else product(matrix, None, rows, dtype)
        )

    def scores(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Scores of the next token; the head is applied to the last position only.  (B, T) -> (B, V) float32"""
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
    """Whether this torch has oneDNN's products with packed matrices. torch.compile uses them; they are not part of
    torch's public interface, so may be missing."""
    present = all(hasattr(torch.ops.mkldnn, name) for name in PRIVATE)
    if not (torch.backends.mkldnn.is_available() and present):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_huge_pages(address: int, size_bytes: int) -> bool:
    """Collapse this memory into huge pages, where the system can; -> whether it did. The content does not change."""
    begin = -(-address // HUGE_BYTES) * HUGE_BYTES
    length = (address + size_bytes) // HUGE_BYTES * HUGE_BYTES - begin
    if sys.platform != "linux" or length <= 0:
        return False
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    return advise is not None and advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_COLLAPSE) == 0
