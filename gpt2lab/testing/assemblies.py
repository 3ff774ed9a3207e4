"""Components together: assemblies of many choices at once, and what each must do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gpt2lab.config import Config
from gpt2lab.config.config import conflicts
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.registry import SLOTS, Choice, Misfit, unmet_needs
from gpt2lab.testing.cases import (
    CONTEXT,
    HEAD_SIZE,
    HEADS,
    VOCABULARY,
    Case,
    batch,
    cases,
    compared,
    distance,
    disturbed,
    in_pieces,
    nudged,
    placed,
)

Row = Mapping[str, Case]
"""Slots of the model with one case each."""
Pair = frozenset[str]
"""Names of one or two cases."""


def fits(a: Case, b: Case) -> bool:
    """Whether both offer what the other needs, and neither's own check refuses the other."""
    sides = ((a, SLOTS[b.slot][b.name]), (b, SLOTS[a.slot][a.name]))
    if not all(SLOTS[x.slot][x.name].needs.get(y.slot) in (None, *y.can) for x, y in sides):
        return False
    together = refusals(a, b)
    return not together or together <= refusals(a) | refusals(b)


def refusals(*row: Case) -> set[str]:
    """What the checks of these cases refuse in a tiny model that has them."""
    checks = [(check, case.choice().options) for case in row if (check := SLOTS[case.slot][case.name].check)]
    dims = config({case.slot: case for case in row}) if checks else None
    return {problem for check, options in checks for problem in check(dims, options)}


def allowed_pairs(levels: Mapping[str, Sequence[Case]]) -> set[Pair]:
    """Every pair of cases from two slots that fit each other."""
    slots = itertools.combinations(levels, 2)
    pairs = (pair for s, t in slots for pair in itertools.product(levels[s], levels[t]))
    return {frozenset(map(str, pair)) for pair in pairs if fits(*pair)}


def refused_pairs(plain: Config, only: str | None = None) -> tuple[int, list[tuple[str, str, str]]]:
    """All pairs of components of two slots of model and optimizer, or of the slot `only` and another, with their
    defaults in a config that is otherwise `plain`: how many there are, and those that a config may not have, with the
    reason."""

    def problem(*choices: Choice) -> str:
        config = plain
        for choice in choices:
            slot, section = SLOTS[choice.slot], SLOTS[choice.slot].path.split(".")[0]
            value = placed(choice)
            value = slot.read(value) if slot.arity == "one" else slot.read_all(value)
            changed = getattr(config, section).model_copy(update={choice.slot: value})
            config = config.model_copy(update={section: changed})
        return "; ".join(complaint.what for complaint in conflicts(config))

    read: dict[str, list[Choice]] = {}
    for name, slot in SLOTS.items():
        for component in slot if slot.path.split(".")[0] in ("model", "optim") else ():
            try:
                read.setdefault(name, []).append(slot.read(component.name))
            except Misfit:  # an option without a default
                continue
    count, refused = 0, []
    for first, second in itertools.combinations(read, 2):
        for a, b in itertools.product(read[first], read[second]) if only in (None, first, second) else ():
            count += 1
            why = problem(a, b)
            refused += [(f"{a.slot}={a.name}", f"{b.slot}={b.name}", why)] if why else []
    return count, refused


def covering_array(
    levels: Mapping[str, Sequence[Case]], wanted: set[Pair], allowed: set[Pair] | None = None
) -> list[Row]:
    """Assemblies in which every wanted case, or pair of cases from two slots, occurs at least once, and no pair that is
    not allowed (greedy, 30 candidates). allowed: `allowed_pairs(levels)`, where they are known."""
    dice = random.Random(0)
    allowed, todo = allowed_pairs(levels) if allowed is None else allowed, set(wanted)
    named = {slot: {str(case): case for case in own} for slot, own in levels.items()}
    names = {slot: list(own) for slot, own in named.items()}
    rows: list[Row] = []

    def parts(row: Mapping[str, str], size: int) -> set[Pair]:
        return set(map(frozenset, itertools.combinations(row.values(), size)))

    while todo:
        start = sorted(map(sorted, todo))[dice.randrange(len(todo))]
        fixed = {slot: name for slot, own in named.items() for name in start if name in own}
        candidates: list[dict[str, str]] = []
        while len(candidates) < 30:
            row = {slot: dice.choice(own) for slot, own in names.items()} | fixed
            if parts(row, 2) <= allowed:
                candidates.append(row)
        best = max(candidates, key=lambda row: len(parts(row, len(start)) & todo))
        todo -= parts(best, len(start))
        rows.append({slot: named[slot][name] for slot, name in best.items()})
    return rows


