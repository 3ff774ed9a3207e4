"""The search for the largest micro-batch: with invented machines, and once on this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpt2lab.config import load_config
from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.planning import probes
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.probes import MicroBatch, micro_batch, micro_batch_of, probed, search

HERE = Machine("cpu", "an invented processor", 1, 1, 1e9, "invention")
SMALL = ("model.n_layer=1", "model.n_embd=32", "training.batch_tokens=8192")


class Invented:
    """A device on which a training takes `base` bytes and `each` more for every sequence; `asked`: what was tried."""

    def __init__(self, base: int, each: int, breaks_at: int = 10**9) -> None:
        self.base, self.each, self.breaks_at = base, each, breaks_at
        self.asked: list[int] = []

    def __call__(self, n: int, available: int = 2700) -> MicroBatch:
        self.asked.append(n)
        if n >= self.breaks_at:
            raise EnvironmentFault(f"a pass of {n} sequences failed", where="memory probe")
        return MicroBatch(n, self.base + n * self.each, available, 0.5 * n, 0.1)


def test_the_largest_size_on_the_line_is_taken_and_tried() -> None:
    device = Invented(1000, 100)
    found = search(512, 64, 2700, device)  # room for 17 sequences
    assert found == MicroBatch(16, 2600, 2700, 8.0, 0.1)
    assert device.asked == [1, 2, 16]


def test_the_size_that_is_tried_trains_as_the_run_will() -> None:
    near, exact = Invented(1000, 100), Invented(900, 90)
    assert search(512, 64, 2700, near, exact) == MicroBatch(16, 2340, 2700, 8.0, 0.1)
    assert (near.asked, exact.asked) == ([1, 2], [16])
    assert search(512, 2, 2700, near, exact).memory_bytes == 1080


def test_what_the_line_promises_and_the_device_refuses_is_halved() -> None:
    device = Invented(1000, 100, breaks_at=8)
    assert search(512, 64, 9000, device).sequences == 4
    assert device.asked == [1, 2, 64, 32, 16, 8, 4]


@pytest.mark.parametrize(
    ("share", "most", "available", "sequences"),
    [
        (24, 64, 10**6, 8),  # a power of two that divides the share
        (7, 64, 10**6, 1),
        (512, 4, 10**6, 4),  # more would be no faster
        (512, 0, 10**6, 1),  # a sequence longer than what is worth while
        (512, 64, 1100, 1),
    ],
)
def test_limits_other_than_memory(share: int, most: int, available: int, sequences: int) -> None:
    assert search(share, most, available, Invented(1000, 100)).sequences == sequences


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match=r"one sequence takes 1\.1 KiB, and a rank may use 1\.0 KiB"):
        search(512, 64, 1050, Invented(1000, 100))


def test_the_step_is_its_passes_and_one_update() -> None:
    assert MicroBatch(4, 0, 0, 2.0, 0.5).step_seconds(16) == 4 * 2.0 + 0.5


def test_the_answer_is_kept_for_as_long_as_the_training_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Invented(1000, 100)
    monkeypatch.setattr(probes, "probed", lambda config, machine, n, available: device(n, available))
    monkeypatch.setattr(probes, "available_bytes", lambda machine: 10**6)
    config = load_config("nano", SMALL)
    first = micro_batch(config, HERE, tmp_path)
    asked = len(device.asked)
    monkeypatch.setattr(probes, "available_bytes", lambda machine: 1200)  # a busier hour: the same run
    assert micro_batch(config, HERE, tmp_path) == first and len(device.asked) == asked
    longer = load_config("nano", [*SMALL, "training.steps=700", "training.micro_batch_sequences=2"])
    assert micro_batch(longer, HERE, tmp_path) == first
    wider = load_config("nano", [*SMALL, "model.n_embd=64"])
    assert micro_batch(wider, HERE, tmp_path).sequences == 2
    assert micro_batch(config, replace(HERE, device_name="another"), tmp_path).sequences == 2
    for kept in (tmp_path / "probes").iterdir():
        kept.write_text('{"found": {"sequences": "many"}}')
    with pytest.raises(DataFault, match="no micro-batch in it"):
        micro_batch(config, HERE, tmp_path)


@pytest.mark.slow
def test_a_real_training_is_measured_in_a_process_of_its_own() -> None:
    config = load_config("nano", [*SMALL, "training.micro_batch_sequences=64"])
    few, many = probed(config, HERE, 1, 10**9), micro_batch_of(config, HERE)
    assert many.sequences == 64
    assert 50e6 < few.memory_bytes < many.memory_bytes < 4e9
    whole = load_config("nano", [*SMALL, "training.micro_batch_sequences=1"])  # what is asked counts, not the config
    again = probed(whole, HERE, 64, 10**9).memory_bytes
    assert again - few.memory_bytes > 0.7 * (many.memory_bytes - few.memory_bytes)
    assert 0 < few.pass_seconds < many.pass_seconds < 10 and many.update_seconds > 0


def test_a_training_that_breaks_says_why() -> None:
    config = load_config("nano", SMALL)
    with pytest.raises(EnvironmentFault, match=r"a pass of 1 sequences failed: .*(mps|MPS)"):
        probed(config, replace(HERE, device="mps"), 1, 10**9)
