"""Whole runs on a CUDA device, by the command line: an ablation with two workers on one GPU, a run that is stopped and
resumed, NCCL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import ablation

from gpt2lab.model import ModelConfig, build_model
from gpt2lab.store import Store
from gpt2lab.testing import batch
from gpt2lab.training.distributed import Replica, World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def gpt2lab(*words: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in the present folder."""
    command = [sys.executable, "-m", "gpt2lab", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **changes}, check=False)


@pytest.fixture
def here(preset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a preset and an ablation; it is the present one."""
    folder = preset.parent
    monkeypatch.chdir(folder)
    (folder / "ablation.yaml").write_text(ablation("preset.yaml", "evaluate: {contexts: [0.5, 1]}"))
    return folder


def test_an_ablation_runs_side_by_side_on_one_gpu_and_is_reported(here: Path) -> None:
    done = gpt2lab("run", "ablation.yaml", "--jobs", "2", "--no-tracking")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list(Store(here / "runs").runs())
    results = [run.result() for run in runs]
    assert len(results) == 4
    for run, result in zip(runs, results, strict=True):
        assert result is not None and result["status"] == "finished", (run.path / "run.log").read_text()
        assert result["stack"]["device"] == "cuda" and result["peak_memory_bytes"] < 1 << 30
        assert result["metrics"]["val/loss"] < 5.0  # ln 256 is 5.5
        assert set(result["time"]) >= {"forward", "backward", "optimizer", "evaluation"}
    page = next((here / "reports").glob("tiny@*/index.html")).read_text()
    assert "rotary" in page
    again = gpt2lab("run", "ablation.yaml", "--jobs", "2", "--no-tracking")
    assert "4 runs found finished, 0 trained now" in again.stdout, again.stdout + again.stderr
    one = runs[0].id[:8]
    for command in (
        ("eval", one),
        ("sample", one, "--prompt", "the ", "--max-new-tokens", "8"),
        ("doctor", "--run", one),
    ):
        said = gpt2lab(*command)
        assert said.returncode == 0, (command, said.stdout, said.stderr)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint of the only run in a store."""
    [run] = Store(folder).runs()
    last = sorted(run.checkpoints.glob("step_*"))[-1]
    return load_file(last / "model.safetensors")


def rows(folder: Path) -> list[Any]:
    """The journal of the only run in a store, without times."""
    [run] = Store(folder).runs()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows()]


@pytest.mark.parametrize(
    ("end", "precision"), [(signal.SIGTERM, "bf16"), (signal.SIGKILL, "fp32")], ids=["stopped", "killed"]
)
def test_a_deterministic_run_goes_on_to_the_same_bits(here: Path, end: signal.Signals, precision: str) -> None:
    words = ["train", "preset.yaml", "--set", "training.deterministic=true", "--set", f"training.precision={precision}"]
    words += ["--set", "training.steps=200", "--no-tracking", "--runs"]
    done = gpt2lab(*words, "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "gpt2lab", *words, "broken"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 60
    while not list((here / "broken").glob("*/checkpoints/step_*40")) and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, end)
    process.wait()
    time.sleep(0.5)  # a killed parent's worker still has to see it
    before = len(rows(here / "broken"))
    assert 0 < before < 201
    done = gpt2lab(*words, "broken")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(here / "broken") == rows(here / "whole")
    ours, theirs = weights(here / "broken"), weights(here / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_torchrun_with_one_rank_trains(here: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "gpt2lab"]
    command = [*torchrun, "train", "preset.yaml", "--no-tracking"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = Store(here / "runs").runs()
    result = run.result()
    assert result is not None and result["status"] == "finished" and result["stack"]["device"] == "cuda"


def test_more_ranks_than_gpus_are_refused(here: Path) -> None:
    many = torch.cuda.device_count() + 1
    done = gpt2lab("train", "preset.yaml", "--nproc", str(many), "--set", f"training.batch_tokens={32 * many}")
    assert done.returncode == 2 and f"--nproc {many - 1}" in done.stderr, done.stdout + done.stderr


@pytest.fixture
def group(tmp_path: Path) -> Iterator[World]:
    """A group of one process over NCCL and gloo, as `join_world` makes it; it counts as one of two."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield World(rank=0, size=2)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ranks_are_joined_over_nccl(group: World) -> None:
    """What one GPU can show of it: messages of both kinds of memory, and DDP around the model."""
    assert group.sum(torch.ones(3, device="cuda")).tolist() == [1.0] * 3
    assert group.sum(torch.ones(3)).tolist() == [1.0] * 3
    assert group.any(True) and not group.any(False)
    said: list[Any] = [None]
    dist.all_gather_object(said, {"a": 1})
    assert said == [{"a": 1}]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 97}
    model = build_model(ModelConfig(**sizes), seed=1, device="cuda")
    tokens, targets = (x.cuda() for x in batch())
    model.objective(tokens, targets)[0].backward()
    alone = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    replica = Replica(model, group)
    for last in (False, True):
        with replica.accumulating(last):
            replica(tokens, targets)[0].backward()
    together = [p.grad / 2 for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_worker_is_forked_before_anything_touches_the_gpu() -> None:
    """CUDA cannot be used in a fork of a process that has used it; what the server imports must not."""
    code = (
        "import importlib, os, torch\nimport gpt2lab.executors.fork_server as fork_server\n"
        "for name in fork_server.PRELOADED: importlib.import_module(name)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os._exit(0 if torch.zeros(2).cuda().sum().item() == 0 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
