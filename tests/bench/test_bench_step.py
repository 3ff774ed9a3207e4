"""`benchmarks step` and `benchmarks memory`: all sides do equal work, the figures add up, mistakes are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from benchmarks import step, turns
from benchmarks.memory import measure, peak_bytes
from benchmarks.options import names_of
from benchmarks.sides import WORKS, Product, Spec, Work, work_against
from benchmarks.step import compare
from benchmarks.turns import SideProcess, ratio_of
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.inspection.costs import costs
from gpt2lab.registry import SLOTS

Call = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
TINY = Work(n_layer=2, n_head=2, n_embd=16, block_size=8, sequences=3, vocab_size=31)
# what a checkout of nanoGPT offers, around our own blocks: names, interface and tied head as there
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from benchmarks.plain import PlainGPT, adamw

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = config
        self.transformer = PlainGPT(c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        print("number of parameters: 0.00M")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return adamw(self, learning_rate, weight_decay)

    def forward(self, idx, targets):
        logits = self.transformer(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(NANOGPT)
    return tmp_path


def losses(spec: Spec, work: Work, steps: int = 6) -> list[float]:
    side = spec.make(work, CPU)
    return [side.step() for _ in range(steps)]


def test_all_sides_do_equal_work(checkout: Path) -> None:
    ours = losses(Spec("gpt2lab"), TINY)
    assert len({round(loss, 3) for loss in ours}) > 3  # batches differ from step to step
    for other in (Spec("gpt2lab", plain_model=True), Spec("plain"), Spec(f"nanogpt={checkout}")):
        assert losses(other, TINY) == pytest.approx(ours, abs=1e-5), other
    assert losses(Spec("engine"), TINY) == losses(Spec("gpt2lab", plain_model=True), TINY)
    with_bias = dataclasses.replace(TINY, bias=True)
    assert losses(Spec("transformers"), with_bias) == pytest.approx(losses(Spec("gpt2lab"), with_bias), abs=1e-5)


def test_other_precisions_train_as_well() -> None:
    exact = losses(Spec("plain"), TINY)
    for spec in (Spec("gpt2lab", "bf16"), Spec("gpt2lab", "fp16"), Spec("plain", "bf16")):
        found = losses(spec, TINY)
        assert found == pytest.approx(exact, abs=0.03), spec
        assert found != exact


@pytest.mark.slow
def test_a_comparison_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(step, "LIMIT_SIZE", 64)
    found = compare("tiny", TINY, (Spec("gpt2lab"), Spec("plain")), CPU, blocks=3, memory=False)
    ours, theirs = found.sides
    assert (ours.name, theirs.name) == ("gpt2lab", "plain")
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    for side in found.sides:
        assert side.low <= side.milliseconds <= side.high
        assert side.tokens_per_second == pytest.approx(24 / side.milliseconds * 1000)
        per_token = costs(TINY.model()).flops_per_token
        assert side.flops_per_second == pytest.approx(per_token * side.tokens_per_second)
        assert 0 < side.of_limit < 5
    assert found.interval is None and found.ratio > 0
    assert json.loads(json.dumps(dataclasses.asdict(found)))["sides"][0]["precision"] == "fp32"


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, steps: int) -> tuple[float, list[float]]:
            order.append(self.name * steps)
            return 1e-6, [0.0] * steps

    monkeypatch.setattr(turns, "MOST_STEPS", 2)
    taken = turns.in_turns([Counting("a"), Counting("b")], 3)
    assert "".join(order) == "ab" + "aabb" * 3
    assert [len(found) for found in taken] == [3, 3]


def test_the_ratio_and_its_interval_by_hand() -> None:
    # the median, whatever a disturbed block does
    assert ratio_of([2.0, 8.0, 9000.0], [1.0, 2.0, 3.0]) == (4.0, None)
    # between the smallest and the largest of six lies the median of the distribution with 1 - 2 / 2^6 = 96.9 %,
    # between the second and the eighth of nine with 1 - 2 x (1 + 9) / 2^9 = 96.1 %
    assert ratio_of([float(n) for n in (3, 1, 2, 5, 4, 6)], [1.0] * 6) == (3.5, (1.0, 6.0))
    assert ratio_of([float(n) for n in range(1, 10)], [1.0] * 9) == (5.0, (2.0, 8.0))


def test_against_nanogpt_both_sides_compute_the_exact_gelu_and_unequal_precision_is_named() -> None:
    work = work_against("nanogpt=somewhere", "a")
    assert [part.name for part in work.model().mlp] == ["gelu"] and not work.bias
    assert work_against("plain", "a") == WORKS["a"] and work_against("transformers", "a").bias
    ours, theirs = Spec("gpt2lab", "bf16"), Spec("plain")
    assert names_of(ours, theirs) == ("gpt2lab in bf16", "plain in fp32") and names_of(theirs, theirs)[0] == "plain"


def test_the_limit_is_a_product_of_two_matrices() -> None:
    side = Product(64).make(TINY, CPU)
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert side.step() == pytest.approx(float(matrix[0] @ matrix[:, 0]), rel=1e-5) and Product(64).flops == 2 * 64**3


@pytest.mark.slow
def test_memory_is_that_of_the_training_alone() -> None:
    # weights, gradients and two moments in float32: 16 bytes a parameter; this model has little else
    work = Work(n_layer=1, n_head=2, n_embd=512, block_size=8, sequences=1, vocab_size=4096)
    least = 16 * costs(work.model()).parameters
    ballast = bytearray(400_000_000)  # of the parent, which must not count
    found = peak_bytes(Spec("gpt2lab"), work, CPU, threads=1)
    assert least < found < 2 * least < len(ballast)


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown side 'plan'; did you mean 'plain'"):
        Spec("plan").make(TINY, CPU)
    with pytest.raises(ConfigError, match="there is no such file"):
        Spec(f"nanogpt={tmp_path}").make(TINY, CPU)
    for text, reason in (("1/0", "ZeroDivisionError"), ("x = 1", "has no GPT and GPTConfig")):
        (tmp_path / "model.py").write_text(text)
        with pytest.raises(ConfigError, match=reason):
            Spec(f"nanogpt={tmp_path}").make(TINY, CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentFault, match="transformers is not installed"):
        Spec("transformers").make(TINY, CPU)


def test_what_a_side_prints_is_no_answer(checkout: Path) -> None:
    with closing(SideProcess(Spec(f"nanogpt={checkout}"), TINY, CPU, 1)) as side:
        assert side.name == "nanoGPT"
        assert side.run(3)[1] == pytest.approx(losses(Spec("plain"), TINY, 3), abs=1e-5)


@pytest.mark.slow
def test_what_a_side_cannot_do_is_told_across_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        SideProcess(Spec(f"nanogpt={tmp_path}"), TINY, CPU, 1)
    with closing(SideProcess(Spec("plain"), TINY, CPU, 1)) as side:
        seconds, found = side.run(3)
        assert seconds > 0 and found == pytest.approx(losses(Spec("plain"), TINY, 3), abs=1e-6)
        side._process.kill()
        with pytest.raises(EnvironmentFault, match="ended with code -9"):
            side.run(1)


@pytest.mark.slow
def test_a_failed_measurement_of_memory_says_why() -> None:
    broken = dataclasses.replace(TINY, n_head=3)
    with pytest.raises(EnvironmentFault, match=r"measuring the memory of gpt2lab failed: .*"):
        peak_bytes(Spec("gpt2lab"), broken, CPU, threads=1)


def test_measuring_takes_a_question_of_plain_data() -> None:
    question = {"spec": dataclasses.asdict(Spec("plain")), "work": dataclasses.asdict(TINY), "device": "cpu"}
    assert measure({**question, "threads": 1}) >= 0


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, call: Call) -> Call:
    """The command line, with a tiny configuration a and short blocks."""
    monkeypatch.setitem(WORKS, "a", TINY)
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    return call


@pytest.mark.slow
def test_what_the_command_prints(answer: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    code, out, _ = answer("step", "--blocks", "2", "--threads", "1", "--no-memory")
    assert code == 0
    head, ours, theirs, said = out.strip().splitlines()
    assert [ours.split()[0], theirs.split()[0]] == ["gpt2lab", "plain"]
    assert "of the limit" in head and "%" in ours
    assert "times as fast as plain (2 blocks each" in said


def test_every_component_of_a_slot_has_its_cost(answer: Call) -> None:
    for slot, names in (("head", SLOTS["head"].names()), ("schedule", None)):
        code, out, err = answer("components", slot, "--config", "a", "--blocks", "1", "--json")
        if names is None:
            assert code == 2 and "unknown slot 'schedule'" in err
            continue
        found = json.loads(out)["rows"]
        assert code == 0 and [row["component"] for row in found] == names
        assert all(row["milliseconds"] > 0 and 0.05 < row["ratio"] < 20 for row in found)


@pytest.mark.slow
def test_memory_is_printed_as_well(answer: Call) -> None:
    words = ("memory", "--config", "a", "--batches", "2", "--vocabularies", "31", "--threads", "1")
    code, out, _ = answer(*words)
    assert code == 0 and out.split()[:5] == ["vocabulary", "batch", "gpt2lab", "plain", "share"]
    code, out, _ = answer(*words, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["sequences"] == 2 and set(row["peak_memory_bytes"]) == {"gpt2lab", "plain"}
    code, out, _ = answer("step", "--blocks", "1", "--threads", "1", "--json")
    assert code == 0 and all(side["peak_memory_bytes"] > 0 for side in json.loads(out)["sides"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("step", "--config", "b5k"), "unknown configuration 'b5k'; did you mean 'b50k'"),
        (("step", "--precision", "fp8"), "unknown precision 'fp8'"),
        (("step", "--vs-precision", "fp16"), "unknown precision 'fp16'"),
        (("step", "--model", "plainer"), "unknown model 'plainer'; did you mean 'plain'"),
        (("step", "--device", "gpu"), "unknown device 'gpu'"),
        (("memory", "--batches", "2,many"), "'2,many' is no list of whole numbers"),
        (("memory", "--batches", "0"), "0 is below 1"),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...], reason: str, answer: Call) -> None:
    code, _, err = answer(*words)
    assert code == 2
    assert reason in err
