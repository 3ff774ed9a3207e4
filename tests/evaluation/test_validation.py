"""Validation: which tokens are scored, in which sums, and what the model is like afterwards; losses by window."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt2lab.data.prepared import Prepared, Tokens
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window, evaluation_key
from gpt2lab.evaluation.windows import divided, validation_documents, windows_by_document
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.store import Store
from gpt2lab.training import World

VOCABULARY, BLOCK = 23, 8
Ids = NDArray[np.int64]


def small(**changes: Any) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": VOCABULARY}
    return build_model(ModelConfig.model_validate(sizes | changes), seed=3)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Untrained, with larger weights so that the losses of tokens differ."""
    built = small(dropout=0.5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


@pytest.fixture(scope="module")
def tokens() -> Ids:
    return np.random.default_rng(1).integers(0, VOCABULARY, 200)


def each_loss(model: GPT, tokens: Ids, start: int, length: int) -> Tensor:
    """Nats of tokens start + 1 to start + length, from one pass in float64.  -> (length,)"""
    ids = torch.from_numpy(tokens[start : start + length + 1])
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="none")
    model.train(training)
    return losses


def scored(model: Any, tokens: Ids, total: int, batch: int, block_size: int = BLOCK, **how: Any) -> dict[str, Any]:
    """The record of an evaluation of `total` tokens."""
    config = EvaluationConfig(tokens=total)
    return evaluate_by_window(model, tokens, config, block_size=block_size, batch_sequences=batch, **how)[0]


def at_contexts(model: GPT, tokens: Ids, contexts: list[float], total: int, batch: int = 4) -> dict[str, float | None]:
    """The losses at other context lengths."""
    config = EvaluationConfig(tokens=1, contexts=tuple(contexts), context_tokens=total)
    record, _ = evaluate_by_window(model, tokens, config, block_size=BLOCK, batch_sequences=batch)
    losses: dict[str, float | None] = record["contexts"]
    return losses


@pytest.mark.parametrize("total", [64, 61, 5])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_blocks_spread_over_all_tokens_are_scored_once(model: GPT, tokens: Ids, total: int, batch: int) -> None:
    starts = [0] if total == 5 else range(0, 192, 24)  # 8 of the 24 blocks that 199 targets allow: every third
    lengths = [BLOCK] * (len(starts) - 1) + [total - BLOCK * (len(starts) - 1)]
    expected = [each_loss(model, tokens, s, n) for s, n in zip(starts, lengths, strict=True)]
    record = scored(model, tokens, total, batch)
    assert record["targets"] == total
    assert record["metrics"] == {"val/loss": pytest.approx(torch.cat(expected).mean().item(), abs=1e-6)}


