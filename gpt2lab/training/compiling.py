"""Whether a training compiles its model, and how.

torch.compile joins small operations into generated kernels. It changes the last bits of what is computed, so whether a
run is compiled belongs to its identity: the rule reads the config and the type of device, never a clock.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Compile = Literal["auto", "on", "off"]

PAYS_FROM_FLOPS = {"cuda": 5e16}
"""Work of a whole training, in FLOP, from which `auto` compiles on a type of device; it compiles on no other."""


def decide(setting: Compile, device_type: str, total_flops: float) -> tuple[bool, str]:
    """Whether to compile a training of `total_flops` FLOP in all, and why in words. The same on every machine."""
    if setting != "auto":
        return setting == "on", f"training.compile is {setting}"
    least = PAYS_FROM_FLOPS.get(device_type)
    if least is None:
        return False, f"on {device_type} compiling gains too little for what it takes to compile"
    work = f"the training takes {total_flops:.2g} FLOP, and compiling on {device_type} pays from {least:.2g}"
    return total_flops >= least, work


def compiled(model: nn.Module, cache: Path) -> nn.Module:
    """`model` itself, its forward pass up to the head compiled for training; the names in its state dict stay.

    The loss works chunk by chunk with gradients of its own, so it stays as it is but for what is done to a chunk's
    scores on a GPU. Whatever runs without gradients stays eager: evaluations come in other shapes, each of which would
    be compiled anew. Generated code is kept in the
    folder `cache`, so that the next run with the same model starts within seconds (unless the user has set
    TORCHINDUCTOR_CACHE_DIR already).
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    whole: Any = model
    eager = whole.trunk
    # a kernel for any shape computes other bits than one for this shape, and which of them a step gets would depend on
    # the shapes seen before, hence on whether the run was stopped in between
    fast = torch.compile(eager, dynamic=False)

    def trunk(tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return fast(tokens, documents) if torch.is_grad_enabled() else eager(tokens, documents)  # type: ignore[no-any-return, no-untyped-call]

    whole.trunk, whole.compiled_loss = trunk, True
    return model
