"""Tables of a page, as plain text in cells, and the cells that several sections have: HTML and Markdown are made from
the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.scaling import Reach, bounds
from gpt2lab.analysis.wording import decimals
from gpt2lab.analysis.wording import probability as p_value
from gpt2lab.basics.text import DASH, interval, signed

Item = TypeVar("Item")
KINDS = ("number", "words", "id")
CHIPS = {
    "better": "better", "worse": "worse", "likely better": "better tentative", "likely worse": "worse tentative",
    "no difference": "same", "inconclusive": "open", "unstable": "broken", "not comparable": "grey",
    "exploratory": "tentative",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """`kind` is how it is set: "number" to the right, "words" in a wide column, "id" unbroken."""

    title: str
    kind: str = ""
    detail: str = ""


def columns(*titles: str) -> list[Column]:
    """`"Mean:number"` is a column of numbers called Mean; kinds are those of `Column`."""
    split = [title.rpartition(":") for title in titles]
    return [
        Column(start, kind) if kind in KINDS else Column(title)
        for title, (start, _, kind) in zip(titles, split, strict=True)
    ]


def tabulate(
    items: Iterable[Item],
    cells: Callable[[Item], Mapping[str, Cell | str | None]],
    look: Callable[[Item], int | None] = lambda _: None,
    baseline: Callable[[Item], bool] = lambda _: False,
) -> Table | None:
    """One row per item, of which `cells` makes its cells by title as in `columns`; None without items.

    A column in which every cell is None is left out; elsewhere None is an empty cell.
    """
    items = list(items)
    made = [cells(item) for item in items]
    if not made:
        return None
    titles = [title for title in made[0] if any(row[title] is not None for row in made)]
    rows = []
    for item, row in zip(items, made, strict=True):
        shown = [cell if isinstance(cell, Cell) else Cell(cell or "") for cell in map(row.get, titles)]
        rows.append(Row(shown, look(item), baseline(item)))
    return Table(columns(*titles), rows)


@dataclass(frozen=True)
class Link:
    """A link within a quieter line."""

    text: str
    address: str = ""
    after: str = ""


@dataclass(frozen=True)
class Cell:
    """`detail` is a second, quieter line and `remark` a third; `chip` a class that makes the text a coloured label;
    `link` an address. `parts`: cells one below the other in this one."""

    text: str = ""
    detail: str | Link = ""
    chip: str = ""
    link: str = ""
    remark: str = ""
    parts: Sequence[Cell] = ()


@dataclass(frozen=True)
class Row:
    """`look` is the colour of the arm in the figures, by number; None for no mark."""

    cells: Sequence[Cell]
    look: int | None = None
    baseline: bool = False


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Row] = field(default_factory=tuple)


def difference_cell(difference: float, low: float, high: float, p: str = "") -> Cell:
    """A difference over its interval, with the digits that the interval supports, and its p where one is given."""
    if not math.isfinite(difference):
        return Cell(DASH)
    digits = decimals((high - low) / 2, difference)
    bounds = "" if math.isnan(low) or math.isnan(high) else interval(low, high, digits)
    return Cell(signed(difference, digits) + (f" (p {p})" if p not in ("", DASH) else ""), bounds)


def p_text(value: float, alpha: float) -> str:
    """`0.036`, `< 1e-15`: a p value in a column that is called so."""
    return DASH if math.isnan(value) else p_value(value, alpha).removeprefix("= ")


def kind_of(word: str) -> str:
    """The kind of a verdict, one of CHIPS: what its word begins with."""
    return max((known for known in CHIPS if word.startswith(known)), key=len)


def verdict_cell(contrast: Contrast) -> Cell:
    """The verdict's word as a label; what it adds, why, and what to beware of on the line below."""
    start = kind_of(contrast.word)
    slight = "(smaller" in contrast.word  # significant, and within the zone too small to matter
    label = contrast.word if start == "no difference" or slight else start
    details = [contrast.word.removeprefix(label).strip(" :()")]
    if contrast.survivors:
        details.append(f"conditional on not failing: {contrast.survivors}")
    if contrast.reason and start in ("exploratory", "not comparable"):
        details.append(contrast.reason)
    return Cell(label, "; ".join(filter(None, (*details, *contrast.notes))), CHIPS[start] + " slight" * slight)


def worth_cell(reach: Reach | None) -> Cell:
    """A compute multiplier over its interval."""
    if reach is None:
        return Cell()
    shown = f"{reach.value:.2f}x" if math.isfinite(reach.value) else DASH
    unbounded = reach.low == 0 and math.isinf(reach.high)
    return Cell(shown, reach.reason if unbounded and reach.reason else bounds(reach))


def confidence(verdicts: Verdicts) -> str:
    """Of the contrasts' intervals: `96 %`, or `96 to 99.4 %` where some were judged at other levels."""
    levels = sorted({contrast.alpha for contrast in verdicts.contrasts} or {verdicts.alpha}, reverse=True)
    return " to ".join(f"{100 * (1 - level):.3g}" for level in dict.fromkeys((levels[0], levels[-1]))) + " %"


def is_pair(contrast: Contrast) -> bool:
    """Whether it compares two arms and nothing else."""
    return dict(contrast.weights) == {contrast.arm: 1.0, contrast.against: -1.0}
