"""Whether a training compiles its model, and how.

torch.compile fuses small operations into generated kernels. It changes the last bits of results, so whether a run is
compiled is part of its identity: the rule depends on the config and the type of device, never on a measured time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpt2lab.errors import EnvironmentFault, causes

Compile = Literal["auto", "on", "off"]

PAYS_FROM_FLOPS = {"cuda": 5e16}
"""Total work of a training, in FLOP, from which `auto` compiles, by type of device; never on other devices."""


def decide(setting: Compile, device_type: str, total_flops: float) -> tuple[bool, str]:
    """Whether to compile a training of `total_flops` FLOP, and why. The same on every machine."""
    if setting != "auto":
        return setting == "on", f"training.compile is {setting}"
    least = PAYS_FROM_FLOPS.get(device_type)
    if least is None:
        return False, f"on {device_type} compiling saves less time than it takes"
    work = f"the training takes {total_flops:.2g} FLOP, and compiling on {device_type} pays from {least:.2g}"
    return total_flops >= least, work


def compile_fault(error: BaseException) -> EnvironmentFault | None:
    """The fault where torch's compiler raised `error`, as it does without a C++ compiler; None for another error."""
    compilers = ("torch._inductor.", "torch._dynamo.")
    cause = next((cause for cause in causes(error) if type(cause).__module__.startswith(compilers)), None)
    if cause is None:
        return None
    what = f"torch.compile failed: {str(cause).partition(chr(10))[0]}"
    hint = "install a C++ compiler such as g++, or --set training.compile=off"
    return EnvironmentFault(what, where="training.compile", hint=hint)


def compiled(model: nn.Module, cache: Path) -> nn.Module:
    """`model` itself, with its forward pass below the head compiled for training; its state dict keeps its names.

    The loss computes its own gradients chunk by chunk, so only its operations on the logits of a chunk are compiled, on
    a GPU. Passes without gradients stay eager: evaluations have other shapes, and each would be compiled separately.
    Generated code is cached in the folder `cache` (unless TORCHINDUCTOR_CACHE_DIR is set), so the next run with the
    same model starts within seconds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    whole: Any = model
    eager = whole.trunk
    # kernels for dynamic shapes give other bits than those for a fixed shape, and which one a step gets would depend on
    # earlier shapes, hence on whether the run was stopped in between
    fast = torch.compile(eager, dynamic=False)

    def trunk(tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return fast(tokens, documents) if torch.is_grad_enabled() else eager(tokens, documents)  # type: ignore[no-any-return, no-untyped-call]

    whole.trunk, whole.compiled_loss = trunk, True
    return model
