"""How a study or a sweep was done: what was declared, what deviates from that, noise floor and power, what it does not
show, and where it ran."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt2lab.analysis.metric_names import LOSS, target_of
from gpt2lab.analysis.planning import MULTIPLES
from gpt2lab.analysis.results import Study
from gpt2lab.analysis.studies import moving_rate, scope_text
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import number, plural, quantity, setting, time_taken
from gpt2lab.records import Evaluation, SweepRecord
from gpt2lab.reports.page import Remark, Section, section
from gpt2lab.reports.read import SearchRead, StudyRead, SweepRead
from gpt2lab.reports.sections import health, tuned
from gpt2lab.reports.sections.runs import elsewhere
from gpt2lab.reports.sections.verdicts import shown

SHARED_POOL = 5  # studies named one by one up to here, counted beyond
NEAR_BIGRAM = 0.3


@section(order=130, title="Noise floor and power")
def noise(read: StudyRead) -> Section:
    """Which noise floor was used, and how small a difference could have been shown."""
    study = read.study
    floor = floor_sentence(study)
    if not floor:
        command = study.noise_command or f"gpt2lab noise {study.scale}"
        unknown = (
            f"No noise floor was available for this scale, data, length and software; `{command}` measures one, and "
            "plans then predict which effects they can detect."
        )
        return Section(points=[unknown, _power(read)])
    points = [
        f"{floor} It is used for planning and for verdicts on one or two seeds; it never defines which differences "
        "matter."
    ]
    if study.noise and max((arm.sd or 0.0 for arm in read.arms.values()), default=0.0) > 2 * study.noise.sd:
        points.append(
            "An arm of this study varies more than twice as much as the floor, so the planned power was too "
            "optimistic; the intervals above use the arms' own spread."
        )
    return Section(points=[*points, _power(read)])


def floor_sentence(study: Study) -> str:
    """The noise floor that the study was planned by; "" without one."""
    floor = study.noise
    if not floor:
        return ""
    failed = f"; {floor.failed} more failed" if floor.failed else ""
    return (
        f"Noise floor: sd {number(floor.sd, 3)} nats, 95 % interval [{number(floor.low, 3)}, "
        f"{number(floor.high, 3)}], from {floor.runs} repeats of the recipe at {floor.scale} with only "
        f"the seed changed{failed}; torch {floor.stack.get('torch')} on {floor.stack.get('device')}, measured "
        f"{floor.created[:10]}."
    )


def _power(read: StudyRead) -> str:
    """How many seeds, and how small a difference they could have shown."""
    counts = sorted({str(arm.n) for arm in read.arms.values()}, key=int)
    text = f"Usable seeds per arm: {' to '.join(dict.fromkeys((counts[0], counts[-1])))}."
    detectable = [c.detectable for c in read.verdicts.contrasts if math.isfinite(c.detectable)]
    if not detectable:
        return text + " That is too few to say how small a difference could have been detected."
    span = " to ".join(dict.fromkeys(number(d, 3) for d in (min(detectable), max(detectable))))
    searched = any("search" in c.halfwidths for c in read.verdicts.contrasts)
    at = " at the chosen rates; the uncertainty of the search comes on top" if searched else ""
    return text + f" The smallest true difference that they detect with 80 % power: {span} {read.unit}{at}."


def scored(evaluation: Evaluation) -> str:
    """The validation text by which all runs are judged."""
    if evaluation.tokens == "all":
        return "all of the same validation text except its first token"
    return f"the same {quantity(evaluation.tokens)} validation tokens"


@section(order=140, title="Method")
def declared(read: StudyRead) -> Section:
    """What was declared before the first run, in sentences."""
    study = read.study
    points = [
        f"Design: {study.design}, {plural(len(study.arms), 'arm')}, baseline "
        f"{study.baseline}; {plural(read.verdicts.members, 'contrast')} declared, one family.",
        f"Every run is scored at its end on {scored(study.evaluation)}. Metric: {study.metric}. A seed "
        "sets initialisation, data order and dropout together; all arms share data order and, where shapes agree, "
        "initial weights.",
        f"Estimator: Welch's t with critical values valid for every ratio of the arms' noise, Holm-adjusted, at "
        f"{100 * read.verdicts.alpha:g} % for the whole family; equivalence by two one-sided tests against "
        f"±{read.verdicts.smallest_effect:g} {read.unit}.",
        _looks(read),
    ]
    if study.screened:
        screen = study.screened
        points.insert(0, f"Confirms a screen: the best {len(study.arms) - 1} of the {len(screen.arms)} arms of "
                         f"{screen.study} ({plural(len(screen.seeds), 'seed')}), on seeds that the screen did not use. "
                         "Only the results here are claims.")  # fmt: skip
    if study.confirm:
        points.insert(0, f"A screen, without claims: its best {study.confirm['best']} by mean {study.metric} are "
                         f"judged on {study.confirm['seeds']} fresh seeds in {study.ablation}-confirm.")  # fmt: skip
    if study.lr_bracket:
        factors = ", ".join(f"{factor:g}" for factor in study.lr_bracket)
        points.append(
            f"Learning rates: {factors} times each arm's own, one seed each, then fresh seeds at the best. A curve "
            "through the trials bounds how far that rate may be from each arm's best; the intervals include this."
        )
    points += tuned.method(study)
    axis = study.equalise.replace("_", " ")
    points.append(f"Arms are compared at equal {axis}; the table shows the other axes.")
    points += [f"{arm} was adjusted to match: {e.adjustment}." for arm, e in study.arms.items() if e.adjustment]
    if study.tokens_per_parameter:
        points.append(f"Trained for {study.tokens_per_parameter:g} tokens per parameter of the baseline.")
    return Section(points=points)


def _looks(read: StudyRead) -> str:
    """At which seeds contrasts are judged, and at which levels."""
    study, past = read.study, read.study.history
    looks = (past.looks if past else study.looks) or [past.first_seeds if past else len(study.seeds)]
    declared = f"Looks were declared at {listed(map(str, looks))} seeds per arm; decided arms stopped there. "
    if len(looks) > 2 and looks == list(range(looks[0], looks[-1] + 1)):
        declared = (
            f"Seeds were added one by one, from {looks[0]} to at most {looks[-1]} per arm, and decided arms stopped; "
            "each number of seeds was a declared look, and the levels of all looks together keep the error rate, "
            "whenever an arm stopped. "
        )
    more = listed(str(multiple * looks[-1]) for multiple in MULTIPLES)
    return (
        f"{declared if len(looks) > 1 else ''}Seeds may be added after a verdict: contrasts that are still open are "
        f"then judged again, at {more} seeds. A fifth of the {100 * read.verdicts.alpha:g} % is reserved for that."
    )


@section(order=150, title="Deviations from the declaration")
def deviations(read: StudyRead) -> Section:
    """What is otherwise than declared, or was declared after something could be seen."""
    study, others = read.study, read.once(elsewhere)
    points = [f"{arm} is exploratory only: {e.exploratory}." for arm, e in study.arms.items() if e.exploratory]
    points += [f"{a} against {b} is exploratory only: {reason}." for (a, b), reason in moving_rate(study).items()]
    points += [f"{arm} is not comparable: {e.not_comparable}." for arm, e in study.arms.items() if e.not_comparable]
    if study.left_out:
        points.append(f"Left out to fit the time budget: {'; '.join(study.left_out)}.")
    points += _declared_before(study)
    missing = [run for run in read.runs if run.value is None]
    if missing:
        points.append(f"{plural(len(missing), 'declared run')} without a final value; see Runs.")
    if failed := failed_runs(read):
        points.append(f"{failed.head} {failed.text}")
    points += health.deviations(read.once(health.health))
    shared = [run for run in read.runs if run.id in others]
    if shared:
        names = sorted({name for run in shared for name in others[run.id]})
        some = ", ".join(names[:SHARED_POOL]) + (f" and {len(names) - SHARED_POOL} more" if names[SHARED_POOL:] else "")
        points.append(
            f"{plural(len(shared), 'run')} shared with {some}: trained once, so these studies are not independent."
        )
    adopted = [run for run in read.runs if run.adopted_from]
    if adopted:
        points.append(
            f"{plural(len(adopted), 'run')} taken over from older code that trains the same bits (`gpt2lab adopt`)."
        )
    return Section(points=points or ["The store records none."], folded=not points)


def failed_runs(read: StudyRead) -> Remark | None:
    """How many runs failed, what counts as failing, and of which arms they are; None where no run failed."""
    failed = {name: arm.failed for name, arm in read.arms.items() if arm.failed}
    if not failed:
        return None
    target = target_of(read.metric)
    alternative = f"above the loss of {target[1]:g}" if target else "no better than guessing by token frequency"
    arms = ", ".join(f"{count} of {name}" for name, count in failed.items())
    text = f"Diverged, or {alternative}; counted, never dropped: {arms}."
    return Remark(f"{plural(sum(failed.values()), 'run')} failed.", text)


def _declared_before(study: Study) -> list[str]:
    """What was declared under this name before, and what of the present declaration therefore counts otherwise."""
    earlier, past = study.earlier, study.history
    if not earlier:
        return []
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    points = [f"This study was declared differently {times} before, last by `{earlier[-1].reproduce}`."]
    if past:
        points += [f"{sentence}." for sentence in past.changed]
    if past and past.late:
        pairs = listed(f"{arm} against {against}" for arm, against in past.late)
        points.append(f"Declared after the results existed, and therefore exploratory: {pairs}.")
    undeclared = (past.undeclared if past else None) or study.undeclared_look
    return [*points, f"No claims are made: {undeclared}."] if undeclared else points


def strongest_caveat(read: StudyRead) -> str:
    """What a reader must know before all else: a baseline that ends near the bigram floor, and the scale's own."""
    study, mean = read.study, read.arms[read.baseline].mean
    bigram, scale = (study.floors or {}).get("bigram"), study.caveat or ""
    if study.metric != LOSS or bigram is None or mean is None or mean < bigram - NEAR_BIGRAM:
        return scale
    place = "above" if mean > bigram + NEAR_BIGRAM else f"within {NEAR_BIGRAM:g} nats of"
    return (
        f"{read.baseline} ends at {number(mean, 3)}, {place} the bigram loss "
        f"({number(bigram, 3)}): differences to it measure when attention switches on, not how good the arms become."
    ) + (f" Caveat of this scale: {scale}." if scale else "")


