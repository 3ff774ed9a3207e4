"""Components together: a covering array over the registry, in which every allowed pair of choices is tested."""

from __future__ import annotations

import itertools

import pytest

from gpt2lab import testing
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS, unmet_needs
from gpt2lab.testing import assemblies
from gpt2lab.testing.assemblies import allowed_pairs, covering_array

VARIANTS = {slot: testing.cases(SLOTS[slot]) for slot in MODEL_SLOTS}
LEVELS = {slot: [case for case in cases if not case.options] for slot, cases in VARIANTS.items()}
ALLOWED = allowed_pairs(LEVELS)
ROWS = covering_array(LEVELS, ALLOWED)
EACH_ONCE = covering_array(LEVELS, {frozenset([str(case)]) for own in LEVELS.values() for case in own})


@pytest.mark.parametrize("chunk", range(8))
def test_every_pair_of_choices_trains_and_caches_and_does_not_look_ahead(chunk: int) -> None:
    for row in ROWS[chunk::8]:
        name = " ".join(map(str, row.values()))
        choices = assemblies.config(row).choices().values()
        assert not unmet_needs([choice for pattern in choices for choice in pattern]), name
        assert assemblies.problem_in(row) is None, name


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(8))
def test_every_pair_of_options_trains_and_caches_and_does_not_look_ahead(chunk: int) -> None:
    for row in covering_array(VARIANTS, allowed_pairs(VARIANTS))[chunk::8]:
        assert assemblies.problem_in(row) is None, " ".join(map(str, row.values()))


@pytest.mark.parametrize("row", EACH_ONCE, ids=range(len(EACH_ONCE)))
def test_every_choice_compiles_in_some_assembly(row: assemblies.Row) -> None:
    testing.compiled_as_eager(assemblies.config(row, n_layer=2))


def test_the_array_covers_every_pair_that_is_not_refused() -> None:
    seen = {frozenset(p) for row in ROWS for p in itertools.combinations(map(str, row.values()), 2)}
    assert seen == ALLOWED
    for s, t in itertools.combinations(LEVELS, 2):
        for a, b in itertools.product(LEVELS[s], LEVELS[t]):
            choices = [x.choice() for x in (a, b)]
            assert bool(unmet_needs(choices)) != (frozenset([str(a), str(b)]) in ALLOWED)
    largest = max(len(LEVELS[s]) * len(LEVELS[t]) for s, t in itertools.combinations(LEVELS, 2))
    assert largest <= len(ROWS) <= 3 * largest  # the two largest slots alone take that many
