"""What follows the figures: cost, worth, rates, other estimators, noise, method, deviations, runs. Text, not layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpt2lab.analysis.scaling import tell_multiplier, tell_share
from gpt2lab.report import appendix, health, method, origins, tables, tuned
from gpt2lab.report.pictures import HEALTH, ORIGINS, TUNED, Picture
from gpt2lab.report.read import Read
from gpt2lab.report.tables import Summary, Table
from gpt2lab.results import LOSS, Study, StudyRun, scope_text, searched, shares_rate
from gpt2lab.text import number

NEAR_BIGRAM = 0.3


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a table, paragraphs, code or points below it. `folded`: opened by a click on the page."""

    title: str
    table: Table | None = None
    note: str = ""
    code: str = ""
    points: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    folded: bool = False


def sections(read: Read, pictures: Sequence[Picture] = ()) -> list[Section]:
    """The page behind its figures, in order; parts that the study does not have are left out."""
    study, evidence = read.study, read.evidence
    made = [
        *_tuned(read, [picture for picture in pictures if picture.section == TUNED]),
        _origins(read, [picture for picture in pictures if picture.section == ORIGINS]),
        Section(
            title="What it costs",
            table=tables.cost_table(study, read.arms),
            note=COST,
            points=[*_per_second(read), *tuned.cost_points(read)],
        ),
        _time(read),
        _worth(read) if evidence.budgets else None,
        _rates(read) if evidence.trials else None,
        _ladder(read) if read.trends else None,
        _horizon(read) if evidence.horizon else None,
        Section(
            title="Sensitivity: the same contrasts, analysed in other ways",
            table=appendix.sensitivity_table(read.verdicts, evidence),
            note=SENSITIVITY,
            folded=True,
        ),
        _errors(read) if evidence.error_budgets else None,
        Section(title="Noise floor and power", points=method.noise(read)),
        Section(title="Method", points=method.declared(read)),
        Section(
            title="What deviates from that", points=method.deviations(read) or ["Nothing that the store knows of."]
        ),
        _health(read, [picture for picture in pictures if picture.section == HEALTH]),
        Section(title="Runs", table=appendix.run_table(study, [*read.runs, *_as_written(read)], evidence)),
        Section(title="What this shows, and what it does not", points=_limits(read)),
    ]
    return [section for section in made if section]


def _errors(read: Read) -> Section:
    return Section(
        title="What the intervals are made of", table=appendix.error_table(read.verdicts, read.evidence), note=ERRORS
    )


ERRORS = (
    "Half-widths in the metric's unit, at the level of the verdicts. Seeds: of the interval at the rates that were "
    "chosen. Search of rates: what is added because each arm's best rate is known only from a few trials. Validation "
    "text: of a 95 % interval over documents (Student's t); it is not part of the verdict's interval, which holds for "
    "this text. The last column says what would narrow the interval most for the training time that it takes, if "
    "spreads and curves are as they look now."
)
COST = (
    "The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median over runs, "
    "memory the largest of them; both depend on what else the machine was doing."
)
SENSITIVITY = (
    "None of these decides a verdict, and none is adjusted for the number of contrasts. Paired, and arm and seed, use "
    "the seeds that both arms share; a permutation test needs 4 seeds per arm. Detectable: the true difference found "
    "four times out of five, and the same with the noise at its upper 80 % limit. Text noise: half the 95 % interval "
    "of the difference over the documents that were scored; seeds do not lessen it, more validation text does."
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
        "the tokens) that the baseline needs for an arm's loss, divided by what the arm took. The 95 % interval takes "
        "for granted only that the loss falls ever more slowly with the logarithm of the budget; it is not adjusted "
        "for the number of arms.",
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


def _tuned(read: Read, pictures: Sequence[Picture]) -> list[Section]:
    """What tuning changed, and what each search found; nothing for a study without searches."""
    if not searched(read.study):
        return []
    contrasts, arms = tuned.contrast_table(read), tuned.arm_table(read)
    points = tuned.points(read)
    if contrasts is None and arms is None and not points:
        return []
    return [
        Section(title="Each arm tuned", table=contrasts, note=tuned.NOTE, points=points, figures=pictures),
        *([Section(title="What each arm's search found", table=arms, note=tuned.ARMS_NOTE)] if arms else []),
    ]


def _as_written(read: Read) -> list[StudyRun]:
    """Runs at the settings as written, named so."""
    return [replace(run, arm=f"{run.arm}, as written") for run in read.tuned.runs]


def _ladder(read: Read) -> Section:
    return Section(
        title="Over size",
        points=[str(trend) for trend in read.trends],
        note=f"The same ablation at {len(read.trends[0].sizes)} sizes, each trained for "
        f"{read.study['tokens_per_parameter']:g} tokens per parameter: the least-squares slope over the logarithm of "
        "the parameters, with the noise of every size (95 % interval, not adjusted for the number of arms). Sizes "
        "beyond those that were run may differ.",
    )


def _horizon(read: Read) -> Section:
    return Section(
        title="How early the order of arms shows",
        table=appendix.horizon_table(read.evidence),
        note="Rank agreement of the arms' mean losses during training with those at the end: 1 is the same order, 0 "
        "none, -1 the reverse. These runs were on the way to the end of a long schedule; a screen on a short schedule "
        "of its own can do worse.",
    )


def _origins(read: Read, pictures: Sequence[Picture]) -> Section | None:
    """Without numbers it is there to say how to get them, if any run could give some."""
    found, table = read.origins, origins.table(read.origins, read.arms)
    without = origins.left_out(found, read.study["name"])
    if table is None and not found.lacking:
        return None
    return Section(
        title="Where the difference comes from",
        table=table,
        note=origins.note(found) if table else "",
        points=[*origins.points(found, read.study["baseline"]), *without],
        figures=pictures,
    )


def _time(read: Read) -> Section | None:
    table = health.time_table(read.health, read.arms)
    if table is None:
        return None
    return Section(title="Where the time went", table=table, note=health.time_note(read.health), folded=True)


def _health(read: Read, pictures: Sequence[Picture]) -> Section:
    table = health.table(read.health, read.arms)
    return Section(
        title=f"Training health{health.headline(read.health)}",
        table=table,
        note=health.NOTE if table else health.NOTHING,
        points=health.points(read.health) if table else (),
        figures=pictures,
        folded=True,
    )


def _limits(read: Read) -> list[str]:
    study = read.study
    caveat = f" Caveat of this scale: {study['caveat']}." if study.get("caveat") else ""
    sentences = [
        f"It holds {scope_text(study)}; larger models, longer training or other data may order the arms differently."
        + caveat,
    ]
    if shares_rate(study):
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


def worth_sentence(read: Read) -> str:
    """What the judged differences are worth, for the head of the page; "" where no curve tells."""
    told = [
        f"{c.arm}: {tell_multiplier(reach)}"
        for c in read.verdicts.contrasts
        if c.word.startswith(("better", "worse", "likely")) and (reach := read.evidence.multipliers.get(c.arm))
    ]
    return f"In the baseline's own terms, {'; '.join(told)}." if told else ""