@section(order=145, title="Recipe")
def recipe(read: StudyRead) -> Section:
    """What a methods section says of the baseline's training; arms differ from it as the table of verdicts says."""
    study, entry = read.study, read.study.arms[read.baseline]
    run = next((run for run in read.runs if run.arm == read.baseline and run.identity.get("settings")), None)
    settings = run.identity["settings"] if run else {}
    model, optim, training = ({**settings.get(part, {})} for part in ("model", "optim", "training"))
    flops = quantity(entry.tokens * entry.flops_per_token, "FLOP")
    facts: dict[str, Any] = {
        "Parameters": f"{quantity(entry.parameters)}, {quantity(entry.non_embedding_parameters)} without embeddings",
        "Data (tokenizer)": study.scope.data,
        "Training": f"{quantity(entry.tokens)} tokens, {flops} per run",
        "Validation": scored(study.evaluation).removeprefix("the same "),
    }
    if run:
        batch, length = training["batch_tokens"], model["block_size"]
        stack = run.result.get("stack") or {}
        facts |= {
            "Model": f"{model['n_layer']} layers, {model['n_head']} heads, width {model['n_embd']}, context {length} "
            f"tokens, vocabulary {model['vocab_size']:,}, dropout {model['dropout']:g}",
            "Batch": f"{batch:,} tokens ({batch / length:g} sequences of {length})",
            "Steps": f"{training['steps']:,}, of which {optim['warmup_steps']:,} warm-up",
            "Optimizer": f"{shown(optim['optimizer'])}, learning rate {optim['lr']:g}, "
            f"gradients clipped at norm {shown(optim['grad_clip'])}",
            "Schedule": shown(optim["schedule"]),
            "Precision": training["precision"],
            "Processes": f"{stack.get('ranks', 1)} of {plural(stack['threads'], 'thread')}"
            if "threads" in stack
            else "",
        }
    seconds = sum(float(run.result.get("seconds") or 0) for run in read.runs)
    facts |= {
        "Seeds": ", ".join(map(str, study.seeds)),
        "Hardware": where_it_ran(study)["Device"],
        "Time": f"{time_taken(seconds)} of training over {plural(len(read.runs), 'run')}" if seconds else "",
    }
    return Section(aside=f"Of {read.baseline}, the baseline.", facts=_known(facts))


