"""What pruning saves, by hand."""

from __future__ import annotations

from typing import Any

from gpt2lab.analysis.tuning import savings


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
