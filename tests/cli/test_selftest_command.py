"""`gpt2lab selftest statistics`: a table and a sentence for people, JSON for programs, an exit code for CI."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpt2lab.analysis import selftest
from gpt2lab.analysis.selftest import LONG, PARTS, QUICK, Row, SelfTest

Call = Callable[..., Any]
BETTER = Row(part="rates", check="true -3 sd: better", bank="Gaussian", n=3, measured=0.281, reference=0.29, low=0.26,
             high=0.32)  # fmt: skip
ROWS = (
    BETTER,
    replace(BETTER, bank="t5", measured=0.352, reference=0.353, low=0.32, high=0.385),
    Row(part="controls", check="control: peeking", bank="t5", n=10, measured=0.14, high=0.065, control=True),
    Row(part="agreement", check="other word", measured=0, high=0, note="of 800"),
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
    monkeypatch.setattr(selftest, "PARTS", {name: PARTS[name] for name in ("looks", "controls")})
    answer = gpt2lab("selftest", "statistics", "--draws", "1000", "--json")
    record = json.loads(answer.out)
    assert (answer.code, answer.err, record["ok"], record["draws"]) == (0, "", True, 1000)
    assert {row["status"] for row in record["rows"]} == {"accepted", "flagged"} and len(record["rows"]) == 76


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
