"""The Python front door: typed results, nothing printed, a stream of events; and the script of the README."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import gpt2lab as g
from gpt2lab.errors import ConfigError, NumericsFault
from gpt2lab.executors.inline import InlineExecutor


@pytest.fixture
def declared(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An ablation as a mapping, in an empty folder."""
    monkeypatch.chdir(tiny.parent)
    tree: dict[str, Any] = yaml.safe_load(tiny.read_text())
    return tree


def test_an_ablation_is_run_from_a_mapping_in_silence(
    declared: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], no_figures: None
) -> None:
    events: list[g.Event] = []
    executor = InlineExecutor()
    study = g.run_ablation(declared, seeds=3, tracking=False, executor=executor, on_event=events.append)
    assert capfd.readouterr() == ("", "")
    assert study.name == "tiny@tiny" and not study.failed and study.found == 0 and len(executor.trained) == 6
    assert set(study.endings) == {run.id for run in study.runs} == set(executor.trained)
    assert study.losses.groupby("arm").size().to_dict() == {"learned": 3, "rotary": 3} and study.missing.empty
    [contrast] = study.verdicts.contrasts
    assert (contrast.arm, contrast.against, contrast.n_arm + contrast.failed_arm) == (
        "rotary",
        "learned",
        3,
    ) and contrast.verdict
    assert study.record.arms["rotary"].changes == {"model.position": "rotary"}
    assert "run_ablation" in study.record.reproduce
    last = [event for event in events if isinstance(event, g.Progress)][-1]
    assert {run.status for run in last.runs} == {"finished"} and all(run.step == 24 for run in last.runs)
    page = study.report(tmp_path / "pages")
    assert page == tmp_path / "pages/tiny@tiny/index.html" and "rotary" in page.read_text()
    again = g.run_ablation(declared, seeds=3, tracking=False, executor=InlineExecutor())
    assert (again.found, dict(again.endings)) == (6, {})
    assert again.verdicts.to_json() == study.verdicts.to_json()


def test_the_plan_costs_nothing_and_knows_every_run(declared: dict[str, Any], tmp_path: Path) -> None:
    plan = g.plan(declared, seeds=2, arms=["learned", "rotary"])
    assert len(plan.runs()) == 4 and plan.arms["rotary"].costs.parameters > 0
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_a_mapping_is_said_at_once_with_its_keys(declared: dict[str, Any]) -> None:
    declared["arms"]["rotary"] = {"model.position": "rotray"}
    declared["basline"] = "learned"
    with pytest.raises(ConfigError) as error:
        g.run_ablation(declared)
    text = error.value.render()
    assert "did you mean 'rotary'" in text and "did you mean 'baseline'" in text


def test_several_scales_are_named_where_one_is_needed(declared: dict[str, Any]) -> None:
    declared["scales"] = ["nano", "micro"]
    assert g.scales_of(declared) == ("nano", "micro")
    with pytest.raises(ConfigError, match="nano, micro"):
        g.plan(declared)


def test_one_run_is_trained_from_a_config_made_in_python(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.parent)
    config = g.load_config("tiny.yaml", ["model.norm=rmsnorm"])
    run = g.train(config, seed=5, tracking=False, executor=InlineExecutor())
    assert capfd.readouterr() == ("", "")
    assert run.seed == 5 and not run.found and math.isfinite(run.metrics["val/loss"]) and run.result["steps"] == 24
    assert [row["step"] for row in run.rows()] == list(range(25))
    model = run.load().model
    assert sum(p.numel() for p in model.parameters()) > 1000
    same = g.train("tiny.yaml", overrides=["model.norm=rmsnorm"], seed=5, tracking=False)
    assert same.found and same.id == run.id  # however it was asked for, it is the same run
    other = g.train(config, overrides=["model.norm=layernorm"], tracking=False, executor=InlineExecutor())
    assert other.id != run.id


def test_a_run_that_diverges_raises(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    with pytest.raises(NumericsFault):
        g.train("tiny.yaml", overrides=["optim.lr=1e6", "optim.grad_clip=null"], tracking=False,
                executor=InlineExecutor())  # fmt: skip


SCRIPT = """
import gpt2lab as g

if __name__ == "__main__":
    study = g.run_ablation("ablation.yaml", seeds=3, tracking=False)
    assert not study.failed
    for contrast in study.verdicts.contrasts:
        print(contrast.verdict)
"""


@pytest.mark.slow
def test_a_users_script_prints_what_it_prints_and_nothing_else(tiny: Path) -> None:
    (tiny.parent / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tiny.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


@pytest.mark.usefixtures("no_figures")
def test_a_sweep_is_run_from_a_mapping(tiny: Path, monkeypatch: pytest.MonkeyPatch, inline: list[str]) -> None:
    monkeypatch.chdir(tiny.parent)
    declared = {
        "sweep": "rates", "question": "Which rate?", "base": "tiny.yaml", "trials": 3,
        "space": {"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}}, "sampler": "random",
    }  # fmt: skip
    sweep = g.run_sweep(declared, tracking=False)
    assert sweep.name == "rates@tiny" and len(inline) == 3
    assert list(sweep.trials["outcome"]) == ["finished"] * 3
    best = sweep.trials.sort_values("value").iloc[0]
    assert sweep.best == {"rates": {"optim.lr": best["optim.lr"]}}
    assert sweep.report("pages").is_file()
    assert g.run_sweep(declared, tracking=False).best == sweep.best and len(inline) == 3
