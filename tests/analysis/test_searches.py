"""What a search of a sweep record found, and what speaks against setting it beside another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2lab.analysis.tuning import budgets_differ, chosen

RATE = {"name": "optim.lr", "kind": "float", "low": 0.001, "high": 0.016, "log": True, "choices": None, "when": None}
DECAY = {"name": "optim.weight_decay", "kind": "float", "low": 0.0, "high": 0.4, "log": False, "choices": None}
NORM = {"name": "model.norm", "kind": "categorical", "low": None, "high": None, "choices": ["layernorm", "rmsnorm"]}


def trial(slot: int, value: float | None, outcome: str = "finished", **settings: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): setting for key, setting in settings.items()}
    return {"slot": slot, "outcome": outcome, "value": value, "settings": named}


def search(trials: list[dict[str, Any]], *space: dict[str, Any]) -> dict[str, Any]:
    return {"space": list(space or (RATE,)), "trials": trials}


def rates(values: dict[float, float]) -> list[dict[str, Any]]:
    return [trial(slot, value, optim__lr=rate) for slot, (rate, value) in enumerate(values.items())]


VALLEY = {
    rate: 2 + 0.02 * float(np.log2(rate / 0.0041)) ** 2 for rate in (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.016)
}


def test_the_best_finished_trial_is_chosen() -> None:
    found = chosen(search([*rates(VALLEY), trial(7, 1.0, "pruned", optim__lr=0.009)]), effect=0.05, noise_sd=0.01)
    assert (found.settings, found.value, found.slot) == ({"optim.lr": 0.004}, VALLEY[0.004], 3)
    assert found.reason is None and not found.edge
    assert str(found.optima["optim.lr"]).startswith("Best learning rate 0.0041 (95 % interval 0.00")


def test_of_equal_trials_the_first_is_chosen_and_maximize_turns_the_order() -> None:
    trials = [trial(2, 1.0, optim__lr=0.004), trial(1, 1.0, optim__lr=0.003), trial(0, 3.0, optim__lr=0.002)]
    assert chosen(search(trials)).slot == 1
    assert chosen(search(trials), maximize=True).slot == 0


def test_an_optimum_at_an_edge_is_not_comparable() -> None:
    found = chosen(search(rates({0.004: 2.3, 0.008: 2.2, 0.016: 2.0})))
    assert found.edge == {"optim.lr": "high"} and found.optima["optim.lr"].widen == pytest.approx((0.001, 0.064))
    assert found.reason == "its best learning rate lies at the upper edge (0.016)"
    up = chosen(search(rates({0.004: 2.3, 0.008: 2.2, 0.016: 2.0})), maximize=True)
    assert up.edge == {"optim.lr": "low"}


def test_a_search_that_is_not_over_or_found_nothing_is_not_comparable() -> None:
    waiting = [*rates(VALLEY), trial(8, None, "waiting", optim__lr=0.01)]
    assert chosen(search(waiting)).reason == "1 of 8 trials of its search have not ended"
    assert chosen(search(rates(VALLEY)), slots=9).reason == "2 of 9 trials of its search have not ended"
    nothing = chosen(search([trial(0, None, "diverged", optim__lr=0.01), trial(1, None, "failed")]))
    assert (nothing.settings, nothing.value, nothing.slot) == (None, None, None)
    assert nothing.reason == "no trial of its search finished"
    assert "1 trial diverged" in str(nothing.optima["optim.lr"])


def test_of_several_settings_edges_go_by_the_place_of_the_best_trial() -> None:
    trials = [
        trial(k, value, optim__lr=rate, optim__weight_decay=decay, model__norm=norm)
        for k, (value, rate, decay, norm) in enumerate([
            (2.2, 0.002, 0.1, "layernorm"), (2.0, 0.004, 0.3, "rmsnorm"), (2.1, 0.008, 0.2, "rmsnorm"),
        ])
    ]  # fmt: skip
    found = chosen(search(trials, RATE, DECAY, NORM), effect=0.05)
    assert found.edge == {"optim.weight_decay": "high"}
    assert found.reason == "its best weight decay lies at the upper edge (0.3)"
    assert all(optimum.curve is None for optimum in found.optima.values()) and found.optima.keys() == {
        "optim.lr", "optim.weight_decay",
    }  # fmt: skip


def test_a_setting_that_the_best_trial_does_not_have_is_left_out() -> None:
    trials = [trial(0, 2.0, optim__lr=0.004), trial(1, 2.2, optim__lr=0.002, optim__weight_decay=0.1),
              trial(2, 2.3, optim__lr=0.008)]  # fmt: skip
    found = chosen(search(trials, RATE, DECAY))
    assert found.optima.keys() == {"optim.lr"} and found.reason is None


def test_equal_budgets_are_those_that_told_as_much_over_as_wide_a_space() -> None:
    one = search(rates(VALLEY))
    doubled = {**RATE, "low": 0.002, "high": 0.032}
    assert budgets_differ(one, search(rates(VALLEY), doubled)) is None
    assert budgets_differ(one, search(rates(VALLEY), {**RATE, "high": 0.032})) == (
        "unequal spaces: optim.lr has another range"
    )
    failed = [*rates(VALLEY)[:-1], trial(6, None, "failed", optim__lr=0.016)]
    assert budgets_differ(one, search(failed), names=("pre", "post")) == (
        "unequal budgets: 7 trials of pre and 6 trials of post told something"
    )
    cut = [*rates(VALLEY)[:-1], trial(6, None, "pruned", optim__lr=0.016)]
    assert budgets_differ(one, search(cut)) is None
    assert budgets_differ(one, search(rates(VALLEY), RATE, DECAY)) == (
        "unequal spaces: optim.weight_decay is searched in one of them only"
    )
    assert budgets_differ(search([], NORM), search([], {**NORM, "choices": ["layernorm"]})) is not None
    assert budgets_differ(search([], DECAY), search([], {**DECAY, "high": 0.8})) is not None
