"""One page writer for studies, sweeps and the index: HTML that loads and runs nothing, and the same in Markdown.

A page is a head and a list of sections. Each section is made by one function of a file in `report/sections/`, which
`@section` registers; it gets all that was read and returns what to show, or None where there is nothing. A section
that raises costs that section, which is then a line with the error, and never the page.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gpt2lab import text
from gpt2lab.reports.style import Picture, drawing
from gpt2lab.reports.tables import Table
from gpt2lab.store import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
FIGURES = 10.0
"""Order of the part of the page that shows the figures which sections put in front."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it, in the order of the fields; what is empty is left out."""

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
    facts_title: str = ""
    """the facts are folded under it"""
    parts: Sequence[Section] = ()
    """sections within this one"""
    folded: bool = False
    """opened by a click on the page"""
    front: Sequence[Picture] = ()
    """figures that stand under "Figures" near the head of the page"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """what goes into the page's JSON file, by key"""

    @property
    def is_shown(self) -> bool:
        return any(
            (self.lead, self.table, self.note, self.code, self.points, self.figures, self.facts, self.parts, self.aside)
        )


Made = Section | Iterable[Section] | None
Make = TypeVar("Make", bound=Callable[[Any], Made])


@dataclass(frozen=True)
class Registered:
    """A function that makes a section of one kind of page, and where it stands."""

    order: float
    title: str
    make: Callable[[Any], Made]


SECTIONS: dict[str, list[Registered]] = {}
"""kind of page -> its sections"""


def section(*, order: float, title: str = "", of: str = "study") -> Callable[[Make], Make]:
    """Register a function as a section of every page of a `study` or a `sweep`, or of the `index`.

    order: place on the page, from top to bottom; the figures stand at 10.
    title: heading of a section that names none of its own.
    The function takes a StudyRead, SweepRead or Across and returns a Section, several, or None.
    """

    def register(make: Make) -> Make:
        SECTIONS.setdefault(of, []).append(Registered(order, title, make))
        return make

    return register


def made_of(read: Any, kind: str) -> list[Section]:
    """Every section of a page, in order. Figures that sections put in front are a section of their own."""
    importlib.import_module("gpt2lab.reports.sections").load()
    found: list[tuple[float, Section]] = []
    with drawing():
        for entry in SECTIONS.get(kind, ()):
            found += [(entry.order, one) for one in _made_or_told(entry, read)]
    front = list(chain.from_iterable(one.front for _, one in sorted(found, key=lambda pair: pair[0])))
    if front:
        found.append((FIGURES, Section(title="Figures", figures=front)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def made_by(entry: Registered, read: Any) -> list[Section]:
    """What one function makes, with its title."""
    made = entry.make(read)
    several = [] if made is None else [made] if isinstance(made, Section) else list(made)
    return [one if one.title else replace(one, title=entry.title) for one in several]


def _made_or_told(entry: Registered, read: Any) -> list[Section]:
    try:
        return made_by(entry, read)
    except Exception as error:  # whatever it is, the other sections can be read
        place = f"{entry.make.__module__}.{entry.make.__name__}"
        why = text.clean(f"{type(error).__name__}: {error}")
        print(f"report: {place} made no section: {why}", file=sys.stderr)
        return [Section(title=entry.title or place, lead=[f"This section could not be made ({place}): {why}"])]


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
    basis: Sequence[str] = ()
    caveat: str | None = None
    sections: Sequence[Section] = ()
    files: Sequence[str] = ()
    """beside the page, its twin first"""
    also: str = ""
    """what else lies there"""
    figures: str = "figures/"
    """folder of the figures"""

    @property
    def shown(self) -> list[Section]:
        return [one for one in self.sections if one.is_shown]

    @property
    def drawings(self) -> list[Picture]:
        """Every figure, wherever it stands."""
        return [figure for one in self.sections for part in (one, *one.parts) for figure in part.figures]

    @property
    def data(self) -> dict[str, Any]:
        """What sections have for the JSON file."""
        return {key: value for one in self.sections for key, value in one.data.items()}


def write_page(folder: Path, page: Page, numbers: Mapping[str, str]) -> Path:
    """Write a page, its twin, its figures and the files in `numbers`; returns index.html. Figures that are no longer
    drawn are removed.

    Everything is rendered before the first file is written, and every file replaces its old one in a single step, so a
    page that cannot be made leaves the previous one as it was.
    """
    files: dict[str, str | bytes] = {f"{page.figures}{one.name}.svg": one.alone for one in page.drawings}
    files |= {f"{page.figures}{one.name}.png": one.png for one in page.drawings if page.figures}
    files |= {page.files[0]: render_markdown(page), **numbers, "index.html": render_html(page)}
    for file, content in files.items():
        write_atomically(folder / file, content)
    old = set((folder / page.figures).glob("*.*")) if page.figures else set(folder.glob("*.svg"))
    for stale in old - {folder / file for file in files}:
        stale.unlink()
    return folder / "index.html"


def render_html(page: Page) -> str:
    """The page as one file that loads nothing and runs nothing."""
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = _environment(autoescape=True)
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
