"""The page across studies: what each found, whether it was expected and published, and how it goes with scale.

Everything is rendered before the first file is written, and every file replaces its old one in a single step.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gpt2lab import text
from gpt2lab.report import overview, svg
from gpt2lab.report.across import Across, Damaged, Entry, Finding, as_json, duration, facts, gather, total
from gpt2lab.report.agreement import AGAIN, AGAINST, OPEN, Agreement
from gpt2lab.report.sweep.index import SweepEntry, sweep_entries
from gpt2lab.store import write_atomically
from gpt2lab.text import plural, quantity

TEMPLATES = Path(__file__).parent / "templates"
PICTURE = "index.svg"

COMMAND = "gpt2lab run ablations/posenc.yaml --scale nano"
"""What makes a first study."""

RULES = (
    "Better or worse (also likely better or worse) as expected is found again; the other way round is contradicted.",
    "No difference larger than the smallest effect of interest, where none was expected, is found again. Where one was "
    "expected, it contradicts only a published difference of at least that size at the same scale; else it is "
    "inconclusive.",
    "Exploratory, unstable, not comparable and inconclusive verdicts, and a difference where none was expected, are "
    "inconclusive here.",
    "Scales are the same when neither model has more than twice the parameters of the other. At another scale, at one "
    "that the source does not state, and at a scale that shows signs only, the page says same sign and other sign: "
    "such a study does not repeat what was published.",
    "What is expected is read off how its sentence in the study's file begins: better, worse, about equal, no "
    "difference. A published result counts where two arms differ in nothing but what it is about.",
)


@dataclass(frozen=True)
class Place:
    """One cell of the matrix: a contrast at a scale."""

    finding: Finding
    unit: str
    anchor: str


@dataclass(frozen=True)
class MatrixRow:
    """One contrast over all scales; None where it was not run."""

    ablation: str
    label: str
    places: Sequence[Place | None]


@dataclass(frozen=True)
class Matrix:
    """Contrasts by scale; scales with the size of their models, the smallest first."""

    scales: Sequence[tuple[str, str]]
    rows: Sequence[MatrixRow]


@dataclass(frozen=True)
class Tally:
    """How many contrasts agree, in the columns of COUNTED."""

    what: str
    counts: Sequence[int]


COUNTED = ("found again", "same at another scale", "contradicted", "other sign at another scale", "inconclusive")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One study on the page."""

    anchor: str
    entry: Entry
    line: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page, in the order in which it is read."""

    summary: str
    damaged: Sequence[Damaged]
    tallies: Sequence[Tally]
    counted: Sequence[str]
    matrix: Matrix
    picture: tuple[str, str] | None
    """(caption, inline SVG); None while no study has a difference"""
    sections: Sequence[Section]
    rules: Sequence[str]
    command: str
    sweeps: Sequence[SweepEntry] = ()


def write_index(root: str | Path = "runs", out: str | Path = "reports") -> Path:
    """Write `out`/index.html, index.md, index.json and index.svg over every study and sweep of the store below `root`;
    returns index.html.

    Raises EnvironmentFault when the folder cannot be written (the old page stays). A damaged record or run costs its
    own lines only.
    """
    across = gather(root, out)
    sweeps, unreadable = sweep_entries(root, out)
    across = replace(across, damaged=[*across.damaged, *unreadable])
    alone, picture = _picture(across)
    page = build(across, picture, sweeps)
    files = {"index.html": render_html(page), "index.md": render_markdown(page), "index.json": _json(across, sweeps)}
    files |= {PICTURE: alone} if alone else {}
    folder = Path(out)
    for file, content in files.items():
        write_atomically(folder / file, content)
    if not alone:
        (folder / PICTURE).unlink(missing_ok=True)
    return folder / "index.html"


def build(across: Across, picture: tuple[str, str] | None = None, sweeps: Sequence[SweepEntry] = ()) -> Page:
    """The page from what was read."""
    anchors = {entry.name: f"study-{number}" for number, entry in enumerate(across.entries, start=1)}
    sections = [
        Section(
            anchor=anchors[entry.name],
            entry=entry,
            line=_line(entry),
            facts=[(key, value) for key, value in facts(entry) if value],
        )
        for entry in across.entries
    ]
    return Page(
        summary=_summary(across),
        damaged=across.damaged,
        tallies=_tallies(across.findings),
        counted=COUNTED,
        matrix=matrix(across.entries, anchors),
        picture=picture,
        sections=sections,
        rules=RULES,
        command=COMMAND,
        sweeps=sweeps,
    )


def _line(entry: Entry) -> str:
    """A study in a line: `nano · 842 k parameters, 819 k tokens · 2026-11-23`."""
    scope = entry.study["scope"]
    sizes = f"{quantity(scope.get('parameters'))} parameters, {quantity(scope.get('tokens'))} tokens"
    parts = [entry.scale, sizes, str(entry.study.get("created") or "")[:10], entry.study.get("caveat") or ""]
    return " · ".join(part for part in parts if part)


def _summary(across: Across) -> str:
    runs, flops, seconds = total(across.entries)
    studies = "1 study" if len(across.entries) == 1 else f"{len(across.entries)} studies"
    parts = [studies, plural(len(across.findings), "contrast"), plural(runs, "run")]
    parts += [quantity(flops, "FLOP")] if flops else []
    parts += [f"{duration(seconds)} of training"] if seconds else []
    return ", ".join(parts) + "; runs that studies share are counted once."


def _tallies(findings: Sequence[Finding]) -> list[Tally]:
    expected = [finding.agreement for finding in findings if finding.agreement]
    published = [agreement for finding in findings for _, agreement in finding.published]
    pairs = (("what the study's file expects", expected), ("published results", published))
    return [Tally(what, _count(agreements)) for what, agreements in pairs if agreements]


def _count(agreements: Sequence[Agreement]) -> list[int]:
    def how_many(kind: str, *, elsewhere: bool) -> int:
        return sum(a.kind == kind and (a.word != a.kind) == elsewhere for a in agreements)

    return [
        *(how_many(kind, elsewhere=elsewhere) for kind in (AGAIN, AGAINST) for elsewhere in (False, True)),
        sum(a.kind == OPEN for a in agreements),
    ]


def matrix(entries: Sequence[Entry], anchors: dict[str, str]) -> Matrix:
    """Every contrast of an ablation in one row, a scale in each column; those at most scales first."""
    sizes: dict[str, list[float]] = {}
    places: dict[tuple[str, str], dict[str, Place]] = {}
    for entry in entries:
        sizes.setdefault(entry.scale, []).append(entry.study["scope"].get("parameters") or 0.0)
        ablation = str(entry.study.get("ablation") or entry.name)
        for finding in entry.findings:
            row = places.setdefault((ablation, finding.label), {})
            row.setdefault(entry.scale, Place(finding, entry.unit, anchors[entry.name]))
    middle = {scale: statistics.median(found) for scale, found in sizes.items()}
    scales = sorted(middle, key=lambda scale: (middle[scale], scale))
    order = sorted(places, key=lambda key: (-len(places[key]), key[0]))
    rows = [MatrixRow(ablation, label, [places[ablation, label].get(s) for s in scales]) for ablation, label in order]
    return Matrix([(scale, f"{quantity(middle[scale])} parameters") for scale in scales], rows)


def _picture(across: Across) -> tuple[str, tuple[str, str] | None]:
    """(a file of its own, (caption, markup for the page)); ("", None) where there is nothing to draw."""
    shown = overview.groups(across.entries)
    if not shown:
        return "", None
    caption = overview.caption(shown, len(across.findings))
    with svg.drawing():
        alone, inline = svg.render(overview.overview(shown), "overview", "Every contrast", caption)
    return alone, (caption, inline)


def render_html(page: Page) -> str:
    """The page as one file that loads nothing and runs nothing."""
    css = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "index.css"))
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = _environment(autoescape=True)
    environment.filters["drawing"] = Markup  # our own SVG, in which ElementTree has escaped every name
    return environment.get_template("index.html.j2").render(page=page, css=Markup(css), policy=policy)


def render_markdown(page: Page) -> str:
    """The same content in Markdown."""
    environment = _environment(autoescape=False)
    environment.filters |= {"md": text.markdown, "fenced": text.fenced}
    return environment.get_template("index.md.j2").render(page=page, picture=PICTURE)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True
    )


def _json(across: Across, sweeps: Sequence[SweepEntry]) -> str:
    """All of it for programs."""
    damaged = [{"name": one.name, "why": one.why} for one in across.damaged]
    record: dict[str, Any] = {"studies": [as_json(entry) for entry in across.entries], "damaged": damaged}
    record["sweeps"] = [entry.to_json() for entry in sweeps]
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
