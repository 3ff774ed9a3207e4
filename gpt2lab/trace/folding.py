"""A walk made short: one block of each kind in detail, the others and repeated rows by how many there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from gpt2lab.text import plural
from gpt2lab.trace.rows import Row

PERIOD = 6  # rows that may repeat together, such as those of one expert
OFTEN = 3  # times that they must


def folded(rows: Sequence[Row], *, layer: int | None = None, all_layers: bool = False) -> list[Row]:
    """Rows with blocks alike told once; what was left out is a row without a shape that has its costs.

    layer: show this block in detail and no other.  all_layers: show every block.
    """
    shown: list[Row] = []
    kinds: dict[object, int] = {}
    left: list[tuple[int, list[Row]]] = []
    for depth, group in groupby(rows, key=lambda row: row.depth):
        block = list(group)
        kind = signature(block)
        if depth is None or all_layers or depth == layer or (layer is None and kind not in kinds):
            shown += [*fold(left, kinds, layer), *shortened(block)]
            left = []
        else:
            left.append((depth, block))
        if depth is not None and (layer is None or depth == layer):
            kinds.setdefault(kind, depth)
    return shown


def fold(left: Sequence[tuple[int, list[Row]]], kinds: dict[object, int], layer: int | None) -> list[Row]:
    """Blocks that are not shown, as one row."""
    if not left:
        return []
    rows = [row for _, block in left for row in block]
    first, last = left[0][0], left[-1][0]
    which = f"block {first}" if first == last else f"blocks {first} to {last}"
    like = sorted({kinds[kind] for _, block in left if (kind := signature(block)) in kinds})
    if layer is not None:
        name, meaning = plural(len(left), "block"), f"{which}, not shown"
    else:
        name = f"{len(left)} more like block {' and '.join(map(str, like))}"
        meaning = which + (", in the same order" if len(like) > 1 else "")
    if not any(row.parameters for row in rows):
        meaning += ", with weights that were counted before"
    return [summed(rows, name, meaning, 0)]


def shortened(rows: Sequence[Row]) -> list[Row]:
    """Rows that repeat, as those of many experts do, told once."""
    out: list[Row] = []
    at = 0
    while at < len(rows):
        period, times = repetition(rows[at:])
        out += rows[at : at + period]
        if times > 1:
            more = rows[at + period : at + period * times]
            these = "this" if period == 1 else f"these {period}"
            out.append(summed(more, f"{times - 1} more like {these}", "", rows[at].level))
        at += period * times
    return out


def repetition(rows: Sequence[Row]) -> tuple[int, int]:
    """How many rows repeat from the first on, and how often; (1, 1) where nothing does."""
    for period in range(1, PERIOD + 1):
        if any(row.level < rows[0].level for row in rows[:period]):
            break
        kind, times = signature(rows[:period]), 1
        while signature(rows[times * period : (times + 1) * period]) == kind:
            times += 1
        if times >= OFTEN and kind:
            return period, times
    return 1, 1


def signature(rows: Sequence[Row]) -> tuple[object, ...]:
    """What rows that are alike agree in; what serves all layers is made in the first of them only."""
    return tuple(
        (row.level, plain(row.name), row.shape, plain(row.meaning), row.forward, row.backward)
        for row in rows
        if not row.once
    )


def plain(text: str) -> str:
    """Without the numbers of layers and experts, and without the note that a matrix was counted before."""
    return re.sub(r"\d+", "#", re.sub(r"; with \S+( and \S+)* again$", "", text))


def summed(rows: Sequence[Row], name: str, meaning: str, level: int) -> Row:
    """One row without a shape that has the costs of many."""
    head = Row(name, meaning, None, level=level, depth=rows[0].depth)
    return replace(
        head,
        parameters=sum(row.parameters for row in rows),
        forward=sum(row.forward for row in rows),
        backward=sum(row.backward for row in rows),
    )
