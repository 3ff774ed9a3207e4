"""The contract tests: requirements on every component.

`gpt2lab test-plugin FILE` runs them on a user's components, our test suite on every registered one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch.multiprocessing.spawn import ProcessException

import gpt2lab.optim  # noqa: F401  (fills its slots)
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS, Component, line_in
from gpt2lab.testing.assemblies import check_neighbours
from gpt2lab.testing.cases import Case, batch, cases, distance, disturbed, nudged, placed, variants
from gpt2lab.testing.checks import (
    BY_SLOT,
    Check,
    check_builds,
    check_compile,
    check_documented,
    check_gradients,
    checks_for,
    compiled_as_eager,
    ranks_problem,
    two_ranks_against_one,
)

__all__ = [
    "BY_SLOT", "Case", "Check", "CheckResult", "batch", "cases", "check_documented", "checks_for", "compiled_as_eager",
    "distance", "disturbed", "nudged", "placed", "run_contract", "two_ranks_against_one", "variants",
]  # fmt: skip

TOGETHER: tuple[Check, ...] = (check_compile, check_neighbours)
"""Checks of components of the model that take long; our test suite covers them by assemblies of many components."""
TWO_RANKS = "two_ranks"


def name_of(check: Check) -> str:
    """What a check is called in commands and messages."""
    return check.__name__.removeprefix("check_")


CHECK_NAMES = tuple(
    dict.fromkeys(
        [*(name_of(c) for slot in ("norm", *BY_SLOT) for c in checks_for(slot)), *map(name_of, TOGETHER), TWO_RANKS]
    )
)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check on one case; `problem` is None when it passed."""

    case: Case
    check: str
    problem: str | None


def run_contract(components: Iterable[Component], only: Collection[str] = CHECK_NAMES) -> list[CheckResult]:
    """The checks called `only` on every variant of every component: the fast ones, compilation, neighbours, and two
    ranks against one. What cannot be built is not checked further, and what has no gradient not on two ranks."""
    needed = {*only, name_of(check_builds), *([name_of(check_gradients)] if TWO_RANKS in only else [])}
    results: list[CheckResult] = []
    trained: list[Case] = []
    for case in cases(components):
        of_model = case.slot in MODEL_SLOTS
        problems: dict[Check, str | None] = {}
        for check in (*checks_for(case.slot), *(TOGETHER if of_model else ())):
            if name_of(check) in needed:
                problems[check] = problem_of(check, case)
            if check is check_builds and problems[check]:
                break
        results += [CheckResult(case, name_of(c), problem) for c, problem in problems.items() if name_of(c) in only]
        if of_model and TWO_RANKS in only and problems.get(check_gradients, "not built") is None:
            trained.append(case)
    return results + two_ranks(trained)


def two_ranks(todo: list[Case]) -> list[CheckResult]:
    """Whether two ranks compute the gradient of one."""
    if not todo:
        return []
    try:
        problems = [ranks_problem(gap) for gap in two_ranks_against_one(todo)]
    except ProcessException as error:
        problems = ["a process of two fails: " + str(error).strip().splitlines()[-1]] * len(todo)
    return [CheckResult(case, TWO_RANKS, problem) for case, problem in zip(todo, problems, strict=True)]


def problem_of(check: Check, case: Case) -> str | None:
    """The message with which `check` fails on `case`, or None. An exception in a component is also a failure, which
    says where in the component's file it was raised."""
    try:
        check(case)
    except Exception as error:
        file = inspect.getsourcefile(SLOTS[case.slot][case.name].factory) or ""
        line, first = line_in(error, file), str(error).strip().partition("\n")[0]
        if line is None and (mentioned := re.findall(rf'File "{re.escape(file)}", line (\d+)', str(error))):
            line = int(mentioned[-1])  # of code that torch.compile traced
        if isinstance(error, AssertionError) and line is None:
            return str(error)
        return f"{type(error).__name__}{f' at {Path(file).name}:{line}' if line else ''}: {first}"
    return None
