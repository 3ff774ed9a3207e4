"""The reproduction of GPT-2 124M: what `gpt2lab baseline` plans, prints and refuses, and the published curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gpt2lab.experiments.baseline as reproduction
from gpt2lab.cli import execute
from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.experiments.baseline import CURVE, TASK_DOCUMENTS, Baseline, departures, recipe_overrides, tolerance
from gpt2lab.inspection.costs import costs
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.probes import MicroBatch
from gpt2lab.store import Store
from gpt2lab.training.precision import choose_device

MICRO = MicroBatch(4, 5 << 30, 10 << 30, 4.0, 0.5)


def planned(*overrides: str, ranks: int = 1, micro: MicroBatch = MICRO) -> Baseline:
    config = load_config("gpt2-124m", ["training.micro_batch_sequences=4", *overrides])
    machine = Machine("cpu", "an invented processor", 1, 1, 1e9, "invention").with_ranks(ranks)
    return Baseline(config, tuple(overrides), machine, costs(config.model), micro)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No short trainings of 124M parameters in fast tests."""
    monkeypatch.setattr(reproduction, "micro_batch", lambda *args: MICRO)


def test_the_recipe_is_what_it_plans_for(tmp_path: Path, probed: None) -> None:
    base = Baseline.prepare(Store(tmp_path), ranks=1)
    training = base.config.training
    assert (training.steps, training.batch_tokens, base.config.optim.warmup_steps) == (19_560, 524_288, 700)
    assert training.micro_batch_sequences == 4 and base.overrides[-1] == "training.micro_batch_sequences=4"
    assert base.costs.parameters == 124_439_808
    assert base.seconds == 19_560 * (128 * 4.0 + 0.5)


def test_ranks_share_the_batch(tmp_path: Path) -> None:
    alone, shared = planned(), planned(ranks=8)
    assert shared.share == alone.share / 8 == 64
    assert shared.seconds == 19_560 * (16 * 4.0 + 0.5)


def test_few_steps_warm_up_for_a_tenth_of_them() -> None:
    documents = TASK_DOCUMENTS[choose_device().type]
    tasks = ["evaluation.tasks=[hellaswag_nanogpt]", f"evaluation.task_documents={documents}"]
    text = ["data.corpus=shakespeare", "evaluation.tokens=16384", *tasks]
    assert recipe_overrides("shakespeare", None, None) == text
    assert recipe_overrides("shakespeare", 20, None) == [*text, "training.steps=20", "optim.warmup_steps=2"]
    assert recipe_overrides("shakespeare", 3, 4096)[5:] == ["optim.warmup_steps=1", "training.batch_tokens=4096"]
    assert recipe_overrides("openwebtext", 9000, None)[1:] == [
        "evaluation.tokens=10485760", *tasks, "training.steps=9000", "optim.warmup_steps=700",
    ]  # fmt: skip


def test_the_curve_applies_to_the_recipe_alone() -> None:
    fineweb = "data.corpus=fineweb-10b"
    for text in (fineweb, "data.corpus={name: tokens, paths: [fineweb10B/fineweb_*.bin]}"):
        assert not planned(text).differs
    (expected, source) = planned(fineweb).expectation()
    assert "6.17 +- 0.10 at 250" in expected and "3.27 to 3.29" in expected and "llm.c" in source
    for override, said in {
        "training.batch_tokens=4096": "4,096 tokens, not the recipe's 524,288",
        "training.steps=1000": "1,000 steps, not 19,560",
        "optim.lr=1e-3": "optim is not the recipe's",
        "model.position=rotary": "model is not the recipe's",
    }.items():
        assert said in " ".join(planned(fineweb, override).expectation())
    assert "the text is shakespeare" in " ".join(planned("data.corpus=shakespeare").expectation())


def test_the_watch_speaks_only_where_the_curve_applies() -> None:
    rows = [{"step": 500, "metrics": {"val/loss": CURVE[500] + 1}}]
    assert list(planned("data.corpus=shakespeare").watch()(rows)) == []
    (said,) = planned("data.corpus=fineweb-10b").watch()(rows)
    assert said.startswith("off the published curve: step 500: validation loss 6.374, published 5.374")


