"""What commands print for programs: objects with the version of their schema, errors too."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gpt2lab.basics.signals import Stopped
from gpt2lab.cli import app
from gpt2lab.errors import DataFault
from gpt2lab.store import Store

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


def test_a_report_is_told_with_its_verdicts_and_place(gpt2lab: Call, store: Path) -> None:
    found = json.loads(gpt2lab("report", "posenc", "--json", "--publish").out)
    assert found["schema"] == 1 and found["page"] == "reports/posenc@nano/index.html"
    assert found["published"] == "reports/published/posenc@nano"
    assert {contrast["arm"]: contrast["word"] for contrast in found["contrasts"]}["rotary"].startswith("better")
    for command in (("runs",), ("studies",), ("status",), ("explain", "rotary"), ("components", "norm"), ("noise",)):
        assert json.loads(gpt2lab(*command, "--json").out)["schema"] == 1


def test_every_command_prints_json_as_the_table_says_or_has_no_results() -> None:
    def commands(group: Any, path: str) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                found |= commands(command, f"{path}{name} ")
            else:
                found[path + name] = any("--json" in parameter.opts for parameter in command.params)
        return found

    page = (
        (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8").partition("## For programs")[2]
    )
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    have = commands(typer.main.get_command(app), "")
    assert sorted(re.findall("`(.+?)`", " ".join(table))) == sorted(name for name, json_ in have.items() if json_)
    last = page.strip().splitlines()[-1]
    assert sorted(re.findall("`(.+?)`", last)) == sorted(name for name, json_ in have.items() if not json_)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("boom"), "INTERNAL"),
        (MemoryError(), "ENVIRONMENT"),
        (OSError(errno.ENOSPC, "No space left on device"), "ENVIRONMENT"),
        (Stopped("SIGTERM"), "PREEMPTED"),
        (DataFault("damaged", where="x", hint="y"), "DATA"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_whatever_is_raised_is_one_object(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: str
) -> None:
    def raising(self: object) -> None:
        raise error

    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(Store, "runs", raising)
    plain, answer = gpt2lab("runs"), gpt2lab("runs", "--json")
    found = json.loads(answer.err)["error"]
    assert (found["code"], found["exit_code"]) == (code, answer.code) and answer.code == plain.code
    assert found["problems"][0]["what"] in plain.err and found["try"]


def test_a_damaged_record_is_an_object_too(gpt2lab: Call, store: Path) -> None:
    (store / "studies" / "posenc@nano.json").write_text("{")
    for command in ("runs", "studies", "sync"):
        answer = gpt2lab(command, "--json")
        assert answer.code == 4 and [json.loads(line)["error"]["code"] for line in answer.err.splitlines()] == ["DATA"]
        assert json.loads(answer.out)["schema"] == 1


def test_data_and_plugins_are_told(gpt2lab: Call, tmp_path: Path, text: Path) -> None:
    made = json.loads(gpt2lab("data", "prepare", "text", "--tokenizer", "bytes", "--json", "--set",
                              f"data.corpus.paths=[{text}]").out)  # fmt: skip
    assert made["schema"] == 1 and made["train"] + made["validation"] > 10_000
    assert json.loads(gpt2lab("data", "check", "--json").out) == {"schema": 1, "whole": [made["path"]]}
    assert [row["path"] for row in json.loads(gpt2lab("data", "list", "--json").out)["data"]] == [made["path"]]


def test_what_is_cleaned_is_told(gpt2lab: Call, store: Path) -> None:
    before = {path.name for path in store.iterdir()}
    for words, deleted in ((("--dry-run",), False), (("--yes",), True)):
        found = json.loads(gpt2lab("clean", "--where", "arm=rotary", *words, "--json").out)
        assert len(found["runs"]) == 3 and {row["deleted"] for row in found["runs"]} == {deleted}
        left = before - {path.name for path in store.iterdir()}
        assert left == ({row["id"] for row in found["runs"]} if deleted else set())


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


@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("rope", {"learned": {}, "rotary": {"model.position": "rotary"}}),
        ("qk_norm", {"plain": {}, "qk_norm": {"model.scores": {"name": "plain", "qk_norm": "true"}}}),
        ("swiglu_or_moe", {"gelu_tanh": {}, "swiglu": {"model.mlp": "swiglu"}, "moe": {"model.mlp": "moe"}}),
        ("smear", {"plain": {}, "smear": {"model.embedding": ["plain", {"name": "smear"}]}}),
        ("documents", {"layernorm": {}, "rmsnorm": {"model.norm": "rmsnorm"}}),  # bytes have no documents
    ],
)
def test_a_new_ablation_begins_with_what_its_name_speaks_of(
    gpt2lab: Call, tmp_path: Path, name: str, arms: dict[str, Any]
) -> None:
    assert gpt2lab("new", name).code == 0
    assert yaml.load((tmp_path / f"{name}.yaml").read_text(), Loader=yaml.BaseLoader)["arms"] == arms
    assert gpt2lab("check", f"{name}.yaml", "--scale", "nano").code == 0
