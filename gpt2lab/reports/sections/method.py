"""How a study was done: noise floor and power, what was declared, what deviates from that, what it does not show, and
where it ran."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gpt2lab.analysis.planning import MULTIPLES
from gpt2lab.analysis.wording import listed
from gpt2lab.records import StudyRecord
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections import health, tuned
from gpt2lab.reports.sections.runs import elsewhere
from gpt2lab.results import LOSS, Study, scope_text, shares_rate
from gpt2lab.text import number, plural, quantity

SHARED_POOL = 5  # studies named one by one up to here, counted beyond
NEAR_BIGRAM = 0.3


@section(order=130, title="Noise floor and power")
def noise(read: StudyRead) -> Section:
    """Which noise floor was used, how old it is, and how small a difference could have been shown."""
    study = read.study
    known = floor_sentence(study)
    if not known:
        command = study.noise_command or f"gpt2lab noise {study.scale}"
        told = [
            f"No noise floor of this scale, data, length and software was at hand; `{command}` measures one, and plans "
            "then say what they can find."
        ]
        return Section(points=[*told, _power(read)])
    told = [f"{known} It serves planning, and verdicts on one or two seeds; it never defines which differences matter."]
    spreads = [arm.sd for arm in read.arms.values() if arm.sd]
    if spreads and study.noise and max(spreads) > 2 * study.noise.sd:
        told.append(
            "An arm of this study varies more than twice as much as the floor: what the plan said of power was too "
            "hopeful; the intervals above rest on the arms' own spread."
        )
    return Section(points=[*told, _power(read)])


def floor_sentence(study: Study) -> str:
    """The noise floor that the study was planned by, with its age; "" without one."""
    kept = study.noise
    if not kept:
        return ""
    failed = f"; {kept.failed} more failed" if kept.failed else ""
    return (
        f"Noise floor: sd {number(kept.sd, 3)} nats, 95 % interval [{number(kept.low, 3)}, "
        f"{number(kept.high, 3)}], from {kept.runs} repeats of the recipe at {kept.scale} with only "
        f"the seed changed{failed}; torch {kept.stack.get('torch')} on {kept.stack.get('device')}, measured "
        f"{kept.created[:10]}, {_age(kept.created, study.created)}."
    )


def _age(measured: str, declared: str | None) -> str:
    """How old a floor was when the study was declared."""
    try:
        then, now = (datetime.fromisoformat(str(moment)) for moment in (measured, declared))
        days = (_utc(now) - _utc(then)).days
    except ValueError:
        return "at an unknown time"
    return "the same day as this study was declared" if days < 1 else f"{plural(days, 'day')} before this study"


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _power(read: StudyRead) -> str:
    """How many seeds, and how small a difference they could have shown."""
    counts = sorted({arm.n for arm in read.arms.values()})
    text = f"Usable seeds per arm: {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))}."
    detectable = [c.detectable for c in read.verdicts.contrasts if math.isfinite(c.detectable)]
    if not detectable:
        return text + " That is too few to say how small a difference would have been found."
    span = " to ".join(dict.fromkeys(number(d, 3) for d in (min(detectable), max(detectable))))
    searched = any("search" in c.halfwidths for c in read.verdicts.contrasts)
    at = " at the rates that were chosen; the search of rates comes on top" if searched else ""
    return text + f" The smallest true difference that they detect with 80 % power: {span} {read.unit}{at}."


@section(order=140, title="Method")
def declared(read: StudyRead) -> Section:
    """What was declared before the first run, in sentences."""
    study = read.study
    tokens = quantity(study.evaluation.tokens)
    told = [
        f"Design: {study.design}, {plural(len(study.arms), 'arm')}, baseline "
        f"{study.baseline}; {plural(read.verdicts.members, 'contrast')} declared, one family.",
        f"Every run is scored at its end on the same {tokens} validation tokens. A seed sets initialisation, data "
        "order and dropout together; all arms share data order and, where shapes agree, initial weights.",
        f"Estimator: Welch's t with critical values that hold at every ratio of the arms' noise, Holm-adjusted, at "
        f"{100 * read.verdicts.alpha:g} % for the whole family; equivalence by two one-sided tests against "
        f"±{read.verdicts.smallest_effect:g} {read.unit}.",
    ]
    told.append(_looks(read))
    if study.lr_bracket:
        factors = ", ".join(f"{factor:g}" for factor in study.lr_bracket)
        told.append(
            f"Learning rates: {factors} times each arm's own, one seed each, then fresh seeds at the best. A curve "
            "through the trials bounds how far that rate may be from each arm's best; the intervals include it."
        )
    told += tuned.method(study)
    axis = study.equalise.replace("_", " ")
    told.append(f"Arms are compared at equal {axis}; what that costs each of them on the other axes, the table shows.")
    told += [
        f"{arm} was adjusted for that: {entry.adjustment}." for arm, entry in study.arms.items() if entry.adjustment
    ]
    if study.tokens_per_parameter:
        told.append(f"Trained for {study.tokens_per_parameter:g} tokens per parameter of the baseline.")
    return Section(points=told)


@section(order=150, title="What deviates from that")
def deviations(read: StudyRead) -> Section:
    """What is otherwise than declared, or was declared after something could be seen."""
    study, others = read.study, read.once(elsewhere)
    told = [f"{arm} is exploratory only: {e.exploratory}." for arm, e in study.arms.items() if e.exploratory]
    told += [f"{arm} is not comparable: {e.not_comparable}." for arm, e in study.arms.items()
             if e.not_comparable]  # fmt: skip
    if study.left_out:
        told.append(f"Left out to fit the time budget: {'; '.join(study.left_out)}.")
    told += _declared_before(study)
    missing = [run for run in read.runs if run.value is None]
    if missing:
        told.append(f"{plural(len(missing), 'declared run')} without a final value; see Runs.")
    failed = {name: arm.failed for name, arm in read.arms.items() if arm.failed}
    if failed:
        counts = ", ".join(f"{count} of {name}" for name, count in failed.items())
        told.append(f"Diverged, or no better than token frequencies: {counts}; counted, never dropped.")
    told += health.deviations(read.once(health.health))
    shared = [run for run in read.runs if run.id in others]
    if shared:
        names = sorted({name for run in shared for name in others[run.id]})
        some = ", ".join(names[:SHARED_POOL]) + (f" and {len(names) - SHARED_POOL} more" if names[SHARED_POOL:] else "")
        told.append(
            f"{plural(len(shared), 'run')} shared with {some}: trained once, so these studies are not independent."
        )
    adopted = [run for run in read.runs if run.adopted_from]
    if adopted:
        told.append(
            f"{plural(len(adopted), 'run')} taken over from older code that trains the same bits (`gpt2lab adopt`)."
        )
    return Section(points=told or ["Nothing that the store knows of."])


def _looks(read: StudyRead) -> str:
    """At which seeds contrasts are judged, and at which levels."""
    study, past = read.study, read.study.history
    looks = (past.looks if past else study.looks) or [past.first_seeds if past else len(study.seeds)]
    if len(looks) > 1:
        told = f"Looks were declared at {listed(map(str, looks))} seeds per arm; arms that were decided stopped there. "
    else:
        told = ""
    more = listed(str(multiple * looks[-1]) for multiple in MULTIPLES)
    return (
        f"{told}Seeds may be added after a verdict: contrasts that are still open are then judged again, at {more} "
        f"seeds. A fifth of the {100 * read.verdicts.alpha:g} % is kept back for that."
    )


def _declared_before(study: Study) -> list[str]:
    """What was declared under this name before, and what of the present declaration therefore counts otherwise."""
    earlier, past = study.earlier, study.history
    if not earlier:
        return []
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    told = [f"This study was declared differently {times} before, last by `{earlier[-1].reproduce}`."]
    told += [f"{sentence}." for sentence in (past.changed if past else ())]
    late = past.late if past else []
    if late:
        pairs = listed(f"{arm} against {against}" for arm, against in late)
        told.append(f"Declared after the results were there, and exploratory for that: {pairs}.")
    undeclared = (past.undeclared if past else None) or study.undeclared_look
    return [*told, f"Nothing is claimed: {undeclared}."] if undeclared else told


@section(order=180, title="What this shows, and what it does not")
def limits(read: StudyRead) -> Section:
    study = read.study
    caveat = f" Caveat of this scale: {study.caveat}." if study.caveat else ""
    sentences = [
        f"It holds {scope_text(study)}; larger models, longer training or other data may order the arms differently."
        + caveat
    ]
    if shares_rate(study):
        text = "All arms share one learning rate, which suits some better than others: each at its own best rate, a "
        sentences.append(text + "difference can shrink or turn round.")
    sentences += _near_bigram(study, read.arms[read.baseline].mean)
    sentences.append(f"Only the declared contrasts on {study.metric} carry verdict words; the rest is description.")
    return Section(points=sentences)


def _near_bigram(study: Study, baseline: float | None) -> list[str]:
    bigram = (study.floors or {}).get("bigram")
    if study.metric != LOSS or bigram is None or baseline is None or baseline < bigram - NEAR_BIGRAM:
        return []
    place = "above" if baseline > bigram + NEAR_BIGRAM else f"within {NEAR_BIGRAM:g} nats of"
    return [
        f"The baseline ends at {number(baseline, 3)}, {place} what counting pairs of tokens reaches "
        f"({number(bigram, 3)}): such contrasts measure when attention switches on, not how good the arms become."
    ]


@section(order=190, title="How to reproduce")
def reproduce(read: StudyRead) -> Section:
    study = read.study
    found = [
        ("Data", study.scope.data),
        ("Preset", study.scope.preset),
        ("Seeds", ", ".join(map(str, study.seeds))),
        *where_it_ran(study),
    ]
    return Section(code=study.reproduce, facts=[(key, str(value)) for key, value in found if value])


def where_it_ran(record: StudyRecord | Mapping[str, Any]) -> list[tuple[str, str]]:
    """Code, software, device and time of a study's or sweep's declaration."""
    plain = record.plain() if isinstance(record, StudyRecord) else record
    stack: Mapping[str, Any] = plain.get("stack") or {}
    return [
        ("Code", f"git commit {stack['git_commit']}" if stack.get("git_commit") else "not under version control"),
        ("Software", f"torch {stack.get('torch')}, Python {stack.get('python')}, {stack.get('platform')}"),
        ("Device", " ".join(str(stack[k]) for k in ("device", "device_name") if stack.get(k))),
        ("Declared", f"{plain.get('created')}, record {plain.get('hash')}"),
    ]
