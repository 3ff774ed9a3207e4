"""The arms and seeds of a study: as declared, as the noise floor requires, or as a time budget allows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpt2lab.analysis import calibration, planning
from gpt2lab.analysis.planning import extendable_looks
from gpt2lab.analysis.verdicts import Declared
from gpt2lab.basics.text import plural
from gpt2lab.errors import ConfigError
from gpt2lab.planning.ablation import LoadedAblation
from gpt2lab.planning.declaration import MAX_SEEDS
from gpt2lab.planning.noise import Floor

FEWEST = 3
MOST_AUTOMATIC = 20
"""Most seeds per arm that `auto` chooses; beyond, the plan says how many the smallest effect requires."""
MARGIN = 1.1  # factor on a suggested budget, since time estimates are rough


@dataclass(frozen=True)
class StudyScope:
    """The arms and seeds of a study, and descriptions of what was left out."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline_seeds: tuple[int, ...]
    left_out: tuple[str, ...] = ()


def fit(
    ablation: LoadedAblation,
    floor: Floor | None,
    run_seconds: Mapping[str, float],
    *,
    seconds: float | None,
    jobs: int,
    why_no_floor: str = "",
) -> StudyScope:
    """Choose arms and seeds.

    run_seconds: estimated time of one run of every arm. seconds: the budget. Among the choices that fit, the one with
    the largest expected number of significant contrasts if all arms differ by the smallest effect is taken. Arms are
    dropped from the end of the file, and fewer than 3 seeds are chosen only where no choice with 3 fits. Declared looks
    keep their seeds, except those at every number of seeds. Raises ConfigError when nothing fits, or when `auto` has no
    noise floor.
    """
    names, seeds = tuple(ablation.arms), ablation.seeds
    if seeds is None:
        seeds = tuple(range(_automatic(ablation, floor, why_no_floor)))
    whole = _scope(names, seeds, ablation.baseline_seeds)

    def time_of(scope: StudyScope) -> float:
        return study_seconds(ablation, scope, run_seconds, jobs)

    if seconds is None or time_of(whole) <= seconds:
        return whole
    options = list(_options(ablation, seeds))
    choices = [fitting[0] for scopes in options if (fitting := [s for s in scopes if time_of(s) <= seconds])]
    if not choices:
        least = min((scopes[-1] for scopes in options), key=time_of)
        minutes = math.ceil(MARGIN * time_of(least) / 60)
        study = f"{len(least.arms)} arms with {plural(len(least.seeds), 'seed')}"
        problem = f"not even {study} fit: they take about {plural(minutes, 'minute')} here"
        raise ConfigError(problem, where="--budget", hint=f"--budget {minutes}m")
    fewest = min(FEWEST, max(len(scope.seeds) for scope in choices))
    enough = [scope for scope in choices if len(scope.seeds) >= fewest]
    best = max(enough, key=lambda scope: _worth(ablation, floor, scope))
    return replace(best, left_out=tuple(_excluded(best, whole)))


