"""Settings that every test shares: one thread, no network, nothing written to the user's cache."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2lab.signals import STOP_SIGNALS

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "data-home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command takes signals over and keeps them, since its process ends with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_plugins_after() -> Iterator[None]:
    """Take out again what a test's plug-ins registered."""
    from gpt2lab.registry import PLUGINS, SLOTS

    before = {name: dict(slot._components) for name, slot in SLOTS.items()}
    plugins = list(PLUGINS)
    yield
    for name, slot in SLOTS.items():
        slot._components = before[name]
    PLUGINS[:] = plugins
    for module in [module for module in sys.modules if module.startswith("gpt2lab_plugin_")]:
        del sys.modules[module]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are drawn but not saved, which takes most of the time."""
    monkeypatch.setattr("gpt2lab.reports.style.render", lambda *_: ("<svg/>", "<svg/>"))
    monkeypatch.setattr("gpt2lab.reports.style.saved", lambda *_, **__: b"")
