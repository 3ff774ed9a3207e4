"""Drives one ablation: declares it, submits its runs, follows them to the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2lab.display import Display, RunView
from gpt2lab.evaluation import evaluation_key
from gpt2lab.executors.local import Ending, LocalExecutor
from gpt2lab.plan import Plan, Run, study_record
from gpt2lab.registry import PLUGINS
from gpt2lab.runner import Job
from gpt2lab.store import Store
from gpt2lab.tracking.follower import Follower
from gpt2lab.tracking.mirror import Mirror


@dataclass(frozen=True)
class Outcome:
    """The study's record, the runs that were trained now and how they ended, and how many were found finished."""

    record: dict[str, Any]
    endings: dict[str, Ending]
    found: int

    @property
    def failed(self) -> list[str]:
        """Ids of runs that did not end as they should."""
        return [run for run, ending in self.endings.items() if ending != "done"]


def is_finished(run: Run, store: Store) -> bool:
    """Whether nothing is left to do: trained, and evaluated as this study wants it."""
    folder = store.run(run.id)
    result = folder.result()
    if result is None:
        return False
    key = evaluation_key(run.config.evaluation.spec(run.config.model.block_size))
    return result["status"] == "diverged" or folder.evaluation(key) is not None


def job_of(run: Run, store: Store, plan: Plan) -> Job:
    """The run as a worker receives it."""
    return Job(
        root=str(store.root.resolve()),
        run_id=run.id,
        config=run.config.to_yaml(),
        identity=run.identity,
        data=str(plan.data.path),
        flops_per_token=plan.arms[run.arm].costs.flops_per_token,
        threads=plan.machine.threads,
        plugins=tuple(PLUGINS),
    )


def with_history(record: dict[str, Any], store: Store) -> dict[str, Any]:
    """The record, knowing what was declared under this name before: whoever reads the report must be able to see that
    arms or seeds were chosen after a look. The same declaration again keeps its date."""
    if record["name"] not in store.studies():
        return {**record, "earlier": []}
    before = store.study(record["name"])
    earlier = before.get("earlier", [])
    if before["hash"] == record["hash"]:
        return {**record, "created": before["created"], "earlier": earlier}
    kept = {"hash": before["hash"], "created": before["created"], "reproduce": before["reproduce"]}
    return {**record, "earlier": [*earlier, kept | {"arms": list(before["arms"]), "seeds": before["seeds"]}]}


def run_study(
    plan: Plan,
    store: Store,
    *,
    display: Display,
    reproduce: str,
    mirror: Callable[[], Mirror] | None,
) -> Outcome:
    """Write the study's record, train what is not finished, and follow it.

    A failed run leaves the others alone; it is in the record of its folder and is tried again the next time. Raises
    Preempted when stopped, with everything saved.
    """
    record = with_history(study_record(plan, reproduce=reproduce), store)
    store.write_study(record)
    runs = list({run.id: run for run in plan.runs()}.values())
    todo = [run for run in runs if not is_finished(run, store)]
    views = [RunView(run.arm, str(run.seed), run.id, run.config.training.steps) for run in runs]
    by_id = {view.run_id: view for view in views}
    follower = Follower(store, record, mirror, display.say)

    def tick() -> None:
        for news in follower.poll():
            by_id[news.run_id].take(news.rows)
        for view in views:
            if view.status not in ("finished", "diverged"):
                status = store.run(view.run_id).status()
                view.status = "waiting" if status in ("absent", "partial") else status
        display.show(views)

    gpus = plan.machine.jobs if plan.machine.device == "cuda" else 0
    executor = LocalExecutor(plan.machine.jobs, tick, gpus)
    try:
        with display:
            tick()
            endings = executor.run([job_of(run, store, plan) for run in todo])
            tick()
    finally:
        follower.close(timeout=30.0)
    return Outcome(record, endings, len(runs) - len(todo))
