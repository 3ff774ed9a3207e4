"""docs/features.md: every fragment of YAML builds a model, every hook exists, and shares are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from gpt2lab.components.attention import GroupedAttention
from gpt2lab.components.embedding import Normed
from gpt2lab.components.head import Head
from gpt2lab.components.linear import Quantized
from gpt2lab.components.mlp import MLP
from gpt2lab.components.norm import RMSNorm
from gpt2lab.components.objective import MultiToken
from gpt2lab.components.position import Position
from gpt2lab.components.residual import Block
from gpt2lab.components.scores import Scores
from gpt2lab.components.stack import CrossLayer
from gpt2lab.config import load_config
from gpt2lab.model import GPT
from gpt2lab.optim import build_optimizers
from gpt2lab.registry import SLOTS

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
TEXT = PAGE.read_text(encoding="utf-8")
HOOKS = {
    "attention": GroupedAttention, "embedding": Normed, "head": Head, "linear": Quantized, "mlp": MLP, "norm": RMSNorm,
    "objective": MultiToken, "position": Position, "residual": Block, "scores": Scores, "stack": CrossLayer,
}  # fmt: skip


def tables() -> dict[str, list[tuple[str, str]]]:
    """Project -> (feature, how it is written here)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in TEXT.split("\n## ")[1:]:
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
        found[section.splitlines()[0]] = [(feature, how) for feature, how in rows]
    return found


TABLES = tables()
ROWS = [(f"{project}: {feature}", how) for project, rows in TABLES.items() for feature, how in rows]
FRAGMENTS = [(name, how[1:-1]) for name, how in ROWS if how.startswith("`{")]


def flat(value: object) -> str:
    """A value as `--set` takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


@pytest.mark.parametrize(("name", "fragment"), FRAGMENTS, ids=[name for name, _ in FRAGMENTS])
def test_fragments_build_and_can_be_optimised(name: str, fragment: str) -> None:
    settings = yaml.load(fragment, yaml.BaseLoader)  # as written: 1e-4 is text
    config = load_config("nano", [f"{key}={flat(value)}" for key, value in settings.items()])
    assert config != load_config("nano"), "it changes nothing"
    with torch.device("meta"):
        model = GPT(config.model)
    assert build_optimizers(config.optim, model.params())
    assert config.optim.multiplier(config.training.steps)(0) > 0


def test_hooks_exist() -> None:
    for name, how in ROWS:
        if how.startswith("plug-in: "):
            for hook in re.findall("`([^`]+)`", how):
                slot, _, method = hook.partition(".")
                assert slot in SLOTS, name
                assert not method or hasattr(HOOKS[slot], method), f"{name}: {hook}"
        else:
            assert how.startswith(("`{", "not possible: ")), f"{name}: {how}"


def test_shares_are_those_of_the_tables() -> None:
    for project, rows in TABLES.items():
        counts = [sum(how.startswith(kind) for _, how in rows) for kind in ("`{", "plug-in: ", "not possible: ")]
        share = (counts[0] + counts[1]) / len(rows)
        line = f"| {project} | {len(rows)} | {counts[0]} | {counts[1]} | {counts[2]} | {share:.0%} |"
        assert line.replace("%", " %") in TEXT, line
        assert share >= 0.95, f"{project}: {share:.1%}"
