"""Builds the records of studies: the declaration, the results so far, and earlier declarations under the same name.

A declaration counts as it was before the first results. A study may therefore be stopped, resumed and extended, and
its verdicts stay valid:

- Seeds that are added after a verdict are judged at the looks that every study has (analysis/looks.py).
- Looks that are added, changed or removed after the first results do not count; those declared first do.
- Leaving out seeds that have results, or ending before the first look, is selection by results: exploratory.
- Contrasts that are left out stay members of the family; a contrast declared after its results existed is exploratory.
  Smallest effect and alpha are those of the first declaration.
- A declaration with new seeds only starts a new history, and may be extended in the same way."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpt2lab.analysis.verdicts import FEWEST, Declared
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import plural
from gpt2lab.config import Config
from gpt2lab.data.prepared import Prepared
from gpt2lab.evaluation.validation import evaluation_key
from gpt2lab.identity import choices, digest, settings
from gpt2lab.inspection.costs import Costs
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.noise import Floor
from gpt2lab.planning.plan import ArmPlan, Plan
from gpt2lab.planning.runs import Run, tokens_of
from gpt2lab.records import (
    FORMAT,
    SINGLE,
    ArmRecord,
    BudgetPoint,
    Earlier,
    Effect,
    History,
    ScopeRecord,
    Shared,
    StudyRecord,
)
from gpt2lab.registry import Choice, mistakes
from gpt2lab.store import Store, now


def git_commit() -> str | None:
    """The commit of the folder that gpt2lab runs in, with a + when files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        process = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return process.stdout.strip() if process.returncode == 0 else None

    if shutil.which("git") is None or not (head := git("rev-parse", "--short=12", "HEAD")):
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def study_record(plan: Plan, *, reproduce: str) -> StudyRecord:
    """The record of a study. Its hash covers the declaration; the runs on this code and machine, and the results of
    searches and looks, are added as they become known."""
    ablation, config = plan.ablation, plan.baseline.arm.config
    declared = _declared(ablation.name, ablation.scale, config) | {
        "question": ablation.question,
        "design": ablation.design,
        "factors": {name: list(levels) for name, levels in ablation.factors.items()},
        "expected": dict(ablation.expected),
        "baseline": ablation.baseline,
        "arms": {name: _declared_arm(ablation.arms[name]) for name in plan.arms},
        "contrasts": [_declared_contrast(contrast) for contrast in ablation.contrasts],
        "seeds": list(plan.seeds),
        "baseline_seeds": ablation.baseline_seeds,
        "looks": list(ablation.looks),
        "budgets": list(ablation.budgets),
        **_declared_tune(plan),
        "metric": ablation.metric,
        "smallest_effect": ablation.smallest_effect,
        "alpha": ablation.alpha,
        "equalise": ablation.axis,
        "equalise_by": ablation.knob,
        "tokens_per_parameter": ablation.tokens_per_parameter,
        "screen": ablation.screen,
    }
    # without the keys where there is nothing, so that the hashes of older records stay the same
    if ablation.judged_contexts:
        declared["judged_contexts"] = list(ablation.judged_contexts)
    if ablation.confirm:
        declared["confirm"] = ablation.confirm.model_dump()
    if ablation.screened:
        declared["screened"] = ablation.screened.plain()
    bracketed = bool(declared["lr_bracket"])
    scope = scope_of(config, ablation.scale, plan.baseline.costs)
    if ablation.tunes_rate and not bracketed:  # the rates differ between arms
        scope = scope.with_(optimizer=str(config.optim.optimizer))
    own_data = any(arm.arm.data for arm in plan.arms.values())
    if own_data:
        scope = scope.with_(data=f"validated on {corpus_name(config)}")
    mistakes_by_arm = {name: mistakes(choices(ablation.arms[name].config)) for name in plan.arms}
    results = conditions(config, scope, plan.data, plan.machine, reproduce, plan.floor) | {
        "bracketed": bracketed,
        "validation_text": plan.data.validation_text if own_data else None,
        "noise_command": ablation.noise_command,
        "left_out": list(plan.left_out),
        "campaign": ablation.campaign,
        "mistakes": {arm: [f"{c.slot}={c.name}" for c in wrong] for arm, wrong in mistakes_by_arm.items() if wrong},
    }
    return _record(declared, {name: _arm_fields(arm, plan) for name, arm in plan.arms.items()}, results)


