"""Makes the records of studies: what is declared before the first run, and what is known of it so far."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from gpt2lab import records
from gpt2lab.analysis.verdicts import Declared
from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.data.prepared import Prepared
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import choices, digest, settings
from gpt2lab.planning.ablation import RATE
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.bracket import Bracket
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.runs import Run, tokens_of
from gpt2lab.planning.tune import Tuned
from gpt2lab.records import FORMAT, ArmRecord, BudgetPoint, RateTrial, Scope, Shared, StudyRecord
from gpt2lab.registry import Choice, mistakes
from gpt2lab.results import LOSS
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


def study_record(plan: Plan, *, reproduce: str) -> StudyRecord:
    """The record of a study. Its hash is that of what was declared; which runs that means on this code and machine, and
    what searches and looks found, is added as it becomes known."""
    ablation, config = plan.ablation, plan.baseline.arm.config
    declared: dict[str, Any] = {
        "format": FORMAT,
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
        **declared_tune(plan),
        "metric": LOSS,
        "smallest_effect": ablation.smallest_effect,
        "alpha": ablation.alpha,
        "equalise": ablation.axis,
        "equalise_by": ablation.knob,
        "tokens_per_parameter": ablation.tokens_per_parameter,
        "screen": ablation.screen,
        "evaluation": evaluation_of(config),
    }
    scope = scope_of(config, ablation.scale, plan.baseline.costs)
    if ablation.tune is not None and RATE in ablation.tune.space:  # every arm has a rate of its own
        scope = scope.with_(optimizer=str(config.optim.optimizer))
    arms = {name: ArmRecord(**arm, **arm_fields(plan.arms[name], plan)) for name, arm in declared["arms"].items()}
    return StudyRecord(
        **{**declared, "arms": arms},
        hash=digest(declared),
        bracketed=bool(ablation.lr_bracket),
        floors=plan.data.floors,
        noise=plan.floor.as_record() if plan.floor else None,
        noise_command=ablation.noise_command,
        left_out=list(plan.left_out),
        scope=scope,
        caveat=config.scale.caveat,
        mistakes=wrong_on_purpose(plan),
        reproduce=reproduce,
        stack=stack_of(plan.machine),
        created=now(),
    )


def single_record(
    study: str, scale: str, label: str, run: Run, costs: Costs, data: Prepared, machine: Machine, *, reproduce: str
) -> StudyRecord:  # fmt: skip
    """The record of one run by itself: a study of one arm that compares nothing."""
    config = run.config
    declared: dict[str, Any] = {
        "format": FORMAT,
        "name": f"{study}@{scale}",
        "ablation": study,
        "scale": scale,
        "question": f"What does {scale} reach?",
        "design": "one run",
        "baseline": label,
        "arms": {label: {"settings": digest(settings(config))[:16]}},
        "contrasts": [],
        "seeds": [run.seed],
        "smallest_effect": config.scale.smallest_effect,
        "alpha": 0.05,
        "evaluation": evaluation_of(config),
    }
    arm = ArmRecord(**declared["arms"][label], runs=_by_seed([run]), **costs_of(config, costs))
    return StudyRecord(
        **{**declared, "arms": {label: arm}},
        hash=digest(declared),
        floors=data.floors,
        scope=scope_of(config, scale, costs),
        caveat=config.scale.caveat,
        reproduce=reproduce,
        stack=stack_of(machine),
        created=now(),
    )


def evaluation_of(config: Config) -> dict[str, Any]:
    """How final values are measured, with the key of that measurement."""
    spec = config.evaluation.spec(config.model.block_size)
    return {"key": evaluation_key(spec), **spec}


def declared_tune(plan: Plan) -> dict[str, Any]:
    """What every arm's search declares; nothing without one, so that records from before there were any keep their
    hash."""
    tune = plan.ablation.tune
    if tune is None:
        return {}
    searches = [arm.tuning.search for arm in plan.arms.values() if isinstance(arm.tuning, Tuned)]
    seeds = searches[0].seeds if searches else ()
    return {"tune": {**tune.model_dump(mode="json"), "tuning_seeds": list(seeds)}}


def wrong_on_purpose(plan: Plan) -> dict[str, list[str]]:
    """Arm -> its components that are mistakes made on purpose; arms without any are left out."""
    wrong = {name: mistakes(choices(plan.ablation.arms[name].config)) for name in plan.arms}
    return {name: [f"{choice.slot}={choice.name}" for choice in found] for name, found in wrong.items() if found}


def declared_arm(arm: Arm) -> dict[str, Any]:
    """An arm as its file declares it; `settings` is a hash of all that it trains with, whatever the code."""
    trained = digest(settings(arm.config))[:16]
    return {"changes": dict(arm.changes), "control": arm.control, "expected": arm.expected, "settings": trained}


def declared_contrast(contrast: Declared) -> Any:
    """`[arm, against]`, or the weights of an effect by name."""
    if contrast.is_pair:
        return [contrast.arm, contrast.against]
    return {"arm": contrast.arm, "against": contrast.against, "weights": dict(contrast.weights)}


def arm_fields(plan: ArmPlan, whole: Plan) -> dict[str, Any]:
    """An arm's runs and costs, and how it was made comparable."""
    return {
        "runs": {} if whole.tuning else _by_seed(plan.runs),
        "bracket": bracket_record(plan),
        "tuned": tuned_record(plan),
        "shared": shared_record(plan, whole),
        "curve": [
            BudgetPoint(budget=budget, tokens=tokens_of(runs[0].config), runs=_by_seed(runs))
            for budget, runs in plan.curve.items()
            if not whole.tuning
        ],
        "adjustment": str(plan.adjustment) if plan.adjustment else None,
        "exploratory": whole.ablation.exploratory_reason(plan.arm.name),
        "not_comparable": plan.tuning.reason if plan.tuning else None,
        **costs_of(plan.arm.config, plan.costs),
    }


