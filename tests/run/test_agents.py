"""Programs that start studies: a budget that no process exceeds, and the tools over the protocol's own client."""

from __future__ import annotations

import asyncio
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from mcp import Client, StdioServerParameters
from mcp.server.mcpserver.exceptions import ToolError

import gpt2lab as g
from gpt2lab.api import open_study
from gpt2lab.cli.agents import Desk, answering
from gpt2lab.errors import ConfigError
from gpt2lab.experiments.ablation import Study
from gpt2lab.experiments.budget import LEAST_SECONDS, Budget
from gpt2lab.store import Store

HOURS = 1.5 * LEAST_SECONDS / 3600


@pytest.fixture
def source(tiny: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(tiny.read_text()))


def study_of(source: dict[str, Any], root: Path, **changes: Any) -> Study:
    return open_study(source | changes, scale=source["base"], campaign="agents", runs=root / "runs")


def budget_of(root: Path, hours: float = HOURS, hypotheses: int = 3) -> Budget:
    return Budget(Store(root / "runs"), "agents", hours=hours, hypotheses=hypotheses)


def grant_and_tell(budget: Budget, study: Study, answers: Any) -> None:
    try:
        answers.put(budget.grant(study, study.plan(), "").seconds)
    except ConfigError as refused:
        answers.put(str(refused))


def test_processes_at_once_are_granted_no_more_than_there_is(source: dict[str, Any], tmp_path: Path) -> None:
    study, context = study_of(source, tmp_path), multiprocessing.get_context("fork")
    study.plan()
    answers: Any = context.Queue()
    parts = [context.Process(target=grant_and_tell, args=(budget_of(tmp_path), study, answers)) for _ in range(5)]
    for part in parts:
        part.start()
    told = [answers.get(timeout=60) for _ in parts]
    granted = [answer for answer in told if isinstance(answer, float)]
    assert sorted(granted) == pytest.approx([0.5 * LEAST_SECONDS, LEAST_SECONDS])
    assert all("hours" in answer and "0 are left" in answer for answer in told if isinstance(answer, str))
    again = budget_of(tmp_path)  # as a server that was started again has it
    assert again.left()["hours"] == 0 and len(again.grants()) == 2
    again.settle(again.grants()[0].id, 10.0, 0)
    assert again.left()["hours"] * 3600 == pytest.approx(again.grants()[0].seconds - 10)


