"""The sections of the page across studies: agreement, every question at its scales, the rules, sweeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpt2lab.basics.text import plural
from gpt2lab.reports.front import sections_of
from gpt2lab.reports.index import Overview, Record
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.published import AGAIN, AGAINST, OPEN, RULES
from gpt2lab.reports.tables import tabulate

COMMAND = "gpt2lab run ablations/posenc.yaml --scale nano"
"""What makes a first study."""

TALLIES = (
    "A contrast that several publications report is counted once for each. The rules of agreement are at the end of "
    "this page."
)


@section(order=0, of="index")
def first_command(read: Overview) -> Section | None:
    return None if read.studies or read.sweeps else Section(code=COMMAND)


@section(order=10, title="Agreement", of="index")
def agreement(read: Overview) -> Section | None:
    contrasts = [contrast for study in read.studies for contrast in study["contrasts"]]
    expected = [contrast["agreement"] for contrast in contrasts if contrast["agreement"]]
    published = [effect for contrast in contrasts for effect in contrast["published"]]
    rows = [("what the study's file expects", expected), ("published results", published)]

    def cells(row: tuple[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
        counts = Counter((agreed["kind"], agreed["word"] != agreed["kind"]) for agreed in row[1])
        return {
            "Contrasts compared with": row[0],
            "found again:number": str(counts[AGAIN, False]),
            "same at another scale:number": str(counts[AGAIN, True]),
            "contradicted:number": str(counts[AGAINST, False]),
            "other sign at another scale:number": str(counts[AGAINST, True]),
            "inconclusive:number": str(counts[OPEN, False] + counts[OPEN, True]),
        }

    table = tabulate([row for row in rows if row[1]], cells)
    return Section(table=table, note=TALLIES) if table else None


@section(order=20, of="index")
def questions(read: Overview) -> list[Section]:
    """A section for each ablation, the newest first."""
    by_question: dict[str, list[Record]] = {}
    for study in read.studies:
        by_question.setdefault(study["ablation"], []).append(_with_expected(study))
    ordered = [sorted(studies, key=lambda study: study["parameters"] or 0) for studies in by_question.values()]
    sections = zip(sections_of(ordered, "Expected and published"), ordered, strict=True)
    return [replace(section, aside="; ".join(map(_line, studies))) for section, studies in sections]


def _line(study: Record) -> str:
    """`posenc@nano of 2026-11-23 (1 run without a value)`"""
    missing = f" ({plural(study['missing'], 'run')} without a value)" if study["missing"] else ""
    return f"{study['name']} of {study['created'][:10]}{missing}"


def _with_expected(study: Record) -> Record:
    """A study in which what its file expects of a contrast is the first of what was published on it."""
    contrasts = []
    for contrast in study["contrasts"]:
        expected, agreed = contrast["expected"], contrast["agreement"]
        first = [{"effect": expected, "source": "expected by its file", "word": agreed["word"]}] if agreed else []
        contrasts.append({**contrast, "published": [*first, *contrast["published"]]})
    return {**study, "contrasts": contrasts, "page": study["report"] or ""}


@section(order=50, title="How agreement is decided", of="index")
def rules(read: Overview) -> Section | None:
    return Section(points=RULES) if read.studies else None


@section(order=60, title="Sweeps", of="index")
def sweeps(read: Overview) -> Section | None:
    parts = [
        Section(
            title=sweep["name"],
            link=sweep["report"] or "",
            lead=[sweep["question"], *sweep["answer"]],
            aside=sweep["line"],
        )
        for sweep in read.sweeps
    ]
    return Section(parts=parts) if parts else None
