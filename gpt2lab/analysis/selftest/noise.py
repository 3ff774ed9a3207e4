"""Studies without training: arms drawn from a noise bank, all of them at sd 1."""

from __future__ import annotations

import csv
import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from gpt2lab.analysis.statistics import Array

GAUSSIAN, T5, REAL = "Gaussian", "t5", "124M seeds"
BANKS = (GAUSSIAN, T5, REAL)
SEEDS = (3, 5, 8)
X = 3.0
"""Smallest effect of interest, in sd."""

NO_SHIFT = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How many studies are drawn, and from which seed. What one check draws does not depend on the others."""

    count: int
    seed: int

    def generator(self, *labels: object) -> np.random.Generator:
        """Random numbers of their own for everything that has labels of its own."""
        return np.random.default_rng([self.seed, zlib.crc32(repr(labels).encode())])

    def studies(
        self,
        label: str,
        bank: str,
        n: int,
        shifts: Sequence[float] = NO_SHIFT,
        sds: Sequence[float] = (),
        times: int = 1,
    ) -> list[Array]:
        """Baseline, then an arm per shift, each (draws x times, seed). sds: of the arms; 1 unless given."""
        rng = self.generator(label, bank, n)
        spread = (1.0, *(sds or (1.0,) * len(shifts)))
        size = (self.count * times, n)
        return [shift + sd * noise(rng, bank, size) for shift, sd in zip((0.0, *shifts), spread, strict=True)]


def noise(rng: np.random.Generator, bank: str, size: tuple[int, ...]) -> Array:
    """Independent values of mean 0 and sd 1; of the real bank, repeats drawn with replacement.  -> size"""
    if bank == GAUSSIAN:
        return rng.standard_normal(size)
    if bank == T5:
        return np.asarray(rng.standard_t(5, size) / math.sqrt(5 / 3))
    return real()[rng.integers(0, len(real()), size)]


@functools.cache
def real() -> Array:
    """Final validation losses of the repeats of one 124M recipe, centred and scaled to sd 1.  -> (repeat,)"""
    values = np.array([float(row["val_loss"]) for row in table("seed_noise_124m.csv")])
    return np.asarray((values - values.mean()) / values.std())


def table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file among the banks; see their README for where it is from."""
    text = (files("gpt2lab.analysis") / "banks" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
