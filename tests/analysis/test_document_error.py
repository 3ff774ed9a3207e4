"""The standard error over documents: against other libraries, and against documents drawn again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from gpt2lab.analysis.statistics import document_error


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of `count` documents of unequal length: differences that documents share, targets and documents."""
    dice = np.random.default_rng(seed)
    documents = np.repeat(np.arange(count), dice.integers(1, 30, count))
    shared = dice.normal(0.1, 0.2, count)[documents]
    return shared + dice.normal(0, 0.1, len(documents)), dice.integers(1, 50, len(documents)), documents


def test_it_is_the_cluster_robust_error_of_a_weighted_mean() -> None:
    difference, targets, documents = drawn(25)
    model = sm.WLS(difference, np.ones(len(difference)), weights=targets)
    reference = model.fit(cov_type="cluster", cov_kwds={"groups": documents}).bse[0]
    found, count = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found == pytest.approx(reference, rel=1e-9) and count == 25


def test_with_one_window_for_each_document_it_is_the_error_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found, count = document_error([values], [np.zeros(40)], np.arange(40))
    assert found == pytest.approx(stats.sem(values), rel=1e-12) and count == 40


def test_it_is_the_spread_of_the_difference_over_documents_drawn_again() -> None:
    difference, targets, documents = drawn(200)
    sums, sizes = np.bincount(documents, targets * difference), np.bincount(documents, targets)
    picks = np.random.default_rng(2).integers(0, 200, (4000, 200))
    bootstrap = (sums[picks].sum(1) / sizes[picks].sum(1)).std()
    found, _ = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found == pytest.approx(bootstrap, rel=0.05)
    alone, _ = document_error([difference], [np.zeros(len(difference))], np.arange(len(difference)), targets=targets)
    assert alone < 0.5 * found  # windows of one document are no independent sample


def test_seeds_are_averaged_before_and_what_both_arms_share_cancels() -> None:
    difference, targets, documents = drawn(30)
    noise = np.random.default_rng(3).normal(size=(3, len(difference)))
    hard = np.random.default_rng(4).normal(3, 1, len(difference))
    a = [hard + difference + noise[0], hard + difference - noise[0]]
    b = [hard + noise[1], hard + noise[2], hard - noise[1] - noise[2]]
    found = document_error(a, b, documents, targets=targets)
    alone = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found[0] == pytest.approx(alone[0], rel=1e-9) and found[1] == 30
    assert document_error(b, a, documents, targets=targets)[0] == pytest.approx(found[0], rel=1e-12)


def test_one_document_has_no_error_and_unequal_lengths_are_refused() -> None:
    found, count = document_error([[1.0, 2.0]], [[0.0, 0.0]], [7, 7])
    assert math.isnan(found) and count == 1
    for wrong in ([[1.0]], []):
        with pytest.raises(ValueError, match="one loss for each window"):
            document_error(wrong, [[0.0, 0.0]], [0, 1])
