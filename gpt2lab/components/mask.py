"""Which earlier tokens each token may look at, chosen per layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gpt2lab.components.attend import Mask
from gpt2lab.components.base import Site
from gpt2lab.registry import Slot

mask = Slot("model.mask", "which earlier tokens a token may look at", default="causal", arity="per_layer")


@mask.register("causal", source="arXiv:1706.03762")
def causal(site: Site) -> Mask:
    """Every token sees itself and all earlier tokens; GPT-2's mask."""
    return Mask()


@mask.register(
    "sliding_window",
    source="arXiv:2310.06825; sinks: arXiv:2309.17453",
    examples=({"window": 4, "sinks": 1},),
)
def sliding_window(
    site: Site, *, window: Annotated[int, Field(ge=1)] | None = None, sinks: Annotated[int, Field(ge=0)] = 0
) -> Mask:
    """Every token sees itself, the `window` - 1 tokens before it, and the first `sinks` tokens of the context.

    token i sees j where i - window < j <= i, or j < sinks.
    window: in tokens; null is half the context. Mix it with full layers by a pattern: `mask: [sliding_window, causal]`.
    sinks:  how many tokens at the start of the context stay visible for ever.
    """
    return Mask(window or max(1, site.dims.block_size // 2), sinks)
