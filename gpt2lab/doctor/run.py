"""A run under examination: its journal, its model at the first step and now, its data; and what a check says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError
from gpt2lab.evaluation.validation import plain_windows
from gpt2lab.model import GPT, build_model
from gpt2lab.reuse.measure import data_of, load_weights
from gpt2lab.store import Row, RunFolder
from gpt2lab.training.checkpoints import checkpoints
from gpt2lab.training.precision import choose_device

SEQUENCES, LONGEST = 4, 512
"""Of the validation windows that probes look at: as few as show what is to be shown."""


@dataclass(frozen=True)
class Finding:
    """Something that a sound training does not show.

    severity: `error` where the run's result cannot be trusted, `warning` where it is probably not what was meant.
    evidence: a sentence with the numbers.  causes: what usually lies behind it, the commonest first.
    """

    name: str
    severity: Literal["error", "warning"]
    evidence: str
    causes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "causes": list(self.causes)}


def error(name: str, evidence: str, *causes: str) -> Finding:
    """A finding because of which the run's result cannot be trusted."""
    return Finding(name, "error", evidence, causes)


def warning(name: str, evidence: str, *causes: str) -> Finding:
    """A finding that is probably not what was meant."""
    return Finding(name, "warning", evidence, causes)


class NotExamined(Exception):
    """Why a check cannot say anything of this run: no failure, and no clean bill either."""


@dataclass(frozen=True)
class ExaminedRun:
    """One run under examination. What cannot be had raises NotExamined when a check asks for it."""

    folder: RunFolder
    config: Config
    rows: Sequence[Row]

    @classmethod
    def load(cls, folder: RunFolder) -> ExaminedRun:
        """Read what the run has written. Raises ConfigError when there is no such run, DataFault when it is damaged."""
        text, path = folder.config(), folder.path
        if folder.status() == "absent":
            raise ConfigError("there is no such run", where=str(path), hint="gpt2lab runs")
        if text is None:
            raise DataFault("no config.yaml: what it trains is not known", where=str(path), hint=f"ls {path}")
        return cls(folder, config_from_text(text, str(path / "config.yaml")), folder.rows())

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json, empty while the run goes on."""
        return self.folder.result() or {}

    @cached_property
    def stack(self) -> dict[str, Any]:
        """Which software and devices it ran on, as far as it is known."""
        return self.result.get("stack") or {}

    @cached_property
    def device(self) -> torch.device:
        """Where it is examined."""
        return choose_device(self.config.training.device)

    @cached_property
    def step(self) -> int:
        """Steps that the newest weights have seen."""
        if self.result.get("status") == "finished":
            return int(self.result["steps"])
        return next((step for step, _ in checkpoints(self.folder.checkpoints)), 0)

    def series(self, metric: str) -> dict[int, float]:
        """A metric of the journal by step, finite values only."""
        values = {row["step"]: row["metrics"].get(metric) for row in self.rows}
        return {step: float(value) for step, value in values.items() if value is not None and math.isfinite(value)}

    def last(self, metric: str) -> tuple[int, float]:
        """Step and value of its last entry."""
        series = self.series(metric)
        if not series:
            raise NotExamined(f"no {metric} in its journal")
        return max(series.items())

    @cached_property
    def data(self) -> Prepared:
        """What it was trained on."""
        try:
            return data_of(self.folder, self.config)
        except Gpt2labError as reason:
            raise NotExamined(f"its data: {reason}") from reason

    def build(self) -> GPT:
        """Its model with the initial weights, in evaluation mode."""
        return build_model(self.config.model, seed=self.config.seed, device=self.device).eval()

    @cached_property
    def start(self) -> GPT:
        """The model before its first step, in evaluation mode."""
        if self.config.branch:
            raise NotExamined(f"it branches from {self.config.branch}")
        return self.build()

    @cached_property
    def now(self) -> GPT:
        """The model with its newest weights, in evaluation mode."""
        if not self.step:
            raise NotExamined("no checkpoint yet")
        model = self.build()
        try:
            load_weights(model, self.folder, self.step)
        except DataFault as reason:
            raise NotExamined(str(reason)) from reason
        return model

    @property
    def newest(self) -> GPT:
        """The model with its newest weights, or at the start where there are none."""
        return self.now if self.step else self.start

    @cached_property
    def tokens(self) -> Tensor:
        """Some validation windows, each with the token after it.  -> (B, T + 1) int64"""
        block = self.config.model.block_size
        try:
            windows = plain_windows(self.data.validation, block_size=block, total=SEQUENCES * block)
        except ConfigError as reason:
            raise NotExamined(f"its validation text is too short: {reason}") from reason
        starts = [window.start for window in windows if window.length == block]
        rows = np.stack([self.data.validation[start : start + min(block, LONGEST) + 1] for start in starts])
        return torch.as_tensor(rows, device=self.device)
