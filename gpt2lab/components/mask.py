"""Which earlier tokens each token may look at, chosen per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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


def _check_documents(section: Any, options: Mapping[str, Any]) -> list[str]:
    if options["separator"] < section.vocab_size:
        return []
    return [f"mask documents waits for token {options['separator']} and vocab_size is {section.vocab_size}"]


@mask.register(
    "documents",
    source="KellerJordan/modded-nanogpt (document masking); arXiv:2404.10830",
    check=_check_documents,
    examples=({"separator": 5}, {"separator": 5, "window": 4}),
)
def documents(
    site: Site, *, separator: Annotated[int, Field(ge=0)] = 50256, window: Annotated[int, Field(ge=1)] | None = None
) -> Mask:
    """Every token sees itself and the earlier tokens of its own document, which a separator begins.

    Whether data has its separators before documents or behind them: where two meet, the separator is the first token
    of the later one, so that what follows is predicted from it alone.
    separator: the token that tells documents apart: GPT-2's, or the last of a vocabulary of one's own.
    window: see no further back than this many tokens, itself included; null sets no limit.
    """
    return Mask(window, separator=separator)
