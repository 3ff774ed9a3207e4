"""Metrics against plain numpy in float64, and the message for a metric that breaks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.evaluation import metrics as module
from gpt2lab.evaluation.metrics import Subject, apply, metric
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window
from gpt2lab.model import ModelConfig, build_model

BLOCK, VOCABULARY, TOTAL = 16, 23, 123


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A model with large weights, so that its predictions differ; the last of eight windows is shorter."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": VOCABULARY, "dropout": 0.5}
    model = build_model(ModelConfig.model_validate(sizes), seed=3).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    dice = np.random.default_rng(1)
    return Subject(
        model=model,
        tokens=dice.integers(0, VOCABULARY, 300),
        block_size=BLOCK,
        total=TOTAL,
        batch_sequences=3,
        byte_lengths=dice.integers(1, 9, VOCABULARY),
    )


@pytest.fixture(scope="module")
def seen(subject: Subject) -> dict[str, NDArray[Any]]:
    """Log probabilities (TOTAL, V), targets and positions, from one pass for each window."""
    starts = [i * 18 // 8 * BLOCK for i in range(8)]  # 299 targets have room for 18 blocks
    logs, targets, positions = [], [], []
    subject.model.eval()
    for start in starts:
        length = BLOCK if start != starts[-1] else TOTAL - 7 * BLOCK
        ids = np.asarray(subject.tokens[start : start + length + 1])
        with torch.no_grad():
            logits = subject.model(torch.from_numpy(ids[None, :-1].copy()))[0].double().numpy()
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        targets.append(ids[1:])
        positions.append(np.arange(length))
    subject.model.train()
    return {"log": np.concatenate(logs), "target": np.concatenate(targets), "position": np.concatenate(positions)}


@pytest.fixture(autouse=True, params=[4096, 7], ids=["whole batches", "seven rows at once"])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", request.param)


def measured(subject: Subject, name: str, **options: Any) -> dict[str, float]:
    return apply(metric.read({"name": name, **options}), subject)


def test_loss_and_bits_per_byte_are_those_of_the_validation(subject: Subject, seen: dict[str, Any]) -> None:
    nats = -seen["log"][np.arange(TOTAL), seen["target"]]
    assert measured(subject, "loss") == {"loss": pytest.approx(nats.mean(), rel=1e-5)}
    assert subject.byte_lengths is not None
    bits = nats.sum() / math.log(2) / subject.byte_lengths[seen["target"]].sum()
    assert measured(subject, "bits_per_byte") == {"bits_per_byte": pytest.approx(bits, rel=1e-5)}
    record, _ = evaluate_by_window(
        subject.model, subject.tokens, EvaluationConfig(tokens=TOTAL), block_size=BLOCK, batch_sequences=3,
        byte_lengths=subject.byte_lengths,
    )  # fmt: skip
    for name in ("loss", "bits_per_byte"):
        assert measured(subject, name)[name] == pytest.approx(record["metrics"][f"val/{name}"], rel=1e-12)


def test_top1_is_the_share_of_right_first_guesses(subject: Subject, seen: dict[str, Any]) -> None:
    expected = (seen["log"].argmax(-1) == seen["target"]).mean()
    assert 0 < expected < 1
    assert measured(subject, "top1") == {"top1": pytest.approx(expected, rel=1e-12)}


@pytest.mark.parametrize("bins", [15, 1, 4])
def test_calibration_is_the_expected_calibration_error(subject: Subject, seen: dict[str, Any], bins: int) -> None:
    """As written in the paper: one bin after another, each with its own two means."""
    probability, right = np.exp(seen["log"].max(-1)), seen["log"].argmax(-1) == seen["target"]
    expected = 0.0
    for m in range(bins):
        inside = (probability > m / bins) & (probability <= (m + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - probability[inside].mean())
    name = "calibration" if bins == 15 else f"calibration(bins={bins})"
    assert measured(subject, "calibration", bins=bins) == {name: pytest.approx(expected, rel=1e-5)}
    assert expected > 0.01


def test_calibration_adds_up_over_bins_that_err_in_both_directions() -> None:
    """Of 5 bins, (0, 0.2] holds 0.15 and (0.4, 0.6] holds 0.45 and 0.55, too low; (0.6, 0.8] holds 0.65, too high."""
    probability, right = [0.15, 0.45, 0.55, 0.65, 0.65], [1, 1, 1, 0, 0]
    others = [(1 - p) / 9 for p in probability]
    logits = torch.tensor([[p, *[rest] * 9] for p, rest in zip(probability, others, strict=True)]).log()

    class Crafted:
        total = 5

        def rows(self) -> Iterator[module.Predictions]:
            targets = 1 - torch.tensor(right)  # the first of ten tokens is always the guess
            for some in (slice(0, 3), slice(3, 5)):
                yield module.Predictions(logits[some], targets[some], torch.arange(5)[some], torch.arange(5)[some])

    crafted: Any = Crafted()
    assert module.calibration(crafted, bins=5) == pytest.approx((0.85 + (0.55 + 0.45) + (0.65 + 0.65)) / 5, abs=1e-6)
    assert module.calibration(crafted, bins=1) == pytest.approx(abs(0.85 + 0.55 + 0.45 - 1.3) / 5, abs=1e-6)
    # bins of a third: 0.15 in the first, the other four together in the second
    assert module.calibration(crafted, bins=3) == pytest.approx((0.85 + abs(0.55 + 0.45 - 1.3)) / 5, abs=1e-6)


def test_measuring_leaves_the_model_and_random_numbers_alone(subject: Subject) -> None:
    subject.model.train()
    before, modes = torch.get_rng_state(), [m.training for m in subject.model.modules()]
    told: list[tuple[int, int]] = []
    object.__setattr__(subject, "tell", lambda done, total: told.append((done, total)))
    assert measured(subject, "top1") == measured(subject, "top1")  # no dropout
    assert [m.training for m in subject.model.modules()] == modes and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in subject.model.parameters())
    assert told[-1] == (TOTAL, TOTAL)


@pytest.mark.usefixtures("no_plugins_after")
def test_a_metric_of_ones_own_may_look_at_the_model(subject: Subject) -> None:
    @metric.register("norm", source="a test")
    def norm(subject: Subject, *, power: float = 2.0) -> dict[str, float]:
        """Norms of the embedding, which needs no predictions."""
        assert not torch.is_grad_enabled() and not subject.model.training
        return {"wte": subject.model.wte.weight.norm(power).item()}

    assert measured(subject, "norm", power="1").keys() == {"norm(power=1.0)/wte"}


@pytest.mark.usefixtures("no_plugins_after")
def test_a_metric_that_breaks_is_named_with_its_file(subject: Subject) -> None:
    @metric.register("broken", source="a test")
    def broken(subject: Subject, *, how: str) -> Any:
        """Breaks in one of several ways."""
        if how == "text":
            return "0.5"
        if how == "nothing":
            return {}
        raise torch.OutOfMemoryError("CUDA out of memory") if how == "memory" else ZeroDivisionError("by zero")

    for how, said in {"text": "a number, or numbers by name", "nothing": "not {}", "zero": "ZeroDivisionError"}.items():
        with pytest.raises(ConfigError, match=rf"metric broken\(how={how}\): .*{said}") as caught:
            measured(subject, "broken", how=how)
        assert "test_metrics.py" in str(caught.value.hint)
    with pytest.raises(EnvironmentFault, match="out of memory with 3 sequences of 16 tokens"):
        measured(subject, "broken", how="memory")


def test_metrics_are_part_of_no_config() -> None:
    from gpt2lab.registry import SLOTS

    assert "metric" not in SLOTS and {"loss", "bits_per_byte", "top1", "calibration"} <= {*metric.names()}
    import gpt2lab

    assert gpt2lab.metric is metric
