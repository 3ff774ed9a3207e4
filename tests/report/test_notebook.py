"""What a notebook shows: completion, short representations, tables in HTML, figures, and the tutorial."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from page_reader import Reader, assert_plain_svg

import gpt2lab as g
from gpt2lab.api import RunResult
from gpt2lab.basics.progress import Progress, RunProgress
from gpt2lab.errors import ConfigError
from gpt2lab.store import Store

MakeStudy = Callable[..., dict[str, Any]]
TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.ipynb"
LONGEST = 400


def test_completion_offers_the_interface_and_nothing_else() -> None:
    assert dir(g) == sorted(g.__all__) and {"run_ablation", "studies", "load_study"} <= set(dir(g))


def test_studies_are_found_again_with_their_numbers(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    [study] = g.studies(tmp_path / "runs")
    assert study.name == "posenc@nano" and study.failed == []
    assert {c.arm: c.word for c in study.verdicts.contrasts}["rotary"] == "better"
    assert len(study.losses) == 9
    frame = study.frame()
    assert list(frame) == ["arm", "seed", "step", "metric", "value"] and set(frame.arm) == {"learned", "rotary", "none"}
    assert g.load_study("posenc", tmp_path / "runs").record == study.record


def test_what_is_shown_is_short_and_escaped(make_study: MakeStudy, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    declared = make_study({"learned": 2.15, bad: 1.89}, question=bad)
    [study] = g.studies(tmp_path / "runs")
    run_id = declared["arms"]["learned"]["runs"]["0"]
    folder = Store(tmp_path / "runs").run(run_id)
    run = RunResult(id=run_id, seed=0, folder=folder, result={"reason": bad}, metrics={"val/loss": 2.1}, found=True)
    difference = g.difference(g.load_config("nano"), g.load_config("nano", ["optim.lr=0.5", "model.position=rotary"]))
    assert set(difference) == {"optim.lr", "model.position"}
    for shown in (study, study.verdicts, run, difference):
        assert len(repr(shown)) < LONGEST
        page = Reader(shown._repr_html_())
        assert "script" not in {tag for tag, _ in page.tags} and "table" in {tag for tag, _ in page.tags}
    assert all(len(repr(contrast)) < LONGEST for contrast in study.verdicts.contrasts)


def test_figures_of_the_page_are_shown_and_saved(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study()
    study = g.load_study("posenc", tmp_path / "runs")
    figure = study.plot("seeds")
    assert_plain_svg(ElementTree.fromstring(figure._repr_svg_()))
    for ending, start in (("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        figure.save(tmp_path / f"it.{ending}")
        assert (tmp_path / f"it.{ending}").read_bytes().startswith(start)
    with pytest.raises(ConfigError, match="ends with"):
        figure.save(tmp_path / "it.jpg")
    with pytest.raises(ConfigError, match="seeds"):
        study.plot("seed")


def test_progress_in_a_notebook_is_one_output_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    updated: list[str] = []
    shell = type("ZMQInteractiveShell", (), {})()
    outputs = SimpleNamespace(
        HTML=str, display=lambda *what, **_: shown.append(what) or SimpleNamespace(update=updated.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=outputs))
    monkeypatch.setitem(sys.modules, "IPython.display", outputs)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # then rich shows what it prints
    with g.show_progress() as listener:
        for step in (0, 1):
            run = RunProgress("learned", "0", "a" * 16, 2, status="finished", step=step)
            listener(Progress.of("mine@nano", [run], jobs=1))
    assert len(shown) == 1 and len(updated) == 2 and "learned" in updated[-1] and "1/2" in updated[-1]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads(TUTORIAL.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["study"].losses) == 6 and names["study"].failed == []
    assert (tmp_path / "reports/first@nano/index.html").is_file()