@section(order=190, title="How to reproduce")
def reproduce(read: StudyRead) -> Section:
    study = read.study
    facts = {"Preset": study.scope.preset, **where_it_ran(study)}
    return Section(code=study.reproduce, facts=_known(facts))


def where_it_ran(record: Study | SweepRecord) -> dict[str, str]:
    """Commit, software, device and time of a study's or sweep's declaration."""
    stack = record.stack
    return {
        "Working folder": f"git commit {stack['git_commit']}" if stack.get("git_commit") else "not under git",
        "Software": f"torch {stack.get('torch')}, Python {stack.get('python')}, {stack.get('platform')}",
        "Device": " ".join(str(stack[k]) for k in ("device", "device_name") if stack.get(k)),
        "Declared": f"{record.created}, record {record.hash}",
    }


def _known(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in facts.items() if value]


@section(order=100, title="How it was done", of="sweep")
def sweep_method(read: SweepRead) -> Section:
    """What was declared before the first trial, what the answer holds for, and where and on what it ran."""
    record = read.record
    tokens = sum(trial.tokens for _, trial in read.trials)
    flops = sum(trial.tokens * (search.record.flops_per_token or 0) for search, trial in read.trials)
    goal = "higher is better" if record.direction == "maximize" else "lower is better"
    seeds = ", ".join(map(str, sorted({seed for search in read.searches.values() for seed in search.seeds})))
    facts: dict[str, object] = {
        "Sampler": _named(record.sampler),
        "Pruner": _named(record.pruner or {}) or "none",
        "Trials": f"{read.slots} in all, over all workers and restarts",
        "Value": f"final {read.metric} on {scored(record.evaluation)} for all; {goal}",
        "Tuning seeds": f"{seeds}, used for nothing else",
        **{read.titled(search, "Space"): _space(search) for search in read.searches.values()},
        **{f"{label} changes": _named(search.record.changes) for label, search in read.searches.items()},
        "Time budget": time_taken(record.time_budget) if record.time_budget else "",
        "Trained": f"{quantity(tokens)} tokens" + (f", {quantity(flops, 'FLOP')}" if flops else ""),
        "Storage": record.storage,
        **where_it_ran(record),
    }
    points = [
        f"It holds {scope_text(record)}; another size, length of training, batch or data shifts the best settings.",
        "A search chooses settings; an ablation decides, on fresh seeds, whether two ways to build a model differ.",
    ]
    return Section(code=record.reproduce, facts=_known(facts), points=points)


def _named(options: Mapping[str, Any]) -> str:
    """`median, startup_trials 4, warmup 0.25`"""
    given = {key: value for key, value in options.items() if value is not None}
    return ", ".join([str(given.pop("name", "")), *(f"{key} {value}" for key, value in given.items())]).strip(", ")


def _space(search: SearchRead) -> str:
    """`optim.lr 0.0002 to 0.2 (log); model.norm layernorm, rmsnorm`"""
    parts = []
    for dimension in search.record.space:
        axis = search.axes[dimension.name]
        step = f", step {setting(dimension.step)}" if dimension.step else ""
        scale = "" if axis.choices else f" ({'log' if axis.log else 'linear'}{step})"
        when = " and ".join(f"{key} is {value}" for key, value in (dimension.when or {}).items())
        parts.append(f"{axis.name} {axis.range}{scale}" + (f", only where {when}" if when else ""))
    return "; ".join(parts)
