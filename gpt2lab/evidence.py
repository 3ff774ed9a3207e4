"""What the runs of a study say beside its verdicts: what a difference is worth in compute, how few tokens reach a loss,
how early the order of arms shows, and how each rate was found. Description only: no word is decided here.

Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.best_rate import ErrorBudget, WeightedArm, error_budget
from gpt2lab.analysis.scaling import FRACTIONS, Agreement, Reach, agreement, reach
from gpt2lab.analysis.verdicts import FEWEST, TextNoise
from gpt2lab.errors import DataFault
from gpt2lab.results import (
    LOSS,
    Study,
    StudyRun,
    cleaned,
    collect,
    curve_of,
    failure_ceiling,
    judge_runs,
    read_run,
    searches,
    text_noise,
    trial_loss,
)
from gpt2lab.store import Store
from gpt2lab.tracking.follower import links

NEAR = 0.02
"""Share of training by which an evaluation may lie away from the fraction that it stands for."""

Curve = tuple[list[float], list[float]]
"""(tokens, loss), one entry per evaluation."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One learning rate that was tried, as a multiple of the arm's own. `loss`: infinity when it failed, None when it
    is not finished."""

    factor: float
    lr: float
    run: str
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """See the module. Empty parts were not declared, or cannot be had yet."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    """run -> validation loss during training"""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """run -> why its curve cannot be read"""
    budgets: Mapping[str, Mapping[float, Sequence[float]]] = field(default_factory=dict)
    """arm -> tokens -> final losses, each at the end of its own schedule, for arms that have other budgets"""
    multipliers: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the compute that the baseline needs for the arm's loss, as a multiple of the arm's own"""
    in_tokens: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the same in tokens"""
    shares: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the tokens that it needs for the baseline's loss, as a share of the baseline's"""
    horizon: Sequence[Agreement] = ()
    text_noise: Mapping[tuple[str, str], TextNoise] = field(default_factory=dict)
    """(arm, against) -> how far the difference depends on the validation text"""
    trials: Mapping[str, Sequence[Trial]] = field(default_factory=dict)
    """arm -> the search for its learning rate"""
    elsewhere: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """run -> other studies that rest on it as well"""
    adopted: Mapping[str, str] = field(default_factory=dict)
    """run -> the run of older code that it was taken over from"""
    error_budgets: Mapping[tuple[str, str], ErrorBudget] = field(default_factory=dict)
    """(arm, against) -> what its interval is made of, and what would narrow it"""
    links: Mapping[str, Any] = field(default_factory=dict)
    """where the runs are in MLflow: uri, experiment_id, runs"""


def gather(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, store: Store) -> Evidence:
    """All of it, from the store alone."""
    curves, damaged = _curves(runs, store)
    budgets = all_budgets(study, runs, store)
    base, shares = study["baseline"], {}
    finals = usable(study, runs, base)
    for arm in budgets.keys() - {base} if finals else ():
        shares[arm] = reach(_scaled(budgets[arm], 1 / study["arms"][base]["tokens"]), finals)
    return Evidence(
        curves=curves,
        damaged=damaged,
        budgets=budgets,
        multipliers=multipliers(study, runs, budgets, lambda arm: flops_ratio(study, arm)),
        in_tokens=multipliers(study, runs, budgets, lambda arm: 1 / study["arms"][arm]["tokens"]),
        shares={arm: shares[arm] for arm in study["arms"] if arm in shares},
        horizon=horizon(study, runs, curves),
        text_noise=text_noise(study, runs, store),
        trials={arm: tried for arm in study["arms"] if (tried := _trials(study, store, arm))},
        elsewhere=_elsewhere(study, store),
        adopted=_adopted(runs, store),
        error_budgets=error_budgets(study, runs, verdicts, store),
        links=links(store, study["name"]) or {},
    )


