"""Checks of this machine: its resources, and what would prevent a run."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch

from gpt2lab.analysis.campaigns import problems_of
from gpt2lab.basics.cores import usable_cores
from gpt2lab.basics.redaction import shown
from gpt2lab.basics.text import quantity
from gpt2lab.data.files import data_home
from gpt2lab.errors import Gpt2labError
from gpt2lab.inspection.costs import peak_flops
from gpt2lab.store import Store
from gpt2lab.store.ledger import read_ledger
from gpt2lab.tracking.addresses import check_uri, default_uri, sqlite_path
from gpt2lab.tracking.mlflow import artifacts_elsewhere
from gpt2lab.training.precision import choose_device, device_name

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
LEAST_FREE_BYTES = 1 << 30
EXTRAS = ("transformers", "datasets", "lm_eval")
SERVER_SECONDS = 2.0


@dataclass(frozen=True)
class MachineCheck:
    """One check. found: its result. problem: why it would prevent a run, or None."""

    name: str
    found: str
    problem: str | None = None


def check_machine(store: Store) -> Iterator[MachineCheck]:
    """Checks of everything that a run needs; leaves no files behind."""
    yield _version("Python", platform.python_version(), sys.version_info[:2], OLDEST_PYTHON)
    number = tuple(int(word) for word in torch.__version__.split("+")[0].split(".")[:2])
    yield _version("torch", torch.__version__, number, OLDEST_TORCH)
    device = choose_device()
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    yield MachineCheck("device", f"{device.type}, {device_name(device)}{'' if bf16 else ', without bf16'}")
    if device.type == "cpu":
        speeds = {kind: peak_flops(device, kind, 1)[0] or 0.0 for kind in ("fp32", "bf16")}
        words = ", ".join(f"{kind} {speed / 1e9:.0f} GFLOP/s" for kind, speed in speeds.items())
        faster = max(speeds, key=speeds.__getitem__)
        yield MachineCheck("precision", f"{words} in products with one thread: {faster} is faster")
    yield MachineCheck("threads", f"{torch.get_num_threads()} of torch, on {usable_cores()} cores")
    memory = psutil.virtual_memory()
    yield MachineCheck("memory", f"{quantity(memory.available, 'B')} free of {quantity(memory.total, 'B')}")
    yield _folder("run store", store.root.absolute())
    yield _folder("data cache", data_home())
    yield _ledger(store)
    yield _mlflow(store)
    installed = [name for name in EXTRAS if importlib.util.find_spec(name)]
    yield MachineCheck("optional packages", ", ".join(installed) or "none")


def _ledger(store: Store) -> MachineCheck:
    """Whether any line of the ledger was changed or is missing."""
    lines, problems = len(read_ledger(store.root).lines), problems_of(store)
    more = f", and {len(problems) - 1} more: gpt2lab ledger" if problems[1:] else ""
    return MachineCheck("ledger", f"{lines} lines", f"{problems[0]}{more}" if problems else None)


def _version(name: str, text: str, version: tuple[int, ...], oldest: tuple[int, ...]) -> MachineCheck:
    required = ".".join(map(str, oldest))
    return MachineCheck(name, text, None if version >= oldest else f"{required} or newer is needed")


def _folder(name: str, folder: Path) -> MachineCheck:
    """Whether a folder, or its nearest existing parent, is writable and has free space."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    description = f"{folder}, {quantity(free, 'B')} free"
    problem = _refused(lambda: tempfile.TemporaryFile(dir=nearest).close())
    if problem is None and free < LEAST_FREE_BYTES:
        problem = "little room: a checkpoint of GPT-2 124M alone takes 1.5 GB"
    return MachineCheck(name, description, problem)


def _mlflow(store: Store) -> MachineCheck:
    """The tracking address, and why it fails: its folder is not writable, or no server answers."""
    uri, problem = default_uri(store.root), None
    try:
        check_uri(uri)
        file, address = sqlite_path(uri), urlsplit(uri)
        port = address.port or {"https": 443, "http": 80}.get(address.scheme)
        if file is not None:
            nearest = next(path for path in (file.parent, *file.parent.parents) if path.exists())
            problem = _refused(lambda: tempfile.TemporaryFile(dir=nearest).close())
            if moved := artifacts_elsewhere(file, store.root / "artifacts"):
                problem = f"it looks for artifacts in {moved[0]}, where the store was before; `gpt2lab sync` mends that"
        elif address.hostname is not None and port is not None:
            target = (address.hostname, port)
            problem = _refused(lambda: socket.create_connection(target, SERVER_SECONDS).close())
    except Gpt2labError as error:
        problem = str(error)
    return MachineCheck("MLflow", shown(uri), problem)


def _refused(work: Callable[[], object]) -> str | None:
    """The operating system's error, or None."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return None
