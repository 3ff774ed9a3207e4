"""Which earlier tokens each token may attend to, chosen per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from gpt2lab.components.attend import Mask
from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
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


@dataclass(frozen=True)
class GrowingWindow(Mask):
    """A window that grows from `start` tokens to `window` over the first `warmup` of the training."""

    start: int = 1
    warmup: float = 1.0

    def allowed(self, ctx: ForwardContext) -> Tensor:
        assert self.window is not None
        share = (ctx.progress / self.warmup).clamp(max=1.0)
        reach = self.start + (self.window - self.start) * share
        near: Tensor = ctx.q_positions[:, None] - ctx.k_positions[None] < reach
        return super().allowed(ctx) & near


@mask.register("growing_window", source="KellerJordan/modded-nanogpt, record of 2024-11-24 (attention window warmup)")
def growing_window(
    builder: Builder,
    *,
    start: Annotated[int, Field(ge=1)] | None = None,
    window: Annotated[int, Field(ge=1)] | None = None,
    warmup: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> Mask:
    """A sliding window that grows during the training. Evaluations use the full one.

    Token i attends to j if i - w < j <= i   with w from `start` to `window`, linear in the progress of the training

    start:  tokens at the beginning, the token itself included; null is an eighth of the context.
    window: tokens at the end; null is the whole context.
    warmup: share of the training over which it grows.
    """
    size = builder.dims.block_size
    return GrowingWindow(window or size, start=start or max(1, size // 8), warmup=warmup)


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