def error_budgets(
    study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, store: Store
) -> dict[tuple[str, str], ErrorBudget]:
    """For every contrast that was tested by its own noise, from the seeds that it was judged by."""
    arms, found = {arm.name: arm for arm in verdicts.arms}, searches(study, store)
    seconds = {arm: _seconds(runs, arm) for arm in study["arms"]}
    members = len(verdicts.contrasts) + len((study.get("history") or {}).get("dropped") or ())
    budgets = {}
    for c in verdicts.contrasts:
        few = min(c.n_arm, c.n_against)
        if not math.isfinite(c.p_holm) or few < FEWEST or not all(seconds[name] for name in c.weights):
            continue
        weighted = [
            WeightedArm(
                weight=weight, search=found.get(name), losses=arms[name].array[: c.n_arm if weight > 0 else c.n_against]
            )
            for name, weight in c.weights.items()
        ]
        budgets[c.arm, c.against] = error_budget(
            weighted, c.halfwidths, [seconds[name] for name in c.weights], level=c.alpha / members,
            more=max(0, (c.next_look or 0) - few), next_level=c.next_alpha and c.next_alpha / members,
        )  # fmt: skip
    return budgets


def next_steps(name: str, store: Store) -> list[str]:
    """For every contrast of a recorded study that is open: what would narrow its interval most for its time."""
    if name not in store.studies():
        return []
    study = cleaned(store.study(name))
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, sensitivity=False)
    budgets = error_budgets(study, runs, verdicts, store)
    steps = {
        f"{c.arm} against {c.against}": budgets[c.arm, c.against].told()
        for c in verdicts.contrasts
        if c.word.startswith("inconclusive") and (c.arm, c.against) in budgets
    }
    return [f"open so far: {pair}; narrows it most: {step}" for pair, step in steps.items() if step]


def _seconds(runs: Sequence[StudyRun], arm: str) -> float:
    """Median training time of an arm's runs; 0 where none is known."""
    known = [r.result["tokens"] / r.result["tokens_per_second"] for r in runs
             if r.arm == arm and r.result.get("tokens") and r.result.get("tokens_per_second")]  # fmt: skip
    return statistics.median(known) if known else 0.0


def tokens_to(name: str, loss: float, root: str | Path = "runs") -> dict[str, Reach]:
    """Training tokens at which each arm of a study reaches `loss`, read off runs that finished their own schedules.

    Needs final losses at two budgets or more (`budget_curve`); an arm without them has a reason in the place of a
    value. Raises ConfigError for an unknown study.
    """
    store = Store(root)
    study = cleaned(store.study(name))
    runs = collect(study, store)
    return {arm: reach(budget_losses(study, runs, store, arm), loss) for arm in study["arms"]}


def all_budgets(study: Study, runs: Sequence[StudyRun], store: Store) -> dict[str, dict[float, list[float]]]:
    """Arm -> tokens -> final losses, for arms that were trained at other budgets too."""
    return {arm: found for arm in study["arms"] if len(found := budget_losses(study, runs, store, arm)) > 1}


def multipliers(
    study: Study,
    runs: Sequence[StudyRun],
    budgets: Mapping[str, Mapping[float, Sequence[float]]],
    scale: Callable[[str], float],
) -> dict[str, Reach]:
    """Arm -> what of the baseline's budget its final losses are worth; `scale` brings tokens to the arm's own unit."""
    base = study["baseline"]
    if base not in budgets:
        return {}
    finals = {arm: usable(study, runs, arm) for arm in study["arms"] if arm != base}
    return {arm: reach(_scaled(budgets[base], scale(arm)), values) for arm, values in finals.items() if values}


def usable(study: Study, runs: Sequence[StudyRun], arm: str) -> list[float]:
    """Final values of an arm's runs that did not fail."""
    ceiling = failure_ceiling(study)
    return [run.value for run in runs if run.arm == arm and run.value is not None and run.value < ceiling]


