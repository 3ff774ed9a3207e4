"""What the intervals of a study are made of, and which step would narrow each most for its time. Draws nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.best_rate import ErrorBudget, WeightedArm, error_budget
from gpt2lab.analysis.results import Study, StudyRun, cleaned, collect, judge_runs, searches
from gpt2lab.analysis.verdicts import FEWEST
from gpt2lab.store import Store


def pair_of(contrast: Contrast) -> str:
    return f"{contrast.arm} against {contrast.against}"


def error_budgets(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, store: Store) -> dict[str, ErrorBudget]:
    """`rotary against learned` -> its budget, for contrasts that were tested by their own noise, from the seeds that
    they were judged by."""
    arms, rates = {arm.name: arm for arm in verdicts.arms}, searches(study, store)
    seconds = {arm: _seconds(runs, arm) for arm in study.arms}
    members = len(verdicts.contrasts) + (len(study.history.dropped) if study.history else 0)
    budgets = {}
    for c in verdicts.contrasts:
        few = min(c.n_arm, c.n_against)
        if not math.isfinite(c.p_holm) or few < FEWEST or not all(seconds[name] for name in c.weights):
            continue
        weighted = [
            WeightedArm(
                weight=weight, search=rates.get(name), losses=arms[name].array[: c.n_arm if weight > 0 else c.n_against]
            )
            for name, weight in c.weights.items()
        ]
        budgets[pair_of(c)] = error_budget(
            weighted, c.halfwidths, [seconds[name] for name in c.weights], level=c.alpha / members,
            more=max(0, (c.next_look or 0) - few), next_level=c.next_alpha and c.next_alpha / members,
        )  # fmt: skip
    return budgets


def _seconds(runs: Sequence[StudyRun], arm: str) -> float:
    """Median training time of an arm's runs; 0 where none is known."""
    known = [r.result["tokens"] / r.result["tokens_per_second"] for r in runs
             if r.arm == arm and r.result.get("tokens") and r.result.get("tokens_per_second")]  # fmt: skip
    return statistics.median(known) if known else 0.0


def next_steps(name: str, store: Store) -> list[str]:
    """For every contrast of a recorded study that is open: what would narrow its interval most for its time."""
    if name not in store.studies():
        return []
    study = cleaned(store.study(name))
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, sensitivity=False)
    budgets = error_budgets(study, runs, verdicts, store)
    unresolved = [pair_of(c) for c in verdicts.contrasts if c.word.startswith("inconclusive") and pair_of(c) in budgets]
    steps = {pair: budgets[pair].advice() for pair in unresolved}
    return [f"open so far: {pair}; narrows it most: {step}" for pair, step in steps.items() if step]
