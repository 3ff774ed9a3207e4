"""One page writer for studies, sweeps and the index: HTML that loads and runs nothing, and the same in Markdown.

A page is a head and a list of sections. Each section is made by one function of a file in `reports/sections/`, which
`@section` registers; it gets all that was read and returns what to show, or None where there is nothing. A section
that raises is replaced by a line with the error; the rest of the page is not affected.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.table import Table as RichTable
from rich.text import Text

from gpt2lab.analysis.verdicts import as_json
from gpt2lab.basics import text
from gpt2lab.errors import ConfigError, DataFault, unknown
from gpt2lab.records import NUMBERED, page_folder
from gpt2lab.registry import line_in
from gpt2lab.reports.inputs import sum_of_code
from gpt2lab.reports.style import IMAGES, Picture, drawing
from gpt2lab.reports.tables import Table
from gpt2lab.store import Store, read_bytes, read_json, write_atomically, write_json
from gpt2lab.store.files import sha256

TEMPLATES = Path(__file__).parent / "templates"
WRITTEN = ".written.json"
"""Beside a page: the list of its files."""
EARLIER = re.compile(r"~\d+$")
"""How the folder of an earlier declaration's page ends; see `write_files`."""
OF_A_PAGE = re.compile(r"(figures/)?[^/\\.][^/\\]*")
LOCAL = {
    "index.html": re.compile(r'<a href="http://(?:127\.0\.0\.1|localhost)[^"]*">(.*?)</a>'),
    "report.md": re.compile(r"\[([^\]]*)\]\(http://(?:127\.0\.0\.1|localhost)[^)]*\)"),
}
"""Links that lead nowhere from a published page."""
FIGURES = 10.0
"""Order of the part of the page that shows the figures which sections put in front."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it, in the order of the fields; what is empty is left out."""

    title: str = ""
    """that of `@section` unless it is given"""
    link: str = ""
    """address that the title leads to"""
    anchor: str = ""
    lead: Sequence[str] = ()
    """paragraphs"""
    aside: str = ""
    """a small line above the table"""
    table: Table | None = None
    note: str = ""
    """a small paragraph below the table"""
    code: str = ""
    points: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    facts: Sequence[tuple[str, str]] = ()
    parts: Sequence[Section] = ()
    """sections within this one"""
    folded: bool = False
    """opened by a click on the page"""
    front: Sequence[Picture] = ()
    """figures that are shown under "Figures" near the head of the page"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """what goes into the page's JSON file, by key"""
    failed: bool = False
    """it says which error took its place"""

    @property
    def is_shown(self) -> bool:
        return any(
            (self.lead, self.table, self.note, self.code, self.points, self.figures, self.facts, self.parts, self.aside)
        )


Made = Section | Iterable[Section] | None
Make = TypeVar("Make", bound=Callable[[Any], Made])


@dataclass(frozen=True)
class Registered:
    """A function that makes a section of one kind of page, and its place on the page."""

    order: float
    title: str
    make: Callable[[Any], Made]


SECTIONS: dict[str, list[Registered]] = {}
"""kind of page -> its sections"""


def section(*, order: float, title: str = "", of: str = "study") -> Callable[[Make], Make]:
    """Register a function as a section of every page of a `study` or a `sweep`, or of the `index`.

    order: place on the page, from top to bottom; the figures are at 10.
    title: heading of a section without a title of its own.
    The function takes a StudyRead, SweepRead or Overview and returns a Section, several, or None.
    """

    def register(make: Make) -> Make:
        SECTIONS.setdefault(of, []).append(Registered(order, title, make))
        return make

    return register


def made_of(read: Any, kind: str) -> list[Section]:
    """Every section of a page, in order. Figures that sections put in front are a section of their own."""
    importlib.import_module("gpt2lab.reports.sections").load()
    entries = sorted(SECTIONS[kind], key=lambda entry: entry.order)
    with drawing():
        placed = [(entry.order, section) for entry in entries for section in _made_or_error(entry, read)]
    if front := [figure for _, section in placed for figure in section.front]:
        placed.append((FIGURES, Section(title="Figures", figures=front)))
    return [section for _, section in sorted(placed, key=lambda pair: pair[0])]


def made_by(entry: Registered, read: Any) -> list[Section]:
    """What one function makes, with its title."""
    made = entry.make(read)
    sections = [] if made is None else [made] if isinstance(made, Section) else list(made)
    return [section if section.title else replace(section, title=entry.title) for section in sections]


def figure_of(read: Any, name: str, kind: str = "study") -> Picture:
    """One figure of a page, by the name of its file. Raises ConfigError where there is none of that name."""
    importlib.import_module("gpt2lab.reports.sections").load()
    names = []
    for entry in SECTIONS[kind]:
        with drawing():
            made = made_by(entry, read)
        for figure in (figure for section in made for figure in (*section.front, *section.figures)):
            names.append(figure.name)
            if figure.name == name:
                return figure
    raise ConfigError(unknown("figure", name, names), hint=", ".join(names))


