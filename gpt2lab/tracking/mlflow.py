"""MLflow: the tracker of a study or sweep, with one parent run for each and one child per gpt2lab run, found again by
their tags; and the runs of any experiment as rows for `compare`.

Only `MlflowClient` with explicit run ids is used: the fluent active run is per thread and leaves stray runs. Nothing is
imported from mlflow, which takes a second and more, and nothing connects before the first call, so that a wrong URI is
refused in an instant and a dead server costs the caller nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from gpt2lab.basics.redaction import shown
from gpt2lab.errors import ConfigError, EnvironmentFault, unknown
from gpt2lab.schema import flatten
from gpt2lab.store import RunFolder, Status, file_lock, fsync_folder, make_folder, read_json, temporary_beside
from gpt2lab.tracking import MetricPoint, RunGone, TrackedRun, milliseconds, started_ms, tracker
from gpt2lab.tracking.addresses import DATABASES, check_uri, is_server, mlflow_name, reason, sqlite_path, sqlite_uri
from gpt2lab.tracking.comparison import (
    BETWEEN,
    OTHER,
    ROLE,
    SEED,
    colour_of,
    contrast_note,
    contrast_numbers,
    contrast_table,
    shared_view,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

VALUE_LIMIT, TAG_LIMIT, PARAMS_PER_CALL = 6000, 5000, 100  # MLflow's own limits
DIGEST_LIMIT = 36
RUNS_PER_PAGE = 1000
NOTE, KIND = "mlflow.note.content", "mlflow.experimentKind"
TABLE = "verdicts.json"
STUDY, SWEEP = "tags.gpt2lab.study", "tags.gpt2lab.sweep"
RUN_STATUS: dict[Status, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "damaged": "FAILED",
    "partial": "KILLED",
    "absent": "KILLED",
}


@tracker.register("mlflow", source="mlflow.org")
class MlflowTracker:
    """MLflow at MLFLOW_TRACKING_URI, or in a database beside the runs."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        """uri: MLflow tracking URI; experiment: its name; artifact_root: folder for artifacts, unless a server keeps
        them. Raises ConfigError or EnvironmentFault for a URI that can never work; connects later."""
        check_uri(uri)
        self.uri, self.experiment = uri, experiment
        self.shown_uri = shown(uri)
        self.notes: list[str] = []
        self.experiment_id = ""
        self._statuses: dict[str, str] = {}
        self._artifact_root = artifact_root.resolve()
        self._client: MlflowClient | None = None
        database = sqlite_path(uri)
        if database:
            make_folder(database.parent)

    # --- finding or making the parent and its children ---

    def open_study(self, study: Mapping[str, Any]) -> TrackedRun:
        """The study's parent run. A deleted one is replaced, with a note."""
        client, kind, name = self._connect(anew=True), kind_of(study), study["name"]
        tags = {
            f"gpt2lab.{kind}": name,
            f"gpt2lab.{kind}_hash": study.get("hash"),
            "gpt2lab.scale": study.get("scale"),
            "gpt2lab.baseline": study.get("baseline"),
            NOTE: _about(study),
        }
        wanted = {f"gpt2lab.{kind}": name}
        run, deleted = self._find(wanted, _is_parent)
        if run is None:
            if deleted:
                self.notes.append(f"the MLflow run of {kind} {name} was deleted; a new one takes its place")
            tags |= {"mlflow.runName": name if kind == "study" else f"{kind} {name}", "gpt2lab.replaces": deleted}
            run = self._create(wanted, _is_parent, tags=self._all_tags(tags, study))
        else:
            if run.data.tags.get(NOTE, "").startswith(tags[NOTE].partition("\n\n")[0]):
                del tags[NOTE]  # it has the verdicts, too
            client.log_batch(run.info.run_id, tags=_as_tags(tags))
        self._set_up_pages(run.info.run_id, study)
        return self._tracked(run)

    def _set_up_pages(self, parent: str, study: Mapping[str, Any]) -> None:
        """The experiment opens as one of model training, and has the view that `runs_link` names."""
        client = self._connect()
        known = client.get_experiment(self.experiment_id).tags
        view = f"mlflow.sharedViewState.{parent}"
        for key, value in {KIND: "custom_model_development", view: shared_view(parent, study)}.items():
            if known.get(key) != value and (key != KIND or key not in known):
                client.set_experiment_tag(self.experiment_id, key, value)

    def open_run(self, study: Mapping[str, Any], parent: TrackedRun, arm: str, seed: str, run: RunFolder) -> TrackedRun:
        """The child of `parent` that mirrors `run`, with how far it is; taken over from a parent that was deleted."""
        client, kind, entry = self._connect(anew=True), kind_of(study), study["arms"][arm]
        started = started_ms(study, run)
        wanted = {"gpt2lab.run_id": run.id, f"gpt2lab.{kind}": study["name"]}

        def fits(other: Run) -> bool:
            return bool(other.data.tags.get("gpt2lab.arm") == arm[:TAG_LIMIT])

        child, deleted = self._find(wanted, fits)
        tags = {
            **wanted,
            "mlflow.parentRunId": parent.id,
            "mlflow.runName": arm if study.get("seeds") == 1 and kind == "sweep" else f"{arm} seed {seed}",
            "mlflow.runColor": colour_of(study, arm),
            "gpt2lab.arm": arm,
            "gpt2lab.seed": seed,
            ROLE: SEED if seed.isdecimal() else OTHER,
            "gpt2lab.replaces": deleted,
            **entry.get("tags", {}),
        }
        if child is None:
            if deleted:
                self.notes.append(f"the MLflow run of {arm} seed {seed} was deleted; its rows go to a new one")
            child = self._create(wanted, fits, start_time=started, tags=self._all_tags(tags, study))
        else:
            had = child.data.tags
            if missing := {
                k: v for k, v in tags.items() if k not in had or (v != had[k] and k == "mlflow.parentRunId")
            }:
                client.log_batch(child.info.run_id, tags=_as_tags(missing))
        if "gpt2lab.described" not in child.data.tags:
            self._describe(child, run, entry.get("params", {}), started)
        return self._tracked(child)

    def _tracked(self, run: Run) -> TrackedRun:
        self._statuses[run.info.run_id] = run.info.status
        return TrackedRun(run.info.run_id, run.data.metrics.get("tokens", -1.0), dict(run.data.tags))

    def _find(self, tags: Mapping[str, str], fits: Callable[[Run], bool]) -> tuple[Run | None, str | None]:
        """The living run with these tags, else None and the id of a deleted one. Of several, as a call makes whose
        answer was lost and which was made again, the first stays: the journals have all that the others hold."""
        from mlflow.entities import ViewType

        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = self._connect().search_runs([self.experiment_id], query, ViewType.ALL, max_results=1000)
        fitting = [run for run in runs if fits(run)]
        living = [run for run in fitting if run.info.lifecycle_stage == "active"]
        if living:
            first, *twins = sorted(living, key=lambda run: (run.info.start_time, run.info.run_id))
            for twin in twins:
                self._connect().delete_run(twin.info.run_id)
            return first, None
        return None, fitting[0].info.run_id if fitting else None

    def _create(self, wanted: Mapping[str, str], fits: Callable[[Run], bool], **options: Any) -> Run:
        """A new run, which `_find` finds by the tags `wanted`, or another process's if that was made first."""
        run = self._connect().create_run(self.experiment_id, **options)
        return self._find(wanted, fits)[0] or run

    def _describe(self, child: Run, run: RunFolder, settings: Mapping[str, Any], time_ms: int) -> None:
        """The settings that can change a weight as parameters, the data as a dataset, and the whole config as an
        artifact; can be repeated after a failure half-way. MLflow sorts by parameters as by text, so numbers that a
        trial was tried with are metrics, too."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        client, run_id = self._connect(), child.info.run_id
        config = yaml.load(run.config() or "{}", Loader=yaml.BaseLoader)  # every scalar as it is written
        identity = (run.identity() or {}).get("identity", {})
        params = [
            Param(mlflow_name(name), (value if isinstance(value, str) else json.dumps(value))[:VALUE_LIMIT])
            for name, value in flatten(_that_matter(config, identity.get("settings"))).items()
            if mlflow_name(name) not in child.data.params
        ]
        for at in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[at : at + PARAMS_PER_CALL])
        numbers = [
            Metric(mlflow_name(f"trial/{key}"), float(value), time_ms, 0)
            for key, value in settings.items()
            if isinstance(value, (int, float))
        ]
        if numbers:
            client.log_batch(run_id, metrics=numbers)
        if "data" in identity and "corpus" in config.get("data", {}):  # a damaged config costs this line only
            corpus, source = config["data"]["corpus"], json.dumps(config["data"])
            name = str(corpus["name"] if isinstance(corpus, Mapping) else corpus)
            dataset = Dataset(name, identity["data"][:DIGEST_LIMIT], "gpt2lab", source)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        if config:
            self._artifact(run_id, run.path / "config.yaml")
            client.set_tag(run_id, "gpt2lab.described", "true")

    def _artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        log = self._connect().log_artifacts if path.is_dir() else self._connect().log_artifact
        with self._noting_artifacts():
            log(run_id, str(path), folder)

    @contextlib.contextmanager
    def _noting_artifacts(self) -> Iterator[None]:
        """Artifacts are a convenience: where their store fails, metrics must still flow."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            self.notes.append(f"MLflow at {self.shown_uri} takes no artifacts: {reason(error)}")

    def _all_tags(self, tags: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, str]:
        """`tags` and those that MLflow's own fluent client would add, as strings within its limits."""
        usual = {
            "mlflow.user": _user(),
            "mlflow.source.name": "gpt2lab",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": study.get("stack", {}).get("git_commit"),
        }
        return {tag.key: tag.value for tag in _as_tags({**usual, **tags})}

    # --- sending ---

    def log(self, run: TrackedRun, points: Sequence[MetricPoint]) -> None:
        """One transaction. MLflow stores a point of equal name, step, time and value once, so that sending again is
        harmless. NaN stays NaN; MLflow turns infinities into the largest float, so a tag records them."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        tags: dict[str, str] = {}
        for point in points:
            for name, value in point.values.items():
                metrics.append(Metric(mlflow_name(name), value, point.time_ms, point.step))
                tag = mlflow_name(f"gpt2lab.nonfinite.{name}")
                if not math.isfinite(value) and tag not in run.tags:
                    tags.setdefault(tag, f"{value} first at step {point.step}")
        with self._raising_gone(run.id):
            self._connect().log_batch(run.id, metrics=metrics, tags=_as_tags(tags))
        run.tags |= tags

    def update(self, run: TrackedRun, status: Status, tags: Mapping[str, str], ended: str | None) -> None:
        """The status first: the tags are the sign that it is set, also after a crash in between."""
        client, wanted = self._connect(), RUN_STATUS[status]
        with self._raising_gone(run.id):
            if self._statuses.get(run.id) != wanted:
                if wanted == "RUNNING":
                    client.update_run(run.id, status=wanted)
                else:
                    client.set_terminated(run.id, wanted, end_time=milliseconds(ended))
                self._statuses[run.id] = wanted
            client.log_batch(run.id, tags=_as_tags(tags))

    def log_report(self, study: Mapping[str, Any], folder: Path) -> None:
        """Keep a finished report (a folder) with the parent run; of a study, its verdicts as numbers."""
        parent = self.open_study(study)
        if verdicts := read_json(folder / "verdicts.json"):
            self._log_contrasts(study, parent.id, verdicts["contrasts"])
        self._artifact(parent.id, folder, "report")  # last: the sign that the rest is there

    def _log_contrasts(self, study: Mapping[str, Any], parent: str, contrasts: Sequence[Mapping[str, Any]]) -> None:
        """What changed since the last time; a number that is no longer claimed becomes NaN, as MLflow deletes none."""
        from mlflow.entities import Metric

        client, time_ms = self._connect(), milliseconds(None)
        known = {k: v for k, v in client.get_run(parent).data.metrics.items() if BETWEEN in k}
        numbers = {mlflow_name(name): value for name, value in contrast_numbers(contrasts).items()}
        numbers |= {k: math.nan for k in known.keys() - numbers.keys() if not math.isnan(known[k])}
        changed = [Metric(k, v, time_ms, 0) for k, v in numbers.items() if known.get(k) != v]
        tags = {
            NOTE: _about(study, contrast_note(contrasts)),
            "mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}]),
        }
        client.log_batch(parent, changed, tags=_as_tags(tags))
        with self._noting_artifacts():
            client.log_dict(parent, contrast_table(contrasts), TABLE)

    def log_model(self, run: TrackedRun, weights: Path, loader: str, options: Mapping[str, Any]) -> str:
        """Keep a folder of weights as a model of a run; returns the address for `mlflow.pyfunc.load_model`.

        loader: the module whose `_load_pyfunc` reads the folder. options: what `predict` takes, with their defaults.
        Raises what mlflow raises.
        """
        client = self._connect()
        from mlflow.models import infer_signature
        from mlflow.pyfunc import save_model

        signature = infer_signature(["To be, or"], [" not to be"], params=dict(options))
        model = client.create_logged_model(self.experiment_id, "model", run.id)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*An input example was not provided")  # colours may come first
            place = Path(folder) / "model"
            save_model(
                place, loader_module=loader, data_path=str(weights), signature=signature,
                pip_requirements=[f"gpt2lab=={version('gpt2lab')}"],
            )  # fmt: skip
            client.log_model_artifacts(model.model_id, str(place))
        client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_uri)

    def held(self, parent: str, runs: Sequence[str]) -> tuple[int, ...] | None:
        """How many points and tags of these runs a database on this machine holds, and how many of them and of their
        parent are not deleted; quick, without importing MLflow. None where a server has to be asked, or the file cannot
        be read."""
        database, marks = sqlite_path(self.uri), ", ".join("?" * len(runs))
        if database is None:
            return None
        counted = [f"select count(*) from {table} where run_uuid in ({marks})" for table in ("metrics", "tags")]
        living = f"select count(*) from runs where run_uuid in ({marks}, ?) and lifecycle_stage = 'active'"
        try:
            with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                counts = [connection.execute(query, runs).fetchone()[0] for query in counted]
                return (*counts, connection.execute(living, [*runs, parent]).fetchone()[0])
        except sqlite3.Error:
            return None

    @contextlib.contextmanager
    def _raising_gone(self, run_id: str) -> Iterator[None]:
        """Raise RunGone where MLflow refuses because the run was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            refusals = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
            if error.error_code in refusals and self._deleted(run_id):
                raise RunGone(run_id) from error
            raise

    def _deleted(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._connect().get_run(run_id).info.lifecycle_stage != "active")
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")

    def _connect(self, anew: bool = False) -> MlflowClient:
        """The client, once the experiment is known, which is made if there is none. anew: look it up again: a server
        may come back with another one under the same id.

        Raises EnvironmentFault for an experiment that was deleted, and what mlflow raises.
        """
        if self._client is not None and not anew:
            return self._client
        prepare_environment()
        from mlflow.exceptions import MlflowException

        database, artifacts = sqlite_path(self.uri), self._artifact_root.as_uri()
        if database:
            create_database(database, self._artifact_root)
        # a client makes the tables of a database, which two at a time cannot
        alone = is_server(self.uri) or database or self._client
        with contextlib.nullcontext() if alone else file_lock(self._artifact_root / ".tables.lock"):
            client = self._client or client_of(self.uri)
        known = client.get_experiment_by_name(self.experiment)
        if known is None:
            # Without an absolute place, artifacts would follow the working directory; a server has its own.
            keeps_artifacts = urlsplit(self.uri).scheme.partition("+")[0] in DATABASES
            try:
                client.create_experiment(self.experiment, artifacts if keeps_artifacts else None)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                    raise
            known = client.get_experiment_by_name(self.experiment)
        assert known is not None
        if known.lifecycle_stage != "active":
            what = f"the MLflow experiment '{self.experiment}' was deleted"
            raise EnvironmentFault(what, where=self.shown_uri, hint=_restore(known))
        if database and database.parent == self._artifact_root.parent and known.artifact_location != artifacts:
            _move_artifacts(database, known.experiment_id, known.artifact_location, artifacts)
        self._client, self.experiment_id = client, known.experiment_id
        return client


