"""What an interval is made of, and the step that narrows it most for its time."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2lab.analysis.best_rate import Search, WeightedArm, error_budget
from gpt2lab.analysis.statistics import welch
from gpt2lab.analysis.verdicts import TextNoise

QUIET, LOUD = np.array([-0.0002, 0.0, 0.0002]), np.array([-0.02, 0.0, 0.02])
COARSE = Search(tried=(-1.0, 0.0, 1.0), losses=(2.04, 2.0, 2.02), chosen=0.0)


def arms(spread: np.ndarray, search: Search | None) -> list[WeightedArm]:
    return [WeightedArm(weight=w, losses=2.0 + spread, search=search) for w in (1.0, -1.0)]


def test_without_a_search_the_interval_is_that_of_the_seeds() -> None:
    budget = error_budget(arms(LOUD, None), {"seeds": 0.1}, (60.0, 60.0), level=0.05)
    test = welch(LOUD, LOUD)
    assert budget.halfwidth == pytest.approx(float(test.high - test.low) / 2)
    grown = welch(np.append(LOUD, (0.02, -0.02)), np.append(LOUD, (0.02, -0.02)))  # two more seeds, about as noisy
    two = error_budget(arms(LOUD, None), {}, (60.0, 60.0), level=0.05, more=2)
    assert two.steps[0].halfwidth == pytest.approx(float(grown.high - grown.low) / 2, rel=0.2)
    assert two.steps[0].seconds == 240.0


@pytest.mark.parametrize(("spread", "wins"), [(LOUD, "1 more seed per arm"), (QUIET, "rates between the best one")])
def test_noisy_arms_want_seeds_and_quiet_ones_a_closer_search(spread: np.ndarray, wins: str) -> None:
    budget = error_budget(arms(spread, COARSE), {}, (60.0, 60.0), level=0.05)
    best = budget.best
    assert best is not None and best.what.startswith(wins)
    assert best.halfwidth < budget.halfwidth
    assert budget.told().startswith(wins) and "% narrower for" in budget.told()


def test_where_the_text_is_the_largest_part_more_of_it_is_the_advice() -> None:
    budget = error_budget(arms(QUIET, None), {"text": 0.5}, (60.0, 60.0), level=0.05)
    assert budget.told().startswith("more validation text")


def test_the_interval_over_few_documents_is_students() -> None:
    assert TextNoise(se=0.01, count=3, unit="documents").halfwidth == pytest.approx(0.043, abs=1e-4)
    assert TextNoise(se=0.01, count=400, unit="windows").halfwidth == pytest.approx(0.0197, abs=1e-4)
