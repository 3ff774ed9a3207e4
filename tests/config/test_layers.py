"""Trees merged: sections key by key, choices as a whole, options one by one."""

from __future__ import annotations

from typing import Any

import pytest

import gpt2lab.config.config  # noqa: F401  (fills the slots)
from gpt2lab.config.source import Place, YamlSource, overlay, read_mapping, read_override
from gpt2lab.errors import ConfigError


@pytest.mark.parametrize(
    ("tree", "changes", "result"),
    [
        ({"model": {"n_layer": "4"}}, {"model.n_layer": "6"}, {"model": {"n_layer": "6"}}),
        ({}, {"model.n_layer": "6"}, {"model": {"n_layer": "6"}}),
        (
            {"optim": {"lr": "1", "warmup_steps": "5"}},
            {"optim": {"lr": "2"}},
            {"optim": {"lr": "2", "warmup_steps": "5"}},
        ),
        # a slot's key replaces the whole choice, with its options
        (
            {"model": {"position": {"name": "rotary", "theta": "5"}}},
            {"model.position": "none"},
            {"model": {"position": "none"}},
        ),
        (
            {"model": {"position": {"name": "rotary", "theta": "5"}}},
            {"model": {"position": {"name": "rotary"}}},
            {"model": {"position": {"name": "rotary"}}},
        ),
        # one option keeps the name and the others
        (
            {"optim": {"schedule": {"name": "linear", "final_fraction": "0.5"}}},
            {"optim.schedule.final_fraction": "0"},
            {"optim": {"schedule": {"name": "linear", "final_fraction": "0"}}},
        ),
        (
            {"model": {"mask": "sliding_window"}},
            {"model.mask.window": "8"},
            {"model": {"mask": {"name": "sliding_window", "window": "8"}}},
        ),
        (
            {},
            {"optim.schedule.final_fraction": "0"},
            {"optim": {"schedule": {"name": "cosine", "final_fraction": "0"}}},
        ),
        # another name is another component
        (
            {"model": {"position": {"name": "rotary", "theta": "5"}}},
            {"model.position.name": "t5_bias", "model.position.buckets": "8"},
            {"model": {"position": {"name": "t5_bias", "buckets": "8"}}},
        ),
        # patterns and lists of parts
        (
            {"model": {"mask": ["causal"]}},
            {"model.mask.window": "8"},
            {"model": {"mask": [{"name": "causal", "window": "8"}]}},
        ),
        (
            {"model": {"mask": ["sliding_window", "causal"]}},
            {"model.mask.0.window": "8"},
            {"model": {"mask": [{"name": "sliding_window", "window": "8"}, "causal"]}},
        ),
        ({"training": {"steps": "5"}}, {"training.steps.a": "1"}, {"training": {"steps": {"a": "1"}}}),  # refused later
        ({"evaluation": {"contexts": ["1"]}}, {"evaluation.contexts.0": "2"}, {"evaluation": {"contexts": {"0": "2"}}}),
        ({"optim": ["x"]}, {"optim.schedule.a": "0"}, {"optim": {"schedule": {"name": "cosine", "a": "0"}}}),
        ({"training": {"steps": "5"}}, {"training": {}}, {"training": {"steps": "5"}}),
        ({"training": {"steps": "5"}}, {"training.steps": {}}, {"training": {"steps": {}}}),
    ],
)
def test_changes_by_dotted_key(tree: dict[str, Any], changes: dict[str, Any], result: dict[str, Any]) -> None:
    before = repr(tree)
    merged = overlay(
        YamlSource(tree, {}), [(key, YamlSource(value, {(): Place("")})) for key, value in changes.items()]
    )
    assert merged.tree == result
    assert repr(tree) == before


def test_an_option_of_several_choices_must_say_of_which() -> None:
    base = read_mapping("model: {mask: [sliding_window, causal]}", "x.yaml")
    with pytest.raises(ConfigError, match=r"--set model.mask.window: 2 choices are there"):
        overlay(base, [read_override("model.mask.window=8")])


def test_places_follow_what_was_written_last() -> None:
    base = read_mapping("model:\n  n_layer: 4\n  norm: {name: rmsnorm,\n    eps: 1}\n", "x.yaml")
    merged = overlay(base, [read_override("model.n_layer=6"), read_override("model.norm.eps=2")])
    assert merged.place(("model", "n_layer")).prefix == "--set "
    assert merged.place(("model", "norm", "eps")).prefix == "--set "
    assert merged.place(("model", "norm", "name")).prefix == "x.yaml:3: "
    replaced = overlay(merged, [read_override("model.norm=layernorm")])
    assert not [key for key in replaced.places if key[:2] == ("model", "norm") and len(key) > 2]
    assert replaced.place(("model", "norm")).layer == 2 and replaced.place(("model", "n_layer")).layer == 1