def _restore(experiment: Experiment) -> str:
    return f"mlflow experiments restore --experiment-id {experiment.experiment_id}"


def _is_parent(run: Run) -> bool:
    return "gpt2lab.arm" not in run.data.tags


def kind_of(study: Mapping[str, Any]) -> str:
    """`study` or `sweep`, which may share a name and an experiment."""
    return str(study.get("kind", "study"))


def _about(study: Mapping[str, Any], verdicts: str = "") -> str:
    """The description of a parent run."""
    parts = (study.get("question", ""), verdicts, f"`{study.get('reproduce', '')}`")
    return "\n\n".join(part for part in parts if part)


def _that_matter(config: Mapping[str, Any], identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config without what a run's identity leaves out because it cannot change a weight, and without what is not
    set; all of it where there is no identity. The data stays: the identity has only its fingerprint."""
    if identity is None:
        return dict(config)
    matter = {**identity, "seed": {}, "data": config.get("data", {})}
    sections = {section: config[section] for section in config if section in matter}
    return {
        section: {key: value for key, value in part.items() if key in matter[section] and value not in ([], "null")}
        if isinstance(part, Mapping)
        else part
        for section, part in sections.items()
    }


def _as_tags(tags: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(mlflow_name(key), str(value)[:TAG_LIMIT]) for key, value in tags.items() if value is not None]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        return None


# --- opening ---


def prepare_environment() -> None:
    """Settings that mlflow reads from the environment; a user's own values win."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # on by default, and read at import
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default keeps a call to a dead server waiting for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm, in a notebook without ipywidgets
    for name in ("alembic", "mlflow.store", "psycopg"):  # they print errors that they raise, too
        logging.getLogger(name).setLevel(logging.CRITICAL)


def client_of(uri: str) -> MlflowClient:
    """MLflow's client, which gives up on a database that is out of reach at the first attempt: its own ten take 100
    seconds without a word, and our callers repeat their calls."""
    from mlflow import MlflowClient

    if not is_server(uri):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 1
        _leave_folders_alone()
    return MlflowClient(uri)


def _leave_folders_alone() -> None:
    """MLflow would make the folders of a database by the quoted path in its URI. The folder is there already."""
    import mlflow.store.db.utils

    mlflow.store.db.utils._make_parent_dirs_if_sqlite = lambda db_uri: None


def create_database(path: Path, artifact_root: Path) -> None:
    """Make a complete MLflow database, once: several processes that open a missing file at the same time break it, and
    so does a kill half-way. Built at a temporary name under a lock, then renamed."""
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):
        for half in path.parent.glob(f".{path.name}.*.partial*"):  # others write in this folder, so no more than that
            half.unlink()
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = temporary_beside(path)
        _leave_folders_alone()
        SqlAlchemyStore(sqlite_uri(temporary), str(artifact_root)).engine.dispose()  # type: ignore[no-untyped-call]
        connection = sqlite3.connect(temporary)
        connection.execute("pragma journal_mode=WAL")
        connection.close()  # the last to close folds the write-ahead log back in: one file is the whole database
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def artifacts_elsewhere(database: Path, artifact_root: Path) -> list[str]:
    """Where a database that lies beside its artifacts still looks for them, because the folder of both was moved or
    copied; `MlflowTracker` mends that for an experiment. Raises EnvironmentFault for a file that is no database."""
    if not database.is_file() or database.resolve().parent != artifact_root.resolve().parent:
        return []
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            query = "select distinct artifact_location from experiments where artifact_location like 'file:%'"
            places = [str(place) for (place,) in connection.execute(query)]
    except sqlite3.Error as error:
        raise EnvironmentFault(f"MLflow cannot be read: {error}", where=str(database)) from None
    return [place for place in places if place != artifact_root.resolve().as_uri()]


