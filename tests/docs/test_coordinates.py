"""The coordinate check tells a parametrisation that follows the width from one that does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import coordinates

from gpt2lab.config import Config, load_config
from gpt2lab.data.batches import Batches
from gpt2lab.errors import ConfigError
from gpt2lab.model import build_model

MUP = "{name: mup, base_width: 64}"
TEXT = np.frombuffer(b"".join(b"%d bottles of beer on the wall, " % n for n in range(400)), np.uint8).astype(np.int64)


def tiny(parametrization: str, *overrides: str) -> Config:
    sizes = ["model.n_layer=2", "model.n_head=4", "model.n_embd=64", "model.block_size=32", "optim.lr=1e-3"]
    return load_config("nano", [*sizes, f"model.parametrization={parametrization}", *overrides])


def checked(parametrization: str, widths: list[int], *overrides: str, steps: int = 6, seeds: int = 1) -> dict[str, Any]:
    configs = coordinates.at_widths(tiny(parametrization, *overrides), widths)
    return coordinates.coordinate_check(configs, steps=steps, seeds=seeds, tokens=TEXT)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {name: checked(name, [64, 128, 256, 512]) for name in ("standard", MUP)}


def test_under_mup_everything_moves_as_far_at_every_width(found: dict[str, dict[str, Any]]) -> None:
    slopes = found[MUP]["slopes"]
    assert set(slopes) == {"block 0", "block 1", "scores 0", "scores 1", "logits"}
    assert all(abs(slopes[name]) < 0.25 for name in slopes), slopes


def test_under_the_standard_parametrisation_it_moves_further_the_wider_the_model(
    found: dict[str, dict[str, Any]],
) -> None:
    slopes = found["standard"]["slopes"]
    assert all(slopes[name] > 0.5 for name in slopes), slopes


def test_while_changes_are_small_their_powers_are_those_of_theory() -> None:
    """With one std and one rate, queries move in proportion to C and meet keys of size sqrt(C): scores of the first
    block move as C^1.5. So does what one branch writes; the second of a block adds what the first has moved. Under muP
    all powers are 0."""
    slopes = {name: checked(name, [128, 512], "optim.lr=1e-5", steps=1)["slopes"] for name in ("standard", MUP)}
    assert slopes["standard"]["scores 0"] == pytest.approx(1.5, abs=0.15)
    assert all(1.5 < slopes["standard"][block] < 2.5 for block in ("block 0", "block 1"))
    assert all(abs(slopes[MUP][name]) < 0.1 for name in ("scores 0", "scores 1", "block 0", "block 1"))


def test_first_logits_follow_from_the_widths(found: dict[str, dict[str, Any]]) -> None:
    """h wte^T has sd sqrt(C) 0.02 but for the token just read, whose vector is part of the stream: at most C 0.02."""
    for name, power in (("standard", 0), (MUP, -1)):
        for width, values in zip(found[name]["widths"], found[name]["rms"]["logits"], strict=True):
            factor = (width / 64) ** power
            others, own = math.sqrt(width) * 0.02 * factor, width * 0.02 * factor
            assert 0.95 * others < values[0] < math.hypot(others, own / math.sqrt(256)), (name, width)


def test_the_record_is_plain_and_equal_where_the_parametrisations_are(found: dict[str, dict[str, Any]]) -> None:
    record = found["standard"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["widths"] == [64, 128, 256, 512] and record["steps"] == list(range(7)) and record["seeds"] == [0]
    for kind in ("rms", "change"):
        for name, values in record[kind].items():
            assert [len(row) for row in values] == [7] * 4
            assert values[0] == found[MUP][kind][name][0], "64 is the base width"
    assert all(row[0] == 0 for values in record["change"].values() for row in values)


def test_it_draws_no_random_number_and_depends_on_the_seed_alone(found: dict[str, dict[str, Any]]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = checked("standard", [64, 128], "model.dropout=0.1")
    assert torch.equal(before, torch.get_rng_state())
    for name, values in again["rms"].items():
        assert values == found["standard"]["rms"][name][:2]
    one, other, both = (
        checked("standard", [64, 128], *seed, steps=1, seeds=n) for seed, n in (([], 1), (["seed=1"], 1), ([], 2))
    )
    assert both["seeds"] == [0, 1] and one["rms"] != other["rms"]
    halves: list[Any] = [{"rms": {"logits": [3.0, 1.0]}}, {"rms": {"logits": [4.0, None]}}]
    assert coordinates.joined(halves) == {"rms": {"logits": [math.sqrt(12.5), None]}}


def test_numbers_are_those_of_the_model() -> None:
    record = checked("standard", [64, 128], steps=0)
    config = coordinates.at_widths(tiny("standard"), [128])[0]
    model = build_model(config.model, seed=0).eval()
    tokens = torch.as_tensor(Batches(TEXT, 32, 4, 0).at(0)[0])
    with torch.no_grad():
        assert record["rms"]["logits"][1][0] == pytest.approx(model(tokens).square().mean().sqrt().item(), rel=1e-5)
        q, k, _ = model.h[0].attn.c_attn(model.h[0].ln_1(model.wte.weight[tokens] + model.wpe.weight)).split(128, -1)
        q, k = (x.view(4, 32, 8, 16).transpose(1, 2) for x in (q, k))
        scores = (q @ k.mT / 4)[..., torch.ones(32, 32, dtype=torch.bool).tril()]
    assert record["rms"]["scores 0"][1][0] == pytest.approx(scores.square().mean().sqrt().item(), rel=1e-5)


def test_what_blows_up_is_null_and_takes_no_part_in_the_slope() -> None:
    record = checked("standard", [64, 128], "optim.lr=1e30", "optim.grad_clip=null", steps=3)
    assert record["rms"]["logits"][0][-1] is None
    assert record["slopes"]["logits"] is None
    json.dumps(record, allow_nan=False)
    assert coordinates.slope([64, 128, 256], [1.0, None, 16.0]) == pytest.approx(2.0)
    assert coordinates.slope([64, 128], [0.0, 1.0]) is None
    assert coordinates.slope([1, 10], [5.0, 0.5]) == pytest.approx(-1)


def test_widths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[40, 8\] are no multiples of a head's 16 channels"):
        coordinates.at_widths(tiny("standard"), [32, 40, 8])
    for config, widths, expected in (
        (tiny("standard"), [[32, 48]], [(32, 2), (48, 3)]),
        (tiny("standard"), [], [(32, 2), (64, 4), (128, 8)]),
        (load_config("nano", ["model.n_head=1"]), [], [(128, 1), (256, 2), (512, 4)]),
    ):
        assert [(c.model.n_embd, c.model.n_head) for c in coordinates.at_widths(config, *widths)] == expected
    for configs in ([], [tiny("standard"), tiny(MUP)]):
        with pytest.raises(ConfigError, match="different widths"):
            coordinates.coordinate_check(configs, tokens=TEXT)


def test_the_ladder_of_widths_changes_nothing_but_the_width() -> None:
    nano = load_config("nano")
    files = sorted((Path(__file__).parents[2] / "sweeps" / "widths").glob("*.yaml"))
    for file in files:
        found, width = load_config(file), int(file.stem.partition("-")[2])
        assert found == nano.with_changes({"model.n_embd": width, "model.n_head": width // nano.model.head_size})
    assert [file.stem for file in files] == ["nano-256", "nano-512", "nano-64"]
