"""Batches are a pure function of seed and step."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gpt2lab.data.batches import Batches, epoch_order
from gpt2lab.errors import ConfigError

STORED_OFFSET, STORED_ORDER = 15, [1, 3, 6, 4, 7, 5, 2, 0]


def batches(tokens: int = 1000, block: int = 16, batch: int = 6, seed: int = 1) -> Batches:
    return Batches(np.arange(tokens), block, batch, seed)


def starts(made: Batches, first: int, count: int) -> list[int]:
    """Where each of `count` sequences begins, counted from sequence `first`; tokens are their own positions."""
    one = Batches(made.tokens, made.block_size, 1, made.seed)
    return [int(one.at(i)[0][0, 0]) for i in range(first, first + count)]


def test_shapes_and_targets_are_the_next_tokens() -> None:
    inputs, targets = batches().at(3)
    assert inputs.shape == targets.shape == (6, 16)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    assert np.array_equal(targets, inputs + 1)
    assert np.array_equal(inputs - inputs[:, :1], np.tile(np.arange(16), (6, 1)))


def test_any_order_of_calls_gives_the_same() -> None:
    steps = list(range(40))
    forward = [batches().at(s)[0] for s in steps]
    epoch_order.cache_clear()
    made = batches()
    for s in np.random.default_rng(0).permutation(steps):
        assert np.array_equal(made.at(int(s))[0], forward[s])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_one_global_batch_in_order(world: int) -> None:
    for step in (0, 9, 10, 11, 25):  # steps 10 and 20 cross borders of epochs
        whole = batches().at(step)
        parts = [batches().at(step, rank=rank, world=world) for rank in range(world)]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 sequences per step cannot be divided evenly among 4 ranks"):
        batches().at(0, rank=0, world=4)


def test_an_epoch_has_every_block_once_and_none_overlap() -> None:
    made = batches()
    n = made.epoch_blocks
    assert n == 61
    for epoch in range(5):
        begun = sorted(starts(made, epoch * n, n))
        assert np.all(np.diff(begun) == 16)
        assert begun[0] >= 0
        assert begun[-1] + 16 <= 999


def test_epochs_differ_in_offset_and_order() -> None:
    made = batches()
    n = made.epoch_blocks
    epochs = [starts(made, epoch * n, n) for epoch in range(12)]
    assert len({min(begun) for begun in epochs}) > 5
    assert len({tuple(np.array(begun) - min(begun)) for begun in epochs}) == 12
    assert epochs[0] != sorted(epochs[0])


def test_a_batch_continues_over_the_border_of_an_epoch() -> None:
    made = batches()
    n = made.epoch_blocks  # 61 blocks, 6 a step: step 10 takes one of epoch 0 and five of epoch 1
    expected = starts(made, 60, 1) + starts(made, 61, 5)
    assert made.at(10)[0][:, 0].tolist() == expected
    assert n == 61


def test_a_batch_larger_than_an_epoch_and_the_smallest_text() -> None:
    assert batches(tokens=17, batch=4).at(2)[0].tolist() == [list(range(16))] * 4
    for tokens in range(17, 70):
        made = batches(tokens=tokens)
        inputs, targets = made.at(0)
        assert inputs.min() >= 0
        assert targets.max() < tokens
        assert made.epoch_blocks == max(1, (tokens - 16) // 16)
    with pytest.raises(ConfigError, match="training needs at least 17 tokens, and there are 16"):
        batches(tokens=16)


def test_seeds_give_different_orders_and_every_token_is_used_in_time() -> None:
    assert not np.array_equal(batches(seed=1).at(0)[0], batches(seed=2).at(0)[0])
    used = {int(i) for s in range(1500) for i in np.concatenate(batches().at(s)).ravel()}
    assert used == set(range(1000))


def test_the_same_in_another_process_and_for_ever() -> None:
    code = (
        "import numpy as np; from gpt2lab.data.batches import Batches;"
        "print(Batches(np.arange(1000), 16, 6, 1).at(7)[0][:, 0].tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(batches().at(7)[0][:, 0].tolist())
    # A stored order: if this changes, runs already trained can no longer be resumed or compared.
    offset, order = epoch_order(1, 0, 8, 15)
    assert (offset, order.tolist()) == (STORED_OFFSET, STORED_ORDER)


def test_the_cache_holds_an_epoch_and_its_neighbour_only() -> None:
    assert epoch_order.cache_info().maxsize == 2
    _, order = epoch_order(1, 0, 8, 15)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 3
