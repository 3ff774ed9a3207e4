"""Read the runs of any MLflow experiment, our own or anybody's, as rows for `compare`.

Nothing here writes: a database that is not there is not made. As in mlflow.py, nothing is imported from mlflow before
the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import ConfigError, EnvironmentFault, unknown
from gpt2lab.tracking import masked
from gpt2lab.tracking.addresses import check_uri, reason, sqlite_path
from gpt2lab.tracking.connection import prepare_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

STUDY, SWEEP = "tags.gpt2lab.study", "tags.gpt2lab.sweep"
RUNS_PER_PAGE = 1000


def read_experiment(name: str, uri: str) -> list[dict[str, Any]]:
    """One row for each run that is not deleted, with the column names of `mlflow.search_runs`.

    Unlike in its table, a metric, parameter or tag that a run lacks is absent, so that a metric that was logged as NaN
    differs from one that was never logged.

    name: an experiment; or one of our studies, as posenc@nano, when no experiment is called so.
    Raises ConfigError for an unknown name, an experiment without runs or one with several studies, EnvironmentFault
    for a tracking server or database that cannot be read.
    """
    check_uri(uri)
    where, database = masked(uri), sqlite_path(uri)
    if database and not database.exists():
        raise ConfigError("there is no such MLflow database", where=where, hint="--tracking-uri URI")
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(uri)
        experiment, study = _find(client, name, where)
        rows = [_row(run) for run in _runs(client, experiment.experiment_id)]
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise EnvironmentFault(f"MLflow cannot be read: {reason(error)}", where=where) from None
    return _of_one_study(rows, study, f"MLflow experiment '{experiment.name}'")


def _find(client: MlflowClient, name: str, where: str) -> tuple[Experiment, str | None]:
    """(experiment, the study in it that is meant)."""
    ablation = name.rpartition("@")[0]
    for asked, study in ((name, None), (ablation, name)):
        found = client.get_experiment_by_name(asked) if asked else None
        if found is None:
            continue
        if found.lifecycle_stage != "active":
            hint = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise ConfigError(f"the MLflow experiment '{asked}' was deleted", where=where, hint=hint)
        return found, study
    known = [experiment.name for experiment in client.search_experiments()]
    raise ConfigError(unknown("MLflow experiment", name, known), where=where)


def _runs(client: MlflowClient, experiment_id: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=RUNS_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _row(run: Run) -> dict[str, Any]:
    info = run.info
    return {
        "run_id": info.run_id,
        "status": info.status,
        "start_time": info.start_time,
        **{f"metrics.{key}": value for key, value in run.data.metrics.items()},
        **{f"params.{key}": value for key, value in run.data.params.items()},
        **{f"tags.{key}": value for key, value in run.data.tags.items()},
    }


def _of_one_study(rows: list[dict[str, Any]], study: str | None, where: str) -> list[dict[str, Any]]:
    """The rows of the study that is meant; all of them where there is no study, or one alone. The trials of sweeps in
    the same experiment are no arms of anything."""
    trials, rows = len(rows), [row for row in rows if SWEEP not in row]
    if trials and not rows:
        raise ConfigError("it holds sweeps alone, whose trials are no arms", where=where, hint="gpt2lab report NAME")
    studies = sorted({row[STUDY] for row in rows if STUDY in row})
    if not rows:
        raise ConfigError("there are no runs in it", where=where)
    if study is None and len(studies) > 1:
        raise ConfigError(f"it holds several studies: {', '.join(studies)}", where=where, hint=f"mlflow:{studies[0]}")
    if study is not None and study not in studies:
        raise ConfigError(unknown("study", study, studies), where=where)
    return rows if study is None else [row for row in rows if row.get(STUDY) == study]
