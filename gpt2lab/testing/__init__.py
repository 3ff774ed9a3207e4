"""The contract tests: requirements on every component.

`gpt2lab test-plugin FILE` runs them on a user's components, our test suite on every registered one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gpt2lab.optim  # noqa: F401  (fills its slots)
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import Component
from gpt2lab.testing.batch_checks import check_batches
from gpt2lab.testing.cases import Case, batch, cases, distance, disturbed, placed, variants
from gpt2lab.testing.checks import (
    check_bf16,
    check_cached_equals_full,
    check_compile,
    check_documented,
    check_documents,
    check_gradients,
    check_loss_at_init,
    check_no_look_ahead,
    check_overfits,
    check_save_and_load,
    check_seed,
    check_shape,
    ranks_problem,
    two_ranks_against_one,
)
from gpt2lab.testing.optim_checks import (
    check_average,
    check_gradients_untouched,
    check_optimizer,
    check_rates,
    check_resume,
    check_same_on_all_ranks,
    check_schedule,
)

__all__ = [
    "Case",
    "Check",
    "CheckResult",
    "batch",
    "cases",
    "checks_for",
    "distance",
    "disturbed",
    "placed",
    "run_contract",
    "two_ranks_against_one",
    "variants",
]

Check = Callable[[Case], None]
MODEL_CHECKS: tuple[Check, ...] = (
    check_shape,
    check_no_look_ahead,
    check_loss_at_init,
    check_gradients,
    check_seed,
    check_save_and_load,
    check_cached_equals_full,
    check_documents,
    check_bf16,
)
SLOW_CHECKS: tuple[Check, ...] = (check_overfits,)
BY_SLOT: dict[str, tuple[Check, ...]] = {
    "optimizer": (
        check_optimizer,
        check_resume,
        check_same_on_all_ranks,
        check_gradients_untouched,
        check_rates,
    ),
    "averaging": (check_average, check_resume),
    "schedule": (check_schedule,),
    "batches": (check_batches,),
}


def checks_for(slot: str) -> tuple[Check, ...]:
    """The fast checks of a slot's components; other slots without checks get the first one only."""
    behaviour = MODEL_CHECKS if slot in MODEL_SLOTS else BY_SLOT.get(slot, ())
    return (check_documented, *behaviour)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check on one case; `problem` is None when it passed."""

    case: Case
    check: str
    problem: str | None


def run_contract(components: Iterable[Component]) -> list[CheckResult]:
    """Every fast check, compilation, and two ranks against one, on every variant of every component."""
    all_cases = cases(components)
    of_model = [case for case in all_cases if case.slot in MODEL_SLOTS]
    outcomes = [
        CheckResult(case, check.__name__, problem_of(check, case))
        for case in all_cases
        for check in (*checks_for(case.slot), *([check_compile] if case in of_model else []))
    ]
    gaps = two_ranks_against_one(of_model) if of_model else []
    return outcomes + [
        CheckResult(case, "check_two_ranks", ranks_problem(gap)) for case, gap in zip(of_model, gaps, strict=True)
    ]


def problem_of(check: Check, case: Case) -> str | None:
    """The message with which `check` fails on `case`, or None. An exception in a component is also a failure."""
    try:
        check(case)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
