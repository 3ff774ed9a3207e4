"""Commands that read stored results: report, why, sync, ui."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from functools import partial
from typing import Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.cli.options import OUT, RUNS, Exploratory, Json, Out, Plugin, Run, Runs, print_fault, print_json, say
from gpt2lab.errors import DataFault, EnvironmentFault


def report(
    name: Annotated[
        str | None, typer.Argument(help="A study or sweep, such as posenc or lr@nano.", metavar="NAME")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Write the index of all studies instead.")] = False,
    force_exploratory: Exploratory = False,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="Write the copy in published/, to be committed, and the page of all that are there."
        ),
    ] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Write figures as PNG and PDF too, for slides and papers.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Let every arm continue three prompts first, for the report.")
    ] = False,
    plugin: Plugin = None,
    runs: Runs = RUNS,
    out: Out = OUT,
    json_: Json = False,
) -> None:
    """Rewrite the report of a study or sweep. Reads the run store only."""
    from gpt2lab.records import page_folder
    from gpt2lab.registry import load_plugin
    from gpt2lab.reports.front import write_front
    from gpt2lab.reports.index import write_index
    from gpt2lab.reports.page import is_current
    from gpt2lab.reports.page import publish as publish_page
    from gpt2lab.reports.read import read_study, read_sweep
    from gpt2lab.reports.study import terminal_summary, write_report
    from gpt2lab.reports.sweep import terminal_sweep, write_sweep_report
    from gpt2lab.store import Store

    if all_ == (name is not None):
        raise typer.BadParameter("a study's name or --all is expected, and not both")
    for file in plugin or ():
        load_plugin(file)
    if name is None:
        page = write_front(out / "published") if publish else write_index(runs, out)
        print_json({"page": str(page)}) if json_ else print(f"report: {page}")
        if open_:
            show_in_browser(page.resolve().as_uri())
        return
    console = console_for()
    if Store(runs).kind(name) == "sweep":
        sweep = read_sweep(name, runs)
        kept = is_current(sweep, out) and not images
        page = page_folder(out, sweep.name) / "index.html" if kept else write_sweep_report(sweep, out, images=images)
        summary = partial(terminal_sweep, sweep, out=out, kept=kept)
    else:
        if samples:
            from gpt2lab import api

            api.write_samples(name, runs=runs)
        study = read_study(name, runs, force_exploratory=force_exploratory)
        kept = is_current(study, out) and not images
        page = page_folder(out, study.name) / "index.html" if kept else write_report(study, out, images=images)
        summary = partial(terminal_summary, study, out, kept=kept, width=console.width)
    published = publish_page(page.parent, out / "published") if publish else None
    if published:
        write_front(out / "published")
    if json_:
        numbers = page.parent / ("sweep.json" if (page.parent / "sweep.json").is_file() else "verdicts.json")
        record = json.loads(numbers.read_text(encoding="utf-8"))
        print_json({**record, "page": str(page), "published": published and str(published)})
    else:
        print(*([f"published: {published}\n"] if published else []), sep="", end="")
        console.print(summary())
    if open_:
        show_in_browser(page.resolve().as_uri())


def why(run_a: Run, run_b: Run, runs: Runs = RUNS, json_: Json = False) -> None:
    """Explain why two runs have different ids. Compares settings, data, software and code definitions."""
    from dataclasses import asdict

    from gpt2lab.reuse.why import why as differences
    from gpt2lab.store import Store

    store, console = Store(runs), console_for()
    a, b = store.find(run_a), store.find(run_b)
    causes = differences(a, b, store)
    if json_:
        print_json({"a": a.id, "b": b.id, "differences": [asdict(difference) for difference in causes]})
    elif not causes:
        same = "one and the same run" if a.id == b.id else "no difference that could change a weight"
        say(console, f"{a.id} and {b.id}: {same}")
    else:
        for difference in causes:
            say(console, str(difference))
            for line in difference.code:
                console.print(f"    {line}", markup=False, highlight=False, style=STYLES.get(line[:1], ""))


STYLES = {"+": "green", "-": "red", "@": "dim"}


def sync(
    name: Annotated[str | None, typer.Argument(help="A study or sweep; all by default.", metavar="[NAME]")] = None,
    runs: Runs = RUNS,
    out: Out = OUT,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Send missing rows and reports to MLflow."""
    from gpt2lab.registry import load_plugin
    from gpt2lab.reports.page import index_of
    from gpt2lab.store import Store
    from gpt2lab.tracking import open_tracker
    from gpt2lab.tracking.follower import sync as bring_up_to_date
    from gpt2lab.tracking.follower import tracked_records

    for file in plugin or ():
        load_plugin(file)
    store, damaged = Store(runs), list[DataFault]()
    sent, messages = dict[str, int](), sys.stderr if json_ else sys.stdout
    for record in tracked_records(store, name, damaged.append):
        tracker = partial(open_tracker, store.root, record["ablation"])
        sent[record["name"]] = bring_up_to_date(store, record, tracker, partial(print, file=messages))
        kind = "sweep" if record.get("kind") == "sweep" else "study"
        page = index_of(store, kind, record["name"], out)  # none where the page is that of an earlier declaration
        if page and (page.parent / "sweep.json").is_file() == (kind == "sweep"):
            tracker().log_report(record, page.parent)
        print(f"{record['name']}: {sent[record['name']]} rows sent", file=messages)
    if json_:
        print_json({"sent": sent})
    if damaged:
        for fault in damaged[:-1]:
            print_fault(fault, as_json=json_)
        raise damaged[-1]


