"""From an ablation to its runs, with what they cost, before anything runs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
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
from gpt2lab.machine import Machine, device_name, estimate_memory, estimate_speed, shares
from gpt2lab.registry import Choice
from gpt2lab.store import Store, now, read_json, write_json
from gpt2lab.training.precision import choose_device


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
