"""`gpt2lab serve`: the pages of a store, made when they are opened, and MLflow, behind one local address."""

from __future__ import annotations

import atexit
import socket
import subprocess
import sys
import threading
import time
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from gpt2lab.basics.redaction import shown as shown_uri
from gpt2lab.errors import Gpt2labError
from gpt2lab.records import NUMBERED, page_folder, run_ids
from gpt2lab.reports.index import write_index
from gpt2lab.reports.page import index_of, written_before
from gpt2lab.reports.write import write_page_of
from gpt2lab.store import Store
from gpt2lab.tracking.addresses import default_uri, is_server, list_link, runs_link
from gpt2lab.tracking.follower import links

EVERY_SECONDS = 60
"""A page of runs that go on is made anew, and loaded anew by the browser, no more often."""


class Pages:
    """The pages of a store below `out`, made anew when what they rest on has changed."""

    def __init__(self, runs: Path, out: Path) -> None:
        self.store, self.out, self.lock, self.made = Store(runs), out, threading.Lock(), dict[str, float]()

    @property
    def names(self) -> list[str]:
        """Of studies and sweeps."""
        return [*self.store.studies(), *self.store.sweeps()]

    def earlier(self, name: str = "") -> list[str]:
        """Names of the declarations that were replaced, `posenc@nano#1`; of all studies and sweeps without a name."""
        return [*self.store.earlier(name), *self.store.earlier(name, "sweep")]

    def page(self, name: str) -> bytes:
        """The HTML of a study, a sweep or an earlier declaration, "" for the index; made anew where it is older than
        its runs. Raises Gpt2labError."""
        with self.lock:
            due, page = time.monotonic() - self.made.get(name, -EVERY_SECONDS) >= EVERY_SECONDS, self._index(name)
            if page is None or (due and self._changed(name) > page.stat().st_mtime):
                if name:
                    write_page_of(name, self.store, self.out)
                else:
                    write_index(self.store.root, self.out)
                self.made[name] = time.monotonic()
            return (self._index(name) or page_folder(self.out, name) / "index.html").read_bytes()

    def _index(self, name: str) -> Path | None:
        """Where the page lies; None where none was written, or only that of an earlier declaration."""
        if name in (*self.names, *self.earlier()):
            return index_of(self.store, self.store.kind(name), name, self.out)
        return index if (index := self.out / name / "index.html").is_file() else None

    def is_running(self, name: str) -> bool:
        """Whether a run of it trains."""
        return any(self.store.run(run).status() == "running" for run in self._runs(name))

    def file(self, name: str, file: str) -> bytes | None:
        """A file of a page that gpt2lab wrote; None for any other."""
        page = self._index(name)
        folder = page.parent if page else self.out / name
        return (folder / file).read_bytes() if file in written_before(folder)[0] and (folder / file).is_file() else None

    def in_mlflow(self, name: str, ui: str) -> str:
        """Address of a study's or sweep's curves in the MLflow UI at `ui`; of its list where the copy is not known."""
        kind = self.store.kind(name) if name in self.names else ""
        copy = (links(self.store, name, kind) if kind else None) or {}
        if copy.get("parent_run_id") and copy.get("experiment_id"):
            return runs_link(ui, copy["experiment_id"], copy["parent_run_id"])
        return list_link(ui)

    def _runs(self, name: str) -> list[str]:
        """Of the index none, which rests on records alone."""
        if not name:
            return []
        return run_ids(self.store.study(name) if self.store.kind(name) == "study" else self.store.sweep(name))

    def _changed(self, name: str) -> float:
        """When what a page rests on was written last."""
        records = [self.store.root / kind / f"{study}.json" for kind in ("studies", "sweeps") for study in self.names
                   if name in ("", study)]  # fmt: skip
        journals = [self.store.run(run).path / "metrics.jsonl" for run in self._runs(name)]
        results = [journal.with_name("result.json") for journal in journals]
        return max((path.stat().st_mtime for path in (*records, *journals, *results) if path.is_file()), default=0.0)


def server(runs: Path, out: Path, port: int) -> ThreadingHTTPServer:
    """A server of the pages on this machine; MLflow gets the next port."""
    return ThreadingHTTPServer(("127.0.0.1", port), handler(Pages(runs, out), port + 1))


def handler(pages: Pages, mlflow_port: int) -> type[BaseHTTPRequestHandler]:
    """Answers GET for the pages, their files, and /mlflow, which leads to a study's curves with its name behind it."""
    mlflow: list[subprocess.Popen[bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            name, _, file = path.partition("/")
            if (numbered := name.replace("~", NUMBERED)) in pages.earlier():  # the folder of its page
                name = numbered
            if str(self.headers["Host"]).partition(":")[0] not in ("127.0.0.1", "localhost"):
                return self._answer(b"unknown host", "text/plain", 421)  # a page elsewhere whose name leads here
            try:
                if name == "mlflow":
                    self._mlflow(file)
                elif path in ("", "index.html"):
                    self._page("")
                elif name in (*pages.names, *pages.earlier()) and file in ("", "index.html"):
                    self._page(name)
                elif (content := pages.file(name, file) if file else pages.file("", name)) is not None:
                    self._answer(content, guess_type(path)[0] or "application/octet-stream")
                else:
                    self._answer(b"there is no such page", "text/plain", 404)
            except Gpt2labError as error:
                self._answer(str(error).encode(), "text/plain; charset=utf-8", 500)

        def log_message(self, *_: object) -> None:
            """Nothing: a log of requests would bury the address."""

        def _page(self, name: str) -> None:
            places = [("/", "all studies"), *((f"/{quote(study)}/", study) for study in pages.names)]
            places.append((f"/mlflow/{quote(name)}", "MLflow"))
            earlier = pages.earlier(name) if name else ()
            places += [(f"/{quote(page_folder('', study).name)}/", study) for study in earlier]
            shown = " · ".join(f'<a href="{address}">{escape(text)}</a>' for address, text in places)
            body = pages.page(name).replace(b"<main>", f'<main><p class="kicker">{shown}</p>'.encode(), 1)
            self._answer(body, "text/html; charset=utf-8", refresh=EVERY_SECONDS if pages.is_running(name) else 0)

        def _mlflow(self, name: str) -> None:
            """Started at the first visit, which takes some seconds, unless it is a server of its own."""
            ui, uri = f"http://127.0.0.1:{mlflow_port}", default_uri(pages.store.root)
            if is_server(uri):
                self._redirect(pages.in_mlflow(name, shown_uri(uri)))
                return
            if not mlflow:
                command = [sys.executable, "-m", "gpt2lab", "ui", "--port", str(mlflow_port), "--runs",
                           str(pages.store.root)]  # fmt: skip
                mlflow.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                atexit.register(mlflow[0].terminate)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", mlflow_port)):
                    state = "MLflow starts." if mlflow[0].poll() is None else "MLflow did not start: gpt2lab ui"
                    self._answer(state.encode(), "text/plain", refresh=0 if mlflow[0].poll() else 2)
                    return
            self._redirect(pages.in_mlflow(name, ui))

        def _redirect(self, address: str) -> None:
            self.send_response(302)
            self.send_header("Location", address)
            self.end_headers()

        def _answer(self, body: bytes, kind: str, status: int = 200, refresh: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            if refresh:  # by the browser itself: pages run no script
                self.send_header("Refresh", str(refresh))
            self.end_headers()
            self.wfile.write(body)

    return Handler
