"""How a search goes about: which points of its space are tried, how many, and when one is given up."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from gpt2lab.errors import unknown
from gpt2lab.planning.space import DimensionSettings, SpaceSettings
from gpt2lab.results import LOSS
from gpt2lab.schema import ABSENT, Settings

MOST_TRIALS = 10_000


class Sampler(Settings):
    """How points of the space are chosen."""

    name: Literal["tpe", "random", "grid", "qmc"] = "tpe"
    """tpe learns from what was found (Bergstra et al. 2011); random, grid and qmc (Sobol's points) do not."""
    seed: int = Field(0, ge=0)
    """Of what is drawn."""
    startup: int | None = Field(None, ge=1)
    """Trials that tpe draws at random before it learns; null is a third of all, at most 10."""


class Pruner(Settings):
    """When a trial is stopped before its end."""

    name: Literal["none", "median", "successive_halving", "hyperband"] = "none"
    """none; median stops what is worse than the median of earlier trials at the same point; the others keep the better
    share at every rung (Li et al. 2018)."""
    startup_trials: int = Field(4, ge=1)
    """Finished trials before any is stopped (median)."""
    warmup: float = Field(0.25, ge=0, lt=1)
    """Share of training before which no trial is stopped (median); the smallest rung of the others."""
    reduction: int = Field(3, ge=2)
    """One in how many is kept at each rung (successive_halving, hyperband)."""
    keep_checkpoints: bool = False
    """Whether what was stopped can be trained on from where it was."""


class SearchSettings(SpaceSettings):
    """How a search goes about; sweeps and the `tune:` of an ablation share it."""

    trials: int = Field(16, ge=1, le=MOST_TRIALS)
    """In all, however often it is started and whoever works on it."""
    sampler: Sampler = Field(default_factory=Sampler)
    pruner: Pruner = Field(default_factory=Pruner)
    seeds: int = Field(1, ge=1, le=20)
    """Runs per trial; its value is their mean. They are 100, 101, ...: no seed that anything is judged by."""
    metric: str = LOSS
    """What counts, of the final evaluation: val/loss, val/bits_per_byte or another of its metrics."""
    direction: Literal["minimize", "maximize"] = "minimize"
    enqueue: tuple[dict[str, Any], ...] = ()
    """Known good points that are tried first; what they leave out is the config's own. Multiples, where the dimension
    is relative."""
    max_failures: int = Field(5, ge=0)
    """Trials that may fail (not: diverge) before the search gives up."""

    @field_validator("sampler", "pruner", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: Any) -> Any:
        """`sampler: tpe` means `{name: tpe}`."""
        if value is None or (isinstance(value, str) and value in ABSENT):
            return {}
        if not isinstance(value, str):
            return value
        known = get_args((Sampler if info.field_name == "sampler" else Pruner).model_fields["name"].annotation)
        if value not in known:
            raise ValueError(unknown(str(info.field_name), value, known))
        return {"name": value}


class Tune(SearchSettings):
    """The search that every arm of an ablation makes for itself before it is judged on fresh seeds."""

    centre: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = Field(default_factory=dict)
    """Arm -> dotted key -> the multiple of its own value around which its relative space lies; 1 unless given. For arms
    of which it is known beforehand that they want quite another rate."""

    def of(self, arm: str) -> SearchSettings:
        """The search of one arm: the space and the known points moved to its centre."""
        moved = {key: multiple for key, multiple in self.centre.get(arm, {}).items() if key in self.space}
        own = SearchSettings.model_construct(**{name: getattr(self, name) for name in SearchSettings.model_fields})
        if not moved:
            return own
        space = {key: _times(one, moved.get(key, 1.0)) for key, one in self.space.items()}
        known = tuple({**moved, **{key: _product(value, moved.get(key)) for key, value in point.items()}}
                      for point in self.enqueue)  # fmt: skip
        return own.model_copy(update={"space": space, "enqueue": known})


def _times(one: DimensionSettings, multiple: float) -> DimensionSettings:
    if one.low is None or one.high is None:
        return one
    return one.model_copy(update={"low": one.low * multiple, "high": one.high * multiple})


def _product(value: Any, multiple: float | None) -> Any:
    """A known point's value at another centre; what is no number is left to be complained about."""
    try:
        return value if multiple is None else float(value) * multiple
    except (TypeError, ValueError):
        return value
