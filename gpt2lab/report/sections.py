"""What follows the figures: cost, worth, rates, other estimators, noise, method, deviations, runs. Text, not layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.scaling import tell_multiplier, tell_share
from gpt2lab.evidence import Evidence
from gpt2lab.report import appendix, tables
from gpt2lab.report.tables import Summary, Table
from gpt2lab.results import LOSS, Study, StudyRun, scope_text, unit
from gpt2lab.text import number, plural, quantity

NEAR_BIGRAM = 0.3
SHARED_POOL = 5  # runs named one by one up to here, counted beyond


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a table, paragraphs or points below it. `folded`: opened by a click on the page."""

    title: str
    table: Table | None = None
    note: str = ""
    points: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Read:
    """All that was read of a study, as every part of its page needs it."""

    study: Study
    runs: Sequence[StudyRun]
    verdicts: Verdicts
    evidence: Evidence
    arms: Mapping[str, Summary]


def sections(read: Read) -> list[Section]:
    """The page behind its figures, in order; parts that the study does not have are left out."""
    study, evidence = read.study, read.evidence
    made = [
        Section(title="What it costs", table=tables.cost_table(study, read.arms), note=COST, points=_per_second(read)),
        _worth(read) if evidence.budgets else None,
        _rates(read) if evidence.trials else None,
        _horizon(read) if evidence.horizon else None,
        Section(
            title="Sensitivity: the same contrasts, analysed in other ways",
            table=appendix.sensitivity_table(study, read.verdicts),
            note=SENSITIVITY,
            folded=True,
        ),
        Section(title="Noise floor and power", points=_noise(read)),
        Section(title="Method", points=_method(read)),
        Section(title="What deviates from that", points=_deviations(read) or ["Nothing that the store knows of."]),
        Section(title="Runs", table=appendix.run_table(study, read.runs, evidence)),
        Section(title="What this shows, and what it does not", points=_limits(read)),
    ]
    return [section for section in made if section]


COST = (
    "The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median over runs, "
    "memory the largest of them; both depend on what else the machine was doing."
)
SENSITIVITY = (
    "None of these decides a verdict, and none is adjusted for the number of contrasts. Paired, and arm and seed, use "
    "the seeds that both arms share; a permutation test needs 4 seeds per arm. Detectable: the true difference found "
    "four times out of five, and the same with the noise at its upper 80 % limit."
)


def _per_second(read: Read) -> list[str]:
    """Arms that win per token and lose, or may lose, per second."""
    base = read.arms[read.study["baseline"]].tokens_per_second
    told = []
    for c in read.verdicts.contrasts:
        speed = read.arms[c.arm].tokens_per_second if c.arm in read.arms else None
        if not c.word.startswith(("better", "likely better")) or c.against != read.study["baseline"]:
            continue
        if not speed or not base or speed >= base:
            continue
        slower = f"{c.arm} wins per token, but trains at {100 * speed / base:.0f} % of the baseline's speed here"
        reach = read.evidence.in_tokens.get(c.arm)
        if reach is None or not math.isfinite(reach.value):
            told.append(f"{slower}; whether it wins per second, only a `budget_curve` of the baseline can tell.")
            continue
        seconds = reach.value * speed / base
        word = "still wins" if seconds > 1 else "loses"
        told.append(f"{slower}: per second it {word}, since its loss takes the baseline {seconds:.2f} times as long.")
    return told


def _worth(read: Read) -> Section:
    """Tokens to a loss and compute multipliers."""
    baseline, evidence = read.study["baseline"], read.evidence
    points = [f"{arm}: {tell_multiplier(reach)}." for arm, reach in evidence.multipliers.items()]
    points += [f"{arm} {tell_share(reach, baseline)}." for arm, reach in evidence.shares.items()]
    return Section(
        title="What differences are worth",
        table=appendix.budget_table(read.study, evidence, read.arms),
        note="Mean final losses of runs that each finished a schedule of their own. A multiplier is the compute (or "
        "the tokens) that the baseline needs for an arm's loss, divided by what the arm took; between two budgets the "
        "loss is taken to be linear in the logarithm of the budget. The 95 % interval holds every budget at which the "
        "baseline cannot be told from the arm; it is not adjusted for the number of arms.",
        points=points,
    )


def _rates(read: Read) -> Section:
    return Section(
        title="How each arm's learning rate was found",
        table=appendix.bracket_table(read.study, read.evidence, read.arms, read.verdicts),
        note="Final loss of one run for each multiple of the arm's own rate, on a seed that serves nothing else. The "
        "verdict rests on fresh seeds at each arm's best rate; a best rate at the edge, after the bracket was widened "
        "three times, makes an arm not comparable.",
    )


