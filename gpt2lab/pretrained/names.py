"""Names and shapes of GPT-2's weights elsewhere, against ours.

Names are the same on all sides. Hugging Face's linear layers in blocks store (in, out), ours and nanoGPT's (as torch's)
(out, in); both others put the prefix `transformer.` before all but the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab.errors import ConfigError, Problem
from gpt2lab.model import GPT
from gpt2lab.training.state import weights_of

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files store among the weights
PREFIX = "transformer."
HEAD, TABLE = "lm_head.weight", "wte.weight"


@dataclass(frozen=True)
class Layout:
    """How a file stores weights. transposed: linear layers in blocks as (in, out).  whose: for messages."""

    whose: str
    transposed: bool

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the file as ours is, or ours as the file's."""
        return tensor.t() if self.transposed and name.endswith(TRANSPOSED) else tensor


HUGGING_FACE = Layout("Hugging Face's GPT-2", transposed=True)
NANOGPT = Layout("nanoGPT", transposed=False)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix, and without masks stored among the weights."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if not name.endswith(NOT_WEIGHTS)}


def from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names and shapes -> ours. A head tied to the embedding is dropped, as ours has none."""
    return {
        name: HUGGING_FACE.turned(name, tensor).contiguous()
        for name, tensor in plain_names(weights).items()
        if name != HEAD
    }


def to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> Hugging Face names and shapes, without a tied head, as their own files are."""
    return {
        name if name == HEAD else PREFIX + name: HUGGING_FACE.turned(name, tensor).contiguous()
        for name, tensor in weights.items()
    }


def fill(model: GPT, weights: Mapping[str, Tensor], layout: Layout, where: str) -> None:
    """Copy `weights`, named and shaped as `layout` has them, into the model. Raises ConfigError with every name and
    shape that does not fit, and then changes nothing."""
    own, found = weights_of(model), plain_names(weights)
    problems = []
    if HEAD not in own and HEAD in found:
        head = found.pop(HEAD)
        if TABLE in found and not _same(head, found[TABLE]):
            problems.append(Problem(HEAD, f"differs from {TABLE}, to which the settings tie it"))
    wanted = {name: tuple(layout.turned(name, tensor).shape) for name, tensor in own.items()}
    problems += differences(wanted, {name: tuple(tensor.shape) for name, tensor in found.items()})
    problems += [
        Problem(name, f"{str(tensor.dtype).removeprefix('torch.')}: only floating-point weights are read")
        for name, tensor in found.items()
        if not tensor.is_floating_point()
    ]
    if problems:
        what = f"the weights are not those that its settings describe ({len(problems)} differences)"
        raise ConfigError([Problem(where, what), *problems], hint="the config.json that these weights came with")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(layout.turned(name, found[name]))


def differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Every name that is missing, unexpected, or there in another shape."""
    missing = [Problem(name, f"missing: {shape} is wanted") for name, shape in wanted.items() if name not in found]
    unexpected = [Problem(name, f"unexpected: {shape} found") for name, shape in found.items() if name not in wanted]
    misshapen = [
        Problem(name, f"{wanted[name]} is wanted, {shape} found")
        for name, shape in found.items()
        if name in wanted and wanted[name] != shape
    ]
    return [*missing, *unexpected, *misshapen]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and bool((a == b).all()))
