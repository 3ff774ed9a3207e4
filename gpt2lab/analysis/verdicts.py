"""Inputs and results of a comparison: arms, contrasts, terms, and the judged verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from gpt2lab.analysis.best_rate import RateSearch
from gpt2lab.analysis.statistics import no_spread
from gpt2lab.basics.text import html_table, interval, signed

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3
"""Seeds per arm from which on an arm is judged by its own noise."""

FEWEST_REPEATS = 10
"""Fewest baseline repeats for a borrowed noise floor."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A noise floor: the sd of `runs` repeats of the baseline on one scale and software stack."""

    sd: float
    df: float
    runs: int
    scale: str
    stack: str

    @property
    def sufficient(self) -> bool:
        """Whether it rests on enough repeats to replace an arm's own noise."""
        return self.runs >= FEWEST_REPEATS and self.sd > 0 and self.df > 0


@dataclass(frozen=True, kw_only=True)
class TextNoise:
    """Standard error of a difference over the validation text, in the metric's unit, estimated from `count` units:
    `documents`, or `windows` where all lie in one document."""

    se: float
    count: int
    unit: str
    effective: float | None = None
    """the equivalent number of equally large ones; `count` unless given"""

    @property
    def halfwidth(self) -> float:
        """Of the 95 % interval of the difference on other text of the same kind (Student's t)."""
        return float(scipy.special.stdtrit((self.effective or self.count) - 1, 0.975)) * self.se


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm's final values, by seed. Failed runs are counted, never averaged; missing ones have no value yet."""

    name: str
    values: Mapping[str, float]
    failed: int = 0
    missing: int = 0
    end: float | None = None
    """step at which its runs end, where the table holds steps"""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def declared(self) -> int:
        """Runs that exist or should."""
        return self.n + self.failed + self.missing

    @property
    def array(self) -> NDArray[np.float64]:
        return np.array(list(self.values.values()), dtype=np.float64)

    @property
    def mean(self) -> float:
        return float(self.array.mean()) if self.n else math.nan

    @property
    def sd(self) -> float:
        if self.n < 2:
            return math.nan
        return 0.0 if no_spread(self.array) else float(self.array.std(ddof=1))


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A contrast as declared before looking: the sum of `weights` x the arms' means, the weights adding up to 0."""

    arm: str
    against: str
    weights: Mapping[str, float]
    """by arm; a pair has 1 and -1, the effects of a factorial design have more"""

    @classmethod
    def pair(cls, arm: str, against: str) -> Declared:
        """One arm against another."""
        return cls(arm=arm, against=against, weights={arm: 1.0, against: -1.0})

    @property
    def is_pair(self) -> bool:
        """Whether it compares two arms and nothing else."""
        return list(self.weights.items()) == [(self.arm, 1.0), (self.against, -1.0)]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What was declared before looking: arguments of `compare`, unless stated otherwise."""

    smallest_effect: float
    alpha: float = 0.05
    unit: str = "nats"
    higher_is_better: bool = False
    noise: Noise | None = None
    exploratory: Mapping[str, str] = field(default_factory=dict)
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    unfair: Mapping[tuple[str, str], str] = field(default_factory=dict)
    late: Mapping[tuple[str, str], str] = field(default_factory=dict)
    dropped: int = 0
    searches: Mapping[str, RateSearch] = field(default_factory=dict)
    text: Mapping[tuple[str, str], TextNoise] = field(default_factory=dict)
    coming: Sequence[int] | None = None
    """seeds per arm at which open contrasts are judged again; None where any number may be added"""
    force_exploratory: bool = False
    screen: bool = False
    scope: Sequence[str] = ()
    look: str = ""
    """which of several looks this is, for the verdict"""
    sensitivity: bool = True


Action = Literal["keep", "drop", "either", "add seeds", "confirm", "finish", "refine rates", "repair", "stop"]
"""What to do after a verdict: take the arm over; leave it out; choose by cost; train more seeds; train anew on fresh
seeds; train the runs that are missing; search its rate more finely; remove what bars a verdict; leave it open."""


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """What a verdict suggests to do next, for programs and as a clause."""

    action: Action
    text: str
    seeds: int | None = None
    """seeds per arm, in all ("add seeds") or fresh ones ("confirm"), where that is known"""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One judged contrast. Numbers that cannot be computed are NaN."""

    arm: str
    against: str
    n_arm: int
    n_against: int
    mean_arm: float
    mean_against: float
    sd_arm: float
    sd_against: float
    failed_arm: int
    failed_against: int
    difference: float
    """arm minus against, over the runs that did not fail"""
    low: float
    high: float
    """adjusted for the family, at the level at which the verdict was decided"""
    joint_low: float
    joint_high: float
    """the same at 1 - alpha / m: these intervals of all contrasts hold together"""
    raw_low: float
    raw_high: float
    p: float
    p_holm: float
    p_equivalence_holm: float
    in_noise_sd: float
    """the difference in sds of the noise floor; NaN without one"""
    detectable: float
    """true difference that these seeds find with 80 % power, at the family's level"""
    detectable_upper: float
    """the same with the sd at its upper 80 % limit"""
    exaggeration: float | None
    """for a small significant effect, the factor by which such effects are too large on average"""
    word: str
    survivors: str | None
    """the word that holds "conditional on not failing", where at most a quarter of the seeds failed"""
    reason: str | None
    """why the contrast is not comparable, unstable or exploratory"""
    verdict: str
    """the whole sentence, with its scope"""
    halfwidths: Mapping[str, float]
    """half the width of an interval by each source alone, where known: `seeds`, `search` of the rates, `text`"""
    notes: tuple[str, ...]
    sensitivity: dict[str, dict[str, float]]
    weights: Mapping[str, float]
    """of the arms' means in the difference: 1 and -1 for a pair"""
    at_least: float
    """size that the difference has at least, where its sign is known: the near end of the joint interval; else 0. NaN
    where nothing is claimed"""
    at_most: float
    """smallest X for which "no difference larger than X" would pass"""
    next: NextStep
    alpha: float
    """the level at which it was judged: smaller than the study's where several looks share it"""
    look: int | None = None
    """seeds per arm at the look of this verdict, where looks were declared"""
    settled: bool = True
    """whether no declared look is left for it"""
    next_look: int | None = None
    """seeds per arm at which it is judged again; None where decided, or where any number may be added"""
    next_alpha: float | None = None
    """the level of that look"""

    def __repr__(self) -> str:
        return f"<Contrast {self.arm} against {self.against}: {self.verdict}>"


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The judged contrasts of one study; `str()` gives one line for each."""

    contrasts: tuple[Contrast, ...]
    arms: tuple[ArmResult, ...]
    baseline: str
    smallest_effect: float
    alpha: float
    unit: str
    metric: str | None
    """None for the column `value`"""
    higher_is_better: bool
    scope: tuple[str, ...]
    """where it holds: size, tokens, data, optimizer; whether all arms shared one rate"""
    caveat: str | None
    extendable: bool = False
    """whether the level includes seeds that may be added after a verdict"""
    dropped: int = 0
    """contrasts that are no longer compared and still count in the family"""

    @property
    def members(self) -> int:
        """Contrasts that the family is adjusted for."""
        return len(self.contrasts) + self.dropped

    def __repr__(self) -> str:
        words = ", ".join(f"{c.arm} {c.word}" for c in self.contrasts)
        return f"<Verdicts against {self.baseline}: {words or 'no contrast'}>"

    def _repr_html_(self) -> str:
        rows = [
            (c.arm, c.against, signed(c.difference), interval(c.low, c.high), f"{c.p_holm:.2g}", c.word)
            for c in self.contrasts
        ]
        return html_table(("arm", "against", f"difference, {self.unit}", "interval", "Holm p", "verdict"), rows)

    def __str__(self) -> str:
        if not self.contrasts:
            return f"no contrast: the table holds no arm beside '{self.baseline}'"
        return "\n".join(f"{c.arm} against {c.against}: {c.verdict}" for c in self.contrasts)

    @property
    def read_as(self) -> str:
        """How the values were read: `val/loss at the last step, lower is better, unit nats`."""
        at = " at the last step" if any(arm.end is not None for arm in self.arms) else ""
        better = "higher" if self.higher_is_better else "lower"
        return f"{self.metric or 'value'}{at}, {better} is better, unit {self.unit}"

    def table(self) -> pd.DataFrame:
        """One row per contrast: every number, the word, and the p value of each sensitivity estimator."""
        import pandas as pd  # slow to import, and not needed by plans

        rows = []
        for contrast in self.contrasts:
            row = asdict(contrast)
            others = row.pop("sensitivity")
            estimators = {f"p_{n}": others.get(n, {}).get("p", math.nan) for n in ("paired", "blocked", "permutation")}
            named = {"notes": "; ".join(row["notes"]), "next": contrast.next.action}
            rows.append(row | named | estimators)
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps(..., allow_nan=False)`; numbers that are not finite are null."""
        arms = [asdict(arm) | {"n": arm.n, "mean": arm.mean, "sd": arm.sd} for arm in self.arms]
        names = ("baseline", "smallest_effect", "alpha", "unit", "metric", "higher_is_better", "scope", "caveat")
        record = {name: getattr(self, name) for name in names}
        plain: dict[str, Any] = as_json(record | {"arms": arms, "contrasts": [asdict(c) for c in self.contrasts]})
        return plain


def as_json(value: Any) -> Any:
    """Plain data for a JSON file: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
