"""Components that take one source of noise away, for `noise_sources.yaml`: the same in every seed."""

from __future__ import annotations

import zlib
from dataclasses import replace

from torch import Generator

from gpt2lab.components.base import Builder, Param
from gpt2lab.components.init import Draw, gpt2, init
from gpt2lab.data.curricula import ORDER, TrainingBatches, TrainingText, batches


@init.register("same_weights", source="gpt2lab")
def same_weights(builder: Builder) -> Draw:
    """As `gpt2`, with the same initial weights in every seed."""
    ordinary = gpt2(builder)

    def draw(param: Param, generator: Generator) -> None:
        ordinary(param, generator.manual_seed(zlib.crc32(param.name.encode())))

    return draw


@batches.register("same_order", source="gpt2lab", can=(ORDER,))
class SameOrder(TrainingBatches):
    """As without it, with the same order of the data in every seed."""

    def __init__(self, text: TrainingText, before: TrainingBatches | None = None) -> None:
        super().__init__(replace(text, seed=0), before)

    def start(self, index: int) -> int:
        """That of seed 0."""
        return self.plain._start(index)
