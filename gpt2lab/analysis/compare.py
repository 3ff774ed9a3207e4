"""`compare`: a table of final values in, a verdict in words for every contrast out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.analysis import arguments, metrics
from gpt2lab.analysis.best_rate import Search
from gpt2lab.analysis.judging import judge
from gpt2lab.analysis.looks import declared_looks, extendable_looks, judge_looks
from gpt2lab.analysis.rows import Source, Value
from gpt2lab.analysis.table import in_order, read, refuse_copies
from gpt2lab.analysis.verdicts import Arm, Contrast, Declared, Noise, Terms, TextNoise, as_json
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
    """None for the column `value`"""
    higher_is_better: bool
    scope: tuple[str, ...]
    """where it holds: size, tokens, data, optimizer; whether all arms shared one rate"""
    caveat: str | None
    extendable: bool = False
    """whether the level includes seeds that may be added after a verdict"""
    dropped: int = 0
    """contrasts that were declared once and still count"""

    @property
    def members(self) -> int:
        """Contrasts that the family is adjusted for."""
        return len(self.contrasts) + self.dropped

    @property
    def provided(self) -> str:
        """What the error rates take for granted."""
        if self.extendable:
            return "with the seeds that may be added later"
        return "provided that the table lists every run and that nobody looked at it before the last one"

    def __str__(self) -> str:
        if not self.contrasts:
            return f"no contrast: the table holds no arm beside '{self.baseline}'"
        return "\n".join(f"{c.arm} against {c.against}: {c.verdict}" for c in self.contrasts)

    @property
    def read_as(self) -> str:
        """`val/loss at the last step, lower is better, unit nats`: how the values were read."""
        at = " at the last step" if any(arm.end is not None for arm in self.arms) else ""
        better = "higher" if self.higher_is_better else "lower"
        return f"{self.metric or 'value'}{at}, {better} is better, unit {self.unit}"

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
        own = ("baseline", "smallest_effect", "alpha", "unit", "metric", "higher_is_better", "scope", "caveat")
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
    extendable: bool = False,
    baseline_seeds: int | None = None,
    late: Mapping[tuple[str, str], str] | None = None,
    dropped: int = 0,
    searches: Mapping[str, Search] | None = None,
    text: Mapping[tuple[str, str], TextNoise] | None = None,
    force_exploratory: bool = False,
    sensitivity: bool = True,
    scope: str = "",
    at_shared_rate: bool = False,
    caveat: str | None = None,
    unit: str | None = None,
    higher_is_better: bool | None = None,
) -> Verdicts:
    """Judge every arm against the baseline (or the declared `contrasts`), as one family.

    frame:           DataFrame, CSV file or list of rows with the columns arm, seed (or run) and value (or `metric`);
                     a blank value is a run without a result, NaN or infinity a failed one. A column not_comparable
                     says why an arm cannot be compared. With a column of steps the last step counts, and arms that end
                     at different steps are not comparable. Or the table of `mlflow.search_runs`: FAILED and KILLED
                     runs failed, RUNNING and SCHEDULED ones have no result; a metric that a finished run lacks is NaN
                     there, and thus a failure. Or a table that Weights & Biases exports.
    arm, seed, value: the columns that hold them, where they have other names; those of MLflow with or without prefix.
    smallest_effect: X, the smallest difference that matters, in the metric's unit; declared before looking.
    contrasts:       declared before looking; the family that Holm's adjustment covers. Pairs (arm, against), or
                     mappings {"arm", "against", "weights"} of a weighted sum of arms, such as a main effect.
    unigram:         cross-entropy in nats that letter frequencies alone reach: a run not at least 0.05 below it failed.
    noise:           repeats of the baseline, to borrow from when an arm has one or two seeds, and to plan by.
    exploratory, not_comparable: arm -> why its contrasts may claim nothing, or cannot be compared.
    screen:          the whole study is a screen; nothing in it is a finding.
    looks:           seeds per arm at which it was declared to look, as (3, 5, 8); seeds count in the order of
                     their numbers, the runs of an MLflow table as they were begun.
    extendable:      seeds may be added after a verdict: contrasts that are still open are judged again at twice and at
                     four times the last look, and a fifth of alpha is kept back for that.
    baseline_seeds:  runs of the baseline that count at the first look; as many as of any arm unless given.
    late:            (arm, against) -> why that contrast alone may claim nothing.
    dropped:         contrasts that were declared before results were seen and are no longer compared: they stay members
                     of the family.
    searches:        arm -> the search that its learning rate is from; differences are then at each arm's own best rate.
    text:            (arm, against) -> the standard error of the difference over validation documents.
    force_exploratory: show numbers where arms are not comparable, and claim nothing.
    sensitivity:     compute other estimators beside; they decide no word and take most of the time.
    scope, at_shared_rate, caveat: what each sentence ends with.
    unit:            of the metric, where its name does not tell: see metrics.py.
    higher_is_better: which way the metric is better, where its name does not tell. The column `value` is a loss in
                     nats, lower is better, unless told otherwise.
    Raises ConfigError for a table or arguments that cannot mean anything.
    """
    arguments.check(locals())
    given = read(frame, metric, arm=arm, seed=seed, value=value)
    table, named = in_order(given) if looks else given.runs, given.metric
    reading = metrics.reading(named, higher_is_better, unit)
    if reading.continuous:
        refuse_copies(given)
    if unigram is not None and (reading.higher_is_better or not reading.unit.startswith("nats")):
        what = f"it bounds a loss in nats, which '{named or 'value'}' is not"
        raise ConfigError(what, where="unigram", hint="leave it out")
    if baseline not in table:
        raise ConfigError(unknown("baseline", baseline, table), hint=f"baseline={next(iter(table))!r}")
    declared = [Declared.pair(a, baseline) for a in table if a != baseline] if contrasts is None else _asked(contrasts)
    for name in [name for one in declared for name in one.weights if name not in table]:
        table[name] = {}  # declared, but not one row yet
    reasons = {"exploratory": exploratory or {}, "not_comparable": not_comparable or {}}
    absent = [Problem(key, unknown("arm", arm, table)) for key, of in reasons.items() for arm in of if arm not in table]
    if absent:
        raise ConfigError(absent)
    barred = {**given.not_comparable, **(not_comparable or {})}
    refusals = {name: f"not comparable: {why}" for name, why in barred.items()} if force_exploratory else {}
    where = tuple(filter(None, [scope.strip().rstrip(";."), SHARED_RATE if at_shared_rate else ""]))
    caveat = (caveat or "").strip() or None
    terms = Terms(
        smallest_effect=smallest_effect,
        alpha=alpha,
        unit=reading.unit,
        higher_is_better=reading.higher_is_better,
        force_exploratory=force_exploratory,
        noise=noise,
        exploratory={**(exploratory or {}), **refusals},
        late=late or {},
        dropped=dropped,
        searches=searches or {},
        text=text or {},
        not_comparable={} if force_exploratory else barred,
        sensitivity=sensitivity,
        screen=screen,
        scope=(*where, *([caveat] if caveat else [])),
    )

    def arms_at(n: int | None) -> dict[str, Arm]:
        """The arms after their first n runs, or after all; the baseline after those that it has beyond the arms'."""
        counted = dict.fromkeys(table, n)
        if n is not None and baseline_seeds is not None:
            counted[baseline] = max(n, baseline_seeds)
        first = {name: dict(itertools.islice(runs.items(), counted[name])) for name, runs in table.items()}
        return {name: _arm(name, runs, unigram, given.ends.get(name)) for name, runs in first.items()}

    if looks:
        stages = (extendable_looks if extendable else declared_looks)(looks, alpha)
        judged = judge_looks(arms_at, declared, terms, stages)
    else:
        judged = judge(arms_at(None), declared, terms)[0]
    return Verdicts(
        contrasts=tuple(judged),
        arms=tuple(arms_at(None).values()),
        baseline=baseline,
        smallest_effect=smallest_effect,
        alpha=alpha,
        unit=terms.unit,
        metric=named,
        higher_is_better=terms.higher_is_better,
        scope=where,
        caveat=caveat,
        extendable=extendable,
        dropped=dropped,
    )


