"""Commands that read or examine: trace, why, adopt without runs, selftest."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt2lab.analysis import selftest
from gpt2lab.analysis.selftest import LONG, PARTS, QUICK, Measurement, SelfTest
from gpt2lab.cli.trace import print_trace as show
from gpt2lab.inspection.trace import folded, trace
from gpt2lab.model import ModelConfig
from gpt2lab.store import Store, write_json

Call = Callable[..., Any]


def test_piped_it_is_aligned_text_with_the_totals(gpt2lab: Call) -> None:
    answer = gpt2lab("trace", "nano")
    assert answer.code == 0 and answer.err == ""
    lines = answer.out.splitlines()
    assert lines[0] == "nano: one pass over 1 x 128 tokens"
    head = next(line for line in lines if line.startswith("module"))
    assert re.split(r"\s{2,}", head) == ["module", "shape", "sizes", "parameters", "FLOP", "what it is"]
    at = head.index("what it is")
    rows = lines[lines.index(head) + 1 : lines.index("", lines.index(head))]
    assert all(line[at - 2 : at].strip() == "" for line in rows)
    assert any("blocks 1 to 3" in line for line in rows)
    assert "842,496 parameters" in answer.out and "5.7 MFLOP" in answer.out
    assert "\x1b" not in answer.out


def test_json_has_every_row_and_the_totals(gpt2lab: Call) -> None:
    told = json.loads(gpt2lab("trace", "nano", "--json", "--set", "model.position=rotary", "--batch", "2").out)
    assert told["letters"]["B"] == 2 and told["letters"]["n"] == 256
    assert sum(row["parameters"] for row in told["rows"]) == told["parameters"] == 842_496 - 128 * 128
    assert sum(row["forward"] for row in told["rows"]) * 3 / 256 == told["flops_per_token"]
    assert {f"h.{block}" for block in range(4)} < {row["path"] for row in told["rows"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nanno",), "unknown preset 'nanno'; did you mean 'nano'?"),
        (("nano", "--layer", "4"), "--layer: there is no block 4: blocks are 0 to 3"),
        (("nano", "--tokens", "999"), "999 tokens of context, but the positions are limited to 128"),
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


@pytest.mark.parametrize(("width", "left_out"), [(150, ""), (80, "sizes")])
def test_on_a_terminal_it_is_a_table_as_wide_as_that(
    monkeypatch: pytest.MonkeyPatch, width: int, left_out: str
) -> None:
    console = Console(force_terminal=True, width=width, record=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr("gpt2lab.cli.trace.console_for", lambda: console)
    seen = trace(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50))
    show("tiny", seen, folded(seen.rows))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    head = next(line for line in text.splitlines() if line.startswith("module"))
    assert (left_out not in head) if left_out else ("sizes" in head)
    assert "block 1" in text and f"{seen.parameters:,} parameters" in text


A, B, C = "a" * 16, "ab" * 8, "c" * 16


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Two runs that differ in their rate, seed and one definition, and a third that never began."""
    root = tmp_path / "runs"
    settings: dict[str, Any] = {"optim": {"lr": 0.01}, "model": {"mlp": [{"name": "mine"}]}}
    for run_id, lr, seed, code in ((A, 0.01, 0, "1" * 64), (B, 0.02, 1, "2" * 64)):
        identity = {"settings": {**settings, "optim": {"lr": lr}}, "seed": seed, "core": "0" * 64}
        Store(root).run(run_id).write_identity(
            {"id": run_id, "identity": {**identity, "components": {"mlp=mine": code}}}
        )
    write_json(root / "code" / f"{'1' * 32}.json", {"plugin:Mine": "x = 1"})
    write_json(root / "code" / f"{'2' * 32}.json", {"plugin:Mine": "x = 2"})
    Store(root).run(C).write_config("seed: 0\n")
    return root


def test_why_tells_what_differs_for_ids_and_their_beginnings(gpt2lab: Call, three: Path) -> None:
    answer = gpt2lab("why", A[:2], B[:2])
    assert answer.code == 0, answer.err
    assert answer.out.splitlines() == [
        "optim.lr: 0.01 -> 0.02", "seed: 0 -> 1", "code of mlp=mine: plugin.Mine changed", "    @@ -1 +1 @@",
        "    -x = 1", "    +x = 2",
    ]  # fmt: skip


def test_why_as_json(gpt2lab: Call, three: Path) -> None:
    told = json.loads(gpt2lab("why", A, B, "--json").out)
    assert (told["a"], told["b"]) == (A, B)
    assert told["differences"][0] == {"what": "optim.lr", "a": "0.01", "b": "0.02", "code": []}
    assert len(told["differences"]) == 3
    assert json.loads(gpt2lab("why", A, A, "--json").out)["differences"] == []


def test_a_run_is_the_same_run_as_itself(gpt2lab: Call, three: Path) -> None:
    assert gpt2lab("why", A, A).out.split(": ")[1] == "one and the same run\n"