def _made_or_error(entry: Registered, read: Any) -> list[Section]:
    try:
        return made_by(entry, read)
    except Exception as error:  # whatever it is, the other sections can be read
        file = inspect.getfile(entry.make)
        place = f"{entry.make.__name__}, {Path(file).name}:{line_in(error, file)}"
        why = text.clean(f"{type(error).__name__}: {error}")
        print(f"report: {place} made no section: {why}", file=sys.stderr)
        lead = [f"This section could not be made ({place}): {why}"]
        return [Section(title=entry.title or place, lead=lead, failed=True)]


@dataclass(frozen=True)
class Remark:
    """Something the reader must know before reading on."""

    head: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page in the order in which it is read."""

    about: str
    """beside `gpt2lab report`"""
    heading: str
    title: str
    """of the browser's window"""
    warnings: Sequence[Remark] = ()
    answer: Sequence[str] = ()
    conclusion: str = ""
    """of the author, below the answer"""
    basis: Sequence[str] = ()
    sections: Sequence[Section] = ()
    files: Sequence[str] = ()
    """beside the page, its twin first"""
    also: str = ""
    """what else lies there"""
    figures: str = "figures/"
    """folder of the figures"""
    source: str = "the run store"
    """what it was made from"""

    @property
    def shown(self) -> list[Section]:
        """Those that have something to show, each with an anchor of its own."""
        sections: dict[str, Section] = {}
        for section in (section for section in self.sections if section.is_shown):
            anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "part"
            anchor += f"-{len(sections)}" if anchor in sections else ""
            sections[anchor] = replace(section, anchor=anchor)
        return list(sections.values())

    @property
    def drawings(self) -> list[Picture]:
        """Every figure, wherever it is."""
        return [figure for section in self.sections for part in (section, *section.parts) for figure in part.figures]

    def json(self, record: Mapping[str, Any]) -> str:
        """The JSON file: a record and what sections have for it; numbers that are not finite are null."""
        data = {key: value for section in self.sections for key, value in section.data.items()}
        return json.dumps(as_json({**record, **data}), indent=1, allow_nan=False) + "\n"


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The lines of a CSV file, None as nothing. Text that a spreadsheet would compute is preceded by an apostrophe."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[_without_formula(cell) for cell in row] for row in rows])
    return buffer.getvalue()


