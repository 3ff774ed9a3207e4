"""The page of published results: every question, its answer at each scale, and what its author concludes.

It is made from the `verdicts.json` of the published pages alone, so a clone without a run store can rewrite it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gpt2lab.basics.text import clean, plural, quantity, time_taken
from gpt2lab.errors import DataFault
from gpt2lab.planning.prediction import FILE
from gpt2lab.reports import prediction, style
from gpt2lab.reports.page import EARLIER, Page, Section, write_page
from gpt2lab.reports.tables import CHIPS, Cell, Column, Link, Row, Table, difference_cell, kind_of
from gpt2lab.store import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERVIEW = (
    "Every contrast with a verdict that claims or bounds a difference. Its interval is a multiple of the smallest "
    "effect that its study declared to matter (shaded: smaller); numbers at the side are in the unit of the study. "
    "The axis is linear within the shading and logarithmic beyond; an arrow marks an end outside the frame. Bars of "
    "'no difference' extend to the largest difference that the test of equivalence leaves open."
)
COLOURS = {"better": style.ARMS[2], "worse": style.ARMS[1], "no difference": style.ARMS[0]}
"""How a verdict begins, likely ones included -> how it is drawn."""
Record = Mapping[str, Any]
"""A `verdicts.json`, or a study of `index.json`."""


def write_front(place: str | Path) -> Path:
    """Write `place`/index.html, README.md and predictions.json over the pages of studies in the folder `place`; returns
    index.html. Raises DataFault for a file that is not as a page writes it."""
    place = Path(place)
    pages = sorted(place.glob("*/verdicts.json"))
    records = [read(path) for path in pages if not EARLIER.search(path.parent.name)]  # else runs would count twice
    by_question: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["ablation"], record["parameters"] or 0)):
        by_question.setdefault(record["ablation"], []).append(record)
    contrasts = sum(len(record["contrasts"]) for record in records)
    seconds = sum(record["seconds"] for record in records)
    small_large = prediction.section(records)
    page = Page(
        about="published results",
        heading="What was found with gpt2lab",
        title="Published results – gpt2lab",
        answer=[
            f"{plural(len(by_question), 'question')}, {plural(len(records), 'study')}, "
            f"{plural(contrasts, 'contrast')}; {time_taken(seconds)} of training."
        ],
        sections=[*overview(records), *sections_of(by_question.values()), *([small_large] if small_large else [])],
        files=("README.md", FILE),
        figures="",
        source="the published pages",
    )
    return write_page(place, page, {FILE: prediction.counts(records)})


def read(path: Path) -> Record:
    """A published `verdicts.json`. Raises DataFault."""
    record = read_json(path)
    needed = ("name", "ablation", "scale", "question", "conclusion", "parameters", "tokens", "seconds", "contrasts",
              "baseline", "unit", "smallest_effect")  # fmt: skip
    if not isinstance(record, dict) or not set(needed) <= record.keys():
        name = path.parent.name
        raise DataFault("is not as a page writes it", where=str(path), hint=f"gpt2lab report {name} --publish")
    return record


def overview(records: Sequence[Record]) -> Iterator[Section]:
    """All that was decided, in one figure with a panel for each study; nothing where nothing was."""
    decided: dict[str, list[style.Interval]] = {}
    for record in records:
        for contrast in record["contrasts"]:
            kind = kind_of(contrast["word"]).removeprefix("likely ")
            if kind in COLOURS and contrast["difference"] is not None:
                low, middle, high = _numbers(contrast)
                label = contrast["arm"] if contrast["against"] == record["baseline"] else _label(contrast)
                shown = f"{difference_cell(middle, low, high).text} {record['unit']}, {kind_of(contrast['word'])}"
                least = record["smallest_effect"]
                bar = style.Interval(clean(label), middle / least, low / least, high / least, shown, COLOURS[kind])
                decided.setdefault(record["name"], []).append(bar)
    if decided:
        with style.drawing():
            picture = style.picture("overview", "What was decided", OVERVIEW, draw(decided))
        yield Section(title="What was decided", figures=[picture])


def draw(decided: Mapping[str, Sequence[style.Interval]]) -> Figure:
    """Differences in smallest effects, a panel for each study."""
    bars = [bar for panel in decided.values() for bar in panel]
    limit = 1.3 * min(max(abs(end) for bar in bars for end in (bar.low, bar.high)), 50.0)
    figure = style.empty(style.WIDE, 0.7 + sum(0.5 + 0.27 * len(panel) for panel in decided.values()))
    heights = [1.4 + len(panel) for panel in decided.values()]
    panels = figure.subplots(len(decided), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, panel) in zip(panels, decided.items(), strict=True):
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
        axes.axvspan(-1, 1, color=style.BAND, linewidth=0, zorder=0)
        style.zero_line(axes, "vertical")
        style.draw_intervals(axes, panel, (-limit, limit), ("better", "worse"))
        axes.set_title(name, fontsize=9.5)
    panels[-1].set_xlabel("difference, in smallest effects that matter")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    return figure


def sections_of(ablations: Collection[Sequence[Record]], compared: str = "Published") -> list[Section]:
    """A section for each ablation: see `section_of`. Ablations with the same question have their names in the title."""
    asked = Counter(studies[0]["question"] for studies in ablations)
    return [section_of(studies, compared, named=asked[studies[0]["question"]] > 1) for studies in ablations]


def section_of(studies: Sequence[Record], compared: str, *, named: bool) -> Section:
    """One question: conclusions, and a table with a row for each contrast, a column for each scale, and one for what it
    is compared with."""
    name = f" ({studies[0]['ablation']})" if named else ""
    return Section(
        title=clean(studies[0]["question"] + name),
        lead=[f"{_place(study)}: {clean(study['conclusion'] or study['answer'])}" for study in studies],
        table=Table(
            [Column("Contrast"), *(Column(clean(study["scale"]), "", _size(study)) for study in studies),
             Column(compared, "words")],
            list(_rows(studies)),
        ),
    )  # fmt: skip


def _rows(studies: Sequence[Record]) -> Iterator[Row]:
    labels = dict.fromkeys((c["arm"], c["against"]) for study in studies for c in study["contrasts"])
    for label in labels:
        cells, published = [], dict[str, Cell]()
        for study in studies:
            contrast = next((c for c in study["contrasts"] if (c["arm"], c["against"]) == label), None)
            cells.append(_found(contrast, study) if contrast else Cell())
            for effect in contrast["published"] if contrast else ():
                published[effect["effect"]] = Cell(effect["word"], f"{effect['effect']}; {effect['source']}")
        yield Row([Cell(clean(label[0]), f"against {clean(label[1])}"), *cells, Cell(parts=list(published.values()))])


def _found(contrast: Record, study: Record) -> Cell:
    """The verdict at one scale; below it the difference with its interval, or with the size that equivalence bounds it
    by, and a link to the study's page."""
    start = kind_of(contrast["word"])
    low, middle, high = _numbers(contrast)
    difference = difference_cell(middle, low, high)
    shown = f"{difference.text} {difference.detail}".strip()
    if (most := _bound(contrast)) is not None:
        shown = f"{difference.text}, at most {most:.2g} in size"
    page = study.get("page", quote(f"{study['name']}/index.html"))
    return Cell(start, Link(shown, page, after=f" {study['unit']}, n = {contrast['n_arm']}"), CHIPS[start])


def _numbers(contrast: Record) -> tuple[float, float, float]:
    """The difference between the ends of its interval, or of what "no difference" leaves open; NaN if unknown."""
    low, middle, high = (
        math.nan if contrast[key] is None else float(contrast[key]) for key in ("low", "difference", "high")
    )
    return (low, middle, high) if (most := _bound(contrast)) is None else (-most, middle, most)


def _bound(contrast: Record) -> float | None:
    """The largest size that "no difference" leaves open; None for other verdicts, and on pages that do not have it."""
    most = contrast.get("at_most")
    return float(most) if kind_of(contrast["word"]) == "no difference" and most is not None else None


def _label(contrast: Record) -> str:
    return f"{contrast['arm']} − {contrast['against']}"


def _place(study: Record) -> str:
    return f"At {clean(study['scale'])} ({_size(study)})"


def _size(study: Record) -> str:
    return f"{quantity(study['parameters'])} parameters, {quantity(study['tokens'])} tokens"
