"""What pruning saves and risks: by hand, and the replayed rule against Optuna's own pruner."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.tuning import _replayed, audit, replay, savings

STEPS = np.arange(20, 180, 20)


def bank(seed: int = 1, trials: int = 16) -> tuple[Array, Array]:
    """Curves (trial, step) and final values; one trial diverges half way."""
    rng = np.random.default_rng(seed)
    final = 2 + rng.normal(0, 0.1, trials)
    slow = rng.uniform(0.5, 3, (trials, 1)) * np.exp(-STEPS / 60)
    curves = final[:, None] + slow + rng.normal(0, 0.03, (trials, len(STEPS)))
    curves[3, 4:], final[3] = np.nan, np.inf
    return curves, final


def by_optuna(curves: Array, final: Array, order: Array, percentile: float, maximize: bool) -> list[int]:
    """Index of the step at which each trial of this order is cut by Optuna."""
    pruner = optuna.pruners.PercentilePruner(percentile, n_startup_trials=4, n_warmup_steps=40)
    study = optuna.create_study(direction="maximize" if maximize else "minimize", pruner=pruner)
    stopped = [len(STEPS)] * len(order)
    for which in order:
        trial = study.ask()
        for at, value in enumerate(curves[which]):
            if np.isnan(value):
                break
            trial.report(float(value), int(STEPS[at]))
            if trial.should_prune():
                stopped[which] = at
                break
        if stopped[which] < len(STEPS) or not np.isfinite(final[which]):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, float(final[which]))
    return stopped


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("percentile", [50.0, 25.0])
def test_the_replayed_rule_is_that_of_optuna(percentile: float, maximize: bool) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves, final = bank()
    orders = np.stack([np.random.default_rng(k).permutation(len(final)) for k in range(6)])
    sign = -1 if maximize else 1
    ours = _replayed(sign * curves, np.isfinite(final), STEPS >= 40, orders, 4, percentile)
    theirs = [by_optuna(curves, final, order, percentile, maximize) for order in orders]
    assert ours.tolist() == theirs
    assert 0.2 < (ours < len(STEPS)).mean() < 0.8


def rows(curves: Array) -> list[list[tuple[float, float]]]:
    return [[(float(s), float(v)) for s, v in zip(STEPS, row, strict=True) if not np.isnan(v)] for row in curves]


def test_curves_that_never_cross_lose_nothing_and_save_much() -> None:
    final = np.linspace(2, 3, 20)
    curves = final[:, None] + np.exp(-STEPS / 60)
    found = replay(rows(curves), final, startup=4, orders=400)
    assert found is not None and found.best_cut == 0 and found.regret == 0 and 0.4 < found.share < 0.9
    assert found.sentence().endswith("of the steps and never cuts the eventual best.")


def test_a_best_trial_that_starts_slowly_is_cut() -> None:
    final = np.linspace(2, 3, 20)
    curves = np.repeat(final[:, None], len(STEPS), axis=1)
    curves[0, :-1] = 9.0
    found = replay(rows(curves), final, startup=4, orders=2000)
    assert found is not None
    # it is kept only among the first four, which the rule lets pass
    assert found.best_cut == pytest.approx(16 / 20, abs=4 * (0.8 * 0.2 / 2000) ** 0.5)
    assert found.regret == pytest.approx(found.best_cut * (final[1] - final[0]), rel=0.3)
    assert "cuts the eventual best in 8" in found.sentence() or "cuts the eventual best in 7" in found.sentence()
    up = replay(rows(-curves), -final, startup=4, orders=2000, maximize=True)
    assert up == found


def test_a_replay_of_nothing_is_nothing() -> None:
    assert replay([], [], startup=4) is None
    assert replay([[(20, 2.0)]], [float("inf")], startup=4) is None


def trial(outcome: str, value: float | None = None, slot: int = 0, **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "value": value, "slot": slot, **more}


def test_savings_by_hand() -> None:
    trials = [
        trial("finished", 2.0, tokens=1000), trial("finished", 2.1, tokens=0), trial("pruned", tokens=250),
        trial("pruned", tokens=None), trial("diverged", tokens=100), trial("failed", tokens=500), trial("waiting"),
    ]  # fmt: skip
    found = savings(trials, 1000)
    assert found == (
        "2 of 5 trials were stopped early: 2,350 tokens were trained where 4,100 would have been, 43 % less."
    )
    assert savings([], 1000) == "No trial has ended, so nothing was saved yet."
    assert savings(trials[:1], 1000) == "None of 1 trial was stopped early."


def test_an_audit_by_hand() -> None:
    cuts = {0: None, 1: 40, 2: None, 3: 80, 4: 20, 5: None, 6: 40, 7: 40}
    trials = [trial("finished", 2 + slot / 10, slot, would_stop_at=cut) for slot, cut in cuts.items()]
    found, worst = (
        audit([*trials, trial("diverged", None, 8, would_stop_at=20)], 160),
        audit(trials, 160, maximize=True),
    )
    assert found and worst and audit([], 160) is None
    share = (0.75 + 0.5 + 0.875 + 0.75 + 0.75) / 8
    assert f"cut 5 of 8 and saved {100 * share:.0f} % of the tokens" in found
    assert "the eventual best would not have been cut, and 1 of the best 2 would have been" in found
    beta = (stats.beta.ppf(0.025, 1, 2), stats.beta.ppf(0.975, 2, 1))  # Clopper and Pearson for 1 of 2
    assert f"(95 % interval of that chance {100 * beta[0]:.0f} to {100 * beta[1]:.0f} %)" in found
    assert "the eventual best would have been cut, and 2 of the best 2 would have been" in worst
