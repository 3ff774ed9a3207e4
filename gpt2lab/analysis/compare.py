"""`compare`: judges the contrasts of a table of final values; and the checks of its arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from gpt2lab.analysis.best_rate import RateSearch
from gpt2lab.analysis.judging import judge, judge_looks
from gpt2lab.analysis.metric_names import reading_of
from gpt2lab.analysis.planning import declared_looks, extendable_looks
from gpt2lab.analysis.table import Source, Value, in_order, read, refuse_copies
from gpt2lab.analysis.verdicts import FEWEST, ArmResult, Declared, Noise, Terms, TextNoise, Verdicts
from gpt2lab.errors import ConfigError, Problem, unknown

MARGIN = 0.05
"""A run that ends less than this below the unigram cross-entropy, in nats, counts as failed."""

SHARED_RATE = "at the shared rate"

DeclaredContrast = Sequence[str] | Mapping[str, Any]
"""Two arms, or the weights of several."""


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
    contrasts: Sequence[DeclaredContrast] | None = None,
    unigram: float | None = None,
    noise: Noise | None = None,
    exploratory: Mapping[str, str] | None = None,
    not_comparable: Mapping[str, str] | None = None,
    screen: bool = False,
    looks: Sequence[int] | None = None,
    extendable: bool = False,
    baseline_seeds: int | None = None,
    unfair: Mapping[tuple[str, str], str] | None = None,
    late: Mapping[tuple[str, str], str] | None = None,
    dropped: int = 0,
    searches: Mapping[str, RateSearch] | None = None,
    text: Mapping[tuple[str, str], TextNoise] | None = None,
    force_exploratory: bool = False,
    sensitivity: bool = True,
    scope: str = "",
    at_shared_rate: bool = False,
    caveat: str | None = None,
    unit: str | None = None,
    higher_is_better: bool | None = None,
) -> Verdicts:
    """Judge every arm against the baseline (or the declared `contrasts`) as one family.

    frame:           DataFrame, CSV file or list of rows with the columns arm, seed (or run) and value (or `metric`);
                     a blank value is a run without a result, NaN or infinity a failed one. A column not_comparable
                     says why an arm cannot be compared. With a column of steps the last step counts, and arms that end
                     at different steps are not comparable. Or the table of `mlflow.search_runs`: FAILED and KILLED
                     runs failed, RUNNING and SCHEDULED ones have no result; a metric that a finished run lacks is NaN
                     there, and thus a failure. Or a table that Weights & Biases exports.
    arm, seed, value: the columns that hold them, where they have other names; those of MLflow with or without prefix.
    smallest_effect: X, the smallest difference that matters, in the metric's unit; declared before looking.
    contrasts:       declared before looking; the family of Holm's adjustment. Pairs (arm, against), or
                     mappings {"arm", "against", "weights"} of a weighted sum of arms, such as a main effect.
    unigram:         cross-entropy in nats of token frequencies alone: a run not at least 0.05 below it failed.
    noise:           repeats of the baseline, to borrow from when an arm has one or two seeds, and to plan by.
    exploratory, not_comparable: arm -> why its contrasts are exploratory, or not comparable.
    screen:          the whole study is a screen: all contrasts are exploratory.
    looks:           seeds per arm at which it was declared to look, as (3, 5, 8); seeds count in the order of
                     their numbers, the runs of an MLflow table as they were begun.
    extendable:      seeds may be added after a verdict: contrasts that are still open are judged again at twice and at
                     four times the last look, and a fifth of alpha is kept back for that.
    baseline_seeds:  runs of the baseline that count at the first look; as many as of any arm unless given.
    unfair:          (arm, against) -> why that contrast alone is exploratory, such as at a rate that suits one arm.
    late:            (arm, against) -> why that contrast is exploratory and not even tested.
    dropped:         contrasts that were declared before results were seen and are no longer compared: they stay members
                     of the family.
    searches:        arm -> the search that its learning rate is from; differences are then at each arm's best rate.
    text:            (arm, against) -> the standard error of the difference over validation documents.
    force_exploratory: report numbers where arms are not comparable, as exploratory.
    sensitivity:     compute other estimators as well; they decide no verdict and take most of the time.
    scope, at_shared_rate, caveat: appended to each sentence.
    unit:            of the metric, where its name does not tell: see table.py.
    higher_is_better: which way the metric is better, where its name does not tell. The column `value` is a loss in
                     nats, lower is better, unless stated otherwise.
    Raises ConfigError for an invalid table or arguments.
    """
    _check(locals())
    results = read(frame, metric, arm=arm, seed=seed, value=value)
    table, named = in_order(results) if looks else results.runs, results.metric
    reading = reading_of(named, higher_is_better, unit)
    if reading.continuous:
        refuse_copies(results)
    if unigram is not None and (reading.higher_is_better or not reading.unit.startswith("nats")):
        problem = f"it bounds a loss in nats, which '{named or 'value'}' is not"
        raise ConfigError(problem, where="unigram", hint="leave it out")
    if baseline not in table:
        raise ConfigError(unknown("baseline", baseline, table), hint=f"baseline={next(iter(table))!r}")
    declared = (
        [Declared.pair(a, baseline) for a in table if a != baseline] if contrasts is None else _declared(contrasts)
    )
    for name in [name for contrast in declared for name in contrast.weights if name not in table]:
        table[name] = {}  # declared, but without a row yet
    reasons = {"exploratory": exploratory or {}, "not_comparable": not_comparable or {}}
    absent = [Problem(key, unknown("arm", arm, table)) for key, of in reasons.items() for arm in of if arm not in table]
    if absent:
        raise ConfigError(absent)
    barred = {**results.not_comparable, **(not_comparable or {})}
    refusals = {name: f"not comparable: {why}" for name, why in barred.items()} if force_exploratory else {}
    scope_parts = tuple(filter(None, [scope.strip().rstrip(";."), SHARED_RATE if at_shared_rate else ""]))
    caveat = (caveat or "").strip() or None
    terms = Terms(
        smallest_effect=smallest_effect,
        alpha=alpha,
        unit=reading.unit,
        higher_is_better=reading.higher_is_better,
        force_exploratory=force_exploratory,
        noise=noise,
        exploratory={**(exploratory or {}), **refusals},
        unfair=unfair or {},
        late=late or {},
        dropped=dropped,
        searches=searches or {},
        text=text or {},
        not_comparable={} if force_exploratory else barred,
        sensitivity=sensitivity,
        screen=screen,
        scope=(*scope_parts, *([caveat] if caveat else [])),
    )

    def arms_at(n: int | None) -> dict[str, ArmResult]:
        """The arms after their first n runs, or after all; the baseline after those that it has beyond the arms'."""
        counted = dict.fromkeys(table, n)
        if n is not None and baseline_seeds is not None:
            counted[baseline] = max(n, baseline_seeds)
        first = {name: dict(itertools.islice(runs.items(), counted[name])) for name, runs in table.items()}
        return {name: _arm(name, runs, unigram, results.ends.get(name)) for name, runs in first.items()}

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
        scope=scope_parts,
        caveat=caveat,
        extendable=extendable,
        dropped=dropped,
    )


