"""Components together: a covering array over the registry, in which every allowed pair of choices trains two steps."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from gpt2lab import testing
from gpt2lab.components.context import Cache
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.registry import SLOTS, unmet_needs
from gpt2lab.testing.cases import VOCABULARY, Case

LEVELS = {slot: testing.cases(SLOTS[slot]) for slot in MODEL_SLOTS}


def fits(a: Case, b: Case) -> bool:
    """Whether both offer what the other needs."""
    sides = ((a, SLOTS[b.slot][b.name]), (b, SLOTS[a.slot][a.name]))
    return all(SLOTS[x.slot][x.name].needs.get(y.slot) in (None, *y.can) for x, y in sides)


ALLOWED = {
    frozenset([str(a), str(b)]) for s, t in itertools.combinations(LEVELS, 2)
    for a in LEVELS[s] for b in LEVELS[t] if fits(a, b)
}  # fmt: skip


def covering_array(seed: int = 0) -> list[dict[str, Case]]:
    """Assemblies such that every allowed pair of cases from two slots occurs together at least once, and no other
    (greedy, 30 candidates)."""
    dice = random.Random(seed)
    todo = set(ALLOWED)
    rows: list[dict[str, Case]] = []

    def pairs(row: dict[str, Case]) -> set[frozenset[str]]:
        return {frozenset(pair) for pair in itertools.combinations(map(str, row.values()), 2)}

    while todo:
        start = sorted(map(sorted, todo))[dice.randrange(len(todo))]
        candidates: list[dict[str, Case]] = []
        while len(candidates) < 30:
            row = {slot: dice.choice(cases) for slot, cases in LEVELS.items()}
            row |= {slot: case for slot, cases in LEVELS.items() for case in cases if str(case) in start}
            if pairs(row) <= ALLOWED:
                candidates.append(row)
        best = max(candidates, key=lambda row: len(pairs(row) & todo))
        todo -= pairs(best)
        rows.append(best)
    return rows


def config(row: dict[str, Case]) -> ModelConfig:
    choices = {slot: testing.placed(slot, {"name": case.name, **case.options}) for slot, case in row.items()}
    return ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=VOCABULARY, **choices)


ROWS = covering_array()


@pytest.mark.parametrize("chunk", range(8))
def test_every_pair_of_choices_trains_two_steps_and_caches(chunk: int) -> None:
    for row in ROWS[chunk::8]:
        name = " ".join(map(str, row.values()))
        settings = config(row)
        assert not unmet_needs([c for choices in settings.choices().values() for c in choices]), name
        model = testing.disturbed(build_model(settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens, targets = testing.batch(rows=8)
        losses = []
        for _ in range(3):
            loss, _ = model.objective(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"{name}: {losses}"
        gap = cached_against_full(model, tokens)
        if gap >= 2e-5:  # float64 has no rounding for a norm of small differences to amplify
            gap = cached_against_full(model.double(), tokens)
        assert gap < 2e-5, f"{name}: cached and full differ by {gap:.1e}"


@torch.no_grad()
def cached_against_full(model: GPT, tokens: Tensor) -> float:
    """The largest difference between logits of a sequence read in pieces and at once."""
    cache = Cache()
    pieces = [model(tokens[:, :7], cache=cache)] + [model(tokens[:, t : t + 1], cache=cache) for t in range(7, 16)]
    return testing.distance(torch.cat(pieces, 1), model(tokens))


def test_the_array_covers_every_pair_that_is_not_refused() -> None:
    seen = {frozenset(p) for row in ROWS for p in itertools.combinations(map(str, row.values()), 2)}
    assert seen == ALLOWED
    for s, t in itertools.combinations(LEVELS, 2):
        for a, b in itertools.product(LEVELS[s], LEVELS[t]):
            choices = [SLOTS[x.slot].read({"name": x.name, **x.options}) for x in (a, b)]
            assert bool(unmet_needs(choices)) != (frozenset([str(a), str(b)]) in ALLOWED)
    largest = max(len(LEVELS[s]) * len(LEVELS[t]) for s, t in itertools.combinations(LEVELS, 2))
    assert largest <= len(ROWS) <= 3 * largest  # the two largest slots alone take that many
