"""Settings that every test shares: one thread, no network, nothing written to the user's cache."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from gpt2lab.basics.signals import STOP_SIGNALS

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")
gc.disable()  # imports and tests that are found make objects that stay: none of them is worth a look


def pytest_collection_finish() -> None:
    """Collect garbage from now on, and only what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_generator() -> Iterator[None]:
    """torch.manual_seed seeds every kind of device, and formats a stack trace for each that this process never used."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if torch.accelerator.current_accelerator() is None:
            patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture(autouse=True, scope="session")
def commands_made_once() -> Iterator[None]:
    """Typer makes all commands anew for each call, which takes most of the time of a short one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of a test lie in its own folder, which is made only for tests that use it."""
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    else:
        folder = tmp_path_factory.getbasetemp() / hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    monkeypatch.setenv("GPT2LAB_DATA", str(folder / "data-home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state-home"))


@pytest.fixture(autouse=True)
def not_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests write need not outlive the machine, and a disk takes milliseconds for each file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command takes signals over and keeps them, since its process ends with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FileLimit = Callable[[int], AbstractContextManager[None]]


class Answer(NamedTuple):
    """What one command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def gpt2lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_figures: None
) -> Callable[..., Answer]:
    """Call the command line in an empty folder, as its entry point does."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> Answer:
        from gpt2lab.cli import main

        monkeypatch.setattr(sys, "argv", ["gpt2lab", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Answer(int(ended.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture
def no_plugins_after() -> Iterator[None]:
    """Take out again what a test's plug-ins registered."""
    from gpt2lab.cli.catalogue import all_slots
    from gpt2lab.registry import PLUGINS

    before = [(slot, dict(slot._components)) for slot in all_slots(None).values()]
    plugins, modules = list(PLUGINS), set(sys.modules)
    yield
    for slot, components in before:
        slot._components = components
    PLUGINS[:] = plugins
    for module in [module for module in sys.modules if module.startswith("gpt2lab_plugin_") and module not in modules]:
        del sys.modules[module]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are trained in this process, one after another; -> their ids in that order. Starting a worker takes seconds,
    and what a study does between its runs does not depend on it."""
    from gpt2lab.executors.inline import InlineExecutor

    executor = InlineExecutor()
    for module in ("experiments.ablation", "experiments.single", "sweep.drive"):
        monkeypatch.setattr(f"gpt2lab.{module}.executor_for", lambda *_: executor)
    return executor.trained


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A process that forks workers, for all tests that do not kill it: to start one takes seconds."""
    from gpt2lab.basics.forks import ForkServer

    class Kept(ForkServer):
        def close(self) -> None:
            if self.process is not None and self.process.poll() is not None:
                super().close()

    made = Kept()
    yield made
    ForkServer.close(made)


@pytest.fixture
def forks(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors on this machine share that server."""
    from gpt2lab.executors.local import LocalExecutor

    initialise = LocalExecutor.__init__

    def shared(self: LocalExecutor, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        self._server = server

    monkeypatch.setattr(LocalExecutor, "__init__", shared)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, Callable[[], None]], None]:
    """Train what `key` names in a folder, the first time; later, copy runs and data of that time to the folder."""
    kept = tmp_path_factory.mktemp("trained")

    def train(key: str, folder: Path, first: Callable[[], None]) -> None:
        earlier = kept / key
        if earlier.exists():
            shutil.copytree(earlier, folder, dirs_exist_ok=True)
        else:
            first()
            for part in ("runs", "data-home"):
                shutil.copytree(folder / part, earlier / part)

    return train


@pytest.fixture
def file_limit() -> FileLimit:
    """Within it no file of this process may pass a number of bytes: what a full disk looks like, also to root."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are drawn but not saved, which takes most of the time."""
    monkeypatch.setattr("gpt2lab.reports.style.render", lambda *_: ("<svg/>", "<svg/>"))
