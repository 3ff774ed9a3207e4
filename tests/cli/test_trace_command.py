"""gpt2lab trace: what it prints, for people and programs, and what it says to bad input."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from gpt2lab.cli.catalogue import print_trace as show
from gpt2lab.model import ModelConfig
from gpt2lab.trace import folded, trace

Call = Callable[..., Any]


def test_piped_it_is_aligned_text_with_the_totals(gpt2lab: Call) -> None:
    answer = gpt2lab("trace", "nano")
    assert answer.code == 0 and answer.err == ""
    lines = answer.out.splitlines()
    assert lines[0] == "nano: one pass over 1 x 128 tokens"
    head = next(line for line in lines if line.startswith("tensor"))
    assert re.split(r"\s{2,}", head) == ["tensor", "shape", "sizes", "parameters", "forward", "training", "what it is"]
    at = head.index("what it is")
    rows = lines[lines.index(head) + 1 : lines.index("", lines.index(head))]
    assert all(line[at - 2 : at].strip() == "" for line in rows)
    assert any("3 more like block 0" in line for line in rows)
    assert "842,496 parameters" in answer.out and "5.7 MFLOP" in answer.out
    assert "\x1b" not in answer.out


def test_json_has_every_row_and_the_totals(gpt2lab: Call) -> None:
    told = json.loads(gpt2lab("trace", "nano", "--json", "--set", "model.position=rotary", "--batch", "2").out)
    assert told["letters"]["B"] == 2 and told["letters"]["n"] == 256
    assert sum(row["parameters"] for row in told["rows"]) == told["parameters"] == 842_496 - 128 * 128
    work = sum(row["forward"] + row["backward"] for row in told["rows"])
    assert work / 256 == told["flops_per_token"]
    assert {row["depth"] for row in told["rows"]} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nanno",), "unknown preset 'nanno'; did you mean 'nano'?"),
        (("nano", "--layer", "4"), "--layer: there is no block 4: blocks are 0 to 3"),
        (("nano", "--tokens", "999"), "999 tokens of context, but the positions end at 128"),
        (("nano", "--set", "model.nrom=rmsnorm"), "did you mean 'norm'?"),
        (("nano", "--batch", "0"), "--batch"),
        (("nano", "--set", "model.position=rotary", "--tokens", "1000000000"), "too large to count"),
    ],
)
def test_bad_input_is_answered_in_one_clear_line(gpt2lab: Call, words: tuple[str, ...], said: str) -> None:
    answer = gpt2lab("trace", *words)
    assert answer.code == 2 and answer.out == ""
    first, *others = answer.err.splitlines()
    assert said in first and len(others) == 1 and others[0].startswith("try: ")


@pytest.mark.parametrize(("width", "left_out"), [(150, ""), (100, "sizes"), (80, "training")])
def test_on_a_terminal_it_is_a_table_as_wide_as_that(
    monkeypatch: pytest.MonkeyPatch, width: int, left_out: str
) -> None:
    import gpt2lab.display

    console = Console(force_terminal=True, width=width, record=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr(gpt2lab.display, "console_for", lambda: console)
    seen = trace(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50))
    show("tiny", seen, folded(seen.rows))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    head = next(line for line in text.splitlines() if line.startswith("tensor"))
    assert (left_out not in head) if left_out else ("sizes" in head)
    assert "1 more like" in text and f"{seen.parameters:,} parameters" in text
