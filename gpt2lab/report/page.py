"""Write the report of a study: one self-contained HTML page, its Markdown twin, the figures and the numbers.

Everything is rendered before the first file is written, and every file replaces its old one in a single step, so a
report that cannot be made leaves the previous one as it was.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from gpt2lab import text
from gpt2lab.analysis.verdicts import as_json
from gpt2lab.report import tables, tuned
from gpt2lab.report.content import Page, build
from gpt2lab.report.pictures import draw
from gpt2lab.report.read import Read, read_study
from gpt2lab.results import StudyRun
from gpt2lab.store import write_atomically

REACHES = ("multipliers", "in_tokens", "shares")
TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    study: str | Read, *, root: str | Path = "runs", out: str | Path = "reports", force_exploratory: bool = False
) -> Path:
    """Write `out`/<study>/ with index.html, report.md, figures/, results.csv and verdicts.json; returns index.html.

    study: its name in the store at `root`, or what `read_study` read of it.
    force_exploratory: show numbers where a verdict is refused, under a banner that says so.
    The study may be incomplete; the page then says what is missing. Raises ConfigError for an unknown study, DataFault
    for a damaged record, EnvironmentFault when the folder cannot be written (the old report stays).
    """
    read = study if isinstance(study, Read) else read_study(study, root, force_exploratory=force_exploratory)
    page = build(read, draw(read), forced=force_exploratory)
    numbers = {"results.csv": _csv(read.runs), "verdicts.json": _json(read)}
    return write_page(Path(out) / str(read.study["name"]), page, numbers)


def write_page(folder: Path, page: Page, numbers: Mapping[str, str]) -> Path:
    """Write a page, its twin, its figures and the files in `numbers`; returns index.html. Figures that are no longer
    drawn are removed."""
    files: dict[str, str | bytes] = {f"figures/{figure.name}.svg": figure.alone for figure in page.drawings}
    files |= {f"figures/{figure.name}.png": figure.png for figure in page.drawings}
    files |= {"report.md": render_markdown(page), **numbers, "index.html": render_html(page)}
    for file, content in files.items():
        write_atomically(folder / file, content)
    for stale in set((folder / "figures").glob("*.*")) - {folder / file for file in files}:
        stale.unlink()
    return folder / "index.html"


def terminal_summary(read: Read, out: str | Path = "reports") -> Group:
    """What a terminal shows at the end of a study: one line per contrast, what is missing, where the page lies."""
    study, runs = read.study, read.runs
    table = tables.verdict_table(study, read.arms, read.verdicts, read.evidence)
    shown = RichTable(title=Text(study["question"]), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        shown.add_column(column.title, justify="right" if column.kind == "number" else "left")
    for row in table.rows:
        cells = [Text(" ".join(filter(None, (cell.text, cell.detail)))) for cell in row.cells[1:]]
        shown.add_row(Text(row.cells[0].text, style="bold"), *cells)
    missing = sum(run.value is None for run in runs)
    lines = [Text(f"{text.plural(missing, 'run')} without a value: see the report", style="yellow")] if missing else []
    lines += [Text(told) for c in read.verdicts.contrasts if (told := tuned.summary(read, c))]
    page = Path(out) / study["name"] / "index.html"
    where = Text(f"report: {page}" if page.exists() else f"report: gpt2lab report {study['name']}")
    return Group(shown, *lines, where)


def render_html(page: Page) -> str:
    """The page as one file that loads nothing and runs nothing."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = _environment(autoescape=True)
    environment.filters["drawing"] = Markup  # our own SVG, in which ElementTree has escaped every name
    return environment.get_template("report.html.j2").render(page=page, css=Markup(css), policy=policy)


def render_markdown(page: Page) -> str:
    """The same content in Markdown."""
    environment = _environment(autoescape=False)
    environment.filters |= {"md": text.markdown, "fenced": text.fenced}
    return environment.get_template("report.md.j2").render(page=page)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True
    )


def _csv(runs: Sequence[StudyRun]) -> str:
    """One line per declared run; `gpt2lab compare` reads it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "value", "run", "status", "tokens", "tokens_per_second", "peak_memory_bytes"])
    measured = ("tokens", "tokens_per_second", "peak_memory_bytes")
    for run in runs:
        writer.writerow(
            [run.arm, run.seed, "" if run.value is None else run.value, run.id, run.status]
            + [run.result.get(key, "") for key in measured]
        )
    return buffer.getvalue()


def _json(read: Read) -> str:
    """The verdicts for programs; numbers that are not finite are null."""
    study = read.study
    record = {key: study.get(key) for key in ("name", "hash", "question", "caveat")} | read.verdicts.to_json()
    record["metric"] = study["metric"]
    if read.tuned.written:
        record["as_written"] = read.tuned.written.to_json()["contrasts"]
    record["missing"] = [
        {key: getattr(run, key) for key in ("arm", "seed", "id", "status", "reason")}
        for run in read.runs
        if run.value is None
    ]
    evidence = {key: {arm: asdict(reach) for arm, reach in getattr(read.evidence, key).items()} for key in REACHES}
    record |= as_json(evidence | {"horizon": [asdict(one) for one in read.evidence.horizon]})
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
