"""The MLflow mirror of a study or sweep: one parent run for each, one child per gpt2lab run, found again by their tags.

Only `MlflowClient` with explicit run ids is used: the fluent active run is per thread and leaves stray runs. Nothing is
imported from mlflow and nothing connects before the first call, so that a wrong URI is refused in an instant and a dead
server costs the caller nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gpt2lab.schema import flatten
from gpt2lab.store import (
    Row,
    RunFolder,
    Status,
    make_folder,
)
from gpt2lab.tracking import masked
from gpt2lab.tracking.addresses import check_uri, mlflow_name, reason, sqlite_path
from gpt2lab.tracking.connection import connect
from gpt2lab.tracking.mirror import Copy, CopyGone

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

VALUE_LIMIT, TAG_LIMIT, PARAMS_PER_CALL = 6000, 5000, 100  # MLflow's own limits
HEARTBEAT_SECONDS = 30.0
RUN_STATUS: dict[Status, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "partial": "KILLED",
    "absent": "KILLED",
}


def study_status(statuses: Sequence[Status], over: bool) -> str:
    """MLflow's status of the parent. An arm that diverged is an answer: it does not fail the study."""
    unfinished = {"partial", "absent"} & set(statuses)
    if "running" in statuses or (unfinished and not over):
        return "RUNNING"
    if unfinished:
        return "KILLED"
    return "FAILED" if "failed" in statuses else "FINISHED"


def kind_of(record: Mapping[str, Any]) -> str:
    """`study` or `sweep`, which may share a name and an experiment."""
    return str(record.get("kind", "study"))