def costs_of(config: Config, costs: Costs) -> dict[str, Any]:
    """What one run of a config is made of and costs."""
    return {
        "components": components_of(config),
        "lr": config.optim.lr,
        "tokens": tokens_of(config),
        "parameters": costs.parameters,
        "non_embedding_parameters": costs.non_embedding_parameters,
        "active_parameters": costs.active_parameters,
        "flops_per_token": costs.flops_per_token,
    }


def bracket_record(plan: ArmPlan) -> records.Bracket | None:
    """The search for the arm's rate: every trial with its rate and run, and the multiple that was best."""
    tuning = plan.tuning
    if not isinstance(tuning, Bracket):
        return None
    trials = [
        RateTrial(factor=factor, lr=run.config.optim.lr, run=run.id, seed=run.seed)
        for factor, run in tuning.trials.items()
    ]
    return records.Bracket(trials=trials, best=tuning.best, at_edge=tuning.at_edge)


def tuned_record(plan: ArmPlan) -> records.Tuned | None:
    """The search for the arm's settings: where it is recorded, what it found, and how its trials ended."""
    tuning = plan.tuning
    if not isinstance(tuning, Tuned):
        return None
    return records.Tuned(
        sweep=tuning.name,
        label=plan.arm.name,
        study=tuning.search.study,
        over=not tuning.open,
        settings=tuning.settings,
        value=tuning.found.value if tuning.found else None,
        edge=dict(tuning.found.edge) if tuning.found else {},
        trials=sum(tuning.counts.values()),
        **{outcome: tuning.counts.get(outcome, 0) for outcome in ("finished", "pruned", "diverged", "failed")},
    )


def shared_record(plan: ArmPlan, whole: Plan) -> Shared | None:
    """The arm's settings as written, where a search may have found others, and its runs at them."""
    tuning = plan.tuning
    if not isinstance(tuning, Tuned):
        return None
    rate, runs = tuning.search.arm.config.optim.lr, {} if whole.tuning else _by_seed(plan.shared)
    return Shared(settings=tuning.own(), lr=rate, runs=runs)


def _by_seed(runs: Sequence[Run]) -> dict[str, str]:
    return {str(run.seed): run.id for run in runs}


def components_of(config: Config) -> dict[str, str]:
    """Slot -> what a config has in it, as people write it."""
    chosen = {name: value for section in (config.model, config.optim) for name, value in section if _is_choice(value)}
    return {name: _written(value) for name, value in chosen.items()}


def stack_of(machine: Machine) -> dict[str, Any]:
    """What trained, and on what."""
    return {**machine.stack, "git_commit": git_commit()}


def scope_of(config: Config, scale: str, costs: Costs) -> Scope:
    """What results hold for."""
    return Scope(
        preset=scale,
        parameters=costs.parameters,
        tokens=tokens_of(config),
        data=f"{config.data.corpus.name} ({config.data.tokenizer})",  # its options may hold a machine's paths
        optimizer=f"{config.optim.optimizer}, lr {config.optim.lr:g}",
    )


def _is_choice(value: object) -> bool:
    return isinstance(value, Choice) or (isinstance(value, tuple) and all(isinstance(v, Choice) for v in value))


def _written(value: Choice | tuple[Choice, ...]) -> str:
    return str(value) if isinstance(value, Choice) else ", ".join(map(str, value)) or "none"
