"""What the page says, before it is HTML or Markdown: both are written from this one value, so they cannot differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpt2lab.analysis import in_words
from gpt2lab.analysis.wording import listed
from gpt2lab.report import method, sections, tables, tuned
from gpt2lab.report.pictures import Picture
from gpt2lab.report.read import Read
from gpt2lab.report.sections import Section
from gpt2lab.report.tables import Table
from gpt2lab.results import NOISE_DESIGN, scope_text, unit
from gpt2lab.text import plural


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
    sections: Sequence[Section]
    command: str
    facts: Sequence[tuple[str, str]]
    heading: str = "Verdicts"
    """of the first table"""
    files: Sequence[str] = ("report.md", "results.csv", "verdicts.json", "figures/")
    """beside the page, its twin first"""

    @property
    def drawings(self) -> list[Picture]:
        """Every figure, wherever it stands."""
        return [*self.figures, *(figure for section in self.sections for figure in section.figures)]


def build(read: Read, figures: Sequence[Picture], *, forced: bool = False) -> Page:
    """The page of a study from what was read of it. forced: refusals were turned into numbers."""
    study, verdicts = read.study, read.verdicts
    told = in_words(replace(verdicts, caveat=None))  # the page sets the caveat apart
    answer, *basis = [line for line in told.splitlines() if line.strip()]
    judged = any(contrast.n_arm and contrast.n_against for contrast in verdicts.contrasts)
    if study.get("design") == NOISE_DESIGN:
        answer, judged = method.floor_sentence(study) or "Nothing is compared here, and no floor is known yet.", True
    worth = sections.worth_sentence(read)
    return Page(
        name=study["name"],
        question=study["question"],
        warnings=_warnings(read, judged=judged, forced=forced),
        answer=[answer, *([worth] if worth else [])] if judged else [],
        basis=basis if judged else [f"Declared to hold {scope_text(study)}."],
        caveat=study.get("caveat"),
        verdicts=tables.verdict_table(study, read.arms, verdicts, read.evidence),
        verdicts_note=_verdicts_note(read),
        figures=[figure for figure in figures if not figure.section],
        sections=sections.sections(read, figures),
        command=study["reproduce"],
        facts=method.facts(study),
    )


def _warnings(read: Read, *, judged: bool, forced: bool) -> list[Remark]:
    found = []
    if forced:
        text = "Refusals were turned into numbers by --force-exploratory: none of them is a finding."
        found.append(Remark("Exploratory.", text))
    if not judged:
        text = "Nothing can be said before both arms of a declared contrast have a run with a usable value."
        found.append(Remark("No verdict yet.", tuned.progress(read) or text))
    wrong = read.study.get("mistakes") or {}
    if wrong:
        text = "They show what a mistake does and how it is found; none of them is a choice for a model: "
        text += "; ".join(f"{arm} ({', '.join(parts)})" for arm, parts in wrong.items()) + "."
        found.append(Remark(f"{plural(len(wrong), 'arm')} wrong on purpose.", text))
    barred = tuned.refused(read)
    if barred:
        text = "; ".join(f"{arm}: {why}" for arm, why in barred.items()) + ". Contrasts with "
        text += "it have" if len(barred) == 1 else "them have"
        text += " no verdict; --force-exploratory shows numbers."
        found.append(Remark(f"{plural(len(barred), 'arm')} cannot be compared.", text))
    missing = [run for run in read.runs if run.value is None]
    if missing:
        counted = ", ".join(f"{sum(r.status == s for r in missing)} {s}" for s in sorted({r.status for r in missing}))
        text = f"{len(missing)} of {plural(len(read.runs), 'declared run')} have no final value ({counted}); see Runs."
        found.append(Remark("This study is incomplete.", text))
    failed = {name: arm.failed for name, arm in read.arms.items() if arm.failed}
    if failed:
        text = "Diverged, or no better than guessing by token frequency; counted, never dropped: "
        text += ", ".join(f"{count} of {name}" for name, count in failed.items()) + "."
        found.append(Remark(f"{plural(sum(failed.values()), 'run')} failed.", text))
    return found


def _verdicts_note(read: Read) -> str:
    study, verdicts = read.study, read.verdicts
    known = [c for c in verdicts.contrasts if math.isfinite(c.low)]
    rescued = [c for c in known if (c.low, c.high) != (c.joint_low, c.joint_high)]
    together = "these intervals hold together"
    if rescued:
        arms = listed(f"{c.arm} against {c.against}" for c in rescued)
        together = (
            f"these intervals hold together, but for {arms}: decided at a later step of Holm's method, each holds by "
            "itself, and those that hold together are in the CSV and JSON as joint_low and joint_high"
        )
    return (
        f"Difference: arm minus baseline in final {study['metric']}, {unit(study)}; lower is better. Below it the "
        f"{tables.confidence(verdicts)} interval (Welch), adjusted for the family of "
        f"{plural(verdicts.members, 'contrast')}, as p is by Holm's method: {together}. A difference below "
        f"{verdicts.smallest_effect:g} {unit(study)} was declared too small to matter. Cost: FLOPs of a whole run, and "
        "training speed, against the baseline's."
    )
