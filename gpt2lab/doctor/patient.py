"""A run as the doctor sees it: its journal, its model at the first step and now, its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.prepared import Prepared
from gpt2lab.doctor.findings import NotExamined
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
class Patient:
    """One run under examination. What cannot be had raises NotExamined when a check asks for it."""

    run: RunFolder
    config: Config
    rows: Sequence[Row]

    @classmethod
    def admit(cls, run: RunFolder) -> Patient:
        """Read what the run has written. Raises ConfigError when there is no such run, DataFault when it is damaged."""
        text = run.config()
        if run.status() == "absent":
            raise ConfigError("there is no such run", where=str(run.path), hint="gpt2lab runs")
        if text is None:
            raise DataFault("no config.yaml: what it trains is not known", where=str(run.path), hint=f"ls {run.path}")
        return cls(run, config_from_text(text, str(run.path / "config.yaml")), run.rows())

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json, empty while the run goes on."""
        return self.run.result() or {}

    @cached_property
    def device(self) -> torch.device:
        """Where it is examined."""
        return choose_device(self.config.training.device)

    @cached_property
    def step(self) -> int:
        """Steps that the newest weights have seen."""
        if self.result.get("status") == "finished":
            return int(self.result["steps"])
        return next((step for step, _ in checkpoints(self.run.checkpoints)), 0)

    def series(self, metric: str) -> dict[int, float]:
        """A metric of the journal by step, finite values only."""
        found = {row["step"]: row["metrics"].get(metric) for row in self.rows}
        return {step: float(value) for step, value in found.items() if value is not None and math.isfinite(value)}

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
            return data_of(self.run, self.config)
        except Gpt2labError as error:
            raise NotExamined(f"its data: {error}") from error

    @cached_property
    def start(self) -> GPT:
        """The model before its first step, in evaluation mode."""
        if self.config.branch:
            raise NotExamined(f"it branches from {self.config.branch}")
        return build_model(self.config.model, seed=self.config.seed, device=self.device).eval()

    @cached_property
    def now(self) -> GPT:
        """The model with its newest weights, in evaluation mode."""
        if not self.step:
            raise NotExamined("no checkpoint yet")
        model = build_model(self.config.model, seed=self.config.seed, device=self.device).eval()
        try:
            load_weights(model, self.run, self.step)
        except DataFault as error:
            raise NotExamined(str(error)) from error
        return model

    @cached_property
    def tokens(self) -> Tensor:
        """Some validation windows, each with the token after it.  -> (B, T + 1) int64"""
        block = self.config.model.block_size
        try:
            windows = plain_windows(self.data.validation, block_size=block, total=SEQUENCES * block)
        except ConfigError as error:
            raise NotExamined(f"its validation text is too short: {error}") from error
        starts = [window.start for window in windows if window.length == block]
        rows = np.stack([self.data.validation[start : start + min(block, LONGEST) + 1] for start in starts])
        return torch.as_tensor(rows, device=self.device)
