"""Losses by position, token frequency and document: against numpy on every target; groups against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.prepared import Prepared, Tokens
from gpt2lab.evaluation import windows as parts
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window
from gpt2lab.evaluation.windows import Parts, Targets, divisions
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.store import Store
from gpt2lab.training import World

BLOCK, VOCABULARY, TOTAL = 16, 100, 123
STARTS = [0, 40, 150, 160]
NAMES = ["a.txt", "b.txt", "empty.txt", "a.txt", "c\n.txt"]


@pytest.fixture(scope="module")
def model() -> GPT:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": VOCABULARY}
    built = build_model(ModelConfig.model_validate(sizes), seed=3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Validation text of four documents and an empty one; training text in which low ids are the most frequent."""
    folder, dice = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    train = np.minimum(dice.geometric(0.05, 3000), VOCABULARY - 1)
    tokens = {"train": train, "validation": dice.integers(0, VOCABULARY, 300)}
    made = {}
    for split, ids in tokens.items():
        ids.astype("<u2").tofile(folder / f"{split}.bin")
        made[split] = Tokens([(folder / f"{split}.bin", len(ids))], "<u2", VOCABULARY)
    lengths = [40, 110, 0, 10, 140]
    documents = [{"name": name, "bytes": n, "tokens": n} for name, n in zip(NAMES, lengths, strict=True)]
    manifest = {
        "separator": None, "vocab_size": VOCABULARY, "tokenizer": {"name": "bytes"},
        "splits": {"validation": {"documents": documents}},
    }  # fmt: skip
    return Prepared(folder, manifest, made["train"], made["validation"])


def every_target(model: GPT, data: Prepared) -> dict[str, NDArray[Any]]:
    """Loss, id, tokens seen and place of each target, one window after another, in float64 by numpy."""
    found: dict[str, list[Any]] = {"loss": [], "id": [], "seen": [], "place": []}
    for start in [i * 18 // 8 * BLOCK for i in range(8)]:  # 299 targets have room for 18 blocks
        length = BLOCK if len(found["loss"]) + BLOCK <= TOTAL else TOTAL - len(found["loss"])
        ids = data.validation[start : start + length + 1]
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, :-1].copy()))[0].double().numpy()
        found["loss"] += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(length), ids[1:]])
        found["id"] += list(ids[1:])
        found["seen"] += range(1, length + 1)
        found["place"] += range(start + 1, start + length + 1)
    return {name: np.array(values) for name, values in found.items()}


def scored(model: GPT, data: Prepared, **how: Any) -> tuple[dict[str, Any], dict[str, Any], Parts]:
    filled = Parts(divisions(data, BLOCK))
    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_sequences": 3}
    record, _ = evaluate_by_window(model, data.validation, EvaluationConfig(tokens=TOTAL), parts=filled, **sizes, **how)
    return record, filled.record("key")["parts"], filled


def test_one_pass_gives_the_mean_loss_of_every_group(model: GPT, data: Prepared) -> None:
    record, found, _ = scored(model, data)
    config = EvaluationConfig(tokens=TOTAL)  # the evaluation keeps its bits
    assert record == evaluate_by_window(model, data.validation, config, block_size=BLOCK, batch_sequences=3)[0]
    all_of = every_target(model, data)
    counts = np.bincount(data.train[0 : len(data.train)], minlength=VOCABULARY)
    rank = {token: place for place, token in enumerate(sorted(range(VOCABULARY), key=lambda t: -counts[t]), start=1)}
    ranks = np.array([rank[token] for token in all_of["id"]])
    works = np.searchsorted(STARTS, all_of["place"], side="right") - 1
    names = ["a.txt (1)", "b.txt", "a.txt (3)", "c .txt"]
    inside = {
        "position": lambda group: _between(all_of["seen"], group),
        "frequency": lambda group: _between(ranks, group),
        "document": lambda group: works == names.index(group),
    }
    assert list(found) == list(inside)
    for name, part in found.items():
        assert len(part["groups"]) > 3 and sum(part["targets"]) == TOTAL
        for group, loss, targets in zip(part["groups"], part["losses"], part["targets"], strict=True):
            mask = inside[name](group)
            assert targets == mask.sum() > 0
            assert loss == pytest.approx(all_of["loss"][mask].mean(), abs=2e-5)
        assert np.average(part["losses"], weights=part["targets"]) == pytest.approx(
            record["metrics"]["val/loss"], abs=1e-6
        )
    assert len(found["frequency"]["groups"]) == 10 and len(found["frequency"]["examples"]) == 10


def _between(values: NDArray[Any], group: str) -> NDArray[np.bool_]:
    first, last = map(int, group.split("-"))
    return (values >= first) & (values <= last)


def test_ranks_add_up_to_one_process(model: GPT, data: Prepared) -> None:
    handed: list[Tensor] = []

    class Recording(World):
        def sum(self, tensor: Tensor) -> Tensor:
            handed.append(tensor.clone())
            return tensor

    _, alone, _ = scored(model, data)
    for rank in range(2):
        scored(model, data, world=Recording(rank, 2))
    ours, theirs = (one for one in handed if one.ndim == 2)
    joined = Parts(divisions(data, BLOCK))
    joined.join(lambda empty: empty + ours + theirs)
    assert 0 < ours[1].sum() < 3 * TOTAL
    assert joined.record("key")["parts"] == alone