class MlflowSink:
    """Writes one study or sweep at a time to MLflow. Not thread-safe: one thread, the follower's sender, uses it."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        """uri: MLflow tracking URI; experiment: its name; artifact_root: folder for artifacts, unless a server keeps
        them. Raises ConfigError or EnvironmentFault for a URI that can never work; connects later."""
        check_uri(uri)
        self.uri, self.experiment = uri, experiment
        self.shown_uri = masked(uri)
        self.notes: list[str] = []
        self.experiment_id = ""
        self._parent_status = ""
        self._artifact_root = artifact_root.resolve()
        self._client: MlflowClient | None = None
        database = sqlite_path(uri)
        if database:
            make_folder(database.parent)

    # --- finding or making the parent and its children ---

    def open_study(self, record: Mapping[str, Any]) -> str:
        """The id of the study's parent run, found by its tag or made. A deleted one is replaced, with a note."""
        client, kind = self._connect(), kind_of(record)
        tags = {
            f"gpt2lab.{kind}": record["name"],
            f"gpt2lab.{kind}_hash": record.get("hash"),
            "gpt2lab.scale": record.get("scale"),
            "gpt2lab.baseline": record.get("baseline"),
            "mlflow.note.content": f"{record.get('question', '')}\n\n`{record.get('reproduce', '')}`",
        }
        found, deleted = self._find({f"gpt2lab.{kind}": record["name"]}, lambda run: "gpt2lab.arm" not in run.data.tags)
        if found is None:
            if deleted:
                self.notes.append(f"the MLflow run of {kind} {record['name']} was deleted; a new one takes its place")
            name = record["name"] if kind == "study" else f"{kind} {record['name']}"
            tags |= {"mlflow.runName": name, "gpt2lab.replaces": deleted}
            found = client.create_run(self.experiment_id, tags=self._tags(tags, record))
        else:
            client.log_batch(found.info.run_id, tags=_as_tags(tags))
        self._parent_status = found.info.status
        return str(found.info.run_id)

    def open_run(self, record: Mapping[str, Any], parent: str, arm: str, seed: str, run: RunFolder) -> Copy:
        """The child of `parent` that mirrors `run`, found by its tags or made; says how far it got."""
        client, kind, one = self._connect(), kind_of(record), record["arms"][arm]
        identity = run.identity() or {}
        started_ms = _milliseconds(identity.get("created") or record.get("created"))
        wanted = {"gpt2lab.run_id": run.id, "mlflow.parentRunId": parent}
        found, deleted = self._find(wanted, lambda other: other.data.tags.get("gpt2lab.arm") == arm[:TAG_LIMIT])
        if found is None:
            if deleted:
                self.notes.append(f"the MLflow run of {arm} seed {seed} was deleted; its rows go to a new one")
            tags = {
                **wanted,
                "mlflow.runName": arm if record.get("seeds") == 1 and kind == "sweep" else f"{arm} seed {seed}",
                f"gpt2lab.{kind}": record["name"],
                "gpt2lab.arm": arm,
                "gpt2lab.seed": seed,
                "gpt2lab.repeat": identity.get("repeat", 0),
                "gpt2lab.replaces": deleted,
            }
            tags |= {f"component.{slot}": name for slot, name in one.get("components", {}).items()}
            tags |= one.get("tags", {})
            found = client.create_run(self.experiment_id, start_time=started_ms, tags=self._tags(tags, record))
        if "gpt2lab.described" not in found.data.tags:
            self._describe(found, run, one.get("params", {}), started_ms)
        return Copy(
            id=found.info.run_id,
            started_ms=started_ms,
            tokens=found.data.metrics.get("tokens", -1.0),
            status=found.info.status,
            sent={key for key in found.data.tags if key.startswith("gpt2lab.nonfinite.")},
            marks=dict(found.data.tags),
        )

    def _find(self, tags: Mapping[str, str], fits: Any) -> tuple[Run | None, str | None]:
        """The living run with these tags, else None and the id of a deleted one."""
        from mlflow.entities import ViewType

        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = self._connect().search_runs([self.experiment_id], query, ViewType.ALL, max_results=1000)
        fitting = [run for run in runs if fits(run)]
        living = [run for run in fitting if run.info.lifecycle_stage == "active"]
        if living:
            return min(living, key=lambda run: run.info.start_time), None
        return None, fitting[0].info.run_id if fitting else None

    def _describe(self, found: Run, run: RunFolder, settings: Mapping[str, Any], time_ms: int) -> None:
        """Resolved config as parameters and artifact, and what a trial was tried with; can be repeated after a failure
        half-way. MLflow sorts by parameters as by text, so numbers that are tried are metrics, too."""
        from mlflow.entities import Metric, Param

        client, run_id = self._connect(), found.info.run_id
        config = flatten(yaml.load(run.config() or "{}", Loader=yaml.BaseLoader))  # every scalar as it is written
        params = [
            Param(mlflow_name(name), (value if isinstance(value, str) else json.dumps(value))[:VALUE_LIMIT])
            for name, value in config.items()
            if mlflow_name(name) not in found.data.params
        ]
        for at in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[at : at + PARAMS_PER_CALL])
        numbers = {mlflow_name(f"trial/{key}"): one for key, one in settings.items() if isinstance(one, (int, float))}
        if numbers:
            client.log_batch(run_id, [Metric(key, float(one), time_ms, 0) for key, one in numbers.items()])
        words = {f"trial.{key}": one for key, one in settings.items() if isinstance(one, str)}
        if words:
            client.log_batch(run_id, tags=_as_tags(words))
        if config:
            self._artifact(run_id, run.path / "config.yaml")
            client.set_tag(run_id, "gpt2lab.described", "true")

    def _artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Artifacts are a convenience: where their store fails, metrics must still flow."""
        from mlflow.exceptions import MlflowException

        try:
            log = self._connect().log_artifacts if path.is_dir() else self._connect().log_artifact
            log(run_id, str(path), folder)
        except (MlflowException, OSError) as error:
            note = f"MLflow at {self.shown_uri} takes no artifacts: {reason(error)}"
            if note not in self.notes:
                self.notes.append(note)

    def _tags(self, tags: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
        """`tags` and those that MLflow's own fluent client would add, as strings within its limits."""
        own = {
            "mlflow.user": _user(),
            "mlflow.source.name": "gpt2lab",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": record.get("stack", {}).get("git_commit"),
        }
        return {tag.key: tag.value for tag in _as_tags({**own, **tags})}

    # --- sending ---

    def send(self, copy: Copy, rows: Sequence[Row]) -> None:
        """Rows in order of step, at most 1,000 metrics in all, as one transaction: all of them arrive, or none.

        The time of a point is the run's start plus the row's training seconds, never the time of sending: MLflow stores
        a point of equal name, step, time and value once, so that sending again is harmless. NaN stays NaN; MLflow turns
        infinities into the largest float, and a tag tells. Raises CopyGone when the run was deleted.
        """
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        odd: dict[str, str] = {}
        for row in rows:
            time_ms = copy.started_ms + round(row["seconds"] * 1000)
            metrics.append(Metric("tokens", float(row["tokens"]), time_ms, row["step"]))
            for name, value in row["metrics"].items():
                metrics.append(Metric(mlflow_name(name), float(value), time_ms, row["step"]))
                tag = mlflow_name(f"gpt2lab.nonfinite.{name}")
                if not math.isfinite(value) and tag not in copy.sent:
                    odd.setdefault(tag, f"{value} first at step {row['step']}")
        self._log(copy, metrics, odd)
        copy.sent |= odd.keys()
        copy.tokens = rows[-1]["tokens"] if rows else copy.tokens

    def settle(self, copy: Copy, status: Status, run: RunFolder, evaluation_key: str | None) -> None:
        """Bring status, heartbeat and final numbers in line with the run folder; cheap when nothing changed."""
        wanted = RUN_STATUS[status]
        if wanted == "RUNNING" and time.monotonic() - copy.beat > HEARTBEAT_SECONDS:
            holder = run.holder()
            beat = {"gpt2lab.heartbeat": datetime.now().astimezone().isoformat(timespec="seconds")}
            self._log(copy, [], {**beat, "gpt2lab.host": holder.get("host"), "gpt2lab.pid": holder.get("pid")})
            copy.beat = time.monotonic()
        result = run.result() if status in ("finished", "diverged") else None
        if result:
            self._log_final(copy, result, run.evaluation(evaluation_key) if evaluation_key else None)
            self._log_late(copy, result, run)
        if copy.status == wanted:
            return
        record = result or run.failure() or {}
        self._log(copy, [], {"gpt2lab.status": status, "gpt2lab.reason": record.get("reason")})
        self._set_status(copy.id, wanted, record.get("finished_at") or record.get("at"))
        copy.status = wanted

    def mark(self, copy: Copy, tags: Mapping[str, str]) -> None:
        """Let the copy have these tags; cheap when it has them."""
        new = {key: tag for key, tag in tags.items() if copy.marks.get(key) != tag[:TAG_LIMIT]}
        if new:
            self._log(copy, [], new)
            copy.marks |= {key: tag[:TAG_LIMIT] for key, tag in new.items()}

    def _log_final(self, copy: Copy, result: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
        """The numbers that belong to the whole run, each group once, at its last step and end time."""
        from mlflow.entities import Metric

        numbers_of_all = ("tokens_per_second", "mfu", "peak_memory_bytes", "seconds")
        groups = {"result": {name: result.get(name) for name in numbers_of_all}}
        if evaluation:
            contexts = {f"context_{length}": loss for length, loss in evaluation.get("contexts", {}).items()}
            named = {**evaluation.get("metrics", {}), **contexts}
            # the UI sorts sections by name: what has one point only comes after the curves
            groups["evaluation"] = {f"val-final/{name.removeprefix('val/')}": value for name, value in named.items()}
        time_ms, step = _milliseconds(result.get("finished_at")), int(result.get("steps", 0))
        for group, numbers in groups.items():
            if group not in copy.sent:
                known = {mlflow_name(name): float(value) for name, value in numbers.items() if value is not None}
                self._log(copy, [Metric(name, value, time_ms, step) for name, value in known.items()], {})
                copy.sent.add(group)

    def _log_late(self, copy: Copy, result: Mapping[str, Any], run: RunFolder) -> None:
        """What was measured of a finished run afterwards, at its last step and the time of measuring; so what was
        measured again after an edit is the newer point, and sending again is harmless."""
        from mlflow.entities import Metric

        step = int(result.get("steps", 0))
        for key in run.evaluation_keys():
            if f"late:{key}" in copy.sent:
                continue
            found = run.evaluation(key) or {}
            if "values" in found and "measured_at" in found:
                time_ms = _milliseconds(found["measured_at"])
                named = {mlflow_name(f"val-measured/{name}"): float(one) for name, one in found["values"].items()}
                self._log(copy, [Metric(name, one, time_ms, step) for name, one in named.items()], {})
            copy.sent.add(f"late:{key}")

    def _log(self, copy: Copy, metrics: Sequence[Metric], tags: Mapping[str, Any]) -> None:
        client = self._connect()
        with self._telling_gone(copy.id):
            if tags:
                client.log_batch(copy.id, tags=_as_tags(tags))
            if metrics:
                client.log_batch(copy.id, metrics=metrics)

    @contextlib.contextmanager
    def _telling_gone(self, run_id: str) -> Iterator[None]:
        """Turn MLflow's complaint into CopyGone where a deleted run is its cause."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if self._gone(run_id, error):
                raise CopyGone(run_id) from error
            raise

    def _gone(self, run_id: str, error: Any) -> bool:
        from mlflow.exceptions import MlflowException

        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
            return False
        try:
            return bool(self._connect().get_run(run_id).info.lifecycle_stage != "active")
        except MlflowException as second:
            return bool(second.error_code == "RESOURCE_DOES_NOT_EXIST")

    def settle_study(self, parent: str, statuses: Sequence[Status], over: bool) -> None:
        """Give the parent the status that follows from its runs, when it has another one."""
        wanted = study_status(statuses, over)
        if self._parent_status != wanted:
            with self._telling_gone(parent):
                self._set_status(parent, wanted, None)
            self._parent_status = wanted

    def log_report(self, record: Mapping[str, Any], folder: Path) -> None:
        """Keep a finished report (a folder) with the parent run."""
        self._artifact(self.open_study(record), folder, "report")

    def _set_status(self, run_id: str, status: str, at: str | None) -> None:
        client = self._connect()
        if status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, status, end_time=_milliseconds(at))

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client, self.experiment_id = connect(self.uri, self.shown_uri, self.experiment, self._artifact_root)
        return self._client


def _as_tags(tags: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(mlflow_name(key), str(value)[:TAG_LIMIT]) for key, value in tags.items() if value is not None]


def _milliseconds(moment: str | None) -> int:
    at = datetime.fromisoformat(moment) if moment else datetime.now().astimezone()
    return round(at.timestamp() * 1000)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        return None