def test_what_it_takes_is_told() -> None:
    told = "\n".join(planned(*recipe_overrides("shakespeare", 20, 4096)).lines())
    for part in (
        "124,439,808 parameters", "81.9 k tokens of shakespeare in 20 steps of 4,096",
        "854.4 MFLOP a token, 7e+13 FLOP", "batch: 4 sequences of 1,024, 4 at a time (1 micro-batch a step)",
        "time: about 1:30 at 910 tokens/s, measured on an invented processor (cpu)", "5.0 GiB a rank, of 10.0 GiB",
        "a batch has 4,096 tokens, not the recipe's 524,288",
    ):  # fmt: skip
        assert part in told, told


def test_large_text_counts_on_the_disk() -> None:
    told = "\n".join(planned("data.corpus=fineweb-10b").lines())
    assert "disk: 4.2 GiB for checkpoints, and about 18.6 GiB for the tokens of fineweb-10b" in told
    assert "for the tokens" not in "\n".join(planned("data.corpus=shakespeare").lines())


def test_a_hopeless_machine_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, store = planned(), Store(tmp_path / "runs")
    assert 115 < base.seconds / 86_400 < 117
    with pytest.raises(EnvironmentFault, match="it would take 116 days here, more than 7") as refused:
        base.refuse_hopeless(store, 7)
    assert "MAX_DAYS=N" in str(refused.value.hint)
    base.refuse_hopeless(store, 117)
    monkeypatch.setattr(reproduction.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 30}))
    with pytest.raises(EnvironmentFault, match=r"checkpoints need 4\.2 GiB, 1\.0 GiB are free"):
        base.refuse_hopeless(store, 117)


def test_torchrun_is_sent_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torchrun's ranks cannot each look for the micro-batch"):
        reproduction.refuse_torchrun(2)
    said = planned("training.micro_batch_sequences=32", ranks=8).by_torchrun()
    assert said == ("torchrun --nproc-per-node 8 -m gpt2lab train gpt2-124m --set training.micro_batch_sequences=32")


def test_the_command_stops_before_any_data_is_touched(
    tmp_path: Path, probed: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.experiments.single.prepare", lambda *args, **how: pytest.fail("data was prepared"))
    runs = str(tmp_path / "runs")
    assert execute(["baseline", "--runs", runs, "--nproc", "1"], debug=False) == 3
    printed = capsys.readouterr()
    assert "116 days" in printed.err and "try: " in printed.err and "124,439,808 parameters" in printed.out
    assert execute(["baseline", "--runs", runs, "--nproc", "1", "--dry-run", "--json"], debug=False) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["micro_batch_sequences"] == 4 and record["seconds"] == 19_560 * (128 * 4.0 + 0.5)
    assert execute(["baseline", "--runs", runs, "--batch-tokens", "1000"], debug=False) == 2
    assert "1000 is no multiple of block_size 1024" in capsys.readouterr().err


def row(step: int, loss: float | None) -> dict[str, object]:
    return {"step": step, "metrics": {"train/loss": 1.0} | ({} if loss is None else {"val/loss": loss})}


def test_the_curve_is_the_published_one() -> None:
    """Points of ../shared/data/reference_curves_124m.csv's source, KellerJordan/modded-nanogpt 2024-10-13_llmc."""
    assert (CURVE[250], CURVE[1000], CURVE[10000], CURVE[19500]) == (6.171, 4.317, 3.392, 3.272)
    losses = [CURVE[step] for step in sorted(CURVE)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("step", "allowed"), [(0, 0.10), (250, 0.10), (500, 0.05), (2000, 0.05), (3000, 0.02)])
def test_tolerances(step: int, allowed: float) -> None:
    assert tolerance(step) == allowed
    inside, outside = CURVE[step] + 0.99 * allowed, CURVE[step] + 1.01 * allowed
    assert not departures([row(step, inside)]) and len(departures([row(step, outside)])) == 1


def test_what_is_said_has_the_distance_and_the_causes_of_its_direction() -> None:
    above, below = (departures([row(500, loss)])[0] for loss in (5.81, 5.0))
    assert above.startswith("step 500: validation loss 5.810, published 5.374 +- 0.05 (+0.436). Usual causes: a batch,")
    assert "(-0.374). Usual causes: validation text that is also in training" in below


def test_other_steps_and_rows_without_a_validation_loss_say_nothing() -> None:
    assert not departures([row(251, 9.9), row(250, None), row(123, 1.0)])


def test_a_loss_that_is_no_number_is_a_departure() -> None:
    assert len(departures([row(250, float("nan"))])) == 1
