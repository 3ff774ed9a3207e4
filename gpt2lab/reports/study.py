"""The page of a study: its head, the numbers beside it, and the summary that a terminal shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.text import Text

from gpt2lab.analysis import Contrast, in_words
from gpt2lab.analysis.results import NOISE_DESIGN, Study, StudyRun
from gpt2lab.analysis.studies import scope_text
from gpt2lab.basics.output import LOG_WIDTH
from gpt2lab.basics.progress import WIDE
from gpt2lab.basics.text import plural
from gpt2lab.planning.prediction import changed_parts
from gpt2lab.records import page_folder
from gpt2lab.reports.index import agreements, compute
from gpt2lab.reports.page import Page, Remark, csv_text, made_of, page_place, sum_of, terminal_table, write_page
from gpt2lab.reports.published import AGAINST, expectation
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections import tuned
from gpt2lab.reports.sections.curves import holding
from gpt2lab.reports.sections.method import failed_runs, floor_sentence, strongest_caveat
from gpt2lab.reports.sections.scaling import early_differences, worth_sentence
from gpt2lab.reports.sections.verdicts import verdict_table

FILES = ("report.md", "results.csv", "verdicts.json", "figures/")
NARROW = ("Arm", "Mean", "n", "Difference", "Holm p", "Verdict")
"""Columns of the table of verdicts that a narrow terminal shows."""


def write_report(read: StudyRead, out: str | Path = "reports", *, images: bool = False) -> Path:
    """Write `out`/<study>/ with index.html, report.md, figures/, results.csv and verdicts.json;
    returns index.html. images: figures also as PNG, for slides, and PDF, for papers.

    The study may be incomplete; the page then says what is missing. Raises EnvironmentFault when the folder cannot be
    written (the old report stays).
    """
    page = build(read)
    numbers = {"results.csv": _csv(read.runs), "verdicts.json": _json(read, page)}
    folder, declaration = page_folder(out, read.name), read.store.declaration(read.name)
    return write_page(folder, page, numbers, declaration, sum_of(read), images=images)


def build(read: StudyRead) -> Page:
    """The page of a study from what was read of it."""
    study, verdicts = read.study, read.verdicts
    text = in_words(replace(verdicts, caveat=None))  # the page sets the caveat apart
    answer, *basis = [line for line in text.splitlines() if line.strip()]
    judged = any(contrast.n_arm and contrast.n_against for contrast in verdicts.contrasts)
    if study.design == NOISE_DESIGN:
        answer, judged = floor_sentence(study) or "Nothing is compared here, and no floor is known yet.", True
    return Page(
        about=read.name,
        heading=study.question,
        title=f"{study.question} – {read.name}",
        warnings=_warnings(read, judged=judged),
        answer=[sentence for sentence in (answer, holding(read), worth_sentence(read)) if sentence] if judged else [],
        conclusion=read.conclusion,
        basis=basis if judged else [f"Declared to hold {scope_text(study)}."],
        sections=made_of(read, "study"),
        files=FILES,
    )


def _warnings(read: StudyRead, *, judged: bool) -> list[Remark]:
    remarks = [Remark("Caveat:", caveat)] if (caveat := read.once(strongest_caveat)) else []
    if read.forced:
        text = "--force-exploratory shows numbers where verdicts were refused: none of them is a finding."
        remarks.append(Remark("Exploratory.", text))
    if not judged:
        text = "A verdict needs a run with a usable value in both arms of a declared contrast."
        remarks.append(Remark("No verdict yet.", tuned.progress(read) or text))
    expected = {c.arm: expectation(read.study, c) for c in read.verdicts.contrasts}
    if against := {arm: said for arm, (said, agreement) in expected.items() if agreement and agreement.kind == AGAINST}:
        text = "; ".join(f"expected of {arm}: {said}" for arm, said in against.items())
        remarks.append(Remark("Not as expected.", f"{text}."))
    if wrong := read.study.mistakes:
        arms = "; ".join(f"{arm} ({', '.join(parts)})" for arm, parts in wrong.items())
        text = f"They show what a mistake does and how it is found; do not use them in a model: {arms}."
        remarks.append(Remark(f"{plural(len(wrong), 'arm')} wrong on purpose.", text))
    if barred := tuned.refused(read):
        reasons = "; ".join(f"{arm}: {why}" for arm, why in barred.items())
        them = "it have" if len(barred) == 1 else "them have"
        text = f"{reasons}. Contrasts with {them} no verdict; --force-exploratory shows numbers."
        remarks.append(Remark(f"{plural(len(barred), 'arm')} cannot be compared.", text))
    if missing := Counter(run.status for run in read.runs if run.value is None):
        counted = ", ".join(f"{count} {status}" for status, count in sorted(missing.items()))
        declared = plural(len(read.runs), "declared run")
        text = f"{missing.total()} of {declared} have no final value ({counted}); see Runs."
        remarks.append(Remark("This study is incomplete.", text))
    if failed := failed_runs(read):
        remarks.append(failed)
    return remarks


def terminal_summary(
    read: StudyRead, out: str | Path = "reports", *, kept: bool = False, width: int = LOG_WIDTH
) -> Group:
    """What a terminal shows at the end of a study: one row per contrast, what is missing, where the page lies. kept:
    the page lay there already. width: columns of the terminal; a narrow one has no room for all of the table."""
    study, runs = read.study, read.runs
    table = verdict_table(read)
    shown = [i for i, column in enumerate(table.columns) if width >= WIDE or column.title in NARROW]
    columns = [table.columns[i] for i in shown]
    titles = {column.title: "right" if column.kind == "number" else "left" for column in columns}
    rows: list[list[Text | str]] = [
        [Text(row.cells[0].text, style="bold"),
         *(f"{row.cells[i].text}\n{row.cells[i].detail}".strip() for i in shown[1:])]
        for row in table.rows
    ]  # fmt: skip
    missing = sum(run.value is None for run in runs)
    lines = [Text(f"{plural(missing, 'run')} without a value: see the report", style="yellow")] if missing else []
    lines += [Text(f"{failed.head} {failed.text}", style="yellow")] if (failed := failed_runs(read)) else []
    lines += [Text(line)] if (line := holding(read)) else []
    lines += [Text(line) for c in read.verdicts.contrasts if (line := tuned.summary(read, c))]
    lines += [Text(" ".join(read.standing.sentences()))] if read.standing and not read.standing.alone else []
    lines += [Text(f"earlier declarations: {', '.join(earlier)}")] if (earlier := read.store.earlier(read.name)) else []
    place = page_place(page_folder(out, read.name), kept=kept)
    return Group(terminal_table(titles, rows, study.question), *lines, place)


def _csv(runs: Sequence[StudyRun]) -> str:
    """One line per declared run; `gpt2lab compare` reads it."""
    measured = ("tokens", "tokens_per_second", "peak_memory_bytes")
    rows = [[r.arm, r.seed, r.value, r.id, r.status, *map(r.result.get, measured)] for r in runs]
    return csv_text([["arm", "seed", "value", "run", "status", *measured], *rows])


def _json(read: StudyRead, page: Page) -> str:
    """The verdicts for programs; numbers that are not finite are null."""
    study = read.study
    record = {key: getattr(study, key) for key in ("name", "hash", "question", "caveat")} | read.verdicts.to_json()
    record |= {key: getattr(study, key) for key in ("metric", "ablation", "scale", "created")}
    record |= {
        "parameters": study.scope.parameters,
        "tokens": study.scope.tokens,
        "conclusion": read.conclusion or None,
    }
    record |= {
        "answer": page.answer[0] if page.answer else None,
        "seconds": compute((study, run) for run in read.runs).seconds,
    }
    for contrast, judged in zip(record["contrasts"], read.verdicts.contrasts, strict=True):
        contrast |= agreements(study, judged)
        contrast |= {"parts": _parts(study, judged), "early": early_differences(read, judged.weights)}
    record["missing"] = [
        {key: getattr(run, key) for key in ("arm", "seed", "id", "status", "reason")}
        for run in read.runs
        if run.value is None
    ]
    return page.json(record)


def _parts(study: Study, contrast: Contrast) -> list[str]:
    """The slots and settings in which the two arms of a contrast differ; [] for an effect over more arms."""
    arms = [study.arms.get(name) for name in contrast.weights]
    return changed_parts(arms[0].changes, arms[1].changes) if len(arms) == 2 and arms[0] and arms[1] else []
