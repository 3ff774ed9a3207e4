"""From an ablation to its runs, with what they cost, before anything runs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpt2lab.ablation import Arm, LoadedAblation
from gpt2lab.config import Config
from gpt2lab.costs import Costs, costs
from gpt2lab.data.files import data_home
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, Gpt2labError, Problem
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import choices, component_code, core_code, digest, run_id, run_identity, settings
from gpt2lab.registry import Choice
from gpt2lab.store import Store, now, read_json, write_json
from gpt2lab.training.precision import choose_device

PROBE_SECONDS, PROBE_SHARE = 0.1, 0.5  # a training step reaches about half of the speed of one large matmul


@dataclass(frozen=True)
class Run:
    """One training to be done, or found done: `config` with its seed, and the id that this determines."""

    id: str
    arm: str
    config: Config
    identity: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class ArmPlan:
    """One arm's runs and costs. `seconds`: estimated training time of one run; `memory`: estimated bytes of one run."""

    arm: Arm
    runs: tuple[Run, ...]
    costs: Costs
    seconds: float
    memory: int

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        training = self.arm.config.training
        return training.steps * training.batch_tokens


@dataclass(frozen=True)
class Machine:
    """Where runs will execute. `jobs` side by side, each with `threads` CPU threads; jobs x threads <= cores.

    `speed`: estimated FLOP/s of one job; `speed_from`: in words, where that estimate comes from.
    """

    device: str
    device_name: str
    threads: int
    jobs: int
    speed: float
    speed_from: str


@dataclass(frozen=True)
class Plan:
    """What an ablation will do: its arms with their runs, on this machine, over this data."""

    ablation: LoadedAblation
    arms: dict[str, ArmPlan]
    machine: Machine
    data: Prepared

    def runs(self) -> Iterator[Run]:
        """Seed-major, so that every arm has its first seed early and the live table shows a picture soon."""
        for index in range(max(len(arm.runs) for arm in self.arms.values())):
            yield from (arm.runs[index] for arm in self.arms.values() if index < len(arm.runs))

    @property
    def baseline(self) -> ArmPlan:
        return self.arms[self.ablation.baseline]


