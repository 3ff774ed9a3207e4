"""How parameters start. A component returns `draw(param, generator)`, which fills one matrix in place by its role.

Each parameter has a generator of its own, seeded by the run's seed and the parameter's name, so that two arms start
equal wherever their shapes agree. Vectors (gains, biases) keep what their component gave them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from gpt2lab.components.base import Param, Site
from gpt2lab.registry import Slot

init = Slot("model.init", "how parameters start", default="gpt2")

Draw = Callable[[Param, Generator], None]
Std = Annotated[float, Field(gt=0)]
UNSCALED_ROWS = ("query", "key")  # their product is what a gain must not shrink twice


def normal(param: Param, std: float, gain: float, generator: Generator) -> None:
    """N(0, (std gain)^2); stacked queries and keys keep std, as gains concern what is written to the stream."""
    tensor: Tensor = param.tensor.data
    tensor.normal_(0.0, std, generator=generator)
    if not param.role.rows:
        tensor.mul_(gain)
        return
    for (name, _), part in zip(param.role.rows, tensor.split([n for _, n in param.role.rows]), strict=True):
        if name not in UNSCALED_ROWS:
            part.mul_(gain)


@init.register("gpt2", source="GPT-2 (Radford et al. 2019), section 2.3, as in Hugging Face and llm.c")
def gpt2(site: Site, *, std: Std = 0.02) -> Draw:
    """N(0, std) everywhere, matrices that write into the residual stream scaled by 1/sqrt(2 L); GPT-2's.

    std:  standard deviation; biases start at 0 and norm gains at 1.
    Residual schemes that bring a gain of their own (deepnorm) replace the 1/sqrt(2 L).
    """
    depth = (2 * site.dims.n_layer) ** -0.5

    def draw(param: Param, generator: Generator) -> None:
        gain = param.role.gain
        if gain is None:
            gain = depth if param.role.kind == "residual_out" else 1.0
        normal(param, std, gain, generator)

    return draw


@init.register("gpt2_tf", source="openai/gpt-2, src/model.py", can=("even",))
def gpt2_tf(site: Site, *, std: Std = 0.02, position_std: Std = 0.01) -> Draw:
    """N(0, std) everywhere but for positions, as OpenAI's published code draws; branches are not scaled by 1/sqrt(2 L).

    std:          standard deviation of all but positions.
    position_std: of the position table.
    The paper says that residual layers are scaled by 1/sqrt(N); the published code does not do it.
    """

    def draw(param: Param, generator: Generator) -> None:
        own = position_std if param.role.kind == "position" else std
        normal(param, own, 1.0 if param.role.gain is None else param.role.gain, generator)

    return draw


@init.register("zero_projections", source="arXiv:2203.03466, appendix D; KellerJordan/modded-nanogpt 2024-10")
def zero_projections(site: Site, *, std: Std = 0.02) -> Draw:
    """As `gpt2`, but matrices that write into the residual stream start at zero: every block starts as the identity.

    std: standard deviation of all others.
    """
    ordinary = gpt2(site, std=std)

    def draw(param: Param, generator: Generator) -> None:
        if param.role.kind == "residual_out":
            torch.nn.init.zeros_(param.tensor)
        else:
            ordinary(param, generator)

    return draw
