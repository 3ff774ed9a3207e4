"""Every registered component keeps the contract. Adding one touches nothing here."""

from __future__ import annotations

import pytest

from gpt2lab import testing
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS

TESTED = [slot for name, slot in SLOTS.items() if name in (*MODEL_SLOTS, *testing.BY_SLOT)]
CASES = [case for slot in TESTED for case in testing.cases(slot)]
PAIRS = [(case, check) for case in CASES for check in testing.checks_for(case.slot)]
MODULAR = [case for case in CASES if case.slot in MODEL_SLOTS]


def label(value: object) -> str:
    return str(value) if isinstance(value, testing.Case) else getattr(value, "__name__", "")


@pytest.mark.parametrize(("case", "check"), PAIRS, ids=label)
def test_contract(case: testing.Case, check: testing.Check) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODULAR, ids=label)
def test_compiles_alone(case: testing.Case) -> None:
    testing.check_compile(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODULAR, ids=label)
def test_overfits_one_batch(case: testing.Case) -> None:
    testing.check_overfits(case)


def test_two_ranks_equal_one() -> None:
    gaps = testing.two_ranks_against_one(MODULAR)
    wrong = {str(case): gap for case, gap in zip(MODULAR, gaps, strict=True) if testing.ranks_problem(gap)}
    assert not wrong


def test_every_slot_of_the_model_is_filled() -> None:
    assert {name for name in MODEL_SLOTS if not SLOTS[name].names()} == set()
