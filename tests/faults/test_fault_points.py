"""The points where tests break things: off they do nothing, on they do what the specification says, once."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2lab.basics import faults
from gpt2lab.errors import ConfigError

PACKAGE = Path(faults.__file__).parents[1]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm("")


def hits(spec: str, name: str = "step", count: int = 6) -> list[int]:
    """Numbers of the hits at which something was raised."""
    faults.arm(spec)
    raised = []
    for hit in range(1, count + 1):
        try:
            faults.point(name)
        except faults.InjectedFault:
            raised.append(hit)
    return raised


def test_a_fault_happens_at_its_hit() -> None:
    assert hits("") == []
    assert hits("raise@step") == [1]
    assert hits("raise@step:3") == [3]
    assert hits("raise@step:4+") == [4, 5, 6]
    assert hits("raise@step:2, raise@step:5") == [2, 5]
    assert hits("raise@step:2", name="forward") == []


def test_only_the_ranks_that_are_named_break(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hits("raise@step:2,rank=0") == [2]
    assert hits("rank=1,raise@step:2") == []
    monkeypatch.setenv("RANK", "1")
    assert hits("rank=1,raise@step:2") == [2]


def test_tensors_are_spoilt_at_their_hit_with_their_gradients() -> None:
    faults.arm("nan@loss:2,inf@grad:1")
    x = torch.ones(3, requires_grad=True)
    assert faults.tensor("loss", x) is x
    loss = faults.tensor("loss", x.sum())
    loss.backward()
    assert math.isnan(loss.item())
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert faults.tensor("grad", torch.ones(2)).isinf().all()
    assert faults.tensor("grad", torch.ones(2)).isfinite().all()


def test_memory_disk_signals_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.arm("memory@step:1,full@save.weights,signal=USR1@forward,sleep=2.5@backward")
    with pytest.raises(MemoryError):
        faults.point("step")
    with pytest.raises(OSError, match="No space left"):
        faults.point("save.weights")
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    faults.point("forward")
    signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    faults.point("backward")
    assert slept == [2.5]


def in_child(spec: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GPT2LAB_FAULT": spec}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )


def test_the_environment_arms_a_process_at_its_first_hit() -> None:
    code = "from gpt2lab.basics.faults import point\nfor _ in range(5): point('step'); print('.', end='', flush=True)"
    child = in_child("kill@step:3", code)
    assert (child.returncode, child.stdout) == (-signal.SIGKILL, "..")


def test_a_mistaken_specification_breaks_no_import() -> None:
    code = (
        "from gpt2lab.errors import ConfigError\nfrom gpt2lab.basics.faults import point\n"
        "try: point('step')\nexcept ConfigError as error: print(error)"
    )
    assert "GPT2LAB_FAULT: unknown point 'stpe'; did you mean 'step'?" in in_child("kill@stpe:3", code).stdout


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("kill", "'kill' is not action@point:hit"),
        ("kill@step:x", "not action@point:hit"),
        ("kil@step", "unknown action 'kil'; did you mean 'kill'?"),
        ("nan@step", "unknown tensor 'step'"),
        ("kill@loss", "unknown point 'loss'"),
        ("kill@step:0", "is not a valid fault"),
        ("signal=NO@step", "is not a valid fault"),
        ("signal@step", "is not a valid fault"),
        ("sleep=long@step", "is not a valid fault"),
        ("kill=9@step", "is not a valid fault"),
        ("rank=one,kill@step", "'rank=one' is not the number of a rank"),
    ],
)
def test_a_mistaken_specification_is_refused(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        faults.arm(spec)


def test_every_point_is_in_the_code_and_every_one_in_the_code_is_known() -> None:
    """Those of tensors, too; a point that is never reached would be a test that cannot fail."""
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "faults.py")
    assert set(re.findall(r"\bpoint\(\"([\w.]+)\"\)", source)) == faults.POINTS.keys()
    assert set(re.findall(r"\btensor\(\"(\w+)\", ", source)) == faults.TENSORS.keys()


def test_the_table_of_faults_names_tests_that_there_are() -> None:
    tests = PACKAGE.parent / "tests"
    table = (tests / "faults" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", table)
    assert len(named) > 40
    for file, function in named:
        assert re.search(rf"^def {function}\(", (tests / file).read_text(encoding="utf-8"), re.MULTILINE), function
