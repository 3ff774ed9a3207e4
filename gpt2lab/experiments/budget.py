"""Budgets of a campaign for programs that start studies: hours and hypotheses that are granted and never exceeded.

Every study that is started is granted a part of the hours, before it starts; its process ends itself when they are
over. What was granted and not used returns when that process says so; of one that was killed all of it counts. Hours
are those of the process that drives a study, of every study by itself, from start to end. Hypotheses are those of the
ledger, and those of studies that were granted and have not come to their declaration yet.

    runs/budgets/<campaign>.json            grants, and by what all studies of the campaign are judged
    runs/budgets/<grant>.{yaml,log,lock}    what was started, what it printed, held while it runs
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import Field

from gpt2lab.analysis.campaigns import tests_of, tests_so_far
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.experiments.ablation import Study
from gpt2lab.planning.forecast import seconds_left
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.record import study_record
from gpt2lab.records import Effect, Record
from gpt2lab.store import Store, file_lock, now, read_json, write_json
from gpt2lab.store.locks import is_locked

MARGIN = 1.5
"""A study is granted so many times its estimate, as far as the budget goes."""
LEAST_SECONDS = 60.0
GRACE_SECONDS, GRACE_SHARE = 20.0, 0.25
"""How long before the end of its grant a study is asked to save and stop, at most."""


class Grant(Record):
    """Hours that one study may take. `used`: None while it runs, or where its process was killed."""

    id: str
    study: str
    tests: list[str]
    """its hypotheses, as `tests_of` names them"""
    several: list[str] = Field(default_factory=list)
    """arms that were declared to change several things"""
    seconds: float
    used: float | None = None
    exit_code: int | None = None
    started: str
    ended: str | None = None


class Budget:
    """The budget of a campaign in one store, shared by all processes. hours, hypotheses: the limits."""

    def __init__(self, store: Store, campaign: str, *, hours: float, hypotheses: int) -> None:
        self.store, self.campaign, self.seconds, self.hypotheses = store, campaign, hours * 3600, hypotheses
        self.folder = store.folder("budgets")
        self.path = self.folder / f"{campaign}.json"

    def _lock(self) -> AbstractContextManager[None]:
        return file_lock(self.folder / f"{self.campaign}.lock")

    def _read(self) -> tuple[dict[str, Any], list[Grant]]:
        written = read_json(self.path) or {}
        return written, [Grant.read(grant, str(self.path)) for grant in written.get("grants", [])]

    def _write(self, grants: Sequence[Grant], yardstick: Mapping[str, Any] | None) -> None:
        write_json(self.path, {"yardstick": yardstick, "grants": [grant.plain() for grant in grants]})

    def grants(self) -> list[Grant]:
        """Every grant so far. Raises DataFault."""
        return self._read()[1]

    def runs(self, grant: Grant) -> bool:
        """Whether the process of a grant is alive."""
        return is_locked(self.folder / f"{grant.id}.lock")

    def left(self) -> dict[str, float]:
        """`hours` and `hypotheses` that are left, with the limits and what was used; what is granted counts as used."""
        grants = self.grants()
        seconds, tests = self._spent(grants), self._tests(grants)
        return {
            "hours": max(0.0, self.seconds - seconds) / 3600, "hypotheses": max(0, self.hypotheses - len(tests)),
            "hours_used": seconds / 3600, "hypotheses_used": len(tests),
            "hours_allowed": self.seconds / 3600, "hypotheses_allowed": self.hypotheses,
        }  # fmt: skip

    def _spent(self, grants: Sequence[Grant]) -> float:
        return sum(grant.seconds if grant.used is None else grant.used for grant in grants)

    def _tests(self, grants: Sequence[Grant]) -> set[str]:
        """Those in the ledger, and those of studies at work."""
        return tests_so_far(self.store, self.campaign) | {
            test for grant in grants if grant.used is None for test in grant.tests
        }

    def grant(self, study: Study, plan: Plan, source: str, several: Sequence[str] = ()) -> Grant:
        """Grant hours to a study, if the budget has room for it; `source` is kept as its file.

        several: arms that may change several things. Raises ConfigError with every reason against it.
        """
        record = study_record(plan, reproduce=study.reproduce)
        estimate, tests = seconds_left(plan, self.store), tests_of(record)
        problems = [
            Problem(f"arms.{arm}", f"differs from {against} in {len(keys)} things: {', '.join(keys)}; what a "
                    "difference is due to would not be known")
            for arm, against in (pair for pair in record.contrasts if not isinstance(pair, Effect))
            if len(keys := _differing(plan, arm, against)) > 1 and arm not in several
        ]  # fmt: skip
        yardstick = {
            "scale": record.scale, "metric": record.metric, "evaluation": record.evaluation.key,
            "smallest_effect": record.smallest_effect, "alpha": record.alpha, "data": record.scope.data,
        }  # fmt: skip
        if study.ablation.confirm:
            problems.append(Problem("confirm", "is a study of its own here: start it when the screen has ended"))
        with self._lock():
            written, grants = self._read()
            frozen = written.get("yardstick") or yardstick
            problems += [
                Problem(key, f"is {yardstick[key]}; all studies of the campaign {self.campaign} are judged by {value}")
                for key, value in frozen.items() if yardstick.get(key) != value
            ]  # fmt: skip
            if any(grant.study == study.name and self.runs(grant) for grant in grants):
                problems.append(Problem(study.name, "is being trained already"))
            room = self.seconds - self._spent(grants)
            if estimate > room or room <= 0:
                problems.append(Problem("hours", f"it takes about {estimate / 3600:.3g}, of {self.seconds / 3600:.3g} "
                                        f"{max(0.0, room) / 3600:.3g} are left"))  # fmt: skip
            known = self._tests(grants)
            new = set(tests) - known
            if len(known | new) > self.hypotheses:
                problems.append(Problem("hypotheses", f"it has {len(new)} new ones, of {self.hypotheses} "
                                        f"{max(0, self.hypotheses - len(known))} are left"))  # fmt: skip
            if problems:
                raise ConfigError(
                    problems, hint="fewer arms or seeds; one change for each arm, or name it in `several`"
                )
            seconds = min(room, max(LEAST_SECONDS, MARGIN * estimate))
            grant = Grant(
                id=secrets.token_hex(8), study=study.name, tests=tests, several=list(several), seconds=seconds,
                started=now(),
            )  # fmt: skip
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{grant.id}.yaml").write_text(source, encoding="utf-8")
            self._write([*grants, grant], frozen)
        return grant

    def settle(self, grant_id: str, used: float, exit_code: int) -> None:
        """Return what a grant has not used."""
        with self._lock():
            written, grants = self._read()
            settled = [
                grant.with_(used=min(used, grant.seconds), exit_code=exit_code, ended=now())
                if grant.id == grant_id else grant for grant in grants
            ]  # fmt: skip
            self._write(settled, written.get("yardstick"))

    def file(self, grant: Grant, suffix: str) -> Path:
        """The file of a grant: yaml, log or lock."""
        return self.folder / f"{grant.id}.{suffix}"


def _differing(plan: Plan, arm: str, against: str) -> list[str]:
    """Settings in which two arms differ, as dotted keys."""
    ours, theirs = (plan.arms[name].arm.changes for name in (arm, against))
    return [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]


def before_the_end(seconds: float) -> float:
    """When, within a grant of so many seconds, its process is asked to save and stop."""
    return seconds - min(GRACE_SECONDS, GRACE_SHARE * seconds)
