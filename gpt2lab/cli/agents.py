"""The command mcp: a server of the Model Context Protocol through which programs plan, start and read studies.

Each tool is a call of the Python interface. What a program may not decide is fixed by the command line: the campaign,
the scale, the hours, the number of hypotheses, and the plug-ins.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.options import OUT, RUNS, Jobs, Out, Plugin, Runs
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Preempted, Problem, unknown

if TYPE_CHECKING:
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.experiments.budget import Budget

INSTRUCTIONS = """Compare changes of GPT-2 and report only what the evidence supports. Workflow: components lists what
can be swapped; write an ablation as YAML and check it; plan it, which reports its cost and the remaining budget; start
it; poll its status until it has ended; read its verdicts. Keep a change only if its verdict is "better" and it is
supported over the campaign. Every contrast that is started counts permanently as a hypothesis. Each arm makes one
change; name arms that must make several. Scale, validation, smallest effect and alpha stay as in the first study of the
campaign. A study that stopped at the end of its hours continues when it is started again."""
LOG_LINES = 12


def mcp(
    hours: Annotated[float, typer.Option("--hours", help="Total training time on this machine for all studies of the "
                                         "campaign, in hours.", min=0.0)],
    hypotheses: Annotated[int, typer.Option("--hypotheses", help="Contrasts allowed in the campaign.", min=1)],
    campaign: Annotated[str, typer.Option("--campaign", help="Campaign that counts all contrasts.")] = "agents",
    scale: Annotated[str, typer.Option("--scale", "-s", help="Preset that all studies run at.")] = "nano",
    jobs: Jobs = None,
    plugin: Plugin = None,
    runs: Runs = RUNS,
    out: Out = OUT,
) -> None:  # fmt: skip
    """Serve programs that run experiments. Uses the Model Context Protocol over standard input and output."""
    from gpt2lab.planning.declaration import variant_name

    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        raise EnvironmentFault("the package mcp is not installed", hint="pip install 'gpt2lab[mcp]'") from None
    name = variant_name(campaign, "--campaign")
    desk = Desk(name, scale, hours, hypotheses, jobs, plugin or [], runs.absolute(), out.absolute())
    server = MCPServer("gpt2lab", instructions=INSTRUCTIONS, log_level="WARNING")
    for tool in (desk.components, desk.check, desk.plan, desk.start, desk.status, desk.verdicts, desk.ledger):
        server.add_tool(answering(tool), name=tool.__name__, description=tool.__doc__)
    server.run()


def answering(tool: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The tool, with errors as their lines for people, and numbers that are not finite as null."""
    from mcp.server.mcpserver.exceptions import ToolError

    from gpt2lab.analysis.verdicts import as_json

    @functools.wraps(tool)
    def called(*arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return dict(as_json(tool(*arguments, **options)))
        except Gpt2labError as error:
            raise ToolError(error.render()) from None

    return called


@dataclass(frozen=True)
class Desk:
    """The tools, and what they may do."""

    campaign: str
    scale: str
    hours: float
    hypotheses: int
    jobs: int | None
    plugins: list[str]
    runs: Path
    out: Path

    @property
    def budget(self) -> Budget:
        from gpt2lab.experiments.budget import Budget
        from gpt2lab.store import Store

        return Budget(Store(self.runs), self.campaign, hours=self.hours, hypotheses=self.hypotheses)

    def components(self, slot: str = "") -> dict[str, Any]:
        """The slots of GPT-2 and its training with the components that fit them; of one slot with options, defaults
        and sources. In YAML a change is `model.norm: rmsnorm`, or `model.norm: {name: ..., option: value}`."""
        from gpt2lab.cli.catalogue import listing

        slots = listing(self.plugins)
        if slot and slot not in slots:
            raise ConfigError(unknown("slot", slot, slots), hint="components without a slot lists all of them")
        if slot:
            return {"slot": slots[slot]}
        return {
            "slots": {
                name: {"what": one["what"], "key": one["path"], "components": [c["name"] for c in one["components"]]}
                for name, one in slots.items()
            }
        }

    def check(self, yaml: str) -> dict[str, Any]:
        """Check an ablation in YAML: every mistake with its key and a suggestion; trains nothing. Keys: ablation (a
        name), question, base (ignored), baseline, arms (name -> changes by dotted key), seeds, expected."""
        from gpt2lab.planning.ablation import load_ablation

        ablation = load_ablation(self._source(yaml), scale=self.scale, plugins=self.plugins)
        arms = {name: dict(arm.changes) for name, arm in ablation.arms.items()}
        seeds = list(ablation.seeds) if ablation.seeds is not None else "auto"
        return {"study": f"{ablation.name}@{ablation.scale}", "arms": arms, "seeds": seeds}

    def plan(self, yaml: str) -> dict[str, Any]:
        """Plan an ablation in YAML: its cost on this machine, the effect that it can detect, and the remaining budget;
        trains nothing and declares nothing."""
        from gpt2lab.analysis.campaigns import tests_of, tests_so_far
        from gpt2lab.planning import forecast
        from gpt2lab.planning.record import study_record

        study = self._study(yaml)
        plan = study.plan()
        new = set(tests_of(study_record(plan, reproduce=""))) - tests_so_far(study.store, self.campaign)
        return {
            "study": study.name, "runs": len(plan.runs()), "hours": forecast.seconds_left(plan, study.store) / 3600,
            "new_hypotheses": len(new), "forecast": forecast.lines(plan), "budget": self.budget.left(),
        }  # fmt: skip

    def start(self, yaml: str, several: list[str] | None = None) -> dict[str, Any]:
        """Train an ablation in YAML, within the remaining budget. It is declared in the ledger before its first
        run. several: arms that are meant to change more than one thing. Returns at once; see status. Starting it again
        continues it."""
        study = self._study(yaml)
        budget, began = self.budget, time.time()
        grant = budget.grant(study, study.plan(), yaml, several or ())
        words = ["run", str(budget.file(grant, "yaml")), "--scale", self.scale, "--campaign", self.campaign,
                 "--runs", str(self.runs), "--out", str(self.out), "--no-tracking", "--max-days", "100000",
                 *(["--jobs", str(self.jobs)] if self.jobs else []),
                 *(word for plugin in self.plugins for word in ("--plugin", plugin))]  # fmt: skip
        begun = [str(self.runs), self.campaign, grant.id, str(grant.seconds), str(began)]
        with budget.file(grant, "lock").open("w") as lock, budget.file(grant, "log").open("w") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)  # which the process inherits, and holds until it ends
            subprocess.Popen(
                [sys.executable, "-m", "gpt2lab.cli.granted", *begun, *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True, pass_fds=(lock.fileno(),), env={**os.environ, "COLUMNS": "120"},
            )  # fmt: skip
        return {"study": study.name, "hours_granted": grant.seconds / 3600, "budget": budget.left()}

    def status(self, study: str) -> dict[str, Any]:
        """Progress of a study of this campaign: running, finished, failed or stopped at the end of its hours; its runs
        by status, and the last lines that it printed."""
        from gpt2lab import api

        budget = self.budget
        grants = {grant.study: grant for grant in budget.grants()}
        grant = grants.get(study) or next((g for name, g in grants.items() if name.partition("@")[0] == study), None)
        if grant is None:
            raise ConfigError(unknown("study", study, grants), hint="start a study first")
        log = budget.file(grant, "log")
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        states = {0: "finished", Preempted.exit_code: "stopped at the end of its hours; start it again to continue"}
        ended = "killed; what it was granted counts as used" if grant.exit_code is None else "failed"
        state = "running" if budget.runs(grant) else states.get(grant.exit_code, ended)  # type: ignore[arg-type]
        declared = grant.study in budget.store.studies()
        runs = (
            Counter(run.status for run in api.load_study(grant.study, self.runs).runs) if declared else Counter[str]()
        )
        return {
            "study": grant.study, "state": state, "runs": dict(runs), "hours_granted": grant.seconds / 3600,
            "hours_used": None if grant.used is None else grant.used / 3600, "log": said, "budget": budget.left(),
        }  # fmt: skip

    def verdicts(self, study: str) -> dict[str, Any]:
        """Results of a study: for every contrast the verdict, the difference with its interval, whether the claim
        is supported over the campaign, and what to do next where that is known."""
        from gpt2lab import api

        result = api.load_study(study, self.runs)
        written = self.out / result.name / "verdicts.json"
        whole = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
        record = whole if whole.get("hash") == result.record.hash else result.verdicts.to_json()
        campaign = api.campaigns(self.runs).get(self.campaign)
        supported = {
            (hypothesis.arm, hypothesis.against): hypothesis.supported
            for hypothesis in (campaign.hypotheses if campaign else ())
            if hypothesis.study == result.name
        }
        contrasts = [
            _without_details(contrast) | {"supported": supported.get((contrast["arm"], contrast["against"]))}
            for contrast in record["contrasts"]
        ]
        missing = result.missing.to_dict("records")
        kept = {"answer": record.get("answer")}
        return {"study": result.name, **kept, "contrasts": contrasts, "missing": missing, "page": str(written.parent)}

    def ledger(self) -> dict[str, Any]:
        """Every hypothesis of the campaign so far, in order, with its outcome; and the remaining budget."""
        from gpt2lab import api

        campaign = api.campaigns(self.runs).get(self.campaign)
        listed = [asdict(hypothesis) for hypothesis in campaign.hypotheses] if campaign else []
        summary = campaign.sentences() if campaign else []
        return {"campaign": self.campaign, "summary": summary, "hypotheses": listed, "budget": self.budget.left()}

    def _source(self, yaml: str) -> Mapping[str, Any]:
        """The mapping in a text. Raises ConfigError."""
        from gpt2lab.config.source import read_mapping

        tree = read_mapping(yaml, "yaml").tree
        if not isinstance(tree, dict) or "arms" not in tree:
            raise ConfigError("an ablation with `arms` is expected", where="yaml")
        fixed = {"campaign": self.campaign, "scales": [self.scale]}
        given = {key: tree[key] for key in fixed if key in tree and tree[key] != fixed[key]}
        if given:
            hint = f"leave it out: every study runs at {self.scale}, in the campaign {self.campaign}"
            raise ConfigError(
                [Problem(key, f"is {value}, not {fixed[key]}") for key, value in given.items()], hint=hint
            )
        return tree

    def _study(self, yaml: str) -> Study:
        from gpt2lab import api

        return api.open_study(
            self._source(yaml), scale=self.scale, campaign=self.campaign, plugins=self.plugins, jobs=self.jobs,
            runs=self.runs,
        )  # fmt: skip


def _without_details(contrast: Mapping[str, Any]) -> dict[str, Any]:
    """A contrast without the numbers that only its page explains."""
    return {key: value for key, value in contrast.items() if key not in ("sensitivity", "halfwidths", "weights")}
