"""Whether a contrast at a small scale predicts the same one at a larger: on the page, in the file that plans read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from page_reader import Reader

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.planning import prediction as planned
from gpt2lab.reports import prediction

LARGER = {"effect": "rotary against learned: better", "direction": -1, "size": 0.05, "parameters": 125e6}
EQUAL = {**LARGER, "direction": 0}


def study(scale: str, parameters: float, **differences: tuple[float, str]) -> dict[str, Any]:
    """A `verdicts.json`: arm -> difference from `learned` and word."""
    contrasts = [
        {"arm": arm, "against": "learned", "difference": difference, "word": word, "parts": ["position"],
         "published": {"rotary": [LARGER], "none": [EQUAL]}.get(arm, []), "early": {"0.25": -difference}}
        for arm, (difference, word) in differences.items()
    ]  # fmt: skip
    return {"ablation": "posenc", "scale": scale, "parameters": parameters, "tokens": 1e6, "unit": "nats",
            "contrasts": contrasts}  # fmt: skip


SMALL = study("nano", 1e6, rotary=(-0.3, "better"), none=(0.2, "worse"), alibi=(-0.1, "inconclusive"))
LARGE = study("micro", 1e7, rotary=(-0.1, "better"), none=(-0.02, "likely better"), alibi=(-0.05, "better"))


def test_each_contrast_is_paired_with_its_larger_side() -> None:
    by_side = prediction.groups(prediction.predictions([LARGE, SMALL]))
    assert list(by_side) == [
        ("nano", "at micro"), ("nano", prediction.LITERATURE), ("micro", prediction.LITERATURE),
        ("25 % of training", prediction.END),
    ]  # fmt: skip
    at_micro = by_side["nano", "at micro"]
    assert [(item.label.split()[0], item.same, item.decided) for item in at_micro] == [
        ("rotary", True, True), ("none", False, True), ("alibi", True, False),
    ]  # fmt: skip
    assert [item.label for item in by_side["nano", prediction.LITERATURE]] == ["rotary against learned"]  # no equality
    assert not any(item.same for item in by_side["25 % of training", prediction.END])
    assert json.loads(prediction.counts([LARGE, SMALL])) == {
        "counts": [
            {"small": "micro", "large": prediction.LITERATURE, "part": "position", "same": 1, "of": 1},
            {"small": "nano", "large": "at micro", "part": "position", "same": 1, "of": 2},
            {"small": "nano", "large": prediction.LITERATURE, "part": "position", "same": 1, "of": 1},
        ]
    }  # fmt: skip


def test_the_interval_of_a_share_is_clopper_and_pearsons() -> None:
    assert prediction.share(4, 5).detail == "[28, 99] %"  # R: binom.test(4, 5)
    assert prediction.share(0, 0).text == ""


def test_the_section_names_what_a_small_scale_got_wrong() -> None:
    section = prediction.section([SMALL, LARGE])
    assert section is not None and section.table is not None and section.figures
    first = [cell.text for cell in section.table.rows[0].cells]
    assert first[:4] == ["nano", "at micro", "2 of 3", "1 of 2"] and first[-1] == "posenc: none against learned"
    assert "nano, at micro" in Reader(section.figures[0].alone).text
    assert prediction.section([]) is None


def test_a_plan_says_how_often_such_contrasts_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "reports" / "published"
    place.mkdir(parents=True)
    monkeypatch.setattr(planned, "shipped_folder", lambda: tmp_path)
    arms = {
        "learned": {}, "rotary": {"model.position": "rotary"}, "silu": {"model.mlp.activation": "silu"},
    }  # fmt: skip
    contrasts = [Declared.pair(arm, "learned") for arm in ("rotary", "silu")]
    plan: Any = SimpleNamespace(
        ablation=SimpleNamespace(scale="nano", contrasts=contrasts),
        arms={name: SimpleNamespace(arm=SimpleNamespace(changes=changes)) for name, changes in arms.items()},
    )
    assert planned.lines(plan) == []
    (place / planned.FILE).write_text(prediction.counts([SMALL, LARGE]))
    assert planned.lines(plan) == [
        "published contrasts in position: of the arms that won at nano, 1 of 2 also won at micro; 1 of 1 also won "
        "in larger models, as published",
        f"what that is worth: {planned.DOCUMENT}",
    ]
