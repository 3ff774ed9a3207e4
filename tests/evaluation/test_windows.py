"""Losses window by window, and the document that each window starts in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2lab.data.prepared import Prepared, Tokens
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation import EvaluationConfig, validation_documents
from gpt2lab.evaluation.validation import evaluate_by_window
from gpt2lab.evaluation.windows import divided, windows_by_document
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.store import Store

BLOCK = 8


@pytest.fixture(scope="module")
def model() -> GPT:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": 23}
    built = build_model(ModelConfig.model_validate(sizes), seed=3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


def test_every_window_has_the_mean_loss_of_its_targets_and_its_document(model: GPT) -> None:
    tokens = np.random.default_rng(1).integers(0, 23, 200)
    config = EvaluationConfig(tokens=61)
    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_sequences": 3}
    record, windows = evaluate_by_window(model, tokens, config, documents=np.array([0, 24, 30, 100]), **sizes)
    starts = range(0, 192, 24)
    assert windows.targets == (8, 8, 8, 8, 8, 8, 8, 5)
    assert (windows.unit, windows.units) == ("document", (0, 1, 2, 2, 2, 3, 3, 3))
    for start, loss, count in zip(starts, windows.losses, windows.targets, strict=True):
        ids = torch.from_numpy(tokens[start : start + count + 1])
        with torch.no_grad():
            expected = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert np.average(windows.losses, weights=windows.targets) == pytest.approx(record["metrics"]["val/loss"], rel=1e-9)
    assert record == evaluate_by_window(model, tokens, config, **sizes)[0]


def test_the_loss_keeps_the_bits_of_one_sum_over_each_batch(model: GPT) -> None:
    """Stored runs are found again by these bits: one float64 sum for each batch, not one for each window."""
    tokens = np.random.default_rng(1).integers(0, 23, 200)
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
