"""What a study declares before its first run, as plain data: all that its report reads, beside the runs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import choices, digest, settings
from gpt2lab.planning.ablation import RATE
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.bracket import Bracket
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.runs import Run, tokens_of
from gpt2lab.planning.tune import Tuned
from gpt2lab.registry import Choice, mistakes
from gpt2lab.store import now


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
    """The record of a study. Its hash is that of what was declared; which runs that means on this code and machine, and
    what bracketing and looks found, is added as it becomes known."""
    ablation, config = plan.ablation, plan.baseline.arm.config
    spec = config.evaluation.spec(config.model.block_size)
    declared: dict[str, Any] = {
        "format": 2,
        "name": f"{ablation.name}@{ablation.scale}",
        "ablation": ablation.name,
        "scale": ablation.scale,
        "question": ablation.question,
        "design": ablation.design,
        "factors": {name: list(levels) for name, levels in ablation.factors.items()},
        "expected": dict(ablation.expected),
        "baseline": ablation.baseline,
        "arms": {name: declared_arm(ablation.arms[name]) for name in plan.arms},
        "contrasts": [declared_contrast(contrast) for contrast in ablation.contrasts],
        "seeds": list(plan.seeds),
        "baseline_seeds": ablation.baseline_seeds,
        "looks": list(ablation.looks),
        "lr_bracket": list(ablation.lr_bracket),
        "budgets": list(ablation.budgets),
        **tune_record(plan),
        "metric": "val/loss",
        "smallest_effect": ablation.smallest_effect,
        "alpha": ablation.alpha,
        "equalise": ablation.axis,
        "equalise_by": ablation.knob,
        "tokens_per_parameter": ablation.tokens_per_parameter,
        "screen": ablation.screen,
        "evaluation": {"key": evaluation_key(spec), **spec},
    }
    known = {
        "bracketed": bool(ablation.lr_bracket),
        "floors": plan.data.floors,
        "noise": plan.floor.as_record() if plan.floor else None,
        "noise_command": ablation.noise_command,
        "left_out": list(plan.left_out),
        "scope": scope_of(config, ablation.scale, plan.baseline.costs) | _tuned_scope(plan),
        "caveat": config.scale.caveat,
        "mistakes": wrong_on_purpose(plan),
        "reproduce": reproduce,
        "stack": stack_of(plan.machine),
    }
    arms = {name: entry | arm_record(plan.arms[name], plan) for name, entry in declared["arms"].items()}
    return {"tune": None, **declared, **known, "arms": arms, "created": now(), "hash": digest(declared)}


def _tuned_scope(plan: Plan) -> dict[str, Any]:
    """What results hold for where every arm has a rate of its own: no rate in particular."""
    tuned = plan.ablation.tune is not None and RATE in plan.ablation.tune.space
    return {"optimizer": str(plan.baseline.arm.config.optim.optimizer)} if tuned else {}


def tune_record(plan: Plan) -> dict[str, Any]:
    """What every arm's search declares; nothing without one, so that records from before there were any keep their
    hash."""
    tune = plan.ablation.tune
    if tune is None:
        return {}
    seeds = next((one.search.seeds for arm in plan.arms.values() if isinstance(one := arm.tuning, Tuned)), ())
    return {"tune": {**tune.model_dump(mode="json"), "tuning_seeds": list(seeds)}}


def wrong_on_purpose(plan: Plan) -> dict[str, list[str]]:
    """Arm -> its components that are mistakes made on purpose; arms without any are left out."""
    found = {name: mistakes(choices(plan.ablation.arms[name].config)) for name in plan.arms}
    return {name: [f"{one.slot}={one.name}" for one in wrong] for name, wrong in found.items() if wrong}


def declared_arm(arm: Arm) -> dict[str, Any]:
    """An arm as its file declares it; `settings` is a hash of all that it trains with, whatever the code."""
    trained = digest(settings(arm.config))[:16]
    return {"changes": dict(arm.changes), "control": arm.control, "expected": arm.expected, "settings": trained}


def declared_contrast(contrast: Declared) -> Any:
    """`[arm, against]`, or the weights of an effect by name."""
    if contrast.is_pair:
        return [contrast.arm, contrast.against]
    return {"arm": contrast.arm, "against": contrast.against, "weights": dict(contrast.weights)}


def arm_record(plan: ArmPlan, whole: Plan) -> dict[str, Any]:
    """An arm's runs and costs, and how it was made comparable."""
    return {
        "components": components_of(plan.arm.config),
        "runs": {} if whole.tuning else _by_seed(plan.runs),
        "bracket": bracket_record(plan),
        "tuned": tuned_record(plan),
        "shared": shared_record(plan, whole),
        "curve": [
            {"budget": budget, "tokens": tokens_of(runs[0].config), "runs": {str(run.seed): run.id for run in runs}}
            for budget, runs in plan.curve.items()
            if not whole.tuning
        ],
        "lr": plan.arm.config.optim.lr,
        "tokens": plan.tokens,
        "adjustment": str(plan.adjustment) if plan.adjustment else None,
        "parameters": plan.costs.parameters,
        "non_embedding_parameters": plan.costs.non_embedding_parameters,
        "active_parameters": plan.costs.active_parameters,
        "flops_per_token": plan.costs.flops_per_token,
        "exploratory": whole.ablation.exploratory_reason(plan.arm.name),
        "not_comparable": plan.tuning.reason if plan.tuning else None,
    }


