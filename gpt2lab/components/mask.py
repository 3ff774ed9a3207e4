"""Which earlier tokens each token may attend to, chosen per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from gpt2lab.components.attend import Mask
from gpt2lab.components.base import Builder
from gpt2lab.registry import Slot

mask = Slot("model.mask", "which earlier tokens a token may attend to", default="causal", arity="per_layer", base=Mask)


@mask.register("causal", source="arXiv:1706.03762")
def causal(builder: Builder) -> Mask:
    """Every token attends to itself and all earlier tokens; GPT-2's mask."""
    return Mask()


@mask.register(
    "sliding_window",
    source="arXiv:2310.06825; sinks: arXiv:2309.17453",
    examples=({"window": 4, "sinks": 1},),
)
def sliding_window(
    builder: Builder, *, window: Annotated[int, Field(ge=1)] | None = None, sinks: Annotated[int, Field(ge=0)] = 0
) -> Mask:
    """Every token attends to itself, the `window` - 1 tokens before it, and the first `sinks` tokens of the context.

    Token i attends to j if i - window < j <= i, or j < sinks.
    window: in tokens; null is half the context. A pattern mixes it with full layers: `mask: [sliding_window, causal]`.
    sinks:  number of tokens at the start of the context that are always visible.
    """
    return Mask(window or max(1, builder.dims.block_size // 2), sinks)


def _check_documents(section: Any, options: Mapping[str, Any]) -> list[str]:
    if options["separator"] < section.vocab_size:
        return []
    return [f"mask documents has separator {options['separator']}, but vocab_size is {section.vocab_size}"]


@mask.register(
    "documents",
    source="KellerJordan/modded-nanogpt (document masking); arXiv:2404.10830",
    check=_check_documents,
    examples=({"separator": 5}, {"separator": 5, "window": 4}),
)
def documents(
    builder: Builder,
    *,
    separator: Annotated[int, Field(ge=0)] = 50256,
    window: Annotated[int, Field(ge=1)] | None = None,
) -> Mask:
    """Every token attends to itself and the earlier tokens of its own document, which begins with a separator.

    The separator between two documents counts as the first token of the second one, so the first token of a document
    is predicted from the separator alone.
    separator: the token between documents: by default GPT-2's end of text.
    window: largest number of tokens to attend to, the token itself included; null sets no limit.
    """
    return Mask(window, separator=separator)