def test_the_model_and_random_numbers_are_left_alone(model: GPT, tokens: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradients, and not by inference mode: tables that a position scheme keeps would be unfit for training."""
    seen: list[tuple[bool, bool]] = []
    handle = model.register_forward_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    model.train()
    model.h[0].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = (scored(model, tokens, 40, 4) for _ in range(2))
    handle.remove()
    assert first == second and set(seen) == {(False, False)}  # no dropout
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", fail)
    model.train()
    with pytest.raises(EnvironmentFault, match="evaluation: out of memory with 4 sequences of 8 tokens"):
        scored(model, tokens, 40, 4)
    assert model.training


def test_bits_per_byte_is_by_the_bytes_of_the_scored_targets(model: GPT, tokens: Ids) -> None:
    lengths = np.random.default_rng(2).integers(1, 9, VOCABULARY)
    tokens = tokens[:51]  # so that all 50 targets are scored
    found = scored(model, tokens, 50, 4, byte_lengths=lengths)["metrics"]
    bits = found["val/loss"] * 50 / math.log(2) / lengths[tokens[1:51]].sum()
    assert found["val/bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_sums_are_exact_where_float32_would_lose_them() -> None:
    """40,000 rows whose losses differ by little: a float32 sum is off in the seventh digit."""

    class Constant(nn.Module):
        max_context = None

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.1, 0.7, -0.3]))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.scores.expand(*tokens.shape, 3)

    model: Any = Constant()
    tokens = np.random.default_rng(0).integers(0, 3, 40_001)
    per_token = -F.log_softmax(model.scores.detach(), -1)
    expected = np.bincount(tokens[1:], minlength=3) @ per_token.double().numpy() / 40_000
    found = scored(model, tokens, 40_000, 7, block_size=1000)["metrics"]["val/loss"]
    assert found == pytest.approx(expected, rel=1e-9)


def test_too_few_tokens_are_refused_with_the_number(model: GPT, tokens: Ids) -> None:
    scored(model, tokens, 199, 8)
    with pytest.raises(ConfigError, match="needs 201 tokens, has 200") as caught:
        scored(model, tokens, 200, 8)
    assert caught.value.hint == "--set evaluation.tokens=199"


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_contexts_score_the_same_targets_at_every_length(tokens: Ids, batch: int) -> None:
    """Every segment by hand: the last 4 predictions of each window, windows of 4, 8 and 16 tokens that end alike."""
    model = small(position=["rotary"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    total, shortest, longest = 29, 4, 16  # 7 segments; behind the first 12 tokens there is room for 46
    ends = [longest + i * 46 // 7 * shortest for i in range(7)]
    assert ends[-1] > 170
    got = at_contexts(model, tokens, [1, 0.5, 2], total, batch)
    assert list(got) == ["1", "0.5", "2"]
    for name, length in (("0.5", 4), ("1", 8), ("2", 16)):
        expected = torch.cat([each_loss(model, tokens, end - length, length)[-shortest:] for end in ends])
        assert len(expected) == 28
        assert got[name] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert len(set(got.values())) == 3


def test_contexts_beyond_the_positions_are_none_and_change_no_other(model: GPT, tokens: Ids) -> None:
    """The targets are those of all asked lengths, also for a model that cannot reach the longest."""
    assert model.max_context == BLOCK
    got = at_contexts(model, tokens, [0.5, 1, 4], 100)
    assert got["4"] is None
    ends = [32 + i * 42 // 25 * 4 for i in range(25)]  # 25 segments, and room for 42 behind the first 28 tokens
    expected = [each_loss(model, tokens, end - 4, 4) for end in ends]
    assert got["0.5"] == pytest.approx(torch.cat(expected).mean().item(), abs=1e-6)
    assert at_contexts(model, tokens, [], 100) == {}


def test_contexts_need_room_for_the_longest(model: GPT, tokens: Ids) -> None:
    assert at_contexts(model, tokens[:33], [1, 4], 8)["1"]
    with pytest.raises(ConfigError, match="needs 33 tokens, has 32"):
        at_contexts(model, tokens[:32], [1, 4], 8)


def test_bfloat16_is_close_and_its_loss_is_taken_in_float32(model: GPT, tokens: Ids) -> None:
    tokens = tokens[:65]
    exact = scored(model, tokens, 64, 8)["metrics"]["val/loss"]
    rounded = scored(model, tokens, 64, 8, precision="bf16")["metrics"]["val/loss"]
    assert rounded != exact
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.from_numpy(tokens[:64]).view(8, 8))
    expected = F.cross_entropy(logits.double().flatten(0, 1), torch.from_numpy(tokens[1:65]))
    assert rounded == pytest.approx(expected.item(), abs=1e-5)
    model.train()


def test_ranks_share_the_batches_without_overlap(model: GPT, tokens: Ids) -> None:
    """Sums of two ranks, joined by hand, are those of one process; tests/training joins them by gloo."""
    partial: list[Tensor] = []

    class Recording(World):
        def sum(self, tensor: Tensor) -> Tensor:
            partial.append(tensor)
            return tensor

    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_sequences": 2}
    alone, windows = evaluate_by_window(model, tokens, EvaluationConfig(tokens=61), **sizes)
    for rank in range(2):
        scored(model, tokens, 61, 2, world=Recording(rank, 2))
    nats, targets, _, *each = (partial[0] + partial[1]).tolist()
    assert (nats / targets, targets) == (pytest.approx(alone["metrics"]["val/loss"], rel=1e-12), 61)
    assert 0 < partial[0][1] < 61
    assert tuple(each) == windows.losses


def test_evaluate_makes_the_record_of_the_store(model: GPT, tokens: Ids) -> None:
    config = EvaluationConfig(every_steps=1, tokens=64, contexts=(0.5, 1, 4), context_tokens=64)
    lengths = np.ones(VOCABULARY, np.int64)
    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_sequences": 4}
    record, _ = evaluate_by_window(model, tokens, config, byte_lengths=lengths, **sizes)
    assert record["spec"] == {"tokens": 64, "contexts": [0.5, 1.0, 4.0], "block_size": BLOCK, "context_tokens": 64}
    assert record["key"] == evaluation_key(record["spec"])
    assert record["metrics"] == scored(model, tokens, 64, 4, byte_lengths=lengths)["metrics"]
    assert (record["contexts"].keys(), record["contexts"]["4"]) == ({"0.5", "1", "4"}, None)
    assert record["targets"] == 64


def test_keys_depend_on_what_is_measured_and_not_on_how_it_is_written() -> None:
    spec = {"tokens": 64, "contexts": [1, 0.5], "block_size": 8}
    assert evaluation_key(spec) == evaluation_key({"block_size": 8, "contexts": [0.5, 1.0], "tokens": 64})
    others = [{**spec, "tokens": 65}, {**spec, "contexts": [1]}, {**spec, "block_size": 9}]
    assert len({evaluation_key(s) for s in [spec, *others]}) == 4
    assert len(evaluation_key(spec)) == 16


def test_config_reads_text_and_refuses_nonsense() -> None:
    config = EvaluationConfig.model_validate({"every_steps": "10", "tokens": "64", "contexts": ["0.5", "1"]})
    assert config.contexts == (0.5, 1.0)
    assert config.problems(8) == []
    assert [p.where for p in config.problems(7)] == ["evaluation.contexts"]
    assert [p.where for p in EvaluationConfig(context_tokens=63, contexts=(8,)).problems(8)] == [
        "evaluation.context_tokens"
    ]
    for wrong in (["0"], ["1", "1"], ["-1"], ["x"]):
        with pytest.raises(ValueError, match="contexts"):
            EvaluationConfig.model_validate({"contexts": wrong})


# Windows and documents.


def test_every_window_has_the_mean_loss_of_its_targets_and_its_document(model: GPT, tokens: Ids) -> None:
    config = EvaluationConfig(tokens=61)
    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_sequences": 3}
    record, windows = evaluate_by_window(model, tokens, config, documents=np.array([0, 24, 30, 100]), **sizes)
    starts = range(0, 192, 24)
    assert windows.targets == (8, 8, 8, 8, 8, 8, 8, 5)
    assert (windows.unit, windows.units) == ("document", (0, 1, 2, 2, 2, 3, 3, 3))
    for start, loss, count in zip(starts, windows.losses, windows.targets, strict=True):
        assert loss == pytest.approx(each_loss(model, tokens, start, count).mean().item(), abs=1e-5)
    assert np.average(windows.losses, weights=windows.targets) == pytest.approx(record["metrics"]["val/loss"], rel=1e-9)
    assert record == evaluate_by_window(model, tokens, config, **sizes)[0]


def test_the_loss_keeps_the_bits_of_one_sum_over_each_batch(model: GPT, tokens: Ids) -> None:
    """Stored runs are found again by these bits: one float64 sum for each batch, not one for each window."""
    total = torch.zeros(1, dtype=torch.float64)
    model.eval()
    for first in range(0, 8, 3):
        ids = np.stack([tokens[24 * i : 24 * i + 9] for i in range(first, min(first + 3, 8))])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[:, :-1].copy())).flatten(0, 1)
        total += F.cross_entropy(logits, torch.from_numpy(ids[:, 1:].flatten()), reduction="none").double().sum()
    record, _ = evaluate_by_window(model, tokens, EvaluationConfig(tokens=64), block_size=BLOCK, batch_sequences=3)
    assert record["metrics"]["val/loss"] == total.item() / 64


@pytest.mark.parametrize("documents", [None, np.array([0, 900])])
def test_windows_of_one_document_are_units_themselves(documents: Any) -> None:
    found = windows_by_document([1.0, 2.0, 3.0], [8, 8, 4], [0, 8, 16], documents)
    assert (found.unit, found.units) == ("window", (0, 1, 2))


def prepared(folder: Path, ids: list[int], lengths: list[int], separator: int | None) -> Prepared:
    file = folder / "validation_000.bin"
    np.array(ids, "<u2").tofile(file)
    tokens = Tokens([(file, len(ids))], "<u2", 10)
    documents = [{"name": str(i), "bytes": n, "tokens": n} for i, n in enumerate(lengths)]
    manifest = {"separator": separator, "splits": {"validation": {"documents": documents}}}
    return Prepared(folder, manifest, tokens, tokens)


@pytest.mark.parametrize(
    ("lengths", "separator", "starts"),
    [
        ([3, 0, 4], 9, [0, 3]),  # an empty document holds no window
        ([7], 9, [0, 2, 5]),
        ([7], 8, None),
        ([7], None, None),
    ],
)
def test_documents_come_from_the_manifest_or_else_from_separators(
    lengths: list[int], separator: int | None, starts: list[int] | None, tmp_path: Path
) -> None:
    found = validation_documents(prepared(tmp_path, [1, 9, 2, 3, 9, 4, 9], lengths, separator))
    assert (None if found is None else found.tolist()) == starts


def test_separators_are_found_across_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.evaluation.windows.READ_TOKENS", 3)
    found = divided(np.array([1, 9, 2, 9, 3, 9, 4]), 9)
    assert found is not None and found.tolist() == [0, 2, 4, 6]


def test_the_store_keeps_windows_apart_from_records(tmp_path: Path) -> None:
    run = Store(tmp_path).run("a" * 16)
    assert run.windows("key") is None
    windows = windows_by_document([1.00000004, 2.5], [8, 4], [0, 8], np.array([0, 5]))
    run.write_evaluation({"key": "key", "metrics": {}})
    run.write_windows(windows.record("key"))
    kept = {"key": "key", "unit": "document", "losses": [1.0, 2.5], "targets": [8, 4], "units": [0, 1]}
    assert run.windows("key") == json.loads(json.dumps(kept))
    assert [file.name for file in (run.path / "evaluations").glob("*.json")] == ["key.json"]
    with pytest.raises(ConfigError, match="cannot be a"):
        run.windows("../up")