def test_what_a_killed_process_was_granted_counts_as_used(source: dict[str, Any], tmp_path: Path) -> None:
    study, budget = study_of(source, tmp_path), budget_of(tmp_path)
    grant = budget.grant(study, study.plan(), "")
    with budget.file(grant, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert budget.runs(grant)
        with pytest.raises(ConfigError, match="is being trained already"):
            budget.grant(study, study.plan(), "")
    assert not budget.runs(grant) and budget.left()["hours_used"] * 3600 == LEAST_SECONDS


def test_hypotheses_are_counted_from_the_ledger_and_from_what_is_at_work(
    source: dict[str, Any], tmp_path: Path
) -> None:
    budget, alibi = budget_of(tmp_path, 1.0), {"learned": {}, "alibi": {"model.position": "alibi"}}
    study = study_of(source, tmp_path)
    budget.grant(study, study.plan(), "")
    assert budget.left()["hypotheses"] == 2
    budget.settle(budget.grants()[0].id, 1.0, 1)  # it ended before it declared anything
    assert budget.left()["hypotheses"] == 3
    study._record(None, lambda event: None)
    assert budget.left()["hypotheses"] == 2
    small = budget_of(tmp_path, 1.0, hypotheses=1)
    small.grant(study, study.plan(), "")  # the same hypotheses again
    with pytest.raises(ConfigError, match="1 new ones, of 1 0 are left"):
        small.grant(other := study_of(source, tmp_path, ablation="other", arms=alibi), other.plan(), "")
    screen = study_of(source, tmp_path, ablation="screen", arms=alibi, screen=True)
    budget.grant(screen, screen.plan(), "")
    assert budget.left()["hypotheses"] == 1


def test_one_change_for_each_arm_and_a_yardstick_that_stays(source: dict[str, Any], tmp_path: Path) -> None:
    budget = budget_of(tmp_path, 1.0)
    two = {"learned": {}, "both": {"model.position": "rotary", "model.norm": "rmsnorm"}}
    study = study_of(source, tmp_path, arms=two)
    differs = r"differs from \w+ in 2 things: model\.position, model\.norm"
    with pytest.raises(ConfigError, match=differs):
        budget.grant(study, study.plan(), "")
    turned = {"both": two["both"], "alibi": {"model.position": "alibi"}}
    hidden = study_of(source, tmp_path, baseline="both", arms=turned)  # the changes of what is compared with count too
    with pytest.raises(ConfigError, match=differs):
        budget.grant(hidden, hidden.plan(), "")
    assert budget.grant(study, study.plan(), "", ["both"]).several == ["both"]
    for changed in ({"alpha": 0.1}, {"smallest_effect": 0.5}, {"evaluate": {"tokens": 128}}):
        other = study_of(source, tmp_path, ablation="other", **changed)
        with pytest.raises(ConfigError, match="all studies of the campaign agents are judged by"):
            budget.grant(other, other.plan(), "")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("!!python/object/apply:os.system ['touch hostile']", r"yaml:1: tags .* are not accepted"),
        ("a: &a [x, x]\narms: [*a, *a]", r"yaml:1: anchors \(&a\) are not accepted"),
        ("[" * 5000 + "]" * 5000, "nested more than 32 levels deep"),
        ("arms: \x00", "yaml: not valid YAML"),
        ("just text", "a mapping of keys to values is expected"),
        ({"campaign": "other"}, "campaign: is other, not agents"),
        ({"scales": ["nano", "micro"]}, r"scales: is \['nano', 'micro'\], not"),
        ({"plugins": ["other.py"]}, "unknown key 'plugins'"),
        ({"executor": {"name": "slurm", "setup": "touch hostile"}}, "unknown key 'executor'"),
        ({"ablation": "../../hostile"}, "a name of letters, digits"),
        ({"seeds": 99999999999}, "from 1 to 100 seeds are expected"),
    ],
)
def test_hostile_yaml_is_refused_and_runs_nothing(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = written if isinstance(written, str) else yaml.safe_dump(source | written)
    desk = Desk("agents", source["base"], 1.0, 1, None, [], tmp_path / "runs", tmp_path / "reports")
    with pytest.raises(ToolError, match=message):
        answering(desk.check)(yaml=text)
    assert not (tmp_path / "hostile").exists() and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_process_ends_with_its_hours(source: dict[str, Any], tmp_path: Path) -> None:
    budget = budget_of(tmp_path, 1.0)
    long = yaml.safe_dump(source)
    study = study_of(source, tmp_path)
    grant = budget.grant(study, study.plan(), long)
    seconds, began = 20.0, time.time()
    words = ["run", str(budget.file(grant, "yaml")), "--scale", source["base"], "--campaign", "agents", "--runs",
             str(tmp_path / "runs"), "--no-tracking", "--set", "training.steps=10000000"]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "gpt2lab.cli.granted", str(tmp_path / "runs"), "agents", grant.id, str(seconds),
         str(began), *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert time.time() - began < seconds + 2, process.stderr
    [settled] = budget.grants()
    assert process.returncode in (75, -signal.SIGKILL), process.stderr
    if process.returncode == 75:
        assert settled.used is not None and settled.used < seconds and settled.exit_code == 75
    assert budget.left()["hours_used"] * 3600 <= grant.seconds
    assert all(run.status != "running" for run in g.load_study("tiny", tmp_path / "runs").runs)


@pytest.mark.slow
def test_the_tools_over_the_protocol(source: dict[str, Any], tmp_path: Path) -> None:
    written = yaml.safe_dump(source | {"seeds": 1})
    options = ["--hours", str(HOURS), "--hypotheses", "1", "--scale", source["base"], "--runs", str(tmp_path / "runs"),
               "--out", str(tmp_path / "reports")]  # fmt: skip
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "gpt2lab", "mcp", *options], env=dict(os.environ), cwd=tmp_path
    )

    async def first() -> None:
        async with Client(server) as client:
            call = caller(client)
            assert "start" in {tool.name for tool in (await client.list_tools()).tools}
            norms = (await call("components", slot="norm"))["slot"]["components"]
            assert "rmsnorm" in {component["name"] for component in norms}
            wrong = await call("check", yaml=written.replace("rotary}", "rotry}").replace(": rotary\n", ": rotry\n"))
            assert "unknown position 'rotry'; did you mean 'rotary'?" in wrong["error"]
            assert (await call("check", yaml=written))["arms"]["rotary"] == {"model.position": "rotary"}
            planned = await call("plan", yaml=written)
            assert planned["new_hypotheses"] == 1 and planned["budget"]["hypotheses_used"] == 0
            assert (await call("start", yaml=written))["budget"]["hypotheses"] == 0
            async with Client(server) as other:  # a second session at once
                refused = await caller(other)("start", yaml=written)
                assert "is being trained already" in refused["error"]

    async def second() -> None:
        async with Client(server) as client:  # the first server is gone, its study goes on
            call = caller(client)
            for _ in range(120):
                status = await call("status", study="tiny")
                if status["state"] != "running":
                    break
                await asyncio.sleep(0.5)
            assert status["state"] == "finished" and status["runs"] == {"finished": 2}, status
            assert 0 < status["hours_used"] < status["hours_granted"]
            [contrast] = (await call("verdicts", study="tiny"))["contrasts"]
            assert contrast["arm"] == "rotary" and contrast["supported"] is None
            [hypothesis] = (await call("ledger"))["hypotheses"]
            assert hypothesis["number"] == 1 and hypothesis["campaign"] == "agents" and hypothesis["word"]
            more = source | {"ablation": "more", "arms": {"learned": {}, "alibi": {"model.position": "alibi"}}}
            assert "1 new ones, of 1 0 are left" in (await call("start", yaml=yaml.safe_dump(more)))["error"]
            unknown = await call("status", study="tinny")
            assert "did you mean 'tiny@tiny'" in unknown["error"]

    asyncio.run(first())
    asyncio.run(second())


def caller(client: Client) -> Callable[..., Coroutine[Any, Any, dict[str, Any]]]:
    """Call a tool; -> what it returns, or its `error`."""

    async def call(name: str, **arguments: Any) -> dict[str, Any]:
        result = await client.call_tool(name, arguments)
        text = "".join(getattr(part, "text", "") for part in result.content)
        return {"error": text} if result.is_error else dict(json.loads(text))

    return call