def _move_artifacts(database: Path, experiment_id: str, old: str, new: str) -> None:
    """Give an experiment and its runs a new place for artifacts: the run store that holds both was moved or copied.
    MLflow itself keeps the first place for ever."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        connection.execute(
            "update runs set artifact_uri = ? || substr(artifact_uri, ?)"
            " where experiment_id = ? and (artifact_uri = ? or substr(artifact_uri, 1, ?) = ?)",
            (new, len(old) + 1, experiment_id, old, len(old) + 1, f"{old}/"),
        )
        connection.execute("update experiments set artifact_location = ? where experiment_id = ?", (new, experiment_id))


# --- reading ---


def read_experiment(name: str, uri: str) -> list[dict[str, Any]]:
    """One row for each run that is not deleted, with the column names of `mlflow.search_runs`.

    Unlike in its table, a metric, parameter or tag that a run lacks is absent, so that a metric that was logged as NaN
    differs from one that was never logged.

    name: an experiment; or one of our studies, as posenc@nano, when no experiment is called so.
    Raises ConfigError for an unknown name, an experiment without runs or one with several studies, EnvironmentFault
    for a tracking server or database that cannot be read.
    """
    check_uri(uri)
    where, database = shown(uri), sqlite_path(uri)
    if database and not database.exists():
        raise ConfigError("there is no such MLflow database", where=where, hint="--tracking-uri URI")
    prepare_environment()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = client_of(uri)
        experiment, study = _find(client, name, where)
        rows = [_row(run) for run in _runs(client, experiment.experiment_id)]
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise EnvironmentFault(f"MLflow cannot be read: {reason(error)}", where=where) from None
    return _of_one_study(rows, study, f"MLflow experiment '{experiment.name}'")


def _find(client: MlflowClient, name: str, where: str) -> tuple[Experiment, str | None]:
    """(experiment, the study in it that is meant)."""
    ablation = name.rpartition("@")[0]
    for wanted, study in ((name, None), (ablation, name)):
        experiment = client.get_experiment_by_name(wanted) if wanted else None
        if experiment is None:
            continue
        if experiment.lifecycle_stage != "active":
            what = f"the MLflow experiment '{wanted}' was deleted"
            raise ConfigError(what, where=where, hint=_restore(experiment))
        return experiment, study
    known = [other.name for other in client.search_experiments()]
    raise ConfigError(unknown("MLflow experiment", name, known), where=where)


def _runs(client: MlflowClient, experiment_id: str) -> Iterator[Run]:
    token = None
    while token != "":
        page = client.search_runs([experiment_id], max_results=RUNS_PER_PAGE, page_token=token)
        yield from page
        token = page.token or ""


def _row(run: Run) -> dict[str, Any]:
    info = {name: getattr(run.info, name) for name in ("run_id", "status", "start_time")}
    for kind in ("metrics", "params", "tags"):
        info |= {f"{kind}.{key}": value for key, value in getattr(run.data, kind).items()}
    return info


def _of_one_study(rows: list[dict[str, Any]], study: str | None, where: str) -> list[dict[str, Any]]:
    """The rows of the study of that name, or of the only one; all rows where there is no study. Trials of sweeps in the
    same experiment are not arms and left out."""
    trials, rows = len(rows), [row for row in rows if SWEEP not in row]
    if trials and not rows:
        raise ConfigError("it holds only sweeps, whose trials are not arms", where=where, hint="gpt2lab report NAME")
    studies = sorted({row[STUDY] for row in rows if STUDY in row})
    if not rows:
        raise ConfigError("there are no runs in it", where=where)
    if study is None and len(studies) > 1:
        raise ConfigError(f"it holds several studies: {', '.join(studies)}", where=where, hint=f"mlflow:{studies[0]}")
    if study is not None and study not in studies:
        raise ConfigError(unknown("study", study, studies), where=where)
    return rows if study is None else [row for row in rows if row.get(STUDY) == study]
