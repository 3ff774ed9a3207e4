"""`gpt2lab why` as people use it: prefixes, words, JSON, and one line when there is no such run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.store import Store, write_json

Call = Callable[..., Any]
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
