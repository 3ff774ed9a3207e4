"""Cores that a process may use: its affinity, and quotas of control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt2lab.basics.cores import usable_cores


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # a container with its own view of the groups
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),  # of the group above
        ("0::/docker/12ab\n", {"cpu.max": "300000 100000\n"}, 3),  # named as from outside
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3),
        ("3:cpu,cpuacct:/a\n0::/\n", {
            "cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "50000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }, 3),
        ("3:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "1\n", "cpuset/a/cpu.cfs_period_us": "1\n"}, 16),
        ("1:cpu:/\n0::/x\n", {"unified/x/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "9999999 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "what\n"}, 16),
    ],
)  # fmt: skip
def test_the_smallest_quota_above_the_process_limits_its_cores(
    tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert usable_cores(tmp_path / "cgroup", tmp_path / "fs") == cores


def test_without_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path) == 16
