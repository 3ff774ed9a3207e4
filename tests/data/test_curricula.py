"""Batches that change over the training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2lab.config import load_config
from gpt2lab.data.batches import Batches
from gpt2lab.data.curricula import TrainingBatches, build_batches, optim_of
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError
from gpt2lab.identity import choices, settings
from gpt2lab.registry import SLOTS
from gpt2lab.testing.checks import BLOCK, SEPARATOR, SEQUENCES, STEPS, training_text

TEXT = training_text()


def built(*parts: Any, seed: int = 1, world: int = 1) -> TrainingBatches:
    choices = SLOTS["batches"].read_all(list(parts))
    made = build_batches(choices, training_text(seed), world=world)
    assert isinstance(made, TrainingBatches)
    return made


def sizes(made: TrainingBatches) -> list[int]:
    return np.diff([made.sequences_before(step) for step in range(STEPS + 1)]).tolist()


def test_without_parts_batches_and_identities_are_as_they_were() -> None:
    assert type(build_batches((), TEXT)) is Batches
    plain, ramp = load_config("nano"), load_config("nano", ["data.batches=batch_ramp"])
    assert "data" not in settings(plain)
    part = {"name": "batch_ramp", "start": 0.25, "over": 0.3, "multiple": 1}
    assert settings(ramp) == settings(plain) | {"data": {"batches": [part]}}
    assert set(choices(ramp)) - set(choices(plain)) == set(ramp.data.batches)


def test_parts_that_change_nothing_give_the_plain_batches() -> None:
    plain = Batches(TEXT.tokens, BLOCK, SEQUENCES, TEXT.seed)
    for made in (TrainingBatches(TEXT), built({"name": "batch_ramp", "start": 1.0})):
        for step in (0, 13, STEPS - 1):
            assert all(np.array_equal(a, b) for a, b in zip(made.at(step), plain.at(step), strict=True))


@pytest.mark.parametrize("multiple", [1, 2])
def test_a_ramp_grows_as_its_formula_says_and_has_the_same_tokens(multiple: int) -> None:
    ramp = sizes(built({"name": "batch_ramp", "start": 0.25, "over": 0.5, "multiple": multiple}))
    share = (np.arange(STEPS) + 0.5) / STEPS
    wanted = 0.25 + 0.75 * np.minimum(1, share / 0.5)
    wanted *= SEQUENCES / wanted.mean()
    assert sum(ramp) == STEPS * SEQUENCES and {size % multiple for size in ramp} == {0}
    assert np.abs(np.array(ramp) - wanted).max() <= multiple + 0.01


def test_rates_follow_the_tokens() -> None:
    config = load_config("nano", ["optim.warmup_steps=4", "training.steps=40", "data.batches=batch_ramp"])
    made = built("batch_ramp")
    rates, plain = optim_of(config, made).multiplier(STEPS), config.optim.multiplier(STEPS)
    for step in range(STEPS):
        trained = made.sequences_before(step) / (SEQUENCES * STEPS)
        assert rates(step) == plain(int(trained * STEPS + 1e-9))
    assert rates(4) < plain(4) == 1.0  # warm-up has as many tokens, thus more steps
    assert optim_of(config, Batches(TEXT.tokens, BLOCK, SEQUENCES, 1)) is config.optim


def test_short_sequences_have_the_text_of_long_ones() -> None:
    short, plain = built({"name": "short_to_long", "halvings": 2, "over": 0.5}), TrainingBatches(TEXT)
    lengths = [short.at(step)[0].shape for step in range(STEPS)]
    assert lengths == [(32, 4)] * 10 + [(16, 8)] * 10 + [(8, 16)] * 20
    for step in (0, 12, 30):
        assert np.array_equal(short.at(step)[0].ravel(), plain.at(step)[0].ravel())


def test_sequences_begin_with_documents_and_none_is_left_out() -> None:
    made = built("document_starts")
    starts = made.starts  # type: ignore[attr-defined]
    seen = np.zeros(len(TEXT.tokens), bool)
    for start in starts:
        seen[start : start + BLOCK] = True
    assert seen[: starts[-1] + BLOCK].all() and len(TEXT.tokens) - starts[-1] <= 2 * BLOCK + 1
    for start, after in itertools.pairwise(starts):
        if TEXT.tokens[after] != SEPARATOR:  # then there was none to begin with
            assert after == start + BLOCK and SEPARATOR not in TEXT.tokens[start + 1 : after + 1]
    epoch = [made.start(index) for index in range(len(starts))]
    assert sorted(epoch) == starts.tolist() and epoch != starts.tolist()


def test_easy_text_comes_first() -> None:
    made = built({"name": "easy_first", "start": 0.05, "over": 0.5})
    surprise = -np.log(np.bincount(TEXT.tokens) / len(TEXT.tokens))
    early, late = (np.mean([surprise[made.at(s)[0]].mean() for s in span]) for span in (range(4), range(14, 18)))
    assert early < late - 0.01
    assert made.start(SEQUENCES * STEPS // 2) == TrainingBatches(TEXT).start(SEQUENCES * STEPS // 2)


@pytest.mark.parametrize(("side", "left_out"), [("common", (0, 30)), ("rare", (30, 0)), ("middle", (15, 15))])
def test_pruned_text_lacks_the_blocks_at_the_ends(side: str, left_out: tuple[int, int]) -> None:
    made = built({"name": "pruned", "keep": 0.92, "side": side})
    surprise = -np.log(np.bincount(TEXT.tokens[: 374 * BLOCK]) / (374 * BLOCK))
    means = surprise[TEXT.tokens[: 374 * BLOCK]].reshape(-1, BLOCK).mean(1)
    ranked = np.argsort(means, kind="stable")
    epoch = [made.start(index) // BLOCK for index in range(344)]
    assert set(epoch) == set(ranked[left_out[0] : 374 - left_out[1]].tolist()) and epoch != sorted(epoch)


def test_a_mixture_has_its_shares_all_along_and_repeats_small_corpora() -> None:
    weights = {"first": 3, "second": 1}
    made = built({"name": "mixture", "weights": weights}, seed=3)
    starts = np.array([made.start(index) for index in range(STEPS * SEQUENCES)])
    for stretch in np.split(starts < 2000, 8):  # of 40 sequences
        assert abs(stretch.sum() - 30) <= 2
    first = starts[starts < 2000]
    blocks = (2000 - BLOCK) // BLOCK
    assert len(set(first[:blocks])) == blocks and first.max() <= 2000 - BLOCK - 1
    changing = built({"name": "mixture", "weights": {"first": 1, "second": 0}, "end": {"first": 0, "second": 1}})
    from_first = [changing.start(index) < 2000 for index in range(STEPS * SEQUENCES)]
    assert sum(from_first[:40]) in (37, 38) and sum(from_first[-40:]) in (2, 3) and abs(sum(from_first) - 160) <= 2
    assert [built("mixture", seed=s).start(0) for s in (1, 2)] != [built("mixture", seed=s).start(0) for s in (3, 4)]


def test_parts_combine() -> None:
    made = built("batch_ramp", "short_to_long", "mixture")
    assert sizes(made) == sizes(built("batch_ramp"))
    assert made.length(0) == 2 and made.start(11) == built("mixture").start(11)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.batches=[easy_first, easy_first]"], "easy_first and easy_first both determine the order"),
        (["data.batches=mixture"], "corpus shakespeare has no parts to weigh"),
        (["data.batches=document_starts"], "the tokenizer bytes puts no separator"),
        (["data.batches=batch_rump"], "did you mean 'batch_ramp'?"),
        (
            ["data.corpus={name: several, corpora: {a: shakespeare, b: python}}",
             "data.batches={name: mixture, weights: {a: 1, c: 2}}"],
            "weights of all of a, b are expected (b, c)",
        ),
        (["data.corpus={name: several, corpora: {a: shakespeare, b: shakespear}}"], "did you mean 'shakespeare'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("nano", overrides)
    assert problem in str(caught.value)


def test_what_does_not_fit_the_text_or_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="step 1 has 3 sequences, which cannot be divided evenly among 2 ranks"):
        built("batch_ramp", world=2)
    assert built({"name": "batch_ramp", "multiple": 2}, world=2)
    with pytest.raises(ConfigError, match="a mean batch of 8 sequences is no multiple of 3"):
        built({"name": "batch_ramp", "multiple": 3})
    with pytest.raises(ConfigError, match="step 2 would have no sequence"):
        built({"name": "batch_ramp", "multiple": 4})
    with pytest.raises(ConfigError, match="block_size 16 cannot be halved 5 times"):
        built({"name": "short_to_long", "halvings": 5})


def test_several_corpora_are_divided_as_each_is_alone(config: Callable[..., DataConfig], texts: Path) -> None:
    for name in ("prose", "verse"):
        (texts / name).mkdir()
    for file in sorted(texts.glob("*.txt")):
        for name in ("prose", "verse"):
            (texts / name / file.name).write_text(name + file.read_text())
    written = {name: {"name": "text", "paths": [str(texts / name / "*.txt")]} for name in ("prose", "verse")}
    together = prepare(config(corpus={"name": "several", "corpora": written}))
    alone = {name: prepare(config(corpus=choice)) for name, choice in written.items()}
    for split in ("train", "validation"):
        parts = [getattr(made, split)[:] for made in alone.values()]
        assert np.array_equal(getattr(together, split)[:], np.concatenate(parts))
    border = len(alone["prose"].train)
    assert together.corpora == {"prose": range(border), "verse": range(border, len(together.train))}
    assert alone["prose"].corpora == {}
    names = [document["name"] for document in json.loads((together.path / "manifest.json").read_text())["splits"][
        "validation"]["documents"]]  # fmt: skip
    assert {name.partition("/")[0] for name in names} == {"prose", "verse"}
