"""The description of a machine that a plan depends on, and the probe that describes this one."""

from __future__ import annotations

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from gpt2lab.basics.cores import usable_cores
from gpt2lab.basics.text import plural
from gpt2lab.components.chunked import rows_at_once
from gpt2lab.config import Config
from gpt2lab.errors import ConfigError, DataFault, Problem
from gpt2lab.inspection.costs import Costs, matmul_flops, slower_precision
from gpt2lab.store import Store
from gpt2lab.training.compiling import decide
from gpt2lab.training.precision import choose_device, device_name, shortcomings
from gpt2lab.training.settings import TrainingConfig

PROBE_SIZE, PROBE_SHARE = 512, 0.5  # a training step reaches about half of the speed of one large matmul
GPU_PROBE_SIZE, GPU_STEP_SECONDS = 8192, 0.008
"""On a GPU a smaller product measures the launch of a kernel; and a step takes at least as long as launching its
hundreds of kernels."""
SPEEDS_FROM = 300
"""Runs of the store whose speed is looked at: those that ended last."""
SPEEDS_ENOUGH = 30
"""Speeds of similar runs, the newest, after which no more are read."""


@dataclass(frozen=True)
class Machine:
    """Where runs will execute: `jobs` side by side, each shared by `ranks` processes, which have `threads` CPU threads;
    on one machine all together no more than there are cores.

    A plan depends on the machine through this description alone, so a login node can plan for a GPU node:
    `gpt2lab machine nano > node.json` there, `gpt2lab run FILE --dry-run --machine node.json` here.

    `speed`: estimated FLOP/s of one process; `speed_from`: where that estimate comes from.
    """

    device: str
    device_name: str
    threads: int
    jobs: int
    speed: float
    speed_from: str
    gpus: int = 0
    """runs are distributed over them; several runs may share one"""
    torch: str = torch.__version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=platform.platform)
    local: bool = True
    """whether it is the machine of this process, on which speed can be measured"""
    ranks: int = 1
    """processes that share every batch of a run"""

    def to_json(self) -> str:
        """Its description, for `machine_of`."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "local"}, indent=2)

    def with_ranks(self, ranks: int) -> Machine:
        """With so many processes for every run."""
        return replace(self, jobs=1, ranks=ranks) if ranks > 1 else self

    @property
    def run_speed(self) -> float:
        """Estimated FLOP/s of one run, communication between its ranks not counted."""
        return self.speed * self.ranks

    @property
    def at_a_time(self) -> str:
        """How many runs train at a time, and with how many processes and threads."""
        if self.ranks > 1:
            return f"{self.jobs} at a time, ranks each: {self.ranks}, threads of each rank: {self.threads}"
        return f"{self.jobs} at a time, threads each: {self.threads}"

    @property
    def stack(self) -> dict[str, str]:
        """The software and device that runs are trained with, as records keep it."""
        names = ("torch", "device", "device_name", "python", "platform")
        return {name: getattr(self, name) for name in names}


def machine_of(path: str | Path) -> Machine:
    """A machine by the description in a file. Raises ConfigError."""
    try:
        machine = replace(TypeAdapter(Machine).validate_json(Path(path).read_bytes(), strict=True), local=False)
        if min(machine.jobs, machine.threads, machine.ranks) < 1 or machine.gpus < 0:
            raise ValueError
        if not 0 < machine.speed < math.inf:
            raise ValueError
        return machine
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (TypeError, ValueError, RecursionError):
        hint = "gpt2lab machine PRESET > FILE on that machine"
        raise ConfigError("does not describe a machine", where=str(path), hint=hint) from None


def shares(jobs: int | None, threads: int | None, cores: int, device: str) -> tuple[int, int]:
    """(jobs, threads) such that jobs x threads <= cores: more threads than cores make a step ten times slower.

    Raises ConfigError for a request that exceeds the cores.
    """
    if device == "cpu" and (threads or 1) > cores:
        raise ConfigError(
            f"{threads} threads in each run, {cores} cores can be used here",
            where="training.threads",
            hint=f"--set training.threads={cores}",
        )
    most = torch.cuda.device_count() if device == "cuda" else 1 if device == "mps" else cores // (threads or 1)
    jobs = most if jobs is None else jobs
    threads = threads or max(1, cores // jobs)
    if device == "cpu" and jobs * threads > cores:
        raise ConfigError(
            f"{jobs} jobs of {threads} threads need {jobs * threads} cores, {cores} can be used here",
            where="--jobs",
            hint=f"--jobs {cores // threads}",
        )
    return jobs, threads


def check_ranks(config: Config, ranks: int, local: int | None = None) -> None:
    """Raises ConfigError when a batch cannot be divided among `ranks`, or when `local` of them (all, unless given) do
    not fit on this machine."""
    problems, local = config.training.problems(config.model.block_size, ranks), local or ranks
    hint = f"--set training.batch_tokens={problems[0].what.rpartition(' ')[2]}" if problems else None
    if local > 1:
        device, threads = choose_device(config.training.device).type, config.training.threads or 1
        cores = usable_cores()
        largest = {"cpu": cores // threads, "cuda": torch.cuda.device_count(), "mps": 1}[device]
        if local > largest:
            available = (
                f"{cores} cores, and each rank takes {threads}" if device == "cpu" else f"{largest} of device {device}"
            )
            problems.append(Problem("--nproc", f"{local} ranks; this machine has {available}"))
            hint = f"--nproc {max(1, largest)}"
    if problems:
        raise ConfigError(problems, hint=hint)


def probe(
    store: Store, training: TrainingConfig, flops_per_token: float, jobs: int | None = None, ranks: int = 1
) -> Machine:
    """This machine with so many jobs side by side, or as many as fit, or with one at a time that `ranks` processes
    share. Raises ConfigError when that many do not fit."""
    device = choose_device(training.device)
    jobs, threads = shares(jobs if ranks == 1 else ranks, training.threads, usable_cores(), device.type)
    speed, speed_from = estimate_speed(store, device, threads, flops_per_token, training)
    notes = shortcomings(training.precision, device) or slower_precision(device, training.precision, threads)
    speed_from = "; ".join([speed_from, *notes])
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    machine = Machine(device.type, device_name(device), threads, jobs, speed, speed_from, gpus)
    return machine.with_ranks(ranks)


def estimate_speed(
    store: Store, device: torch.device, threads: int, flops_per_token: float, training: TrainingConfig
) -> tuple[float, str]:
    """FLOP/s that one job reaches in training: from finished runs of similar cost on such a device, else from a probe.

    Similar: in the same precision on the same model of device, compiled or not alike, and within a factor of 3 in FLOPs
    per token, as small models reach a smaller share of the machine.
    """
    speeds = []
    compiles, _ = decide(training.compile, device.type, flops_per_token * training.steps * training.batch_tokens)
    for run in store.newest(SPEEDS_FROM):
        try:
            result, identity = run.result() or {}, (run.identity() or {}).get("identity", {})
        except DataFault:
            continue
        cost = result.get("flops_per_token")
        trained = (identity.get("settings") or {}).get("training") or {}
        stack = result.get("stack") or {}
        same = (
            (identity.get("device"), trained.get("precision")) == (device.type, training.precision)
            and identity.get("threads") in (threads, 0)
            and stack.get("device_name") in (None, device_name(device))
            and bool(identity.get("compiled")) == compiles
        )
        if same and cost and result.get("tokens_per_second") and 1 / 3 < cost / flops_per_token < 3:
            speeds.append(cost * result["tokens_per_second"] / stack.get("ranks", 1))
        if len(speeds) == SPEEDS_ENOUGH:
            break
    if speeds:
        return statistics.median(speeds), f"{plural(len(speeds), 'finished run')} here"
    if device.type != "cuda":
        return PROBE_SHARE * matmul_flops(device, training.precision, threads, PROBE_SIZE), "a matmul probe, so rough"
    work = flops_per_token * training.batch_tokens
    fastest = PROBE_SHARE * matmul_flops(device, training.precision, threads, GPU_PROBE_SIZE)
    return work / (work / fastest + GPU_STEP_SECONDS), "a matmul probe, so rough"


def estimate_memory(config: Config, model_costs: Costs, machine: Machine) -> int:
    """Bytes that one process takes for weights, gradients and AdamW state, for activations kept for backward, and for
    logits; about right.

    Per layer and token 34 C values of 2 bytes are the usual count for 16-bit training (arXiv:2205.05198); without
    autocast values take 4. Of logits there are at most those of a chunk of rows; with their copies they take 12 bytes.
    """
    model, training = config.model, config.training
    share = training.batch_tokens // model.block_size // machine.ranks
    tokens = (training.micro_batch_sequences or share) * model.block_size
    width = 34 * model.n_embd * (1 if training.precision in ("bf16", "fp16") else 2)
    scored = rows_at_once(tokens, model.vocab_size, machine.device)
    return 16 * model_costs.parameters + tokens * model.n_layer * width + 12 * scored * model.vocab_size