def single_record(
    study: str, scale: str, label: str, changes: Mapping[str, Any], run: Run, costs: Costs, data: Prepared,
    machine: Machine, *, reproduce: str,
) -> StudyRecord:  # fmt: skip
    """The record of a single run: a study of one arm without contrasts."""
    config = run.config
    declared = _declared(study, scale, config) | {
        "question": f"What does {scale} reach?",
        "design": SINGLE,
        "baseline": label,
        "arms": {label: {"settings": digest(settings(config))[:16]}},
        "contrasts": [],
        "seeds": [run.seed],
        "smallest_effect": config.scale.smallest_effect,
        "alpha": 0.05,
    }
    arm = {"changes": dict(changes), "runs": _by_seed([run]), **_costs_of(config, costs)}
    scope = scope_of(config, scale, costs)
    return _record(declared, {label: arm}, conditions(config, scope, data, machine, reproduce))


def _declared(study: str, scale: str, config: Config) -> dict[str, Any]:
    """The part of the declaration common to all records: the name, and the final evaluation."""
    name = {"format": FORMAT, "name": f"{study}@{scale}", "ablation": study, "scale": scale}
    return {**name, "evaluation": final_evaluation(config)}


def final_evaluation(config: Config) -> dict[str, Any]:
    """How final values are measured, with the key of the measurement."""
    spec = config.evaluation.spec(config.model.block_size)
    return {"key": evaluation_key(spec), **spec}


def conditions(
    config: Config, scope: ScopeRecord, data: Prepared, machine: Machine, reproduce: str, floor: Floor | None = None
) -> dict[str, Any]:
    """What studies and sweeps record of the conditions of their results."""
    return {
        "floors": data.floors,
        "noise": floor.as_record() if floor else None,
        "scope": scope,
        "caveat": config.scale.caveat,
        "reproduce": reproduce,
        "stack": {**machine.stack, "git_commit": git_commit()},
    }


def _record(
    declared: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]
) -> StudyRecord:
    """The declaration with its hash, and the results; `arms`: results by arm."""
    whole = {name: ArmRecord(**arm, **arms[name]) for name, arm in declared["arms"].items()}
    return StudyRecord(**{**declared, **results, "arms": whole, "hash": digest(declared), "created": now()})


def _declared_tune(plan: Plan) -> dict[str, Any]:
    """The declared tuning: the multiples of a grid, and the search of every arm. The key `tune` is left out without a
    search, so that the hashes of older records stay the same."""
    tune = plan.ablation.tune
    declared: dict[str, Any] = {"lr_bracket": list(tune.multiples) if tune else []}
    if tune is not None and not tune.multiples:
        searches = [arm.tuning.search for arm in plan.arms.values() if arm.tuning and arm.tuning.search]
        seeds = searches[0].seeds if searches else ()
        declared["tune"] = {**tune.model_dump(mode="json"), "tuning_seeds": list(seeds)}
    return declared


def _declared_arm(arm: Arm) -> dict[str, Any]:
    """An arm as its file declares it; `settings` is a hash of its training settings, independent of the code."""
    trained = digest(settings(arm.config))[:16]
    return {"changes": dict(arm.changes), "control": arm.control, "expected": arm.expected, "settings": trained}


def _declared_contrast(contrast: Declared) -> Any:
    """`[arm, against]`, or the weights of an effect by name."""
    if contrast.is_pair:
        return [contrast.arm, contrast.against]
    return {"arm": contrast.arm, "against": contrast.against, "weights": dict(contrast.weights)}


