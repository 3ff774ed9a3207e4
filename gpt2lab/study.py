"""Drives one ablation: declares it, submits its runs, follows them to the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.display import Display, RunView
from gpt2lab.executors.local import Ending, LocalExecutor
from gpt2lab.planning.bracket import Bracket
from gpt2lab.planning.history import with_history
from gpt2lab.planning.machine import gpus_of
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.record import study_record
from gpt2lab.planning.runs import Run, is_finished, tokens_of
from gpt2lab.results import judge
from gpt2lab.reuse.why import keep_sources
from gpt2lab.runner import Job
from gpt2lab.runner.job import job_for
from gpt2lab.store import Store
from gpt2lab.tracking import Tracker as Mirror
from gpt2lab.tracking.follower import Follower


@dataclass(frozen=True)
class Outcome:
    """The study's record, the runs that were trained now and how they ended, and how many were found finished."""

    record: dict[str, Any]
    endings: dict[str, Ending]
    found: int

    @property
    def failed(self) -> list[str]:
        """Ids of runs that did not end as they should."""
        return [run for run, ending in self.endings.items() if ending not in ("done", "found")]


def job_of(run: Run, store: Store, plan: Plan) -> Job:
    """The run as a worker receives it. The first seed of each arm can be replayed later, by other code."""
    own = plan.arms[run.arm].runs
    return job_for(
        run,
        store,
        plan.data,
        flops_per_token=plan.arms[run.arm].costs.flops_per_token,
        threads=plan.machine.threads,
        replayable=bool(own) and run.id == own[0].id,
    )


def more_seeds(record: Mapping[str, Any], store: Store, plan: Plan) -> dict[str, int] | None:
    """Seeds that each arm needs at the next declared look: all of an arm in a contrast that is still open; None when
    no contrast is, or no look is left. Of looks that were declared too late all seeds are due at once."""
    looks = plan.ablation.looks
    if not looks or plan.look is None or plan.look >= looks[-1]:
        return None
    if record["history"]["looks"] != list(looks):
        return dict.fromkeys(plan.arms, looks[-1])
    open_arms = {name for c in judge(record, store).contrasts if not c.settled for name in c.weights}
    if not open_arms:
        return None
    coming = looks[looks.index(plan.look) + 1]
    return {name: coming if name in open_arms else len(arm.runs) for name, arm in plan.arms.items()}


def run_study(
    planned: Callable[[Mapping[str, int] | None], Plan],
    store: Store,
    *,
    display: Display,
    reproduce: str,
    mirror: Callable[[], Mirror] | None,
) -> Outcome:
    """Write the study's record, train what is not finished, and follow it; stage by stage: first the settings of each
    arm, then the runs at those that were found, then the seeds of the next look.

    planned: makes the plan anew from what is finished, for as many seeds of each arm as are due. A failed run leaves
    the others alone; it is in the record of its folder and is tried again the next time. Raises Preempted when stopped,
    with everything saved.
    """
    due: dict[str, int] | None = None
    endings: dict[str, Ending] = {}
    found: set[str] = set()
    searched = False
    while True:
        plan = planned(due)
        record = with_history(study_record(plan, reproduce=reproduce), store)
        store.write_study(record)
        keep_sources((arm.arm.config for arm in plan.arms.values()), store)
        if plan.searches and not searched:  # once: what then is open still has been given up
            _search(plan, store, display, mirror, reproduce)
            searched = True
            continue
        runs = plan.runs()
        todo = [run for run in runs if not is_finished(run, store)]
        found |= {run.id for run in runs} - {run.id for run in todo} - endings.keys()
        with display:
            endings |= _train(runs, todo, plan, record, store, display, mirror)
        stuck = any(endings.get(run.id, "done") not in ("done", "found") for run in runs)
        if plan.tuning and not plan.searches and not stuck:
            continue
        due = None if stuck or plan.tuning else more_seeds(record, store, plan)
        if due is None:
            meanwhile = [run for run, ending in endings.items() if ending == "found"]
            own: dict[str, Ending] = {run: how for run, how in endings.items() if how != "found"}
            return Outcome(record, own, len(found) + len(meanwhile))


def _search(plan: Plan, store: Store, display: Display, mirror: Callable[[], Mirror] | None, reproduce: str) -> None:
    """Drive the searches of all arms to their end, side by side."""
    from gpt2lab.sweep.record import head
    from gpt2lab.sweep.searching import run_searches  # Optuna takes a second to load, and few studies need it

    ablation, baseline = plan.ablation, plan.baseline
    assert ablation.tune is not None
    of_all = head(
        sweep=ablation.name, scale=ablation.scale, part_of=f"{ablation.name}@{ablation.scale}",
        question=f"Which settings suit each arm best? {ablation.question}", settings=ablation.tune,
        config=baseline.arm.config, costs=baseline.costs, data=plan.data, machine=plan.machine, floor=plan.floor,
        smallest_effect=ablation.smallest_effect, reproduce=reproduce,
    )  # fmt: skip
    run_searches(plan.searches, of_all, store, display=display, mirror=mirror)


def _train(
    runs: Sequence[Run], todo: Sequence[Run], plan: Plan, record: dict[str, Any], store: Store, display: Display,
    mirror: Callable[[], Mirror] | None,
) -> dict[str, Ending]:  # fmt: skip
    """One stage of a study: run what is to be done, and follow all of it."""
    views = [RunView(run.arm, label(run, plan), run.id, run.config.training.steps) for run in runs]
    by_id = {view.run_id: view for view in views}
    follower = Follower(store, record, mirror, display.say)

    def tick() -> None:
        for news in follower.poll():
            if news.run_id in by_id:
                by_id[news.run_id].take(news.rows)
        for view in views:
            if view.status not in ("finished", "diverged"):
                status = store.run(view.run_id).status()
                view.status = "waiting" if status in ("absent", "partial") else status
        display.show(views)

    gpus = gpus_of(plan.machine)
    try:
        tick()
        by_run = {run.id: run for run in todo}
        executor = LocalExecutor(plan.machine.jobs, tick, gpus, lambda run_id: is_finished(by_run[run_id], store))
        endings = executor.run([job_of(run, store, plan) for run in longest_first(todo, plan)])
        tick()
        return endings
    finally:
        follower.close(timeout=30.0)


def longest_first(runs: Sequence[Run], plan: Plan) -> list[Run]:
    """The order to start them in: seed by seed as they come, but within one the costliest first, so that no long run
    is begun last and trains on beside idle cores."""
    turns, seconds = dict[str, int](), dict[str, float]()
    for arm in plan.arms.values():
        for turn, run in enumerate(arm.all_runs()):
            turns.setdefault(run.id, turn)
            seconds[run.id] = arm.seconds * tokens_of(run.config) / arm.tokens
    return sorted(runs, key=lambda run: (turns[run.id], -seconds[run.id]))


def label(run: Run, plan: Plan) -> str:
    """What tells a run from the others of its arm: its seed, with the rate or budget that is tried, or that it has the
    settings as written."""
    arm = plan.arms[run.arm]
    if plan.tuning and isinstance(arm.tuning, Bracket):
        factor = next((f for f, trial in arm.tuning.trials.items() if trial.id == run.id), 1.0)
        return f"{run.seed} lr x{factor:g}"
    if run.id not in {one.id for one in arm.runs} and run.id in {one.id for one in arm.shared}:
        return f"{run.seed} as written"
    budget = next((b for b, runs in arm.curve.items() if run.id in {r.id for r in runs}), 1.0)
    return str(run.seed) if budget == 1 else f"{run.seed} {budget:g}x"
