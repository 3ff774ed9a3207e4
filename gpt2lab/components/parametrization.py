"""How sizes and rates follow the width: factors on what the other settings say, read by role.

Shapes: C channels (n_embd), D channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from gpt2lab.components.base import Kind, Site
from gpt2lab.registry import Slot

parametrization = Slot("model.parametrization", "how sizes and rates follow the width", default="standard")


@dataclass(frozen=True)
class Scaling:
    """Factors, all 1 unless said otherwise. The model and `build_optimizers` apply them; no other component needs to
    know.

    std:    on the standard deviation of what `model.init` draws, by kind of role.
    rate:   on the learning rate, by kind of role.
    output: on what the head reads, hence on the logits.
    scores: on attention scores before the softmax, beside their own 1/sqrt(D).
    """

    std: Mapping[Kind, float] = field(default_factory=dict)
    rate: Mapping[Kind, float] = field(default_factory=dict)
    output: float = 1.0
    scores: float = 1.0


@parametrization.register("standard", source="GPT-2 (Radford et al. 2019)")
def standard(site: Site) -> Scaling:
    """One standard deviation and one rate for all widths, as `model.init` and `optim` say; GPT-2's."""
    return Scaling()


@parametrization.register(
    "mup",
    source="arXiv:2203.03466, table 8",
    needs={"optimizer": "rates"},
    examples=({"base_width": 16, "base_head": 4},),
)
def mup(
    site: Site, *, base_width: Annotated[int, Field(ge=1)] = 128, base_head: Annotated[int, Field(ge=1)] | None = None
) -> Scaling:
    """Maximal update parametrisation: updates move activations and logits as much at every width, so one rate serves.

    With m = n_embd / base_width, of matrices in blocks std / sqrt(m) and rate / m, of routers std / m and rate / m;
    logits are divided by m. Tables, head and vectors keep their std and rate. At m = 1 nothing changes.

    base_width: n_embd of the model whose settings these are, such as the one a rate was found at.
    base_head:  its channels per head, where heads grow: scores are then multiplied by sqrt(base_head) / D, which is
    1/sqrt(D) at that size. null keeps 1/sqrt(D), which is right where heads keep their size and their number grows.
    Depth is left alone: this is about width. Adam's rule is meant, and `weight_decay` is multiplied by m where the rate
    is divided by it, so that a step takes the same share off every matrix (arXiv:2405.13698).
    """
    m = site.dims.n_embd / base_width
    return Scaling(
        std={"hidden": m**-0.5, "residual_out": m**-0.5, "router": 1 / m},
        rate={"hidden": 1 / m, "residual_out": 1 / m, "router": 1 / m},
        output=1 / m,
        scores=1.0 if base_head is None else (base_head / site.dims.head_size) ** 0.5,
    )
