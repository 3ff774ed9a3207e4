"""Initial weights. A component returns `draw(param, generator)`, which fills one matrix in place, by its role.

Each parameter has its own generator, seeded by the run's seed and the parameter's name, so that two arms have equal
initial weights wherever their shapes agree. Vectors (gains, biases) keep the values from their constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from gpt2lab.components.base import Builder, Param
from gpt2lab.registry import Slot

init = Slot("model.init", "initial weights", default="gpt2")

Draw = Callable[[Param, Generator], None]
Std = Annotated[float, Field(gt=0)]
TABLES = ("embedding", "position", "head")
UNSCALED_ROWS = ("query", "key")  # a gain concerns values: it scales what is written to the stream


def normal(param: Param, std: float, gain: float, generator: Generator) -> None:
    """Draw from N(0, (std gain)^2); stacked queries and keys are drawn without the gain."""
    tensor: Tensor = param.tensor.data
    tensor.normal_(0.0, std, generator=generator)
    if not param.role.rows:
        tensor.mul_(gain)
        return
    for (name, _), part in zip(param.role.rows, tensor.split([n for _, n in param.role.rows]), strict=True):
        if name not in UNSCALED_ROWS:
            part.mul_(gain)


@init.register("gpt2", source="GPT-2 (Radford et al. 2019), section 2.3, as in Hugging Face, nanoGPT and llm.c")
def gpt2(builder: Builder, *, std: Std = 0.02) -> Draw:
    """N(0, std), with matrices that write to the residual stream scaled by 1/sqrt(2 L); GPT-2's.

    std:  standard deviation. Biases are initially 0, gains of norms 1.
    Residual schemes with their own gain (deepnorm) replace the 1/sqrt(2 L).
    """
    depth = (2 * builder.dims.n_layer) ** -0.5

    def draw(param: Param, generator: Generator) -> None:
        gain = param.role.gain
        if gain is None:
            gain = depth if param.role.kind == "residual_out" else 1.0
        normal(param, std, gain, generator)

    return draw


@init.register("gpt2_tf", source="openai/gpt-2, src/model.py", can=("even",))
def gpt2_tf(builder: Builder, *, std: Std = 0.02, position_std: Std = 0.01) -> Draw:
    """N(0, std), with another std for positions, as in OpenAI's published code; branches are not scaled by 1/sqrt(2 L).

    std:          standard deviation of everything but positions.
    position_std: standard deviation of the position table.
    The paper scales residual layers by 1/sqrt(N); the published code does not.
    """

    def draw(param: Param, generator: Generator) -> None:
        chosen = position_std if param.role.kind == "position" else std
        normal(param, chosen, 1.0 if param.role.gain is None else param.role.gain, generator)

    return draw


@init.register("zero_projections", source="arXiv:2203.03466, appendix D; KellerJordan/modded-nanogpt 2024-10")
def zero_projections(builder: Builder, *, std: Std = 0.02) -> Draw:
    """As `gpt2`, but matrices that write to the residual stream are initially zero, so every block is the identity.

    std: standard deviation of all other matrices.
    """
    ordinary = gpt2(builder, std=std)

    def draw(param: Param, generator: Generator) -> None:
        if param.role.kind == "residual_out":
            torch.nn.init.zeros_(param.tensor)
        else:
            ordinary(param, generator)

    return draw


@init.register("depth_scaled", source="arXiv:1908.11365 (depth-scaled initialisation), as in pytorch/torchtitan")
def depth_scaled(builder: Builder, *, std: Std = 0.02) -> Draw:
    """As `gpt2`, but matrices that write to the residual stream are scaled by their own layer's depth.

    N(0, (std / sqrt(2 l))^2)   for such a matrix of layer l, counted from 1;  N(0, std^2) for others

    std: standard deviation of all other matrices.
    The paper scales every matrix of layer l by 1/sqrt(l).
    """

    def draw(param: Param, generator: Generator) -> None:
        gain = param.role.gain
        if gain is None:
            deep = param.role.kind == "residual_out"
            gain = (2 * ((param.role.layer or 0) + 1)) ** -0.5 if deep else 1.0
        normal(param, std, gain, generator)

    return draw


@init.register("small_init", source="arXiv:1910.05895 (Nguyen and Salazar 2019)", can=("even",))
def small_init(builder: Builder) -> Draw:
    """A standard deviation that depends on the width, the same for all matrices, without scaling by depth.

    N(0, 2 / (5 C))   which is the variance of Xavier's init for the larger matrix of a feed-forward layer
    """
    std = (2 / (5 * builder.dims.n_embd)) ** 0.5

    def draw(param: Param, generator: Generator) -> None:
        normal(param, std, 1.0 if param.role.gain is None else param.role.gain, generator)

    return draw


def matrices(param: Param) -> Iterator[tuple[str, Tensor]]:
    """Each matrix stacked in a parameter by name, (A, B) or of experts (E, A, B); the name of a single one is empty."""
    rows = param.role.rows or (("", param.tensor.shape[-2]),)
    parts = param.tensor.data.split([height for _, height in rows], -2)
    return zip((name for name, _ in rows), parts, strict=True)


@init.register("xavier", source="Glorot and Bengio 2010; arXiv:1706.03762 uses it", can=("even",))
def xavier(builder: Builder, *, table_std: Std = 0.02) -> Draw:
    """A standard deviation that depends on both sides of a matrix; tables of tokens and positions have their own.

    N(0, 2 / (n_in + n_out))   for each matrix, stacked ones by themselves; N(0, table_std^2) for tables

    table_std: standard deviation of embedding, positions and head.
    """

    def draw(param: Param, generator: Generator) -> None:
        gain = 1.0 if param.role.gain is None else param.role.gain
        normal(param, table_std if param.role.kind in TABLES else 1.0, gain, generator)
        if param.role.kind not in TABLES:
            for _, matrix in matrices(param):
                matrix.mul_((2 / sum(matrix.shape[-2:])) ** 0.5)

    return draw


@init.register("orthogonal", source="arXiv:1312.6120", can=("even",))
def orthogonal(builder: Builder, *, scale: Std = 0.5, table_std: Std = 0.02) -> Draw:
    """Random orthogonal matrices, whose singular values are all the same.

    scale Q   with orthonormal rows or columns, for each matrix, stacked ones apart;  N(0, table_std^2) for tables

    scale:     every singular value; N(0, 0.02^2) has 0.02 sqrt(C) on average, 0.55 at 768 channels.
    table_std: standard deviation of embedding, positions and head.
    """

    def draw(param: Param, generator: Generator) -> None:
        gain = 1.0 if param.role.gain is None else param.role.gain
        normal(param, table_std, gain, generator)
        if param.role.kind not in TABLES:
            for name, matrix in matrices(param):
                size = scale if name in UNSCALED_ROWS else scale * gain
                for part in matrix.reshape(-1, *matrix.shape[-2:]):
                    torch.nn.init.orthogonal_(part, size, generator=generator)

    return draw
