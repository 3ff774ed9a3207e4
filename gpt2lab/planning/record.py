"""Makes the records of studies: what is declared before the first run, what is known of it so far, and what was
declared under the same name before.

A declaration counts as it was before the first results. So a study may be stopped, run again and extended, and its
verdicts keep their meaning:

- Seeds that are added after a verdict are judged at the looks that every study has (analysis/looks.py).
- Looks that are written down, changed or left out after results were there do not count; those declared first do.
- Leaving out seeds that have results is a choice among results, and so is ending before the first look: exploratory.
- Contrasts that are left out stay members of the family; a contrast whose results were there before it was declared is
  exploratory. Smallest effect and alpha are those of the first declaration.
- Fresh seeds alone begin anew, and may be added to likewise."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2lab.analysis.verdicts import FEWEST, Declared
from gpt2lab.analysis.wording import listed
from gpt2lab.config import Config
from gpt2lab.costs import Costs
from gpt2lab.data.prepared import Prepared
from gpt2lab.evaluation import evaluation_key
from gpt2lab.identity import choices, digest, settings
from gpt2lab.planning.ablation import RATE
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.runs import Run, tokens_of
from gpt2lab.records import FORMAT, ArmRecord, BudgetPoint, Earlier, Effect, History, Scope, Shared, StudyRecord
from gpt2lab.registry import Choice, mistakes
from gpt2lab.results import LOSS
from gpt2lab.store import Store, now
from gpt2lab.text import plural


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
    searches = [arm.tuning.search for arm in plan.arms.values() if arm.tuning and arm.tuning.search]
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
        "bracket": plan.tuning.bracket_record() if plan.tuning else None,
        "tuned": plan.tuning.tuned_record() if plan.tuning else None,
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


def shared_record(plan: ArmPlan, whole: Plan) -> Shared | None:
    """The arm's settings as written, where a search may have found others, and its runs at them."""
    tuning = plan.tuning
    if tuning is None or tuning.search is None:
        return None
    runs = {} if whole.tuning else _by_seed(plan.shared)
    return Shared(settings=tuning.as_written(), lr=tuning.around.config.optim.lr, runs=runs)


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


KEPT = ("hash", "created", "reproduce", "seeds", "baseline_seeds", "looks", "contrasts", "smallest_effect", "alpha")
"""What is remembered of an earlier declaration, beside its arms and the seeds that had results."""


def with_history(record: StudyRecord, store: Store) -> StudyRecord:
    """The record, with what was declared under its name before. The same declaration again keeps its date."""
    if record.name not in store.studies():
        return record.with_(earlier=[], history=history(record, []))
    before = store.study(record.name)
    earlier = list(before.earlier)
    if before.hash == record.hash:
        return record.with_(created=before.created, earlier=earlier, history=history(record, earlier))
    replaced = {key: getattr(before, key) for key in KEPT}
    arms = {name: arm.settings for name, arm in before.arms.items()}
    earlier.append(Earlier(**replaced, arms=arms, finished=seeds_finished(before, store)))
    return record.with_(earlier=earlier, history=history(record, earlier))


def seeds_finished(record: StudyRecord, store: Store) -> list[int]:
    """The seeds at which two arms of a record have results, so that somebody may have compared them. An arm with seeds
    of its own has them in the place of the study's, one by one."""
    arms = [{int(seed): run for seed, run in arm.runs.items()} for arm in record.arms.values()]
    found = []
    for position, seed in enumerate(record.seeds):
        own = [runs.get(seed) or dict(enumerate(runs[s] for s in sorted(runs))).get(position) for runs in arms]
        ids = {run for run in own if run}
        if sum(store.run(run).result() is not None for run in ids) > 1:
            found.append(seed)
    return found


