"""How initial weights and learning rates depend on the width: factors by role, on top of the other settings.

Shapes: C channels (n_embd), D channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from gpt2lab.components.base import Builder, Kind
from gpt2lab.registry import Slot


@dataclass(frozen=True)
class Scaling:
    """Factors, 1 by default, applied by the model and `build_optimizers`.

    std:    on the standard deviation of the init, by kind of role.
    rate:   on the learning rate, by kind of role.
    output: on the input of the head, hence on the logits.
    scores: on attention scores before the softmax, besides their 1/sqrt(D).
    """

    std: Mapping[Kind, float] = field(default_factory=dict)
    rate: Mapping[Kind, float] = field(default_factory=dict)
    output: float = 1.0
    scores: float = 1.0


parametrization = Slot(
    "model.parametrization", "how initial weights and rates depend on the width", default="standard", base=Scaling
)


@parametrization.register("standard", source="GPT-2 (Radford et al. 2019)")
def standard(builder: Builder) -> Scaling:
    """The same standard deviation and rate at every width, those of `model.init` and `optim`; GPT-2's."""
    return Scaling()


@parametrization.register(
    "mup",
    source="arXiv:2203.03466, table 8",
    needs={"optimizer": "rates"},
    examples=({"base_width": 16, "base_head": 4},),
)
def mup(
    builder: Builder,
    *,
    base_width: Annotated[int, Field(ge=1)] = 128,
    base_head: Annotated[int, Field(ge=1)] | None = None,
) -> Scaling:
    """Maximal update parametrisation: the best learning rate does not depend on the width.

    With m = n_embd / base_width: matrices in blocks have std / sqrt(m) and rate / m, routers std / m and rate / m, and
    logits are divided by m. Tables, head and vectors keep their std and rate. At m = 1 nothing changes.

    base_width: n_embd of the model for which the settings were chosen.
    base_head:  channels per head of that model, if wider models have larger heads: scores are then multiplied by
    sqrt(base_head) / D, which is 1/sqrt(D) at that size. null keeps 1/sqrt(D), which is right if wider models have more
    heads of the same size.
    Depth is not scaled. The rules are those for Adam. `weight_decay` is multiplied by m where the rate is divided by m,
    so that a step decays every matrix by the same share (arXiv:2405.13698).
    """
    m = builder.dims.n_embd / base_width
    return Scaling(
        std={"hidden": m**-0.5, "residual_out": m**-0.5, "router": 1 / m},
        rate={"hidden": 1 / m, "residual_out": 1 / m, "router": 1 / m},
        output=1 / m,
        scores=1.0 if base_head is None else (base_head / builder.dims.head_size) ** 0.5,
    )
