"""What the page says, before it is HTML or Markdown: both are written from this one value, so they cannot differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt2lab.analysis import Verdicts, in_words
from gpt2lab.report import tables
from gpt2lab.report.pictures import Picture
from gpt2lab.report.tables import Table
from gpt2lab.results import LOSS, Study, StudyRun, scope_text, unit
from gpt2lab.text import number, plural, quantity

NEAR_BIGRAM = 0.3


@dataclass(frozen=True)
class Remark:
    """Something the reader must know before reading on."""

    head: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report, in the order in which it is read."""

    name: str
    question: str
    warnings: Sequence[Remark]
    answer: Sequence[str]
    basis: Sequence[str]
    caveat: str | None
    verdicts: Table
    verdicts_note: str
    figures: Sequence[Picture]
    cost: Table
    cost_note: str
    sensitivity: Table
    sensitivity_note: str
    runs: Table
    limits: Sequence[str]
    command: str
    facts: Sequence[tuple[str, str]]


def build(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, figures: Sequence[Picture]) -> Page:
    """The page of a study from what was read of it."""
    arms = tables.summaries(study, runs, verdicts)
    told = in_words(replace(verdicts, caveat=None))  # the page sets the caveat apart
    answer, *basis = [line for line in told.splitlines() if line.strip()]
    judged = any(contrast.n_arm and contrast.n_against for contrast in verdicts.contrasts)
    return Page(
        name=study["name"],
        question=study["question"],
        warnings=_warnings(runs, arms, judged=judged),
        answer=[answer] if judged else [],
        basis=basis if judged else [f"Declared to hold {scope_text(study)}."],
        caveat=study.get("caveat"),
        verdicts=tables.verdict_table(study, arms, verdicts),
        verdicts_note=_verdicts_note(study, verdicts),
        figures=figures,
        cost=tables.cost_table(study, arms),
        cost_note="The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median "
        "over runs, memory the largest of them; both depend on what else the machine was doing.",
        sensitivity=tables.sensitivity_table(study, verdicts),
        sensitivity_note="None of these decides a verdict, and none is adjusted for the number of contrasts. Paired, "
        "and arm and seed, use the seeds that both arms share; a permutation test needs 4 seeds per arm. Detectable: "
        "the true difference found four times out of five, and the same with the noise at its upper 80 % limit.",
        runs=tables.run_table(study, runs),
        limits=_limits(study, arms, verdicts),
        command=study["reproduce"],
        facts=_facts(study),
    )


def _warnings(runs: Sequence[StudyRun], arms: Mapping[str, tables.Summary], *, judged: bool) -> list[Remark]:
    found = []
    if not judged:
        text = "Nothing can be said before both arms of a declared contrast have a run with a usable value."
        found.append(Remark("No verdict yet.", text))
    missing = [run for run in runs if run.value is None]
    if missing:
        counted = ", ".join(f"{sum(r.status == s for r in missing)} {s}" for s in sorted({r.status for r in missing}))
        text = f"{len(missing)} of {plural(len(runs), 'declared run')} have no final value ({counted}); see Runs."
        found.append(Remark("This study is incomplete.", text))
    failed = {name: arm.failed for name, arm in arms.items() if arm.failed}
    if failed:
        text = "Diverged, or no better than guessing by token frequency; counted, never dropped: "
        text += ", ".join(f"{count} of {name}" for name, count in failed.items()) + "."
        found.append(Remark(f"{plural(sum(failed.values()), 'run')} failed.", text))
    return found


def _verdicts_note(study: Study, verdicts: Verdicts) -> str:
    return (
        f"Difference: arm minus baseline in final {study['metric']}, {unit(study)}; lower is better. Below it the "
        f"{100 * (1 - study['alpha']):g} % interval (Welch), adjusted for the family of "
        f"{plural(len(verdicts.contrasts), 'contrast')}, as p is by Holm's method. A difference below "
        f"{study['smallest_effect']:g} {unit(study)} was declared too small to matter before anything ran."
    )


def _limits(study: Study, arms: Mapping[str, tables.Summary], verdicts: Verdicts) -> list[str]:
    caveat = f" Caveat of this scale: {study['caveat']}." if study.get("caveat") else ""
    tokens = quantity(study["evaluation"].get("tokens"))
    sentences = [
        f"It holds {scope_text(study)}; larger models, longer training or other data may order the arms differently."
        + caveat,
        f"Every run is scored at its end on the same {tokens} validation tokens. A seed sets initialisation, data "
        "order and dropout together.",
        _power(study, arms, verdicts),
    ]
    if not study.get("bracketed"):
        text = "All arms share one learning rate, which suits some better than others: each at its own best rate, a "
        sentences.append(text + "difference can shrink or turn round.")
    sentences += _near_bigram(study, arms[study["baseline"]])
    for arm, entry in study["arms"].items():
        if entry.get("exploratory"):
            sentences.append(f"{arm} is exploratory only: {entry['exploratory']}.")
    earlier = study.get("earlier") or []
    if earlier:
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        sentences.append(
            f"This study was declared differently {times} before, last by `{earlier[-1].get('reproduce')}`; arms or "
            "seeds that were chosen after a look make every verdict weaker than it says."
        )
    axis = study.get("equalise", "tokens")
    sentences.append(f"Arms are compared at equal {axis}; what that costs each of them is in the table above.")
    sentences.append(f"Only the declared contrasts on {study['metric']} carry verdict words; the rest is description.")
    return sentences


def _power(study: Study, arms: Mapping[str, tables.Summary], verdicts: Verdicts) -> str:
    """How many seeds, and how small a difference they could have shown."""
    counts = sorted({arm.n for arm in arms.values()})
    text = f"Usable seeds per arm: {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))}."
    detectable = [c.detectable for c in verdicts.contrasts if math.isfinite(c.detectable)]
    if not detectable:
        return text + " That is too few to say how small a difference would have been found."
    span = " to ".join(dict.fromkeys(number(d, 3) for d in (min(detectable), max(detectable))))
    return text + f" The smallest true difference that they find four times out of five: {span} {unit(study)}."


def _near_bigram(study: Study, baseline: tables.Summary) -> list[str]:
    bigram = (study.get("floors") or {}).get("bigram")
    if study["metric"] != LOSS or bigram is None or baseline.mean is None or baseline.mean < bigram - NEAR_BIGRAM:
        return []
    place = "above" if baseline.mean > bigram + NEAR_BIGRAM else f"within {NEAR_BIGRAM:g} nats of"
    return [
        f"The baseline ends at {number(baseline.mean, 3)}, {place} what counting pairs of tokens reaches "
        f"({number(bigram, 3)}): such contrasts measure when attention switches on, not how good the arms become."
    ]


def _facts(study: Study) -> list[tuple[str, str]]:
    stack: Mapping[str, Any] = study.get("stack") or {}
    device = " ".join(str(stack[k]) for k in ("device", "device_name") if stack.get(k))
    facts = [
        ("Data", study["scope"].get("data")),
        ("Preset", study["scope"].get("preset")),
        ("Seeds", ", ".join(map(str, study["seeds"]))),
        ("Code", f"git commit {stack['git_commit']}" if stack.get("git_commit") else "not under version control"),
        ("Software", f"torch {stack.get('torch')}, Python {stack.get('python')}, {stack.get('platform')}"),
        ("Device", device),
        ("Declared", f"{study.get('created')}, record {study.get('hash')}"),
    ]
    return [(key, str(value)) for key, value in facts if value]
