"""No secret of a URI is shown: not by the URI itself, however odd it is, and not by what libraries say about it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from small_study import Lab, sweep_record

from gpt2lab import redaction
from gpt2lab.cli import answer
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.redaction import masked, shown
from gpt2lab.runner import Job, record_failure
from gpt2lab.store import Store
from gpt2lab.sweep.storage import open_storage
from gpt2lab.tracking.follower import Follower, sync
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