def failure_ceiling_of(floors: Mapping[str, float] | None) -> float:
    """The final loss from which on a run has learned nothing, by the floors of its data; infinity without a floor."""
    return (floors or {}).get("unigram", math.inf) - MARGIN


def _arm(name: str, runs: Mapping[str, Value], unigram: float | None, end: float | None) -> ArmResult:
    """Sort an arm's runs into values, failures and runs without a value."""
    ceiling = failure_ceiling_of({} if unigram is None else {"unigram": unigram})
    present = {seed: value for seed, value in runs.items() if value is not None}
    good = {seed: value for seed, value in present.items() if math.isfinite(value) and value < ceiling}
    return ArmResult(name=name, values=good, failed=len(present) - len(good), missing=len(runs) - len(present), end=end)


def _declared(contrasts: Sequence[DeclaredContrast]) -> list[Declared]:
    if isinstance(contrasts, str) or not isinstance(contrasts, Sequence):
        raise ConfigError(f"a list of contrasts is expected, not {contrasts!r:.60}", where="contrasts")
    declared: list[Declared] = []
    for contrast in contrasts:
        added = _effect(contrast) if isinstance(contrast, Mapping) else _pair(contrast)
        turned = {name: -weight for name, weight in added.weights.items()}
        if any(dict(earlier.weights) in (dict(added.weights), turned) for earlier in declared):
            raise ConfigError(f"{added.arm} and {added.against} are compared twice", where="contrasts")
        declared.append(added)
    return declared


