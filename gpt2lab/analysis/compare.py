"""`compare`: a table of final values in, a verdict in words for every contrast out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.analysis.judging import judge
from gpt2lab.analysis.looks import judge_looks
from gpt2lab.analysis.rows import Source, Value
from gpt2lab.analysis.table import read
from gpt2lab.analysis.verdicts import FEWEST, Arm, Contrast, Declared, Noise, Terms, as_json
from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.05
"""A run that ends less than this below the unigram cross-entropy, in nats, has learned nothing: it failed."""

SHARED_RATE = "at the shared rate"

Asked = Sequence[str] | Mapping[str, Any]
"""A contrast as declared: two arms, or the weights of several."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The judged contrasts of one study; `str()` gives one line for each."""

    contrasts: tuple[Contrast, ...]
    arms: tuple[Arm, ...]
    baseline: str
    smallest_effect: float
    alpha: float
    unit: str
    metric: str | None
    scope: tuple[str, ...]
    """where it holds: size, tokens, data, optimizer; whether all arms shared one rate"""
    caveat: str | None

    def __str__(self) -> str:
        if not self.contrasts:
            return f"no contrast: the table holds no arm beside '{self.baseline}'"
        return "\n".join(f"{c.arm} against {c.against}: {c.verdict}" for c in self.contrasts)

    def table(self) -> pd.DataFrame:
        """One row per contrast: every number, the word, and the p value of each sensitivity estimator."""
        rows = []
        for contrast in self.contrasts:
            row = asdict(contrast)
            others = row.pop("sensitivity")
            row["notes"] = "; ".join(row["notes"])
            rows.append(
                row | {f"p_{n}": others.get(n, {}).get("p", math.nan) for n in ("paired", "blocked", "permutation")}
            )
        import pandas as pd  # here and not above: plans need words, not frames, and it takes a quarter of a second

        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps(..., allow_nan=False)`; numbers that are not finite are null."""
        arms = [asdict(arm) | {"n": arm.n, "mean": arm.mean, "sd": arm.sd} for arm in self.arms]
        own = ("baseline", "smallest_effect", "alpha", "unit", "metric", "scope", "caveat")
        record = {name: getattr(self, name) for name in own}
        plain: dict[str, Any] = as_json(record | {"arms": arms, "contrasts": [asdict(c) for c in self.contrasts]})
        return plain


def compare(
    frame: Source,
    *,
    baseline: str,
    smallest_effect: float,
    alpha: float = 0.05,
    metric: str | None = None,
    arm: str | None = None,
    seed: str | None = None,
    value: str | None = None,
    contrasts: Sequence[Asked] | None = None,
    unigram: float | None = None,
    noise: Noise | None = None,
    exploratory: Mapping[str, str] | None = None,
    not_comparable: Mapping[str, str] | None = None,
    screen: bool = False,
    looks: Sequence[int] | None = None,
    force_exploratory: bool = False,
    sensitivity: bool = True,
    scope: str = "",
    at_shared_rate: bool = False,
    caveat: str | None = None,
    unit: str | None = None,
) -> Verdicts:
    """Judge every arm against the baseline (or the declared `contrasts`), as one family. Lower is better.

    frame:           DataFrame, CSV file or list of rows with the columns arm, seed (or run) and value (or `metric`);
                     a blank value is a run without a result, NaN or infinity a failed one. A column not_comparable
                     says why an arm cannot be compared. Or the table of `mlflow.search_runs`: FAILED and KILLED runs
                     failed, RUNNING and SCHEDULED ones have no result; a metric that a finished run lacks is NaN
                     there, and thus a failure.
    arm, seed, value: the columns that hold them, where they have other names; those of MLflow with or without prefix.
    smallest_effect: X, the smallest difference that matters, in the metric's unit; declared before looking.
    contrasts:       declared before looking; the family that Holm's adjustment covers. Pairs (arm, against), or
                     mappings {"arm", "against", "weights"} of a weighted sum of arms, such as a main effect.
    unigram:         cross-entropy in nats that letter frequencies alone reach: a run not at least 0.05 below it failed.
    noise:           repeats of the baseline, to borrow from when an arm has one or two seeds, and to plan by.
    exploratory, not_comparable: arm -> why its contrasts may claim nothing, or cannot be compared.
    screen:          the whole study is a screen; nothing in it is a finding.
    looks:           seeds per arm at which it was declared to look, as (3, 5, 8); runs count in the table's order.
    force_exploratory: show numbers where arms are not comparable, and claim nothing.
    sensitivity:     compute other estimators beside; they decide no word and take most of the time.
    scope, at_shared_rate, caveat: what each sentence ends with.
    unit:            of the metric; nats unless the metric is called bits_per_byte.
    Raises ConfigError for a table or arguments that cannot mean anything.
    """
    _check(smallest_effect, alpha, looks)
    given = read(frame, metric, arm=arm, seed=seed, value=value)
    table, named = given.runs, given.metric
    if baseline not in table:
        raise ConfigError(unknown("baseline", baseline, table), hint=f"baseline={next(iter(table))!r}")
    declared = [Declared.pair(a, baseline) for a in table if a != baseline] if contrasts is None else _asked(contrasts)
    for name in [name for one in declared for name in one.weights if name not in table]:
        table[name] = {}  # declared, but not one row yet
    barred = {**given.not_comparable, **(not_comparable or {})}
    refusals = {name: f"not comparable: {why}" for name, why in barred.items()} if force_exploratory else {}
    where = tuple(filter(None, [scope.strip().rstrip(";."), SHARED_RATE if at_shared_rate else ""]))
    caveat = (caveat or "").strip() or None
    terms = Terms(
        smallest_effect=smallest_effect,
        alpha=alpha,
        unit=unit or ("bits per byte" if "bits_per_byte" in (named or "") else "nats"),
        noise=noise,
        exploratory={**(exploratory or {}), **refusals},
        not_comparable={} if force_exploratory else barred,
        sensitivity=sensitivity,
        screen=screen,
        scope=(*where, *([caveat] if caveat else [])),
    )

    def arms_at(n: int | None) -> dict[str, Arm]:
        """The arms after their first n runs, or after all."""
        return {name: _arm(name, dict(itertools.islice(runs.items(), n)), unigram) for name, runs in table.items()}

    judged = judge_looks(arms_at, declared, terms, looks) if looks else judge(arms_at(None), declared, terms)[0]
    return Verdicts(
        contrasts=tuple(judged),
        arms=tuple(arms_at(None).values()),
        baseline=baseline,
        smallest_effect=smallest_effect,
        alpha=alpha,
        unit=terms.unit,
        metric=named,
        scope=where,
        caveat=caveat,
    )


def _check(smallest_effect: float, alpha: float, looks: Sequence[int] | None) -> None:
    problems = []
    if not (math.isfinite(smallest_effect) and smallest_effect > 0):
        problems.append(Problem("smallest_effect", f"a positive difference is expected, not {smallest_effect}"))
    if not 0 < alpha < 0.5:
        problems.append(Problem("alpha", f"a level between 0 and 0.5 is expected, not {alpha}"))
    if looks and (list(looks) != sorted(set(looks)) or looks[0] < FEWEST):
        listed = ", ".join(map(str, looks))
        problems.append(Problem("looks", f"rising numbers of seeds are expected, from {FEWEST} on, not {listed}"))
    if problems:
        raise ConfigError(problems)


def _arm(name: str, runs: Mapping[str, Value], unigram: float | None) -> Arm:
    """Sort an arm's runs into values, failures and runs without a value."""
    ceiling = math.inf if unigram is None else unigram - MARGIN
    present = {seed: value for seed, value in runs.items() if value is not None}
    good = {seed: value for seed, value in present.items() if math.isfinite(value) and value < ceiling}
    return Arm(name=name, values=good, failed=len(present) - len(good), missing=len(runs) - len(present))


def _asked(contrasts: Sequence[Asked]) -> list[Declared]:
    found: list[Declared] = []
    for contrast in contrasts:
        one = _effect(contrast) if isinstance(contrast, Mapping) else _pair(contrast)
        if any(_same(one, other) for other in found):
            raise ConfigError(f"{one.arm} and {one.against} are compared twice", where="contrasts")
        found.append(one)
    return found


def _pair(contrast: Sequence[str]) -> Declared:
    if isinstance(contrast, str) or len(contrast) != 2 or contrast[0] == contrast[1]:
        raise ConfigError(f"a contrast is a pair of two arms, not {contrast!r}", where="contrasts")
    return Declared.pair(contrast[0], contrast[1])


def _effect(contrast: Mapping[str, Any]) -> Declared:
    weights = {str(name): float(weight) for name, weight in contrast.get("weights", {}).items()}
    if len(weights) < 2 or abs(sum(weights.values())) > 1e-9 or not all(weights.values()):
        what = f"weights that add up to 0 are expected, none of them 0, for two arms or more; not {weights}"
        raise ConfigError(what, where="contrasts")
    return Declared(arm=str(contrast["arm"]), against=str(contrast["against"]), weights=weights)


def _same(one: Declared, other: Declared) -> bool:
    turned = {name: -weight for name, weight in other.weights.items()}
    return dict(one.weights) in (dict(other.weights), turned)
