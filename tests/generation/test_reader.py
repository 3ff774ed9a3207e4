"""What reads a few tokens at a time gives the model's own scores, for every component; the cache's rows are right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2lab import testing
from gpt2lab.components.context import Cache
from gpt2lab.generation import Reader, reader
from gpt2lab.generation.reader import HUGE_BYTES, in_huge_pages
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS
from gpt2lab.testing import Case

SMAPS = Path("/proc/self/smaps")
CASES = [case for slot in MODEL_SLOTS for case in testing.cases(SLOTS[slot])]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case.options else case for case in CASES], ids=str
)
def test_a_reader_gives_the_models_scores(case: Case) -> None:
    model, (tokens, _) = testing.disturbed(case.model()), testing.batch()
    with torch.no_grad():
        full = model(tokens)
    for precision, most in (("fp32", 2e-5), ("bf16", 0.05)):
        reading, cache = Reader(model, rows=2, precision=precision), Cache()  # type: ignore[arg-type]
        with torch.inference_mode():
            for end, piece in zip((9, 10, 16), tokens.split((9, 1, 6), 1), strict=True):
                scores = reading.scores(piece, cache)
                assert scores.dtype == torch.float32
                assert testing.distance(scores, full[:, end - 1]) < most, f"{precision}, {end} tokens"


def test_products_without_a_layout_of_their_own_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(24, 16), torch.randn(24), torch.randn(3, 5, 16)
    with torch.inference_mode():
        packed = {dtype: reader.product(weight, bias, 3, dtype)(x) for dtype in (torch.float32, torch.bfloat16)}
        monkeypatch.setattr(reader, "has_packed_products", lambda dtype: False)
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            plain = reader.product(weight, bias, 3, dtype)(x)
            assert plain.dtype == packed[dtype].dtype == dtype
            assert plain.shape == packed[dtype].shape == (3, 5, 24)
            assert testing.distance(plain, packed[dtype]) < most
        assert testing.distance(reader.product(weight, bias, 3, torch.float32)(x), x @ weight.T + bias) < 1e-5


def test_memory_in_huge_pages_stays_what_it_was() -> None:
    data = np.arange(2 * HUGE_BYTES, dtype=np.int64)  # 16 huge pages
    before = data.copy()
    done = in_huge_pages(data.ctypes.data, data.nbytes)
    assert np.array_equal(data, before)
    assert in_huge_pages(data.ctypes.data, 4096) is False, "no whole huge page lies there"
    assert in_huge_pages(16 * HUGE_BYTES, HUGE_BYTES) is False, "nothing lies there"
    if done:
        begin = -(-data.ctypes.data // HUGE_BYTES) * HUGE_BYTES
        areas = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^AnonHugePages: +(\d+) kB", SMAPS.read_text(), re.M | re.S)
        (kib,) = (int(kib) for low, high, kib in areas if int(low, 16) <= begin < int(high, 16))
        assert kib >= 15 * 2048


def test_an_heir_of_linear_keeps_its_own_product() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model, (tokens, _) = Case("norm", "layernorm").model(), testing.batch()
    heir = Doubled(32, 128)
    model.h[0].mlp.c_fc = heir
    with torch.inference_mode():
        assert testing.distance(Reader(model).scores(tokens, Cache()), model(tokens)[:, -1]) < 1e-5


def test_rows_of_a_cache_are_all_that_was_kept() -> None:
    cache, kept = Cache(), []
    for size in (3, 1, 1, 5, 1, 20, 1):
        kept.append(torch.randn(2, 4, size, 8))
        assert torch.equal(cache.append("k", kept[-1], -2), torch.cat(kept, -2))
        assert torch.equal(cache.rows["k"], torch.cat(kept, -2))


def test_rows_stay_in_place_while_there_is_room() -> None:
    cache = Cache()
    places = {cache.append("k", torch.randn(1, 1, 1, 8), -2).data_ptr() for _ in range(64)}
    assert len(places) <= 8


def test_gradients_pass_through_a_cache() -> None:
    model, (tokens, targets) = testing.disturbed(Case("norm", "layernorm").model()), testing.batch()

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    cache = Cache()
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split((5, 1, 10), 1)], 1)
    for one, other in zip(gradients(pieces), gradients(model(tokens)), strict=True):
        assert testing.distance(one, other) < 1e-5
