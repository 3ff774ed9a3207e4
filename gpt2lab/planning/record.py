"""What a study declares before its first run, as plain data: all that its report reads, beside the runs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import choices, digest, settings
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.runs import tokens_of
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
        "scope": {
            "preset": ablation.scale,
            "parameters": plan.baseline.costs.parameters,
            "tokens": plan.baseline.tokens,
            "data": f"{config.data.corpus.name} ({config.data.tokenizer})",  # its options may hold a machine's paths
            "optimizer": f"{config.optim.optimizer}, lr {config.optim.lr:g}",
        },
        "caveat": config.scale.caveat,
        "mistakes": wrong_on_purpose(plan),
        "reproduce": reproduce,
        "stack": {
            "torch": torch.__version__,
            "device": plan.machine.device,
            "device_name": plan.machine.device_name,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "git_commit": git_commit(),
        },
    }
    arms = {name: entry | arm_record(plan.arms[name], plan) for name, entry in declared["arms"].items()}
    return {**declared, **known, "arms": arms, "created": now(), "hash": digest(declared)}


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
    sections = (plan.arm.config.model, plan.arm.config.optim)
    chosen = {name: value for section in sections for name, value in section if _is_choice(value)}
    return {
        "components": {name: _written(value) for name, value in chosen.items()},
        "runs": {} if whole.bracketing else {str(run.seed): run.id for run in plan.runs},
        "bracket": bracket_record(plan),
        "curve": [
            {"budget": budget, "tokens": tokens_of(runs[0].config), "runs": {str(run.seed): run.id for run in runs}}
            for budget, runs in plan.curve.items()
            if not whole.bracketing
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
    if plan.tuning is None:
        return None
    trials = [
        {"factor": factor, "lr": run.config.optim.lr, "run": run.id, "seed": run.seed}
        for factor, run in plan.tuning.trials.items()
    ]
    return {"trials": trials, "best": plan.tuning.best, "at_edge": plan.tuning.at_edge}


def _is_choice(value: object) -> bool:
    return isinstance(value, Choice) or (isinstance(value, tuple) and all(isinstance(v, Choice) for v in value))


def _written(value: Choice | tuple[Choice, ...]) -> str:
    return str(value) if isinstance(value, Choice) else ", ".join(map(str, value)) or "none"