def _arm_fields(arm: ArmPlan, plan: Plan) -> dict[str, Any]:
    """An arm's runs, costs, tuning and adjustment; there are no runs until tuning has ended."""

    def by_seed(runs: Sequence[Run]) -> dict[str, str]:
        return {} if plan.tuning else _by_seed(runs)

    tuning, shared = arm.tuning, None
    if tuning and tuning.search:
        lr = tuning.search.arm.config.optim.lr
        shared = Shared(settings=tuning.search.as_written, lr=lr, runs=by_seed(arm.shared))
    return {
        "runs": by_seed(arm.runs),
        "bracket": tuning.bracket if tuning else None,
        "tuned": tuning.tuned if tuning else None,
        "shared": shared,
        "curve": [
            BudgetPoint(budget=budget, tokens=tokens_of(runs[0].config), runs=by_seed(runs))
            for budget, runs in arm.curve.items()
            if not plan.tuning
        ],
        "adjustment": str(arm.adjustment) if arm.adjustment else None,
        "exploratory": plan.ablation.exploratory_reason(arm.arm.name),
        "moves_rate": plan.ablation.moves_rate(arm.arm.name),
        "not_comparable": tuning.reason if tuning else None,
        **_costs_of(arm.arm.config, arm.costs),
    }


def _costs_of(config: Config, costs: Costs) -> dict[str, Any]:
    """Components, learning rate, tokens and costs of one run."""
    made_of = {"components": components_of(config), "lr": config.optim.lr, "tokens": tokens_of(config)}
    return {**made_of, **asdict(costs)}


def _by_seed(runs: Sequence[Run]) -> dict[str, str]:
    return {str(run.seed): run.id for run in runs}


def components_of(config: Config) -> dict[str, str]:
    """Slot -> its component as written in a config."""
    written = {}
    drawn = [("batches", config.data.batches)] if config.data.batches else []
    for name, value in (*config.model, *config.optim, *drawn):
        if isinstance(value, Choice):
            written[name] = str(value)
        elif isinstance(value, tuple) and all(isinstance(choice, Choice) for choice in value):
            written[name] = ", ".join(map(str, value)) or "none"
    return written


def scope_of(config: Config, scale: str, costs: Costs) -> ScopeRecord:
    """The conditions under which results are valid."""
    return ScopeRecord(
        preset=scale,
        parameters=costs.parameters,
        tokens=tokens_of(config),
        data=f"{corpus_name(config)} ({config.data.tokenizer})",
        optimizer=f"{config.optim.optimizer}, lr {config.optim.lr:g}",
    )


def corpus_name(config: Config) -> str:
    """The corpus, or those that it is made of; without options, which may hold a machine's paths."""
    corpus = config.data.corpus
    return " and ".join(corpus.options["corpora"]) if corpus.name == "several" else corpus.name


ENDED = ("finished", "diverged", "damaged")
"""Statuses of runs whose results may have been seen."""


def with_history(record: StudyRecord, store: Store) -> StudyRecord:
    """The record with the earlier declarations under its name. An identical declaration keeps its date."""
    before = store.study(record.name) if record.name in store.studies() else None
    earlier = list(before.earlier) if before else []
    if before and before.hash == record.hash:
        record = record.with_(created=before.created)
    elif before:
        past = {key: getattr(before, key) for key in Earlier.model_fields.keys() - {"arms", "finished"}}
        arms = {name: arm.settings for name, arm in before.arms.items()}
        earlier.append(Earlier(**past, arms=arms, finished=seeds_finished(before, store)))
    return record.with_(earlier=earlier, history=history(record, earlier))


def seeds_finished(record: StudyRecord, store: Store) -> list[int]:
    """The seeds at which at least two arms of a record have results, so that they may have been compared. Seeds of an
    arm with its own correspond to the study's by position."""
    arms = [{int(seed): run for seed, run in arm.runs.items()} for arm in record.arms.values()]
    finished = []
    for position, seed in enumerate(record.seeds):
        ids = {runs.get(seed) or dict(enumerate(runs[s] for s in sorted(runs))).get(position) for runs in arms}
        if sum(store.run(run).status() in ENDED for run in ids if run) > 1:
            finished.append(seed)
    return finished