def study_seconds(ablation: LoadedAblation, scope: StudyScope, run_seconds: Mapping[str, float], jobs: int) -> float:
    """Estimated time of all runs of a scope with `jobs` in parallel: the trials of searches or of the bracket (assumed
    not to be widened), then all seeds at all budgets; after a search every seed twice, since it is also trained at the
    settings as written."""
    trials, runs = [], []
    tune = ablation.tune
    trials_per_arm = tune.runs_per_arm if tune else 0
    for name in scope.arms:
        seeds = ablation.arms[name].seeds or (scope.baseline_seeds if name == ablation.baseline else scope.seeds)
        budgets = {1.0, *(ablation.budgets if name in ablation.budget_arms else ())}
        trials += [run_seconds[name]] * trials_per_arm
        runs += [budget * run_seconds[name] for budget in budgets for _ in seeds]
        runs += [run_seconds[name] for _ in seeds] if tune and tune.space else []
    return makespan(trials, jobs) + makespan(runs, jobs)


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Time until the last run ends if each starts, longest first, as soon as one of `jobs` slots is free."""
    ends = [0.0] * jobs
    for run in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + run)
    return max(ends)


def level_of(ablation: LoadedAblation) -> float:
    """The level at which each contrast is planned: that of a declared look, divided by the number of contrasts."""
    level = extendable_looks(ablation.looks or (FEWEST,), ablation.alpha)[0].level
    return level / max(1, len(ablation.contrasts))


def sizes(contrast: Declared, n: int, base: int, baseline: str) -> tuple[int, ...]:
    """Seeds of every arm in a contrast, at n per arm and `base` of the baseline."""
    return tuple(base if name == baseline else n for name in contrast.weights)


def family(ablation: LoadedAblation) -> Sequence[Declared]:
    """The contrasts; one arm against the baseline where none is declared."""
    return ablation.contrasts or (Declared.pair("an arm", ablation.baseline),)


def power(ablation: LoadedAblation, contrast: Declared, effect: float, n: int, base: int) -> float:
    """Power for a contrast of `effect` sd with n seeds per arm and `base` of the baseline; 0 for fewer than 2."""
    if n < 2:
        return 0.0
    weights = tuple(contrast.weights.values())
    return calibration.power(effect, sizes(contrast, n, base, ablation.baseline), weights, alpha=level_of(ablation))


def needed(ablation: LoadedAblation, floor: Floor) -> int:
    """Seeds per arm for 80 % power at the smallest effect in every contrast, by the floor's sd at its upper 80 %
    limit."""
    effect = ablation.smallest_effect / float(planning.sd_upper(floor.sd, floor.df))

    def enough(n: int) -> bool:
        base = max(n, ablation.baseline_seeds or 0)
        return all(power(ablation, contrast, effect, n, base) >= planning.POWER for contrast in family(ablation))

    return planning.smallest(enough)


def _automatic(ablation: LoadedAblation, floor: Floor | None, why_no_floor: str) -> int:
    """`needed`, limited to 3 to 20."""
    if floor is None:
        raise ConfigError(
            f"automatic seeds need the noise floor of {ablation.scale}" + (f": {why_no_floor}" if why_no_floor else ""),
            where="seeds",
            hint=ablation.noise_command,
        )
    return min(max(needed(ablation, floor), FEWEST), MOST_AUTOMATIC) if floor.sd > 0 else FEWEST


def _scope(arms: tuple[str, ...], seeds: tuple[int, ...], baseline_seeds: int | None) -> StudyScope:
    """The baseline has the arms' seeds and, where it has more, the next unused ones."""
    unused = [seed for seed in range(MAX_SEEDS) if seed not in seeds]
    return StudyScope(arms, seeds, (*seeds, *unused[: max((baseline_seeds or 0) - len(seeds), 0)]))


def _options(ablation: LoadedAblation, seeds: tuple[int, ...]) -> Iterator[list[StudyScope]]:
    """For every number of arms, with and without extra seeds of the baseline, every number of seeds, the most first."""
    treatments = [name for name in ablation.arms if name != ablation.baseline]
    fewest = 1 if ablation.design == "one factor" else len(treatments)  # other designs need all of their arms
    for count in range(fewest, len(treatments) + 1):
        chosen = {ablation.baseline, *treatments[:count]}
        arms = tuple(name for name in ablation.arms if name in chosen)
        fewest_seeds = ablation.looks[0] if ablation.until_decided else len(seeds) if ablation.looks else 1
        for baseline_seeds in dict.fromkeys((ablation.baseline_seeds, None)):
            yield [_scope(arms, seeds[:n], baseline_seeds) for n in range(len(seeds), fewest_seeds - 1, -1)]


def _worth(ablation: LoadedAblation, floor: Floor | None, scope: StudyScope) -> tuple[float, int, int, int]:
    """Sort key: expected number of significant contrasts if each is of the smallest effect (without a floor, the number
    of contrasts); then arms, seeds and seeds of the baseline."""
    reduced = replace(ablation, contrasts=tuple(c for c in ablation.contrasts if c.weights.keys() <= set(scope.arms)))
    expected, n, base = float(len(reduced.contrasts)), len(scope.seeds), len(scope.baseline_seeds)
    if floor is not None and floor.sd > 0:
        effect = ablation.smallest_effect / float(planning.sd_upper(floor.sd, floor.df))
        expected = sum(power(reduced, contrast, effect, n, base) for contrast in reduced.contrasts)
    return expected, len(scope.arms), n, base


def _excluded(scope: StudyScope, whole: StudyScope) -> Iterator[str]:
    """Descriptions of what a scope leaves out of the whole."""
    n, all_seeds, fewest = len(scope.seeds), len(whole.seeds), min(FEWEST, len(whole.seeds))
    dropped = [name for name in whole.arms if name not in scope.arms]
    if dropped:
        yield f"arm{'s' if len(dropped) > 1 else ''} {', '.join(dropped)}"
    if n < all_seeds:
        note = (
            f" (not even {fewest} fit, and below {FEWEST} no contrast is called better or worse)" if n < fewest else ""
        )
        yield f"{all_seeds - n} of {all_seeds} seeds per arm{note}"
    planned = len(whole.baseline_seeds)
    if planned > max(all_seeds, len(scope.baseline_seeds)):
        yield f"{planned - len(scope.baseline_seeds)} of {planned} seeds of the baseline"