def free_port(command: str, host: str, port: int) -> None:
    """Raises EnvironmentFault where nothing can listen there."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = {errno.EADDRINUSE: f" --port {port % 65535 + 1}", errno.EACCES: " --port 5000"}
            hint = f"gpt2lab {command}{remedy.get(error.errno or 0, ' --host 127.0.0.1')}"
            raise EnvironmentFault(str(error.strerror), where=f"{host}:{port}", hint=hint) from None


def serve(
    port: Annotated[int, typer.Option("--port", "-p", help="Port of the pages.", min=1, max=65534)] = 8000,
    open_: Annotated[bool, typer.Option("--open", help="Open the pages in the browser.")] = False,
    runs: Runs = RUNS,
    out: Out = OUT,
) -> None:
    """Serve reports, and MLflow beside them, on this machine. Pages are built from the store when they are opened, and
    refresh themselves while runs train."""
    free_port("serve", "127.0.0.1", port)
    from gpt2lab.cli.serve import server

    with server(runs, out, port) as listening:
        address = f"http://127.0.0.1:{port}"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if open_:
            show_in_browser(address)
        listening.serve_forever()


def show_in_browser(address: str) -> None:
    """Open it, or say that there is no browser."""
    import webbrowser

    if not webbrowser.open(address):
        print(f"no browser was found for {address}", file=sys.stderr)


def ui(
    port: Annotated[int, typer.Option("--port", "-p", help="Port of the MLflow UI.", min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; other machines can connect if changed.")
    ] = "127.0.0.1",
    runs: Runs = RUNS,
) -> None:
    """Serve the MLflow UI on this machine. Prints links that compare the runs of each study or sweep."""
    from gpt2lab.basics.redaction import shown
    from gpt2lab.store import Store
    from gpt2lab.tracking.addresses import check_uri, default_uri, is_server, sqlite_path
    from gpt2lab.tracking.mlflow import create_database, prepare_environment

    store = Store(runs)
    uri = default_uri(store.root)
    check_uri(uri)
    if is_server(uri):  # it has a user interface of its own
        print_links(store, shown(uri))
        return
    database = sqlite_path(uri)
    if database and database.parent.is_dir() and not os.access(database.parent, os.W_OK):  # MLflow tries for a minute
        raise EnvironmentFault("cannot be written", where=str(database.parent), hint="a copy of the store, by --runs")
    free_port("ui", host, port)
    if host != "127.0.0.1":
        print(f"warning: MLflow has no password; anyone who reaches {host}:{port} can read and delete runs")
    address = f"http://{host}:{port}"
    print_links(store, address, "  (Ctrl-C ends it)")
    sys.stdout.flush()
    if database and not database.exists():  # a run may begin at the same time
        prepare_environment()
        create_database(database, store.root.resolve() / "artifacts")
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # avoids seven idle workers
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": uri,  # anyone can read a command line
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--artifacts-destination", str(store.root.resolve() / "artifacts"),
        "--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    if "%" in uri and (database := sqlite_path(uri)):  # MLflow would make the folders of the quoted path
        environment["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{database.name}"
        os.chdir(database.parent)
    os.execve(command[0], command, environment)


def print_links(store: Any, address: str, note: str = "") -> None:
    """Print where MLflow is, and where studies and sweeps are in it and in Optuna's dashboard."""
    from gpt2lab.tracking.addresses import runs_link
    from gpt2lab.tracking.follower import links

    print(f"MLflow: {address}{note}")
    for kind, name in [("study", name) for name in store.studies()] + [("sweep", name) for name in store.sweeps()]:
        with contextlib.suppress(DataFault):
            linked = links(store, name, kind) or {}
            if linked.get("parent_run_id") and linked.get("experiment_id"):
                print(f"{name}: {runs_link(address, linked['experiment_id'], linked['parent_run_id'])}")
    for line in dashboards(store):
        print(line)


def dashboards(store: Any) -> list[str]:
    """Commands that open Optuna's dashboard on the sweeps' storages, each storage once."""
    import importlib.util

    from gpt2lab.tracking.addresses import dashboard_command

    names: dict[str, list[str]] = {}
    for name in store.sweeps():
        with contextlib.suppress(DataFault):
            if storage := store.sweep(name).storage:
                names.setdefault(dashboard_command(storage), []).append(name)
    lines = [f"{', '.join(sweeps)}: {command}" for command, sweeps in names.items()]
    if any("***" in command for command in names):
        lines.append("*** replaces the password, which is never stored")
    if lines and importlib.util.find_spec("optuna_dashboard") is None:
        lines.append("optuna-dashboard is not installed: pip install 'gpt2lab[dashboard]'")
    return lines