@pytest.mark.parametrize(
    ("counts", "groups", "names", "members"),
    [
        # 20 occurrences for 4 groups: 6 is next to 5; 4 is nearer than 4 + 6 to a third of the 14 left; 6, then 4
        ([6, 4, 2, 2, 2, 1, 1, 1, 1], 4, ["1-1", "2-2", "3-5", "6-9"], [[0], [1], [2, 3, 4], [5, 6, 7, 8]]),
        # half of it is one token, and the other half is shared anew: 3 is nearer to 5 than 3 + 6; ids in any order
        ([1, 10, 3, 2, 2, 2, 0], 3, ["1-1", "2-2", "3-7"], [[1], [2], [0, 3, 4, 5, 6]]),
        ([5, 5, 5, 5], 2, ["1-4"], [[0, 1, 2, 3]]),  # equal counts stay together
        ([4, 3, 2, 0, 0], 10, ["1-1", "2-2", "3-5"], [[0], [1], [2, 3, 4]]),  # the unseen join the rarest
        ([3, 3, 2, 2, 1, 1], 2, ["1-2", "3-6"], [[0, 1], [2, 3, 4, 5]]),
        ([9, 1, 1, 1], 1, ["1-4"], [[0, 1, 2, 3]]),
        ([0, 0, 7], 2, ["1-3"], [[0, 1, 2]]),
    ],
)
def test_groups_by_frequency_by_hand(
    counts: list[int], groups: int, names: list[str], members: list[list[int]]
) -> None:
    division = parts.by_frequency(np.array(counts), groups)
    assert division.groups == names
    index = division.index(Targets(np.arange(len(counts)), np.array([]), np.array([]))).tolist()
    assert [[token for token, group in enumerate(index) if group == number] for number in range(len(names))] == members


def test_ten_groups_of_many_tokens_hold_a_tenth_each() -> None:
    dice = np.random.default_rng(0)
    counts = np.sort(dice.zipf(1.2, 20_000).clip(max=200))[::-1].copy()
    division = parts.by_frequency(counts, 10)
    group = division.index(Targets(np.arange(len(counts)), np.array([]), np.array([])))
    masses = np.bincount(group, counts)
    largest_tie = max(count * (counts == count).sum() for count in np.unique(counts))
    assert len(masses) == 10 and (np.diff(group) >= 0).all()
    assert np.abs(masses - counts.sum() / 10).max() <= largest_tie


def test_examples_are_the_most_frequent_tokens_of_a_group() -> None:
    division = parts.by_frequency(np.array([8, 3, 1, 1, 2, 1]), 2, text="abcdef".__getitem__)
    assert dict(zip(division.groups, division.examples, strict=True)) == {"1-1": "a", "2-6": "b e c"}


def test_the_longest_works_stand_alone_and_the_others_together() -> None:
    starts = np.array([0, 5, 25, 35, 36])
    places = Targets(np.array([]), np.array([]), np.array([0, 4, 5, 24, 25, 34, 35, 36, 49]))
    every = parts.by_document(starts, list("abcde"), 50, most=4)  # one other needs no name of its own
    assert every.groups == list("abcde") and every.index(places).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    some = parts.by_document(starts, list("abcde"), 50, most=3)
    assert some.groups == ["b", "c", "e", "2 others"] and some.index(places).tolist() == [3, 3, 0, 0, 1, 1, 3, 2, 2]


def test_bands_of_positions_are_those_of_the_metric_and_fewer_in_a_short_context() -> None:
    assert parts.by_position(1024).groups == [
        "1-1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512-1024",
    ]  # fmt: skip
    assert parts.by_position(3).groups == ["1-1", "2-2", "3-3"]


def test_counts_of_long_text_come_from_stretches_over_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "STRETCH", 4)
    tokens = np.repeat(np.arange(10), 4)
    assert parts.token_counts(tokens, 12, limit=1000).tolist() == [4] * 10 + [0, 0]
    assert parts.token_counts(tokens[:-2], 10, limit=1000).tolist() == [4] * 9 + [2]
    assert parts.token_counts(tokens, 10, limit=20).tolist() == [4, 0] * 5


def test_one_document_is_no_division_and_a_stream_lists_none(model: GPT, data: Prepared, tmp_path: Path) -> None:
    def prepared(validation: dict[str, Any], **more: Any) -> Prepared:
        manifest = {**data.manifest, "splits": {"validation": validation}, **more}
        return Prepared(tmp_path, manifest, data.train, data.validation)

    alone, separator = {"documents": [{"name": "a", "bytes": 300, "tokens": 300}]}, int(data.validation[9:10][0])
    stream = prepared({"documents": [], "document_count": 7})
    for one in (prepared(alone), stream):
        assert [division.name for division in divisions(one, BLOCK)] == ["position", "frequency"]
    starts, names = parts.named_documents(prepared(alone, separator=separator))
    ends = np.flatnonzero(data.validation[0:299] == separator)
    assert starts.tolist() == [0, *(ends + 1)]
    assert names == [f"document {number}" for number in range(1, len(ends) + 2)]


def test_the_store_keeps_parts_apart_from_records(model: GPT, data: Prepared, tmp_path: Path) -> None:
    run = Store(tmp_path).run("a" * 16)
    assert run.parts("key") is None and run.evaluation_keys() == []
    record = scored(model, data)[2].record("key")
    run.write_evaluation({"key": "key", "metrics": {}})
    run.write_parts(record)
    assert run.parts("key") == json.loads(json.dumps(record)) == record
    assert run.evaluation_keys() == ["key"]