def _horizon(read: Read) -> Section:
    return Section(
        title="How early the order of arms shows",
        table=appendix.horizon_table(read.evidence),
        note="Rank agreement of the arms' mean losses during training with those at the end: 1 is the same order, 0 "
        "none, -1 the reverse. These runs were on the way to the end of a long schedule; a screen on a short schedule "
        "of its own can do worse.",
    )


def _noise(read: Read) -> list[str]:
    """Which noise floor was used, how old it is, and how small a difference could have been shown."""
    study = read.study
    known = floor_sentence(study)
    if not known:
        return [
            f"No noise floor of this scale, data, length and software was at hand; `gpt2lab noise {study['scale']}` "
            "measures one, and plans then say what they can find.",
            _power(read),
        ]
    told = [f"{known} It serves planning, and verdicts on one or two seeds; it never defines which differences matter."]
    spreads = [arm.sd for arm in read.arms.values() if arm.sd]
    if spreads and max(spreads) > 2 * study["noise"]["sd"]:
        told.append(
            "An arm of this study varies more than twice as much as the floor: what the plan said of power was too "
            "hopeful; the intervals above rest on the arms' own spread."
        )
    return [*told, _power(read)]


def floor_sentence(study: Study) -> str:
    """The noise floor that the study was planned by, with its age; "" without one."""
    kept = study.get("noise")
    if not kept:
        return ""
    failed = f"; {kept['failed']} more failed" if kept.get("failed") else ""
    return (
        f"Noise floor: sd {number(kept['sd'], 3)} nats, 95 % interval [{number(kept['low'], 3)}, "
        f"{number(kept['high'], 3)}], from {kept['runs']} repeats of the recipe at {kept['scale']} with only "
        f"the seed changed{failed}; torch {kept['stack'].get('torch')} on {kept['stack'].get('device')}, measured "
        f"{str(kept['created'])[:10]}, {_age(kept['created'], study.get('created'))}."
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


def _power(read: Read) -> str:
    """How many seeds, and how small a difference they could have shown."""
    counts = sorted({arm.n for arm in read.arms.values()})
    text = f"Usable seeds per arm: {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))}."
    detectable = [c.detectable for c in read.verdicts.contrasts if math.isfinite(c.detectable)]
    if not detectable:
        return text + " That is too few to say how small a difference would have been found."
    span = " to ".join(dict.fromkeys(number(d, 3) for d in (min(detectable), max(detectable))))
    return text + f" The smallest true difference that they find four times out of five: {span} {unit(read.study)}."


def _method(read: Read) -> list[str]:
    """What was declared before the first run, in sentences."""
    study = read.study
    tokens = quantity(study["evaluation"].get("tokens"))
    told = [
        f"Design: {study.get('design', 'one factor')}, {plural(len(study['arms']), 'arm')}, baseline "
        f"{study['baseline']}; {plural(len(read.verdicts.contrasts), 'contrast')} declared, one family.",
        f"Every run is scored at its end on the same {tokens} validation tokens. A seed sets initialisation, data "
        "order and dropout together; all arms share data order and, where shapes agree, initial weights.",
        f"Estimator: Welch's t, Holm-adjusted, at {100 * study['alpha']:g} % for the whole family; equivalence by two "
        f"one-sided tests against ±{study['smallest_effect']:g} {unit(study)}.",
    ]
    if study.get("looks"):
        looks = ", ".join(map(str, study["looks"]))
        told.append(
            f"Looks were declared at {looks} seeds per arm, each at a smaller level, so that all of them together keep "
            "the error rate; arms that were decided stopped there."
        )
    if study.get("lr_bracket"):
        factors = ", ".join(f"{factor:g}" for factor in study["lr_bracket"])
        told.append(f"Learning rates: {factors} times each arm's own, one seed each, then fresh seeds at the best.")
    axis = str(study.get("equalise", "tokens")).replace("_", " ")
    told.append(f"Arms are compared at equal {axis}; what that costs each of them on the other axes, the table shows.")
    told += [
        f"{arm} was adjusted for that: {entry['adjustment']}."
        for arm, entry in study["arms"].items()
        if entry.get("adjustment")
    ]
    if study.get("tokens_per_parameter"):
        told.append(f"Trained for {study['tokens_per_parameter']:g} tokens per parameter of the baseline.")
    return told


def _deviations(read: Read) -> list[str]:
    """What is otherwise than declared, or was declared after something could be seen."""
    study = read.study
    told = [
        f"{arm} is exploratory only: {e['exploratory']}." for arm, e in study["arms"].items() if e.get("exploratory")
    ]
    told += [f"{arm} is not comparable: {e['not_comparable']}." for arm, e in study["arms"].items()
             if e.get("not_comparable")]  # fmt: skip
    if study.get("left_out"):
        told.append(f"Left out to fit the time budget: {'; '.join(study['left_out'])}.")
    earlier = study.get("earlier") or []
    if earlier:
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        told.append(
            f"This study was declared differently {times} before, last by `{earlier[-1].get('reproduce')}`; arms or "
            "seeds that were chosen after a look make every verdict weaker than it says."
        )
    if study.get("undeclared_look"):
        told.append(f"An undeclared look: {study['undeclared_look']}.")
    missing = [run for run in read.runs if run.value is None]
    if missing:
        told.append(f"{plural(len(missing), 'declared run')} without a final value; see Runs.")
    failed = {name: arm.failed for name, arm in read.arms.items() if arm.failed}
    if failed:
        listed = ", ".join(f"{count} of {name}" for name, count in failed.items())
        told.append(f"Diverged, or no better than token frequencies: {listed}; counted, never dropped.")
    shared = [run for run in read.runs if read.evidence.elsewhere.get(run.id)]
    if shared:
        names = sorted({name for run in shared for name in read.evidence.elsewhere[run.id]})
        listed = ", ".join(names[:SHARED_POOL]) + (
            f" and {len(names) - SHARED_POOL} more" if names[SHARED_POOL:] else ""
        )
        told.append(
            f"{plural(len(shared), 'run')} shared with {listed}: trained once, so these studies are not independent."
        )
    adopted = [run for run in read.runs if run.adopted_from]
    if adopted:
        told.append(
            f"{plural(len(adopted), 'run')} taken over from older code that trains the same bits (`gpt2lab adopt`)."
        )
    return told


def _limits(read: Read) -> list[str]:
    study = read.study
    caveat = f" Caveat of this scale: {study['caveat']}." if study.get("caveat") else ""
    sentences = [
        f"It holds {scope_text(study)}; larger models, longer training or other data may order the arms differently."
        + caveat,
    ]
    if not study.get("bracketed"):
        text = "All arms share one learning rate, which suits some better than others: each at its own best rate, a "
        sentences.append(text + "difference can shrink or turn round.")
    sentences += _near_bigram(study, read.arms[study["baseline"]])
    sentences.append(f"Only the declared contrasts on {study['metric']} carry verdict words; the rest is description.")
    return sentences


def _near_bigram(study: Study, baseline: Summary) -> list[str]:
    bigram = (study.get("floors") or {}).get("bigram")
    if study["metric"] != LOSS or bigram is None or baseline.mean is None or baseline.mean < bigram - NEAR_BIGRAM:
        return []
    place = "above" if baseline.mean > bigram + NEAR_BIGRAM else f"within {NEAR_BIGRAM:g} nats of"
    return [
        f"The baseline ends at {number(baseline.mean, 3)}, {place} what counting pairs of tokens reaches "
        f"({number(bigram, 3)}): such contrasts measure when attention switches on, not how good the arms become."
    ]


def facts(study: Study) -> list[tuple[str, str]]:
    """Where and on what it ran."""
    stack: Mapping[str, Any] = study.get("stack") or {}
    device = " ".join(str(stack[k]) for k in ("device", "device_name") if stack.get(k))
    found = [
        ("Data", study["scope"].get("data")),
        ("Preset", study["scope"].get("preset")),
        ("Seeds", ", ".join(map(str, study["seeds"]))),
        ("Code", f"git commit {stack['git_commit']}" if stack.get("git_commit") else "not under version control"),
        ("Software", f"torch {stack.get('torch')}, Python {stack.get('python')}, {stack.get('platform')}"),
        ("Device", device),
        ("Declared", f"{study.get('created')}, record {study.get('hash')}"),
    ]
    return [(key, str(value)) for key, value in found if value]


def worth_sentence(read: Read) -> str:
    """What the judged differences are worth, for the head of the page; "" where no curve tells."""
    told = [
        f"{c.arm}: {tell_multiplier(reach)}"
        for c in read.verdicts.contrasts
        if c.word.startswith(("better", "worse", "likely")) and (reach := read.evidence.multipliers.get(c.arm))
    ]
    return f"In the baseline's own terms, {'; '.join(told)}." if told else ""
