"""How many seeds, and of which arms: as declared, as the noise floor asks for, or as a budget of time allows.

Layer: plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpt2lab.ablation import LoadedAblation
from gpt2lab.analysis import planning
from gpt2lab.declaration import MAX_SEEDS
from gpt2lab.errors import ConfigError
from gpt2lab.noise import Floor

FEWEST = 3
MOST_AUTOMATIC = 20
"""Seeds per arm that `auto` goes up to; beyond, the plan says how many X would need."""


@dataclass(frozen=True)
class Scope:
    """The arms and seeds that a study will have, and what was left out of it, in words."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline_seeds: tuple[int, ...]
    left_out: tuple[str, ...] = ()


def fit(
    ablation: LoadedAblation, floor: Floor | None, run_seconds: Mapping[str, float], *, seconds: float | None, jobs: int
) -> Scope:
    """Choose arms and seeds.

    run_seconds: estimated time of one run of every arm. seconds: the budget; among what fits into it, the choice with
    the largest number of contrasts that are expected to be found if all arms differ by the smallest effect. Arms are
    dropped from the end of the file. Raises ConfigError when nothing fits, or when `auto` has no noise floor to go by.
    """
    names = tuple(ablation.arms)
    wanted = ablation.seeds if ablation.seeds is not None else tuple(range(_automatic(ablation, floor)))
    whole = Scope(names, wanted, _baseline_seeds(ablation, wanted))
    if seconds is None or _cost(ablation, whole, run_seconds) / jobs <= seconds:
        return whole
    choices = []
    for count in _arm_counts(ablation):
        kept = (ablation.baseline, *[name for name in names if name != ablation.baseline][: count - 1])
        arms = tuple(name for name in names if name in kept)
        for n in range(1 if len(wanted) < FEWEST else FEWEST, len(wanted) + 1):
            scope = Scope(arms, wanted[:n], _baseline_seeds(ablation, wanted[:n]))
            if _cost(ablation, scope, run_seconds) / jobs <= seconds:
                choices.append((_expected(ablation, floor, count - 1, n), count, n, scope))
    if not choices:
        least = min(
            _cost(ablation, Scope(arms, wanted[:FEWEST], wanted[:FEWEST]), run_seconds)
            for arms in (names, tuple(dict.fromkeys((ablation.baseline, *names)))[: min(_arm_counts(ablation))])
        )
        hours = least / jobs / 3600
        raise ConfigError(
            f"not even {FEWEST} seeds of the smallest design fit: they need about {hours:.2g} hours here",
            where="--budget",
            hint=f"--budget {hours * 1.1:.2g}h",
        )
    _, _, n, scope = max(choices, key=lambda choice: choice[:3])
    dropped = [name for name in names if name not in scope.arms]
    told = [f"{n} of {len(wanted)} seeds"] if n < len(wanted) else []
    told += [f"without {', '.join(dropped)}"] if dropped else []
    return Scope(scope.arms, scope.seeds, scope.baseline_seeds, tuple(told))


def _arm_counts(ablation: LoadedAblation) -> range:
    """How many arms a design may be cut to."""
    most = len(ablation.arms)
    return range(2, most + 1) if ablation.design == "one factor" else range(most, most + 1)


def _cost(ablation: LoadedAblation, scope: Scope, run_seconds: Mapping[str, float]) -> float:
    """Seconds of one job after another, with the bracket and the budget curve."""
    total = 0.0
    for name in scope.arms:
        seeds = len(scope.baseline_seeds if name == ablation.baseline else scope.seeds)
        others = sum(b for b in ablation.budgets if b != 1) if name in ablation.budget_arms else 0.0
        total += run_seconds[name] * (len(ablation.lr_bracket) + seeds * (1 + others))
    return total


def _expected(ablation: LoadedAblation, floor: Floor | None, contrasts: int, n: int) -> float:
    """How many contrasts would be found if every arm differed by X; without a floor, more arms and then more seeds."""
    if floor is None or not floor.sd > 0 or n < 2:
        return contrasts
    effect = ablation.smallest_effect / float(planning.sd_upper(floor.sd, floor.df))
    return contrasts * planning.power(effect, n, n, alpha=ablation.alpha / max(contrasts, 1))


def _automatic(ablation: LoadedAblation, floor: Floor | None) -> int:
    """Seeds per arm that find X with 80 % power, from the floor's sd at its upper 80 % limit; from 3 to 20."""
    if floor is None:
        raise ConfigError(
            f"automatic seeds need the noise floor of {ablation.scale}",
            where="--seeds",
            hint=f"gpt2lab noise {ablation.scale}",
        )
    if not floor.sd > 0:
        return FEWEST
    effect = ablation.smallest_effect / float(planning.sd_upper(floor.sd, floor.df))
    needed = planning.seeds_for_power(effect, alpha=ablation.alpha / max(1, len(ablation.contrasts)))
    return min(max(needed, FEWEST), MOST_AUTOMATIC)


def _baseline_seeds(ablation: LoadedAblation, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The arms' seeds and, where the baseline is to have more, the next ones after them."""
    extra = (ablation.baseline_seeds or 0) - len(seeds)
    free = [seed for seed in range(MAX_SEEDS) if seed not in seeds]
    return (*seeds, *free[: max(extra, 0)])