def _without_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def terminal_table(titles: Mapping[str, str], rows: Iterable[Iterable[Text | str]], title: str = "") -> RichTable:
    """A table as terminals show it: titles -> how a column is justified. Nothing in a text is markup."""
    heading = Text(title) if title else None
    table = RichTable(title=heading, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column, justify in titles.items():
        table.add_column(Text(column), justify="right" if justify == "right" else "left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def page_place(folder: Path, *, kept: bool = False) -> Text:
    """Where a page lies, or how to write it. kept: it lay there already."""
    index = folder / "index.html"
    if not index.exists():
        return Text(f"report: gpt2lab report {folder.name}")
    return Text(f"report: {index}{' (unchanged)' if kept else ''}")


def sum_of(read: Any) -> str:
    """A sum over what the page of a study or sweep is made from; "" where it has to be drawn to know: what sections of
    plug-ins read is theirs to know."""
    code = sum_of_code()
    own = all(entry.make.__module__.startswith("gpt2lab.") for entries in SECTIONS.values() for entry in entries)
    if not (code and own and read.made_from):
        return ""
    runs = [(run.id, run.status, run.reason) for run in getattr(read, "runs", ())]
    marks = getattr(read, "forced", False), getattr(read, "standing", None)
    return sha256(repr((read.name, read.made_from, code, marks, runs)).encode())


def is_current(read: Any, out: str | Path) -> bool:
    """Whether the page of `read` below `out` is what would be written, with every file as it was written."""
    folder = page_folder(out, read.name)
    made_from, (listed, _) = sum_of(read), written_before(folder)
    with contextlib.suppress(DataFault):
        contents = {name: read_bytes(folder / name) or b"" for name in listed}
        return bool(made_from) and (read_json(folder / WRITTEN) or {}).get("sum") == _sum(made_from, contents)
    return False


def _sum(made_from: str, contents: Mapping[str, str | bytes]) -> str:
    """Of a page's files together with what they are made from."""
    sums = {name: sha256(one.encode() if isinstance(one, str) else one) for name, one in contents.items()}
    return sha256(repr((made_from, sorted(sums.items()))).encode())


def write_page(
    folder: Path, page: Page, numbers: Mapping[str, str], declaration: int = 1, made_from: str = "", *,
    images: bool = False,
) -> Path:  # fmt: skip
    """Write a page, its twin, its figures and the files in `numbers`; returns index.html. Everything is rendered before
    the first file is written, so a page that cannot be made leaves the previous one as it was. The page of an earlier
    declaration is first copied to a folder of its own. made_from: see `sum_of`. images: figures also as PNG and PDF."""
    files: dict[str, str | bytes] = {f"{page.figures}{figure.name}.svg": figure.alone for figure in page.drawings}
    for ending in IMAGES if images else ():
        files |= {f"{page.figures}{figure.name}.{ending}": figure.image(ending) for figure in page.drawings}
    files |= {page.files[0]: render_markdown(page), **numbers, "index.html": render_html(page)}
    if any(section.failed for section in page.sections):
        made_from = ""
    return write_files(folder, files, declaration, _sum(made_from, files) if made_from else "")


def publish(folder: Path, place: Path) -> Path:
    """Copy the page in `folder` to a folder of its name in `place`, which it returns; its figures as SVG alone, which
    pages show. Raises DataFault when the page has lost a file."""
    files: dict[str, str | bytes] = {}
    listed, declaration = written_before(folder)
    for name in sorted(name for name in listed if not name.endswith((".png", ".pdf"))):
        content = read_bytes(folder / name)
        if content is None:
            raise DataFault("is missing", where=str(folder / name), hint=f"gpt2lab report {folder.name}")
        files[name] = LOCAL[name].sub(r"\1", content.decode()) if name in LOCAL else content
    return write_files(place / folder.name, files, declaration or 1).parent


def write_files(folder: Path, files: Mapping[str, str | bytes], declaration: int = 1, sum_: str = "") -> Path:
    """Write the files of a page, each in a single step and index.html last, which it returns; then remove those that
    an earlier page wrote here and this one does not. Nothing else in the folder is touched. A page of an earlier
    `declaration` of the same name is copied to `<folder>~<number>` before. sum_: see `is_current`.

    Raises ConfigError for a symbolic link in the place of a folder.
    """
    for inside in dict.fromkeys((folder, *((folder / name).parent for name in files))):
        if inside.is_symlink():
            raise ConfigError("is a symbolic link; reports are never written through one", where=str(inside))
    before, earlier = written_before(folder)
    earlier = earlier or max(1, declaration - 1)
    beside = folder.with_name(f"{folder.name}~{earlier}")
    if earlier < declaration and before and not beside.exists():
        contents = {name: content for name in before if (content := read_bytes(folder / name)) is not None}
        write_files(beside, contents, earlier)
    # first: a kill leaves nothing unlisted
    write_json(folder / WRITTEN, {"files": sorted(before | files.keys()), "declaration": declaration})
    for name in sorted(files, key=lambda name: name == "index.html"):
        write_atomically(folder / name, files[name])
    for stale in before - files.keys():
        path = folder / stale
        if not path.parent.is_symlink() and (path.is_file() or path.is_symlink()):
            path.unlink()
    write_json(folder / WRITTEN, {"files": sorted(files), "declaration": declaration, "sum": sum_})
    return folder / "index.html"


def index_of(store: Store, kind: str, name: str, out: str | Path) -> Path | None:
    """The index.html below `out` that shows this declaration of a study or sweep, `posenc@nano` or `posenc@nano#1`;
    None where none was written. Until `posenc@nano` has a page, the one in its folder is that of the last before."""
    plain, latest = name.partition(NUMBERED)[0], store.declaration(name.partition(NUMBERED)[0], kind)
    shown = written_before(page_folder(out, plain))[1] or max(1, latest - 1)
    wanted = store.declaration(name, kind)
    index = page_folder(out, plain if shown == wanted else f"{plain}{NUMBERED}{wanted}") / "index.html"
    return index if index.is_file() else None


def written_before(folder: Path) -> tuple[set[str], int | None]:
    """Names of the files that pages wrote in `folder`, by the list beside them, none where it is missing or damaged;
    and the number of the declaration that they show, if it is known."""
    with contextlib.suppress(DataFault):
        listed = read_json(folder / WRITTEN) or {}
        names = {name for name in listed.get("files", []) if isinstance(name, str) and OF_A_PAGE.fullmatch(name)}
        number = listed.get("declaration")
        return names, number if isinstance(number, int) else None
    return set(), None


def render_html(page: Page) -> str:
    """The page as one file that loads nothing and runs nothing."""
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = _environment(autoescape=True)
    environment.filters["prose"] = lambda value: Markup(text.CODE.sub(r"<code>\1</code>", str(escape(value))))
    environment.filters["drawing"] = Markup  # our own SVG, in which ElementTree has escaped every name
    return environment.get_template("page.html.j2").render(page=page, css=Markup(css), policy=policy)


def render_markdown(page: Page) -> str:
    """The same content in Markdown."""
    environment = _environment(autoescape=False)
    environment.filters |= {"md": text.markdown, "fenced": text.fenced}
    return environment.get_template("page.md.j2").render(page=page)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True
    )