def history(record: StudyRecord, earlier: Sequence[Earlier]) -> History:
    """The effect of earlier declarations with results: looks, first_seeds, first_baseline, smallest_effect and alpha
    are those declared before any result existed."""
    relevant = _relevant(record, [past for past in earlier if past.finished and len(_same_arms(record, past)) > 1])
    seeds, finished = set(record.seeds), {seed for past in relevant for seed in past.finished}
    declared = History(
        looks=list(record.looks), first_seeds=len(seeds), first_baseline=record.baseline_seeds,
        smallest_effect=record.smallest_effect, alpha=record.alpha,
    )  # fmt: skip
    if not finished & seeds:
        return declared
    pairs = [_pair(contrast) for contrast in record.contrasts]
    before = [_pair(contrast) for past in relevant for contrast in past.contrasts or ()]
    same = {arm for past in relevant for arm in _same_arms(record, past)}
    undeclared = _chosen_among(finished, seeds)
    valid = declared.with_(
        late=[pair for pair in pairs if before and pair not in before and set(pair) <= same],
        late_contexts=[
            at for at in record.judged_contexts if any(at not in (past.judged_contexts or ()) for past in relevant)
        ],
        dropped=[list(pair) for pair in dict.fromkeys(map(tuple, before)) if list(pair) not in pairs],
        looks=list(relevant[0].looks or ()),
        smallest_effect=relevant[0].smallest_effect or record.smallest_effect,
        alpha=relevant[0].alpha or record.alpha,
    )
    first = next((past for past in relevant if len(past.finished) >= FEWEST), None)  # fewer do not allow a verdict
    if first is not None:
        valid = valid.with_(first_seeds=len(first.seeds or ()), first_baseline=first.baseline_seeds)
        first_look = (valid.looks or [valid.first_seeds])[0]
        if undeclared is None and len(seeds) < first_look:  # optional stopping amounts to a look at every seed
            undeclared = f"{first_look} seeds were declared before results were there, and only {len(seeds)} are now"
    valid = valid.with_(undeclared=undeclared)
    return valid.with_(changed=_changed(record, valid, first or relevant[0]))


def _relevant(record: StudyRecord, declarations: Sequence[Earlier]) -> Sequence[Earlier]:
    """The declarations since the last one with only new seeds; all of them, where this one reuses older seeds."""
    start, finished = 0, set[int]()
    for i, past in enumerate(declarations):
        if not finished & set(past.seeds or ()):
            start = i
        finished |= set(past.finished)
    older = {seed for past in declarations[:start] for seed in past.finished}
    return declarations if older & set(record.seeds) else declarations[start:]


def _same_arms(record: StudyRecord, past: Earlier) -> list[str]:
    """The arms of an earlier declaration with the same settings in this one."""
    if not isinstance(past.arms, Mapping):  # older records hold names only
        return [name for name in past.arms if name in record.arms]
    return [name for name, hashed in past.arms.items() if name in record.arms and record.arms[name].settings == hashed]


def _pair(contrast: list[str] | Effect) -> list[str]:
    """[arm, against], whichever kind of contrast it is."""
    return [contrast.arm, contrast.against] if isinstance(contrast, Effect) else contrast


def _chosen_among(finished: set[int], seeds: set[int]) -> str | None:
    """Why the seeds are a choice among results, or None."""
    left_out, added = sorted(finished - seeds), seeds - finished
    if left_out:
        verb = "has results and is" if len(left_out) == 1 else "have results and are"
        return f"{'seed' if len(left_out) == 1 else 'seeds'} {listed(map(str, left_out))} {verb} left out"
    if added and min(added) < max(finished):
        return f"added seeds must follow those that have results, up to {max(finished)}"
    return None


def _changed(record: StudyRecord, valid: History, first: Earlier) -> list[str]:
    """Differences between what the record declares and what counts, as sentences without a full stop."""
    changes = []
    n = len(first.finished)
    if set(record.seeds) - set(first.seeds or ()) and not valid.undeclared:
        changes.append(f"Seeds were added after {n} had results")
    if valid.looks and list(record.looks) != valid.looks:
        looks = listed(map(str, valid.looks))
        changes.append(f"`looks` were changed after {n} seeds had results; those that count are {looks}")
    elif record.looks and not valid.looks:
        changes.append(f"`looks` were written down after {n} seeds had results, and do not count as declared")
    for key, name in (("smallest_effect", "The smallest effect of interest"), ("alpha", "alpha")):
        new, old = getattr(record, key), getattr(valid, key)
        if new != old:
            changes.append(f"{name} was changed to {new:g} after results were there; it counts as {old:g}")
    if valid.dropped:
        dropped = listed(f"{arm} against {against}" for arm, against in valid.dropped)
        count = plural(len(valid.dropped), "contrast")
        changes.append(f"{count} with results left out, still counted in the family: {dropped}")
    return changes