def budget_losses(study: Study, runs: Sequence[StudyRun], store: Store, arm: str) -> dict[float, list[float]]:
    """Tokens -> final losses of one arm, its own runs and those at other budgets; failed runs are left out."""
    entry = study["arms"][arm]
    found = {float(entry["tokens"]): usable(study, runs, arm)}
    for point in entry.get("curve") or []:
        others = [_read(study, store, arm, int(seed), run) for seed, run in point["runs"].items()]
        found[float(point["tokens"])] = usable(study, [run for run in others if run], arm)
    return {tokens: values for tokens, values in found.items() if values}


def flops_ratio(study: Study, arm: str) -> float:
    """What a token of the baseline costs in FLOPs, as a share of all that the arm's run costs."""
    own, base = study["arms"][arm], study["arms"][study["baseline"]]
    return float(base["flops_per_token"] / (own["flops_per_token"] * own["tokens"]))


def _scaled(curve: Mapping[float, Sequence[float]], factor: float) -> dict[float, Sequence[float]]:
    return {budget * factor: values for budget, values in curve.items()}


def _read(study: Study, store: Store, arm: str, seed: int, run: str) -> StudyRun | None:
    try:
        return read_run(study, store, arm, seed, run)
    except DataFault:
        return None


def _curves(runs: Sequence[StudyRun], store: Store) -> tuple[dict[str, Curve], dict[str, str]]:
    curves: dict[str, Curve] = {}
    damaged: dict[str, str] = {}
    for run in runs:
        try:
            curves[run.id] = curve_of(store, run, LOSS)
        except DataFault as fault:  # one damaged file must not cost the others their curves
            damaged[run.id] = str(fault)
    return curves, damaged


def horizon(study: Study, runs: Sequence[StudyRun], curves: Mapping[str, Curve]) -> list[Agreement]:
    """How well the order of arms at fractions of training agrees with that of their final losses."""
    ceiling = failure_ceiling(study)
    good = [run for run in runs if run.value is not None and run.value < ceiling]
    final = _by_arm(good, {run.id: run.value for run in good if run.value is not None})
    found = []
    for fraction in FRACTIONS:
        early = {run.id: loss for run in good if (loss := loss_at(curves.get(run.id, ([], [])), fraction)) is not None}
        agreed = agreement(_by_arm(good, early), final, fraction)
        if agreed is not None:
            found.append(agreed)
    return found


def _by_arm(runs: Sequence[StudyRun], values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {run.arm: {} for run in runs}
    for run in runs:
        if run.id in values:
            found[run.arm][str(run.seed)] = values[run.id]
    return found


def loss_at(curve: Curve, fraction: float) -> float | None:
    """The loss after a fraction of training, if it was evaluated there."""
    tokens, losses = curve
    if not tokens or not tokens[-1]:
        return None
    gaps = [abs(t / tokens[-1] - fraction) for t in tokens]
    nearest = min(range(len(gaps)), key=gaps.__getitem__)
    value = losses[nearest]
    return value if gaps[nearest] <= NEAR and math.isfinite(value) else None


def _trials(study: Study, store: Store, arm: str) -> list[Trial]:
    found = []
    for trial in (study["arms"][arm].get("bracket") or {}).get("trials", []):
        loss = trial_loss(study, store, arm, trial)
        found.append(Trial(factor=trial["factor"], lr=trial["lr"], run=trial["run"], loss=loss))
    return found


def _elsewhere(study: Study, store: Store) -> dict[str, list[str]]:
    """Which other studies declare the runs of this one."""
    own = {run for entry in study["arms"].values() for run in entry["runs"].values()}
    found: dict[str, list[str]] = {}
    for name in store.studies():
        if name == study["name"]:
            continue
        try:
            other = store.study(name)
            theirs = {run for entry in other["arms"].values() for run in entry["runs"].values()}
        except (DataFault, KeyError, TypeError, AttributeError):
            continue
        for run in own & theirs:
            found.setdefault(run, []).append(name)
    return found


def _adopted(runs: Sequence[StudyRun], store: Store) -> dict[str, str]:
    return {run.id: run.adopted_from for run in runs if run.adopted_from}
