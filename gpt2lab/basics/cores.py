"""How many CPU cores this process may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, CONTROLLERS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores(groups: Path = GROUPS, controllers: Path = CONTROLLERS) -> int:
    """Cores of this process's affinity (as taskset and Slurm set it), or fewer where a control group has a quota of CPU
    time (as `docker --cpus` and Kubernetes set it), rounded down: threads beyond a quota are stopped in mid-step. At
    least 1.

    groups: the control groups of the process. controllers: where their settings are. For tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(groups, controllers))]))


def _quotas(groups: Path, controllers: Path) -> Iterator[float]:
    """Cores' worth of CPU time that each control group above this process allows, version 1 or 2.

    In a container, the root of `controllers` is often the container's own group, while `groups` names it as seen from
    outside; so folders that do not exist are passed over.
    """
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            number, _, rest = line.partition(":")
            names, _, group = rest.partition(":")
            if number != "0" and "cpu" not in names.split(","):
                continue
            for root in (controllers, controllers / "unified") if number == "0" else (controllers / names,):
                folder = root / group.lstrip("/")
                for level in (folder, *folder.parents):
                    yield from _quota(level)
                    if level == root:
                        break


def _quota(folder: Path) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" has no limit
        yield float(quota) / float(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = float((folder / "cpu.cfs_quota_us").read_text())  # -1 without a limit
        if quota_us > 0:
            yield quota_us / float((folder / "cpu.cfs_period_us").read_text())
