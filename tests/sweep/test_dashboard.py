"""Optuna's own dashboard opens on a sweep's storage by the command that `gpt2lab ui` prints."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from servers import free_ports

from gpt2lab.sweep.storage import open_storage
from gpt2lab.tracking.addresses import dashboard_command

pytest.importorskip("optuna_dashboard")
SECONDS = 60.0


@contextmanager
def opened(command: str) -> Iterator[str]:
    """The address of a dashboard started so; ended afterwards."""
    [port] = free_ports(1)
    program, *words = shlex.split(command)
    line = [str(Path(sys.executable).with_name(program)), *words, "--port", str(port), "--quiet"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def asked(address: str) -> Any:
    """The JSON at an address, as soon as somebody listens there."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            assert time.monotonic() < end, "no server listens"
            time.sleep(0.1)


@pytest.mark.service
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_the_printed_command_opens_the_dashboard(tmp_path: Path, kind: str) -> None:
    place = {"sqlite": f"sqlite:///{tmp_path}/my optuna.db", "journal": f"journal:{tmp_path}/optuna.log"}[kind]
    study = optuna.create_study(storage=open_storage(place, print), study_name="lr@nano")
    for loss in (2.5, 2.25):
        trial = study.ask({"optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)})
        study.tell(trial, loss)
    with opened(dashboard_command(place)) as address:
        (found,) = asked(f"{address}/api/studies")["study_summaries"]
        assert found["study_name"] == "lr@nano"
        trials = asked(f"{address}/api/studies/{found['study_id']}")["trials"]
    assert [trial["values"] for trial in trials] == [[2.5], [2.25]]
    assert {trial["state"] for trial in trials} == {"Complete"}
    assert trials[0]["params"][0]["name"] == "optim.lr"
