"""What commands print for programs: objects with the version of their schema, errors too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt2lab.reports import style

Call = Callable[..., Any]


def test_mistakes_are_data(gpt2lab: Call, ablation: Path) -> None:
    sound = json.loads(gpt2lab("check", ablation, "--json").out)
    assert sound["schema"] == 1 and sound["sound"][0]["what"].startswith("2 arms (learned, rotary) x 1 seeds")
    ablation.write_text(ablation.read_text().replace("position: rotary", "position: rope"))
    answer = gpt2lab("check", ablation, "--json")
    error = json.loads(answer.err)["error"]
    assert (answer.code, answer.out) == (2, "") and (error["code"], error["exit_code"]) == ("CONFIG", 2)
    [problem] = error["problems"]
    assert ":8: arms.rotary.model.position" in problem["where"] and "did you mean 'rotary'?" in problem["what"]


@pytest.mark.parametrize(
    ("words", "code"),
    [(("runs", "--bogus"), "USAGE"), (("runs", "--runs", "nowhere"), "CONFIG"), (("report", "nothing"), "CONFIG")],
)
def test_every_error_is_one_object(gpt2lab: Call, words: tuple[str, ...], code: str) -> None:
    answer = gpt2lab(*words, "--json")
    found = json.loads(answer.err)
    assert answer.code == 2 and answer.out == "" and found["schema"] == 1
    assert found["error"].keys() == {"code", "exit_code", "problems", "try"} and found["error"]["code"] == code
    assert found["error"]["try"]


def test_a_report_is_told_with_its_verdicts_and_place(
    gpt2lab: Call, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "render", lambda *_: ("<svg/>", "<svg/>"))
    monkeypatch.setattr(style, "saved", lambda *_, **__: b"")
    found = json.loads(gpt2lab("report", "posenc", "--json", "--publish").out)
    assert found["schema"] == 1 and found["page"] == "reports/posenc@nano/index.html"
    assert found["published"] == "reports/published/posenc@nano"
    assert {contrast["arm"]: contrast["word"] for contrast in found["contrasts"]}["rotary"].startswith("better")
    for command in (("runs",), ("studies",), ("status",)):
        assert json.loads(gpt2lab(*command, "--json").out)["schema"] == 1


def test_schemas_know_every_key_and_component(gpt2lab: Call) -> None:
    found = {kind: json.loads(gpt2lab("schema", kind).out) for kind in ("ablation", "sweep", "preset")}
    for kind, folder in (("ablation", "ablations"), ("sweep", "sweeps"), ("preset", "gpt2lab/presets")):
        keys = found[kind]["properties"].keys()
        for file in (Path(__file__).parents[2] / folder).glob("*.yaml"):
            assert yaml.load(file.read_text(), Loader=yaml.BaseLoader).keys() <= keys, file
        assert found[kind]["additionalProperties"] is False
    model = found["preset"]["$defs"]["ModelConfig"]["properties"]
    assert "rotary" in str(model["position"]) and model["n_layer"]["type"] == ["integer", "string"]
    assert model["n_layer"]["description"] == "Transformer blocks."
    assert "did you mean 'preset'" in gpt2lab("schema", "presets").err


def test_a_new_ablation_has_no_mistakes_and_replaces_nothing(gpt2lab: Call, tmp_path: Path) -> None:
    assert gpt2lab("new", "mine").code == 0
    answer = gpt2lab("check", "mine.yaml", "--scale", "nano")
    assert answer.code == 0 and "2 arms (layernorm, rmsnorm) x 3 seeds at nano" in answer.out
    written = (tmp_path / "mine.yaml").read_text()
    assert "is there already" in gpt2lab("new", "mine.yaml").err and (tmp_path / "mine.yaml").read_text() == written
    assert gpt2lab("new", "../up").code == 2