def config(row: Row, n_layer: int = 3) -> ModelConfig:
    """A tiny model, canonical in slots that the row lacks."""
    choices = {slot: placed(case.choice()) for slot, case in row.items()}
    sizes = {"n_layer": n_layer, "n_head": HEADS, "n_embd": HEADS * HEAD_SIZE, "block_size": CONTEXT}
    return ModelConfig(**sizes, vocab_size=VOCABULARY, **choices)


def check_assembly(row: Row) -> None:
    """Three steps lower the loss of their batch, reading in pieces gives the logits of reading at once (so they do not
    depend on later tokens), and while training later tokens change no earlier logits either."""
    model = disturbed(build_model(config(row)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, targets = batch(rows=8)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a part that draws must not fail by chance
        for _ in range(3):
            loss, _ = model.objective(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0], f"three steps on one batch have losses {losses}"
    with torch.no_grad():
        gap = distance(in_pieces(model.eval(), tokens, [7, 1, 1, CONTEXT - 9]), model(tokens))
    assert gap < 2e-5 or gap < 8 * rounding(model, tokens), f"cached and full forward differ by {gap:.1e}"
    changed = torch.cat([tokens[:, :9], (tokens[:, 9:] + 1) % VOCABULARY], 1)
    gap = distance(*(logits[:, :9] for logits in compared(model.train(), tokens, changed)))
    assert gap < 1e-5, f"looks ahead while training: logits before a change moved by {gap:.1e}"


@torch.no_grad()
def rounding(model: GPT, tokens: Tensor) -> float:
    """What rounding moves logits by: some assemblies amplify it, as a norm of small differences does."""
    return distance(nudged(model)(tokens), model(tokens))


def check_neighbours(case: Case) -> None:
    """The component works beside every component, and every example of its options, in the other slots, as far as
    capabilities allow it."""
    levels = {slot: [case] if slot == case.slot else shipped(slot, case) for slot in MODEL_SLOTS}
    others = [other for cases in levels.values() for other in cases if other is not case]
    wanted = {frozenset([str(case), str(other)]) for other in others}
    for row in covering_array(levels, wanted):
        if problem_in(row) is not None:
            row = fewest(row, case)
            beside = ", ".join(str(other) for slot, other in row.items() if slot != case.slot)
            raise AssertionError(f"beside {beside or 'other canonical parts'}: {problem_in(row)}")


def shipped(slot: str, beside: Case) -> list[Case]:
    """Components of this package that fit `beside`, with their variants; of other packages if there are none."""
    ours = cases(c for c in SLOTS[slot] if c.factory.__module__.startswith("gpt2lab."))
    return [c for c in ours if fits(c, beside)] or [c for c in cases(SLOTS[slot]) if fits(c, beside)]


def problem_in(row: Row) -> str | None:
    """What `check_assembly` finds in the row; None if nothing."""
    try:
        check_assembly(row)
    except AssertionError as error:
        return str(error)
    return None


def fewest(row: Row, case: Case) -> Row:
    """A part of `row` that still has a problem, with as few neighbours of `case` as possible."""
    for slot in [slot for slot in row if slot != case.slot]:
        fewer = {other: choice for other, choice in row.items() if other != slot}
        together = [choice for choices in config(fewer).choices().values() for choice in choices]
        if not unmet_needs(together) and problem_in(fewer) is not None:
            row = fewer
    return row
