"""No secret of a URI is shown: not by the URI itself, however odd it is, and not by what libraries say about it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import free_ports
from small_study import Lab, sweep_record

from gpt2lab.basics import redaction
from gpt2lab.basics.redaction import masked, shown
from gpt2lab.cli import Bug, execute
from gpt2lab.errors import Gpt2labError
from gpt2lab.runner import Job, record_failure
from gpt2lab.sweep.storage import open_storage
from gpt2lab.tracking.follower import Follower
from gpt2lab.tracking.mlflow import MlflowTracker

SECRET = "Geheim77"
ODD = (
    f"https://me@corp.com:{SECRET}@127.0.0.1:1",
    f"https://{SECRET}@127.0.0.1:1/path",
    f"https://{SECRET}:x-oauth-basic@127.0.0.1:1",
    f"http://me:{SECRET}/{SECRET}@127.0.0.1:1",
    f"http://me:1/{SECRET}@127.0.0.1:1",
    f"http://{SECRET}/x@127.0.0.1:1",
    f"http://me:{SECRET}?#{SECRET}@127.0.0.1:1",
    f"http://me:{SECRET}[{SECRET}]@127.0.0.1:1",
    f"http://me:{SECRET}%2F{SECRET}@127.0.0.1:1",
    f"http://me:{SECRET} {SECRET}@127.0.0.1:1",
    f"http://127.0.0.1:1/?access_token={SECRET}",
    f"http://127.0.0.1:1/?a=1;b=2&Pass%77ord={SECRET}#x",
    f"http://127.0.0.1:1/#id_token={SECRET}",
    f"http://127.0.0.1:1/?X-Amz-Signature={SECRET}&x=1",
    f"http://me:a@127.0.0.1:1/?api_key={SECRET}@x",
    f"me:{SECRET}@127.0.0.1:1",
    f"//{SECRET}@127.0.0.1:1",
    f"http:me:{SECRET}@127.0.0.1:1",
    f"htp://me:{SECRET}@127.0.0.1:1",
    f"postgresql://me:{SECRET}@127.0.0.1:1/db",
    f"postgresql+nodriver://me:{SECRET}@127.0.0.1:1/db",
    f"postgresql://me:p@{SECRET}:{SECRET}@127.0.0.1:1/db",
    f"postgresql://127.0.0.1:1/db?user=me&sslpassword={SECRET}",
    f"mysql+pymysql://127.0.0.1:1/db?password={SECRET}",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    for name in redaction.SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("uri", ODD)
def test_an_odd_uri_shows_no_secret(uri: str) -> None:
    assert SECRET not in masked(f"trouble at '{uri}'; {uri}") or " " in uri
    assert SECRET not in shown(uri)


@pytest.mark.parametrize(
    "text",
    ["Port could not be cast to integer value as 'alpha'", "no host 'beta/gamma", "at alpha%20beta%2Fgamma", "gamma"],
)
def test_what_a_library_quotes_of_a_secret_is_hidden(text: str) -> None:
    shown("http://me:alpha beta/gamma@host")
    assert not re.search("alpha|beta|gamma", masked(text))


def test_what_is_no_secret_is_shown() -> None:
    for text in ("training.batch_tokens=256", "mail a@b.org", "postgresql://me@host/db", "http://host:5000/a?b=c#d"):
        assert masked(text) == text
    assert shown("postgresql://postgres:postgres@localhost/postgres") == "postgresql://postgres:***@localhost/postgres"
    assert masked("the server postgres at localhost") == "the server postgres at localhost"


def test_a_user_beside_a_password_is_hidden_in_the_uri_alone() -> None:
    assert shown("mlflow:http://user:pass:word@host") == "mlflow:http://***@host"
    assert masked("the quota of this user: pass, word") == "the quota of this user: ***, ***"
    assert masked("at http://user:other@host") == "at http://***@host"
    shown(f"http://{SECRET}:secret@host")
    assert masked(f"{SECRET} is a token, it seems") == "*** is a token, it seems"
    shown("http://user@host")
    assert masked("the token is user") == "the token is ***"


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("uri", ODD)
def test_nothing_that_is_printed_logged_or_stored_holds_a_secret(
    uri: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Tracker, storage, user interface, a worker's error and a bug, each with its trace where there is one."""
    caplog.set_level(logging.DEBUG, logger="gpt2lab")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", local_alone)
    started: list[str] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.extend(words))
    lab.train_all()
    lab.store.write_sweep(sweep_record(storage=shown(uri)))
    for words in (["sync"], ["ui", "--port", str(*free_ports(1))], ["runs"], ["show", lab.run().id]):
        for debug in (False, True):
            execute([*words, "--runs", str(lab.store.root)], debug)
    with contextlib.suppress(Gpt2labError):
        make: Callable[[], MlflowTracker] = lambda: MlflowTracker(uri, "gpt2lab", tmp_path)  # noqa: E731
        follower = Follower(lab.store, lab.record, make, print)
        follower.poll()
        follower.close(1.0)
    said: list[str] = []
    with contextlib.suppress(Gpt2labError):
        try:
            open_storage(uri, said.append, patience_seconds=0.1)
        except Gpt2labError as error:
            said += [error.render(), str(error), repr(error.problems), str(error.hint)]
            raise
    error = RuntimeError(f"cannot reach {uri!r}")
    record_failure(Job(str(lab.store.root), "e" * 16, "", {}, "", 1.0, 1), error)
    said.append(Bug(error).render())
    written = {str(path): path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    written |= {"output": "".join(capfd.readouterr()), "log": caplog.text, "said": "\n".join(said)}
    assert [name for name, text in written.items() if SECRET in text] == [] and SECRET not in " ".join(started)
    assert "e" * 16 in "".join(written) and written["output"]


lookup = socket.getaddrinfo


def local_alone(host: str, *rest: Any, **options: Any) -> Any:
    """No name server is asked, which may take long to refuse."""
    if host == "127.0.0.1":
        return lookup(host, *rest, **options)
    raise socket.gaierror(f"no host {host!r}")
