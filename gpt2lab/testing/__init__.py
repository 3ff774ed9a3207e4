"""The contract tests: what every component must do, whoever wrote it.

`gpt2lab test-plugin FILE` runs them on a user's parts, our own test suite on every registered component. A check is a
function of one `Case` that raises AssertionError with a sentence; it never asks what the component is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gpt2lab.optim  # noqa: F401  (fills its slots)
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS, Component
from gpt2lab.testing.cases import Case, batch, cases, distance, disturbed, placed, variants
from gpt2lab.testing.model_checks import (
    check_bf16,
    check_cached_equals_full,
    check_compile,
    check_documents,
    check_gradients,
    check_loss_at_init,
    check_no_look_ahead,
    check_overfits,
    check_save_and_load,
    check_seed,
    check_shape,
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
from gpt2lab.testing.ranks import ranks_problem, two_ranks_against_one


def check_documented(case: Case) -> None:
    """Says what it does, and where it comes from."""
    component = SLOTS[case.slot][case.name]
    assert component.source, "names no source"
    assert len(component.summary) > 20, "the docstring's first line does not say what it does"
    undocumented = [o for o in component.parameters if f"{o}:" not in component.doc]
    assert not undocumented, f"the docstring does not explain {', '.join(undocumented)} (write 'option: meaning')"


__all__ = [
    "Case",
    "Check",
    "Outcome",
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
}


def checks_for(slot: str) -> tuple[Check, ...]:
    """The fast checks of a slot's components; slots outside the model that have none of their own get the first."""
    behaviour = MODEL_CHECKS if slot in MODEL_SLOTS else BY_SLOT.get(slot, ())
    return (check_documented, *behaviour)


@dataclass(frozen=True)
class Outcome:
    """What one check said of one case; `problem` is None when it passed."""

    case: Case
    check: str
    problem: str | None


def run_contract(components: Iterable[Component]) -> list[Outcome]:
    """Every fast check, compilation, and two ranks against one, on every variant of every component."""
    outcomes = []
    todo = cases(components)
    for case in todo:
        compiled = (check_compile,) if case.slot in MODEL_SLOTS else ()
        for check in (*checks_for(case.slot), *compiled):
            outcomes.append(Outcome(case, check.__name__, problem_of(check, case)))
    modular = [case for case in todo if case.slot in MODEL_SLOTS]
    if modular:
        gaps = two_ranks_against_one(modular)
        outcomes += [
            Outcome(case, "check_two_ranks", ranks_problem(gap)) for case, gap in zip(modular, gaps, strict=True)
        ]
    return outcomes


def problem_of(check: Check, case: Case) -> str | None:
    """The sentence with which `check` fails on `case`, or None. A crash inside a component is a failure as well."""
    try:
        check(case)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
