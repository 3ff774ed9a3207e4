"""Components together: covering arrays over the registry. Every allowed pair of components is tested, and every variant
of their options at least once; every pair of variants in a slow test."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import pytest

from gpt2lab import testing
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS, unmet_needs
from gpt2lab.testing import Case, assemblies
from gpt2lab.testing.assemblies import Pair, Row, allowed_pairs, covering_array

VARIANTS = {slot: testing.cases(SLOTS[slot]) for slot in MODEL_SLOTS}
PLAIN = {slot: [case for case in cases if not case.options] for slot, cases in VARIANTS.items()}
COMPILED = 2  # rows that the fast tests compile


def each(levels: Mapping[str, Sequence[Case]]) -> set[Pair]:
    return {frozenset([str(case)]) for cases in levels.values() for case in cases}


@cache
def allowed() -> set[Pair]:
    return allowed_pairs(PLAIN)


@cache
def pairs() -> list[Row]:
    return covering_array(PLAIN, allowed(), allowed())


def without_repeats(rows: Sequence[Row]) -> list[Row]:
    """The rows without the cases of earlier ones, as far as capabilities allow it: less to compile."""
    seen, fewer = set[str](), list[Row]()
    for row in rows:
        fresh = {slot: case for slot, case in row.items() if str(case) not in seen}
        parts = [part for pattern in assemblies.config(fresh).choices().values() for part in pattern]
        fewer.append(row if unmet_needs(parts) else fresh)
        seen |= set(map(str, row.values()))
    return fewer


@cache
def singles() -> list[Row]:
    return without_repeats(covering_array(PLAIN, each(PLAIN), allowed()))


def check(row: Row) -> None:
    name = " ".join(map(str, row.values()))
    choices = assemblies.config(row).choices().values()
    assert not unmet_needs([choice for pattern in choices for choice in pattern]), name
    assert assemblies.problem_in(row) is None, name


@pytest.mark.parametrize("chunk", [*range(3), *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in range(3, 8))])
def test_every_pair_of_components_trains_and_caches_and_does_not_look_ahead(chunk: int) -> None:
    for row in pairs()[chunk::8]:
        check(row)


def test_every_variant_trains_and_caches_and_does_not_look_ahead() -> None:
    for row in covering_array(VARIANTS, each(VARIANTS)):
        check(row)


@pytest.mark.slow
def test_every_pair_of_variants_trains_and_caches_and_does_not_look_ahead() -> None:
    for row in covering_array(VARIANTS, allowed_pairs(VARIANTS)):
        check(row)


@pytest.mark.parametrize(
    "rows",
    [slice(COMPILED), pytest.param(slice(COMPILED, None), marks=pytest.mark.slow)],
    ids=["first", "others"],
)
def test_every_component_compiles_in_some_assembly(rows: slice) -> None:
    for row in singles()[rows]:
        testing.compiled_as_eager(assemblies.config(row, n_layer=2 if "stack" in row else 1))


def test_every_component_is_in_an_assembly_that_is_compiled() -> None:
    assert {str(case) for row in singles() for case in row.values()} == {str(c) for own in PLAIN.values() for c in own}


def test_the_array_covers_every_pair_that_is_not_refused() -> None:
    seen = {frozenset(p) for row in pairs() for p in itertools.combinations(map(str, row.values()), 2)}
    assert seen == allowed()
    for s, t in itertools.combinations(PLAIN, 2):
        for a, b in itertools.product(PLAIN[s], PLAIN[t]):
            assert bool(unmet_needs([x.choice() for x in (a, b)])) != (frozenset([str(a), str(b)]) in allowed())
    largest = max(len(PLAIN[s]) * len(PLAIN[t]) for s, t in itertools.combinations(PLAIN, 2))
    assert largest <= len(pairs()) <= 3 * largest  # the two largest slots alone take that many
