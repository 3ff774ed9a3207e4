"""Contract checks of parts of `data.batches`."""

from __future__ import annotations

import numpy as np

from gpt2lab.data.curricula import TrainingBatches, TrainingText, build_batches
from gpt2lab.testing.cases import Case

TOKENS, BLOCK, SEQUENCES, STEPS, SEPARATOR = 6000, 16, 8, 40, 0


def training_text(seed: int = 1) -> TrainingText:
    """Text of two corpora, with documents of about 20 tokens."""
    tokens = np.random.default_rng(0).integers(1, 50, TOKENS)
    tokens[np.random.default_rng(1).random(TOKENS) < 1 / 20] = SEPARATOR
    corpora = {"first": range(2000), "second": range(2000, TOKENS)}
    return TrainingText(tokens, BLOCK, SEQUENCES, STEPS, seed, SEPARATOR, corpora)


def check_batches(case: Case) -> None:
    """Neighbouring tokens of the text, a pure function of seed and step, shared by two ranks, as many in all as without
    the part."""

    def built() -> TrainingBatches:
        made = build_batches((case.choice(),), training_text())
        assert isinstance(made, TrainingBatches), "no TrainingBatches"
        return made

    made, text = built(), training_text()
    seen = [made.at(step) for step in range(STEPS)]
    total = sum(inputs.size for inputs, _ in seen)
    assert total == STEPS * SEQUENCES * BLOCK, f"{total} tokens in the training, not {STEPS * SEQUENCES * BLOCK}"
    for inputs, targets in seen:
        assert inputs.shape == targets.shape, f"inputs {inputs.shape}, targets {targets.shape}"
        assert BLOCK % inputs.shape[1] == 0, f"rows of {inputs.shape[1]} tokens do not divide blocks of {BLOCK}"
        assert (inputs[:, 1:] == targets[:, :-1]).all(), "targets are not the next tokens"
    for step in (STEPS - 1, 0, 7):
        again = built().at(step)
        assert (again[0] == seen[step][0]).all(), f"step {step} depends on the steps before it"
        first, end = made.sequences_before(step), made.sequences_before(step + 1)
        starts = [made.start(index) for index in range(first, end)]
        rows = np.stack([text.tokens[start : start + BLOCK] for start in starts])
        assert (rows.reshape(seen[step][0].shape) == seen[step][0]).all(), "not the text at its starts"
        if (end - first) % 2 == 0:
            halves = [made.at(step, rank=rank, world=2)[0] for rank in (0, 1)]
            assert (np.concatenate(halves) == seen[step][0]).all(), "two ranks do not share the batch of one"