def make_plan(ablation: LoadedAblation, data: Prepared, store: Store, *, jobs: int | None = None) -> Plan:
    """Resolve every run of `ablation` on this machine. Raises ConfigError when the data or machine cannot serve it."""
    training = ablation.arms[ablation.baseline].config.training
    device = choose_device(training.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs, threads = shares(jobs, training.threads, cores, device.type)
    for arm in ablation.arms.values():
        check_data(arm, data)
    found = {name: known_costs(arm.config) for name, arm in ablation.arms.items()}
    speed, speed_from = estimate_speed(store, device, threads, found[ablation.baseline].flops_per_token)
    machine = Machine(device.type, device_name(device), threads, jobs, speed, speed_from)
    arms = {}
    for name, arm in ablation.arms.items():
        runs = tuple(make_run(arm, arm.first_seed + seed, data, machine) for seed in ablation.seeds)
        tokens = arm.config.training.steps * arm.config.training.batch_tokens
        seconds = found[name].flops_per_token * tokens / speed
        arms[name] = ArmPlan(arm, runs, found[name], seconds, estimate_memory(arm.config, found[name]))
    return Plan(ablation, arms, machine, data)


def known_costs(config: Config) -> Costs:
    """The costs of a model, remembered in the user's cache folder under all that they follow from: counting them needs
    torch's compiler, whose import alone takes more than a second."""
    parts = {
        "model": settings(config)["model"],
        "code": [core_code(), *(component_code(choice) for choice in choices(config))],
        "torch": torch.__version__,
    }
    path = data_home() / "costs" / f"{digest(parts)[:32]}.json"
    with contextlib.suppress(Gpt2labError, TypeError):  # unreadable is as good as absent
        kept = read_json(path)
        if kept is not None:
            return Costs(**kept)
    found = costs(config.model)
    with contextlib.suppress(Gpt2labError):
        write_json(path, asdict(found))
    return found


def make_run(arm: Arm, seed: int, data: Prepared, machine: Machine) -> Run:
    """One arm with one seed."""
    config = arm.config.model_copy(update={"seed": seed})
    identity = run_identity(
        config,
        data=data.fingerprint,
        device=machine.device,
        threads=machine.threads if machine.device == "cpu" else 0,
        torch_version=torch.__version__,
    )
    return Run(run_id(identity), arm.name, config, identity)


def shares(jobs: int | None, threads: int | None, cores: int, device: str) -> tuple[int, int]:
    """(jobs, threads) such that jobs x threads <= cores: more threads than cores make a step ten times slower.

    Raises ConfigError when the wish is for more.
    """
    if device == "cpu" and (threads or 1) > cores:
        raise ConfigError(
            f"{threads} threads in each run, this machine has {cores} cores",
            where="training.threads",
            hint=f"--set training.threads={cores}",
        )
    most = torch.cuda.device_count() if device == "cuda" else 1 if device == "mps" else cores // (threads or 1)
    jobs = most if jobs is None else jobs
    threads = threads or max(1, cores // jobs)
    if device == "cpu" and jobs * threads > cores:
        raise ConfigError(
            f"{jobs} jobs of {threads} threads need {jobs * threads} cores, this machine has {cores}",
            where="--jobs",
            hint=f"--jobs {cores // threads}",
        )
    return jobs, threads


def check_data(arm: Arm, data: Prepared) -> None:
    """Raises ConfigError with all in which an arm's model or evaluation does not fit the prepared data."""
    model, evaluation = arm.config.model, arm.config.evaluation
    lengths = {"training": len(data.train), "validation": len(data.validation)}
    wrong = [
        (
            "model.block_size",
            min(lengths.values()) - 1,
            f"the {split} split needs {model.block_size + 1} tokens, has {n}",
        )
        for split, n in lengths.items()
        if n <= model.block_size
    ]
    if data.vocab_size > model.vocab_size:
        what = f"the tokenizer has {data.vocab_size} tokens, the model rows for {model.vocab_size}"
        wrong.append(("model.vocab_size", data.vocab_size, what))
    if lengths["validation"] <= evaluation.tokens:
        what = f"the validation split needs {evaluation.tokens + 1} tokens, has {lengths['validation']}"
        wrong.append(("evaluation.tokens", lengths["validation"] - 1, what))
    if wrong:
        settings = dict.fromkeys(f"--set {key}={value}" for key, value, _ in wrong)
        problems = [Problem(f"arm {arm.name}: {key}", what) for key, _, what in wrong]
        raise ConfigError(problems, hint=" ".join(settings))


def estimate_speed(store: Store, device: torch.device, threads: int, flops_per_token: float) -> tuple[float, str]:
    """FLOP/s that one job reaches in training: from finished runs of similar cost on such a device, else from a probe.

    Similar: within a factor of 3 in FLOPs per token, as small models reach a smaller share of the machine.
    """
    seen = []
    for run in store.runs():
        result, identity = run.result() or {}, (run.identity() or {}).get("identity", {})
        cost = result.get("flops_per_token")
        same = identity.get("device") == device.type and identity.get("threads") in (threads, 0)
        if same and cost and result.get("tokens_per_second") and 1 / 3 < cost / flops_per_token < 3:
            seen.append(cost * result["tokens_per_second"])
    if seen:
        return statistics.median(seen), f"{len(seen)} finished runs here"
    return PROBE_SHARE * matmul_speed(device, threads), "a matmul probe, so rough"


def matmul_speed(device: torch.device, threads: int) -> float:
    """FLOP/s of a 512 x 512 x 512 float32 matrix product, the best of what fits into PROBE_SECONDS."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(512, 512, device=device)
        best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * 512**3 / best


def estimate_memory(config: Config, found: Costs) -> int:
    """Bytes of weights, gradients and AdamW state, of activations kept for backward, and of logits; about right.

    Per layer and token 34 C values of 2 bytes are the usual count for 16-bit training (arXiv:2205.05198); without
    autocast values take 4. Logits, their float32 copy and gradient take 12 bytes each.
    """
    model, training = config.model, config.training
    rows = training.micro_batch_sequences or training.batch_tokens // model.block_size
    width = 34 * model.n_embd * (1 if training.precision == "bf16" else 2)
    activations = rows * model.block_size * (model.n_layer * width + 12 * model.vocab_size)
    return 16 * found.parameters + activations


def device_name(device: torch.device) -> str:
    """What people call this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the folder that gpt2lab runs in, with a + when files differ from it; None outside git."""
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def study_record(plan: Plan, *, reproduce: str) -> dict[str, Any]:
    """What is declared before the first run, as plain data: all that the report reads, beside the runs."""
    ablation, config = plan.ablation, plan.baseline.arm.config
    spec = config.evaluation.spec(config.model.block_size)
    declared: dict[str, Any] = {
        "format": 1,
        "name": f"{ablation.name}@{ablation.scale}",
        "ablation": ablation.name,
        "scale": ablation.scale,
        "question": ablation.question,
        "baseline": ablation.baseline,
        "arms": {name: arm_record(arm, plan) for name, arm in plan.arms.items()},
        "contrasts": [list(pair) for pair in ablation.contrasts],
        "seeds": list(ablation.seeds),
        "metric": "val/loss",
        "smallest_effect": ablation.smallest_effect,
        "alpha": ablation.alpha,
        "equalise": "tokens",
        "bracketed": False,
        "screen": ablation.screen,
        "evaluation": {"key": evaluation_key(spec), **spec},
        "floors": plan.data.floors,
        "scope": {
            "preset": ablation.scale,
            "parameters": plan.baseline.costs.parameters,
            "tokens": plan.baseline.tokens,
            "data": f"{config.data.corpus.name} ({config.data.tokenizer})",  # its options may hold a machine's paths
            "optimizer": f"{config.optim.optimizer}, lr {config.optim.lr:g}",
        },
        "caveat": config.scale.caveat,
        "reproduce": reproduce,
    }
    stack = {
        "torch": torch.__version__,
        "device": plan.machine.device,
        "device_name": plan.machine.device_name,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }
    return {**declared, "stack": stack, "created": now(), "hash": digest(declared)}


def arm_record(plan: ArmPlan, whole: Plan) -> dict[str, Any]:
    """One arm's part of the study record."""
    sections = (plan.arm.config.model, plan.arm.config.optim)
    chosen = {name: value for section in sections for name, value in section if _is_choice(value)}
    return {
        "changes": dict(plan.arm.changes),
        "components": {name: _written(value) for name, value in chosen.items()},
        "runs": {str(run.seed): run.id for run in plan.runs},
        "parameters": plan.costs.parameters,
        "non_embedding_parameters": plan.costs.non_embedding_parameters,
        "active_parameters": plan.costs.active_parameters,
        "flops_per_token": plan.costs.flops_per_token,
        "tokens": plan.tokens,
        "expected": plan.arm.expected,
        "control": plan.arm.control,
        "exploratory": whole.ablation.exploratory_reason(plan.arm.name),
    }


def _is_choice(value: object) -> bool:
    return isinstance(value, Choice) or (isinstance(value, tuple) and all(isinstance(v, Choice) for v in value))


def _written(value: Choice | tuple[Choice, ...]) -> str:
    return str(value) if isinstance(value, Choice) else ", ".join(map(str, value)) or "none"