def _arm(name: str, runs: Mapping[str, Value], unigram: float | None, end: float | None) -> Arm:
    """Sort an arm's runs into values, failures and runs without a value."""
    ceiling = math.inf if unigram is None else unigram - MARGIN
    present = {seed: value for seed, value in runs.items() if value is not None}
    good = {seed: value for seed, value in present.items() if math.isfinite(value) and value < ceiling}
    return Arm(name=name, values=good, failed=len(present) - len(good), missing=len(runs) - len(present), end=end)


def _asked(contrasts: Sequence[Asked]) -> list[Declared]:
    if isinstance(contrasts, str) or not isinstance(contrasts, Sequence):
        raise ConfigError(f"a list of contrasts is expected, not {contrasts!r:.60}", where="contrasts")
    found: list[Declared] = []
    for contrast in contrasts:
        one = _effect(contrast) if isinstance(contrast, Mapping) else _pair(contrast)
        if any(_same(one, other) for other in found):
            raise ConfigError(f"{one.arm} and {one.against} are compared twice", where="contrasts")
        found.append(one)
    return found


def _pair(contrast: Sequence[str]) -> Declared:
    pair = isinstance(contrast, Sequence) and not isinstance(contrast, str) and len(contrast) == 2
    if not pair or contrast[0] == contrast[1] or not all(isinstance(name, str) for name in contrast):
        raise ConfigError(f"a contrast is a pair of two arms, not {contrast!r:.60}", where="contrasts")
    return Declared.pair(contrast[0], contrast[1])


def _effect(contrast: Mapping[str, Any]) -> Declared:
    arm, against, given = (contrast.get(key) for key in ("arm", "against", "weights"))
    named = isinstance(arm, str) and isinstance(against, str)
    if not named or not isinstance(given, Mapping) or not all(map(arguments.number, given.values())):
        what = "a mapping has arm, against and weights, as {'rotary': 1.0, 'learned': -1.0}"
        raise ConfigError(f"{what}; not {dict(contrast)!r:.90}", where="contrasts")
    weights = {str(name): float(weight) for name, weight in given.items()}
    if len(weights) < 2 or abs(sum(weights.values())) > 1e-9 or not all(weights.values()):
        what = f"weights that add up to 0 are expected, none of them 0, for two arms or more; not {weights}"
        raise ConfigError(what, where="contrasts")
    return Declared(arm=str(arm), against=str(against), weights=weights)


def _same(one: Declared, other: Declared) -> bool:
    turned = {name: -weight for name, weight in other.weights.items()}
    return dict(one.weights) in (dict(other.weights), turned)