def _pair(contrast: Sequence[str]) -> Declared:
    pair = isinstance(contrast, Sequence) and not isinstance(contrast, str) and len(contrast) == 2
    if not pair or contrast[0] == contrast[1] or not all(isinstance(name, str) for name in contrast):
        raise ConfigError(f"a contrast is a pair of two arms, not {contrast!r:.60}", where="contrasts")
    return Declared.pair(contrast[0], contrast[1])


def _effect(contrast: Mapping[str, Any]) -> Declared:
    arm, against, weights_given = (contrast.get(key) for key in ("arm", "against", "weights"))
    named = isinstance(arm, str) and isinstance(against, str)
    if not named or not isinstance(weights_given, Mapping) or not all(map(_number, weights_given.values())):
        problem = "a mapping has arm, against and weights, as {'rotary': 1.0, 'learned': -1.0}"
        raise ConfigError(f"{problem}; not {dict(contrast)!r:.90}", where="contrasts")
    weights = {str(name): float(weight) for name, weight in weights_given.items()}
    if len(weights) < 2 or abs(sum(weights.values())) > 1e-9 or not all(weights.values()):
        problem = f"weights that add up to 0 are expected, none of them 0, for two arms or more; not {weights}"
        raise ConfigError(problem, where="contrasts")
    return Declared(arm=str(arm), against=str(against), weights=weights)


# Arguments.


def _number(x: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _count(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _optional(*types: type) -> Callable[[Any], bool]:
    return lambda x: x is None or isinstance(x, types)


def _looks(x: Any) -> bool:
    if x is None:
        return True
    if not isinstance(x, Sequence) or not all(map(_count, x)):
        return False
    return all(n >= FEWEST for n in x) and all(n < later for n, later in itertools.pairwise(x))


def _reasons(x: Any) -> bool:
    reasons = isinstance(x, Mapping) and all(isinstance(k, str) and isinstance(v, str | None) for k, v in x.items())
    return x is None or reasons


_FLAGS = ("extendable", "screen", "force_exploratory", "sensitivity", "at_shared_rate")
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "baseline": ("the name of an arm is expected", lambda x: isinstance(x, str)),
    "smallest_effect": ("a positive difference is expected", lambda x: _number(x) and x > 0),
    "alpha": ("a level between 0 and 0.5 is expected", lambda x: _number(x) and 0 < x < 0.5),
    "metric": ("a name is expected", _optional(str)),
    **dict.fromkeys(("arm", "seed", "value"), ("the name of a column is expected", _optional(str))),
    "unigram": ("a loss in nats is expected", lambda x: x is None or _number(x)),
    "noise": ("a Noise is expected", _optional(Noise)),
    **dict.fromkeys(
        ("exploratory", "not_comparable"),
        ("a reason for each arm, as {'rotary': 'other data'}, is expected", _reasons),
    ),
    "looks": (f"rising numbers of seeds are expected, from {FEWEST} on", _looks),
    **dict.fromkeys(_FLAGS, ("True or False is expected", lambda x: isinstance(x, bool))),
    "baseline_seeds": ("a number of seeds is expected", lambda x: x is None or (_count(x) and x > 0)),
    "dropped": ("a number of contrasts is expected", lambda x: _count(x) and x >= 0),
    **dict.fromkeys(("unfair", "late", "text"), ("a mapping from (arm, against) is expected", _optional(Mapping))),
    "searches": ("a mapping from arms is expected", _optional(Mapping)),
    "higher_is_better": ("True or False is expected", _optional(bool)),
    "scope": ("text is expected", lambda x: isinstance(x, str)),
    **dict.fromkeys(("caveat", "unit"), ("text is expected", _optional(str))),
}
"""Argument -> the expectation as a message, and its test."""


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError with every argument that is not as expected."""
    problems = [
        Problem(name, f"{expectation}, not {arguments[name]!r:.60}")
        for name, (expectation, fits) in KINDS.items()
        if not fits(arguments[name])
    ]
    if problems:
        raise ConfigError(problems)
