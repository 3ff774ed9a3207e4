"""How a training is held against the published curve."""

from __future__ import annotations

import pytest

from gpt2lab.published import CURVE, departures, tolerance


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
    above, below = (str(departures([row(500, loss)])[0]) for loss in (5.81, 5.0))
    assert above.startswith("step 500: validation loss 5.810, published 5.374 +- 0.05 (+0.436). Usual causes: a batch,")
    assert "(-0.374). Usual causes: validation text that is also in training" in below


def test_other_steps_and_rows_without_a_validation_loss_say_nothing() -> None:
    assert not departures([row(251, 9.9), row(250, None), row(123, 1.0)])


def test_a_loss_that_is_no_number_is_a_departure() -> None:
    assert len(departures([row(250, float("nan"))])) == 1