def test_code_of_which_nothing_is_kept_differs_somewhere(gpt2lab: Call, three: Path) -> None:
    (three / "code" / f"{'1' * 32}.json").unlink()
    answer = gpt2lab("why", A, B)
    assert answer.code == 0 and "code of mlp=mine; in what, the store does not know: " in answer.out


@pytest.mark.parametrize(("written", "told"), [("f", "'f'"), ("a", "begins 2 run ids"), ("c", "never began")])
def test_what_is_no_run_costs_one_clear_line(written: str, told: str, gpt2lab: Call, three: Path) -> None:
    answer = gpt2lab("why", written, B)
    assert answer.code == 2 and told in answer.err and "Traceback" not in answer.err
    assert answer.err.count("error") == 1 and "try: gpt2lab runs" in answer.err


def test_nothing_is_adopted_where_nothing_was_trained(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    answer = gpt2lab("adopt", ablation)
    assert answer.code == 0, answer.err
    assert "learned: 1 due, no finished run differs in code alone" in answer.out
    assert answer.out.splitlines()[-1] == "tiny@preset: nothing to keep"
    assert not list((tmp_path / "runs").glob("?" * 16))


BETTER = Measurement(part="rates", check="true -3 sd: better", bank="Gaussian", n=3, measured=0.281, reference=0.29,
                     low=0.26, high=0.32)  # fmt: skip

ROWS = (
    BETTER,
    replace(BETTER, bank="t5", measured=0.352, reference=0.353, low=0.32, high=0.385),
    Measurement(part="controls", check="control: peeking", bank="t5", n=10, measured=0.14, high=0.065, control=True),
    Measurement(part="agreement", check="other word", measured=0, high=0, note="of 800"),
)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The draws requested of a self-test that takes no time."""
    requested: list[int] = []

    def run(count: int, progress: Any = None) -> SelfTest:
        requested.append(count)
        progress("rates", 1)
        return SelfTest(rows=ROWS, draws=count, seed=0)

    monkeypatch.setattr(selftest, "selftest", run)
    return requested


@pytest.mark.usefixtures("draws")
def test_a_line_for_each_check_with_every_bank_its_reference_and_the_accepted_range(gpt2lab: Call) -> None:
    answer = gpt2lab("selftest", "statistics", "--quick")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert answer.code == 0 and answer.err == ""
    assert "true -3 sd: better 3 0.281 (0.290) 0.352 (0.353) within 0.03 of it accepted" in lines
    assert "control: peeking 10 0.140 > 0.065 flagged" in lines
    assert "other word 0 of 800 <= 0 accepted" in lines
    assert lines[-1] == "calibrated: 3 checks accepted and 1 wrong method flagged, with 2,000 draws (seed 0)"


@pytest.mark.parametrize(
    ("options", "count"), [((), LONG), (("--quick",), QUICK), (("--draws", "4321"), 4321), (("--json",), LONG)]
)
def test_the_number_of_draws(gpt2lab: Call, draws: list[int], options: tuple[str, ...], count: int) -> None:
    assert gpt2lab("selftest", "statistics", *options).code == 0
    assert draws == [count]


def test_a_rejected_row_is_named_with_its_bank_and_fails(gpt2lab: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (ROWS[0], replace(ROWS[1], measured=0.5), replace(ROWS[2], measured=0.03), ROWS[3])
    monkeypatch.setattr(selftest, "selftest", lambda draws, progress: SelfTest(rows=rows, draws=draws, seed=0))
    answer = gpt2lab("selftest", "statistics", "--quick")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert answer.code == 1
    assert any(line.endswith("rejected (t5)") for line in lines) and any(line.endswith("missed") for line in lines)
    assert lines[-1].startswith("NOT calibrated: 2 of 4 checks failed")
    assert gpt2lab("selftest", "statistics", "--json").code == 1


def test_json_is_the_result_and_nothing_else(gpt2lab: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real self-test, from the command line to its last row, of two parts."""
    monkeypatch.setattr(selftest, "PARTS", {name: PARTS[name] for name in ("measures", "controls")})
    answer = gpt2lab("selftest", "statistics", "--draws", "1000", "--json")
    record = json.loads(answer.out)
    assert (answer.code, answer.err, record["ok"], record["draws"]) == (0, "", True, 1000)
    assert {row["status"] for row in record["rows"]} == {"accepted", "flagged"} and len(record["rows"]) == 33


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--draws", "10"), "between 1000 and 100000 draws"),
        (("--draws", "5000", "--quick"), "--quick is a number of draws already"),
        (("--draws", "many"), "a valid integer"),
    ],
)
def test_impossible_numbers_of_draws_are_refused_at_once(gpt2lab: Call, options: tuple[str, ...], error: str) -> None:
    answer = gpt2lab("selftest", "statistics", *options)
    assert answer.code == 2 and error in answer.err and "try: gpt2lab selftest" in answer.err
    assert answer.out == "" and "Traceback" not in answer.err


def test_without_a_command_the_group_lists_its_commands(gpt2lab: Call) -> None:
    answer = gpt2lab("selftest")
    assert answer.code == 0 and "statistics" in answer.out