def history(record: StudyRecord, earlier: Sequence[Earlier]) -> History:
    """What earlier declarations with results mean for this one: looks, first_seeds, first_baseline, smallest_effect and
    alpha are those that were declared when no result could be seen."""
    seen = _gone_on_from(record, [past for past in earlier if past.finished and len(_alike(record, past)) > 1])
    now, had = set(record.seeds), {seed for past in seen for seed in past.finished}
    fresh = History(
        looks=list(record.looks), first_seeds=len(now), first_baseline=record.baseline_seeds,
        smallest_effect=record.smallest_effect, alpha=record.alpha,
    )  # fmt: skip
    if not had & now:
        return fresh
    declared = [_named(contrast) for contrast in record.contrasts]
    before = [_named(contrast) for past in seen for contrast in past.contrasts or ()]
    known = {arm for past in seen for arm in _alike(record, past)}
    counting = fresh.with_(
        undeclared=_chosen_among(had, now),
        late=[pair for pair in declared if before and pair not in before and set(pair) <= known],
        dropped=[list(pair) for pair in dict.fromkeys(map(tuple, before)) if list(pair) not in declared],
        looks=list(seen[0].looks or ()),
        smallest_effect=seen[0].smallest_effect or record.smallest_effect,
        alpha=seen[0].alpha or record.alpha,
    )
    first = next((past for past in seen if len(past.finished) >= FEWEST), None)  # fewer allow no word
    if first is not None:
        counting = counting.with_(first_seeds=len(first.seeds or ()), first_baseline=first.baseline_seeds)
        counting = counting.with_(undeclared=counting.undeclared or _stopped_early(counting, now))
    return counting.with_(changed=_changed(record, counting, first or seen[0]))


def _gone_on_from(record: StudyRecord, seen: Sequence[Earlier]) -> Sequence[Earlier]:
    """The earlier declarations from the last one on whose seeds were all fresh; all of them, where this one has seeds
    from before that again."""
    began, had = 0, set[int]()
    for i, past in enumerate(seen):
        if not had & set(past.seeds or ()):
            began = i
        had |= set(past.finished)
    older = {seed for past in seen[:began] for seed in past.finished}
    return seen if older & set(record.seeds) else seen[began:]


def _alike(record: StudyRecord, past: Earlier) -> list[str]:
    """The arms of an earlier declaration that this one trains in the same way."""
    if not isinstance(past.arms, Mapping):  # records from before settings were remembered have the names alone
        return [name for name in past.arms if name in record.arms]
    return [name for name, hashed in past.arms.items() if name in record.arms and record.arms[name].settings == hashed]


def _named(contrast: list[str] | Effect) -> list[str]:
    """(arm, against), whichever kind of contrast it is."""
    return [contrast.arm, contrast.against] if isinstance(contrast, Effect) else contrast


def _chosen_among(had: set[int], now: set[int]) -> str | None:
    """Why the seeds are a choice among results, or None."""
    left_out, added = sorted(had - now), now - had
    if left_out:
        seeds = listed(map(str, left_out))
        verb = "has results and is" if len(left_out) == 1 else "have results and are"
        return f"{'seed' if len(left_out) == 1 else 'seeds'} {seeds} {verb} left out"
    if added and min(added) < max(had):
        return f"added seeds must follow those that have results, up to {max(had)}"
    return None


def _stopped_early(counting: History, now: set[int]) -> str | None:
    """Why it ends before its first look, or None: whoever may stop where results please has looked after every seed."""
    due = (counting.looks or [counting.first_seeds])[0]
    if len(now) >= due:
        return None
    return f"{due} seeds were declared before results were there, and only {len(now)} are now"


def _changed(record: StudyRecord, counting: History, first: Earlier) -> list[str]:
    """What counts otherwise than the record now says, in sentences without a stop."""
    changes = []
    n = len(first.finished)
    if set(record.seeds) - set(first.seeds or ()) and not counting.undeclared:
        changes.append(f"Seeds were added after {n} had results")
    if counting.looks and list(record.looks) != counting.looks:
        looks = listed(map(str, counting.looks))
        changes.append(f"`looks` were changed after {n} seeds had results; those that count are {looks}")
    elif record.looks and not counting.looks:
        changes.append(f"`looks` were written down after {n} seeds had results, and do not count as declared")
    for key, name in (("smallest_effect", "The smallest effect of interest"), ("alpha", "alpha")):
        new, old = getattr(record, key), getattr(counting, key)
        if new != old:
            changes.append(f"{name} was changed to {new:g} after results were there; it counts as {old:g}")
    if counting.dropped:
        contrasts = listed(f"{arm} against {against}" for arm, against in counting.dropped)
        changes.append(
            f"{plural(len(counting.dropped), 'contrast')} with results left out, still counted in the family: "
            f"{contrasts}"
        )
    return changes
