"""Ranks on two nodes, each a network namespace with an address of its own, one of which is cut off while they train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import free_ports
from workers import rows_of, wait_until

from gpt2lab.errors import RankLost
from gpt2lab.store import RunFolder, Store

NODES = ("gpt2lab-a", "gpt2lab-b")
LINK = "net"
SETTINGS = ["training.steps=600", "training.checkpoint_every_steps=20", "training.rank_timeout_seconds=5",
            "training.batch_tokens=128"]  # fmt: skip
SECONDS = 300.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[tuple[str, ...]]:
    """Two namespaces, joined by a cable."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (Debian: iproute2)")
    remove_nodes()  # of a run that was killed
    try:
        ip("netns", "add", NODES[0])
    except subprocess.CalledProcessError as error:  # as in most containers; what comes after it must work
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", NODES[1])
        ip("link", "add", LINK, "netns", NODES[0], "type", "veth", "peer", "name", LINK, "netns", NODES[1])
        for number, name in enumerate(NODES):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", LINK)
            for device in ("lo", LINK):
                ip("-n", name, "link", "set", device, "up")
        yield NODES
    finally:
        remove_nodes()


def remove_nodes() -> None:
    for name in NODES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start(preset: Path, root: Path, ranks_each: int) -> list[subprocess.Popen[str]]:
    """The same command on both nodes, as a cluster's launcher starts it. Each rank prints into a file beside `root`."""
    size, [port] = ranks_each * len(NODES), free_ports(1)
    processes = []
    for rank in range(size):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % ranks_each, "LOCAL_WORLD_SIZE": ranks_each,
                 "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": LINK}  # fmt: skip
        words = ["ip", "netns", "exec", NODES[rank // ranks_each], sys.executable, "-m", "gpt2lab", "train",
                 str(preset), "--runs", str(root), "--no-tracking",
                 *(word for setting in SETTINGS for word in ("--set", setting))]  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        with root.with_name(f"{root.name}.{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, text=True))
    return processes


def only_run(root: Path) -> RunFolder:
    [run] = [run for run in Store(root).runs() if (run.path / "config.yaml").exists()]
    return run


def at_step(root: Path, step: int, processes: list[subprocess.Popen[str]]) -> bool:
    assert all(process.poll() is None for process in processes), said(root, len(processes))
    return any(run.last_step() > step for run in Store(root).runs())


def said(root: Path, count: int) -> list[str]:
    return [root.with_name(f"{root.name}.{rank}.log").read_text() for rank in range(count)]


@pytest.mark.service
@pytest.mark.parametrize("ranks_each", [1, 2])
def test_a_node_that_is_cut_off_is_named_and_the_training_goes_on_to_the_same_numbers(
    ranks_each: int, nodes: tuple[str, ...], tiny: Path
) -> None:
    preset, here, there = tiny.parent / "tiny.yaml", tiny.parent / "here", tiny.parent / "there"
    for process in (undisturbed := start(preset, here, ranks_each)):
        assert process.wait(SECONDS) == 0, said(here, len(undisturbed))
    processes = start(preset, there, ranks_each)
    try:
        wait_until(lambda: at_step(there, 100, processes), SECONDS)
        ip("-n", nodes[1], "link", "set", LINK, "down")
        cut = time.monotonic()
        codes = [process.wait(60) for process in processes]
        seconds = time.monotonic() - cut
    finally:
        for process in processes:
            process.kill()
    logs = said(there, len(processes))
    print(f"{ranks_each} ranks each: ended {seconds:.1f} s after the cut; {logs[0].strip().splitlines()[-2:]}")
    assert set(codes) == {RankLost.exit_code} and seconds < 30
    assert f"rank {ranks_each}" in "".join(logs[:ranks_each])  # the first one beyond the cut
    assert 0 < only_run(there).saved_step() < 600 and only_run(there).result() is None
    ip("-n", nodes[1], "link", "set", LINK, "up")
    for process in start(preset, there, ranks_each):
        assert process.wait(SECONDS) == 0, said(there, len(processes))
    resumed, whole = rows_of(only_run(there)), rows_of(only_run(here))
    assert resumed == whole