def bracket_record(plan: ArmPlan) -> dict[str, Any] | None:
    """The search for the arm's rate: every trial with its rate and run, and the multiple that was best."""
    if not isinstance(plan.tuning, Bracket):
        return None
    trials = [
        {"factor": factor, "lr": run.config.optim.lr, "run": run.id, "seed": run.seed}
        for factor, run in plan.tuning.trials.items()
    ]
    return {"trials": trials, "best": plan.tuning.best, "at_edge": plan.tuning.at_edge}


def tuned_record(plan: ArmPlan) -> dict[str, Any] | None:
    """The search for the arm's settings: where it is recorded, what it found, and how its trials ended."""
    one = plan.tuning
    if not isinstance(one, Tuned):
        return None
    found = one.found
    return {
        "sweep": one.name,
        "label": plan.arm.name,
        "study": one.search.study,
        "over": one.open is False,
        "settings": one.settings,
        "value": found.value if found else None,
        "edge": dict(found.edge) if found else {},
        "trials": sum(one.counts.values()),
        **{outcome: one.counts.get(outcome, 0) for outcome in ("finished", "pruned", "diverged", "failed")},
    }


def shared_record(plan: ArmPlan, whole: Plan) -> dict[str, Any] | None:
    """The arm's settings as written, where a search may have found others, and its runs at them."""
    one = plan.tuning
    if not isinstance(one, Tuned):
        return None
    return {
        "settings": one.own(),
        "lr": one.search.arm.config.optim.lr,
        "runs": {} if whole.tuning else _by_seed(plan.shared),
    }


def _by_seed(runs: Sequence[Run]) -> dict[str, str]:
    return {str(run.seed): run.id for run in runs}


def components_of(config: Config) -> dict[str, str]:
    """Slot -> what a config has in it, as people write it."""
    chosen = {name: value for section in (config.model, config.optim) for name, value in section if _is_choice(value)}
    return {name: _written(value) for name, value in chosen.items()}


def stack_of(machine: Machine) -> dict[str, Any]:
    """What trained, and on what."""
    return {
        "torch": torch.__version__,
        "device": machine.device,
        "device_name": machine.device_name,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }


def scope_of(config: Config, scale: str, costs: Costs) -> dict[str, Any]:
    """What results hold for."""
    return {
        "preset": scale,
        "parameters": costs.parameters,
        "tokens": tokens_of(config),
        "data": f"{config.data.corpus.name} ({config.data.tokenizer})",  # its options may hold a machine's paths
        "optimizer": f"{config.optim.optimizer}, lr {config.optim.lr:g}",
    }


def _is_choice(value: object) -> bool:
    return isinstance(value, Choice) or (isinstance(value, tuple) and all(isinstance(v, Choice) for v in value))


def _written(value: Choice | tuple[Choice, ...]) -> str:
    return str(value) if isinstance(value, Choice) else ", ".join(map(str, value)) or "none"
