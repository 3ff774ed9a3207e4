"""A Ray cluster of the tests' own: several raylets on this machine, with a home folder for what they keep there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest


def joined(cluster: Any, cpus: int) -> Any:
    """A node, the first one as head. On a busy machine Ray gives up after half a minute; it is asked more than once."""
    for left in reversed(range(5)):
        with contextlib.suppress(Exception) if left else contextlib.nullcontext():  # Ray raises no class of its own
            return cluster.add_node(num_cpus=cpus, include_dashboard=False)
    raise AssertionError


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A running cluster, to which this process is connected: a head without cores, and a node with two."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gpt2lab[ray]'")
    from gpt2lab.executors.ray import ray_of

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as home:
        patch.setenv("HOME", home)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray = ray_of()
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        for cpus in (0, 2):
            joined(cluster, cpus)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
