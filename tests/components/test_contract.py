"""Every registered component keeps the contract. Adding one touches nothing here."""

from __future__ import annotations

import pytest

from gpt2lab import testing
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS
from gpt2lab.testing.checks import check_overfits

TESTED = [slot for name, slot in SLOTS.items() if name in (*MODEL_SLOTS, *testing.BY_SLOT)]
CASES = [case for slot in TESTED for case in testing.cases(slot)]
ON_VARIANTS = {
    "gradients", "no_look_ahead", "cached_equals_full", "optimizer", "resume", "average", "schedule", "batches",
}  # fmt: skip
"""Checks of every set of options; the others are slow tests, except on defaults."""
MODULAR = [case for case in CASES if case.slot in MODEL_SLOTS]


def label(value: object) -> str:
    return str(value) if isinstance(value, testing.Case) else getattr(value, "__name__", "")


def pairs(slow: bool) -> list[tuple[testing.Case, testing.Check]]:
    """All but costs, which tests of traces count for every case."""
    named = [(case, check, testing.name_of(check)) for case in CASES for check in testing.checks_for(case.slot)]
    return [
        (case, check)
        for case, check, name in named
        if name != "costs" and slow == (bool(case.options) and name not in ON_VARIANTS)
    ]


@pytest.mark.parametrize(("case", "check"), pairs(slow=False), ids=label)
def test_contract(case: testing.Case, check: testing.Check) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "check"), pairs(slow=True), ids=label)
def test_contract_of_variants(case: testing.Case, check: testing.Check) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MODULAR if case.options], ids=label)
def test_a_variant_compiles(case: testing.Case) -> None:
    """Defaults are compiled in assemblies."""
    testing.check_compile(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODULAR, ids=label)
def test_overfits_one_batch(case: testing.Case) -> None:
    check_overfits(case)


@pytest.mark.parametrize("variants", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(variants: bool) -> None:
    todo = [case for case in MODULAR if bool(case.options) == variants]
    gaps = testing.two_ranks_against_one(todo)
    assert not {str(case): gap for case, gap in zip(todo, gaps, strict=True) if testing.ranks_problem(gap)}


def test_every_slot_of_the_model_is_filled() -> None:
    assert {name for name in MODEL_SLOTS if not SLOTS[name].names()} == set()
