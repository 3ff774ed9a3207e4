"""`benchmarks stacked`: seeds trained as one are the seeds trained alone, within the error of float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.sides import Work
from benchmarks.stacked import SeedsSide, clip_each

CPU = torch.device("cpu")
TINY = Work(n_layer=2, n_head=2, n_embd=16, block_size=8, sequences=3, vocab_size=31)


def side(work: Work, seeds: int, *, stacked: bool) -> SeedsSide:
    return SeedsSide(work, seeds, "fp32", CPU, stacked=stacked)


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_seeds_train_as_each_does_alone(bias: bool) -> None:
    work = dataclasses.replace(TINY, bias=bias)
    together, apart, one = (side(work, n, stacked=way) for n, way in ((3, True), (3, False), (1, False)))
    first = None
    for _ in range(8):
        losses = together.losses()
        assert torch.allclose(losses, apart.losses(), rtol=0, atol=1e-5)
        assert torch.allclose(losses[:1], one.losses(), rtol=0, atol=1e-5)
        first = losses if first is None else first
    assert first is not None and len(set(first.tolist())) == 3 and not torch.allclose(first, losses, atol=1e-3)
    assert together.stack is not None
    for name, weights in together.stack.weights.items():
        for seed, model in enumerate(apart.models):
            assert torch.allclose(weights[seed], model.get_parameter(name), rtol=0, atol=1e-4), name


def test_a_seed_that_diverges_does_not_touch_the_others() -> None:
    sound, broken = side(TINY, 2, stacked=True), side(TINY, 2, stacked=True)
    assert broken.stack is not None
    with torch.no_grad():
        broken.stack.weights["ln_f.weight"][1] = float("nan")
    for _ in range(3):
        expected, losses = sound.losses(), broken.losses()
        assert losses[0] == expected[0] and losses[1].isnan()


def test_each_seed_is_clipped_by_its_own_norm() -> None:
    gradients = [torch.tensor([[3.0], [0.3]]), torch.tensor([[[4.0]], [[0.4]]])]
    clip_each(gradients, 1.0)
    assert gradients[0].flatten().tolist() == pytest.approx([0.6, 0.3], abs=1e-6)  # norms 5 and 0.5
    assert gradients[1].flatten().tolist() == pytest.approx([0.8, 0.4], abs=1e-6)
