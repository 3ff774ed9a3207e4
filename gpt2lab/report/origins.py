"""Where differences come from, as a table and sentences: numbers for both ends of each division, and which way they go.

None of it was declared, so no sentence here carries a word of the verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt2lab.origins import Difference, Division, Origins
from gpt2lab.report.tables import Cell, Column, Row, Summary, Table, difference_cell
from gpt2lab.store.parts import DOCUMENT, FREQUENCY, POSITION
from gpt2lab.text import plural

METRICS = ("context_loss", "frequency_loss", "document_loss")


def table(origins: Origins, arms: Mapping[str, Summary]) -> Table | None:
    """One row per arm that can be told; None when there is none."""
    if not origins.divisions:
        return None
    columns = [Column("Arm"), Column("All targets", "number")]
    for division in origins.divisions:
        columns += [Column(title, "number") for title in _titles(division)]
    rows = []
    for name, arm in arms.items():
        if name in origins.totals:
            cells = [cell for division in origins.divisions for cell in _cells(division, name)]
            rows.append(Row((Cell(name), _cell(origins.totals[name]), *cells), arm.look))
    return Table(columns, rows)


def _titles(division: Division) -> tuple[str, ...]:
    if division.name == DOCUMENT:
        return (f"Below 0 in {plural(len(division.groups), 'document')}",)
    return tuple(f"{text[0].upper()}{text[1:]}" for text in (label(division, 0), label(division, -1)))


def _cells(division: Division, arm: str) -> tuple[Cell, ...]:
    found = division.arms.get(arm)
    if found is None:
        return (Cell(),) * len(_titles(division))
    if division.name == DOCUMENT:
        sure = sum(one.sign < 0 for one in found)
        return (Cell(str(sum(one.value < 0 for one in found)), f"{sure} by the interval"),)
    return _cell(found[0]), _cell(found[-1])


def _cell(one: Difference) -> Cell:
    return difference_cell(one.value, one.low, one.high)


def label(division: Division, group: int) -> str:
    """`1 token seen`, `79–128 tokens seen`; `rank 1`, `ranks 28–256`; the name of a document."""
    name = division.groups[group]
    if division.name == DOCUMENT:
        return name
    shown = span(name)
    many = shown != "1" if division.name == POSITION else shown != name.partition("-")[0]
    if division.name == POSITION:
        return f"{shown} {'tokens' if many else 'token'} seen"
    return f"{'ranks' if many else 'rank'} {shown}"


def span(group: str) -> str:
    """`79-128` as `79–128`, `3-3` as `3`."""
    first, _, last = group.partition("-")
    return first if first == last else f"{first}–{last}"


def points(origins: Origins, baseline: str) -> list[str]:
    """One sentence for each arm, in its order."""
    told = []
    for arm in origins.totals:
        parts = [_told(division, arm, baseline, origins) for division in origins.divisions if arm in division.arms]
        told.append(f"{arm}: its difference to {baseline} {'; '.join(parts)}.")
    return told


def _told(division: Division, arm: str, baseline: str, origins: Origins) -> str:
    if division.name == DOCUMENT:
        return _by_work(division.arms[arm])
    ends = f"from {label(division, 0)} to {span(division.groups[-1])}"
    if division.name == FREQUENCY:
        ends = f"from the most frequent tokens ({label(division, 0)}) to the rarest ({label(division, -1)})"
    change = _cell(division.changes[arm])
    moved = f"moves by {change.text} nats" + (f" {change.detail}" if change.detail else "")
    return f"{moved} {ends}, {_way(division, arm, baseline)}{_held(division, arm, origins)}"


def _way(division: Division, arm: str, baseline: str) -> str:
    """Whom a change favours, where the seeds can tell."""
    change = division.changes[arm]
    if not change.has_interval:
        return "with no interval, for lack of seeds"
    if change.sign == 0:
        return "which these seeds cannot tell from no change"
    return f"in favour of {arm if change.sign < 0 else baseline}"


def _held(division: Division, arm: str, origins: Origins) -> str:
    """How much of the difference lies in the last group, where that matters; it means nothing where groups are known to
    differ in opposite directions."""
    total, found = origins.totals[arm], division.arms[arm]
    against = any(one.sign == -total.sign for one in found) or found[-1].value * total.value <= 0
    if total.sign == 0 or division.changes[arm].sign == 0 or against:
        return ""
    own, part = division.shares[-1], division.part(arm, -1)
    return f" ({label(division, -1)}: {100 * own:.0f} % of the targets, {100 * part:.0f} % of the difference)"


def _by_work(found: Sequence[Difference]) -> str:
    sides: list[str] = []
    for word, sign in (("below", -1), ("above", 1)):
        count = sum(one.value * sign > 0 for one in found)
        if count:
            sure = sum(one.sign == sign for one in found)
            of = "" if sides else f" of {plural(len(found), 'document')}"
            sides.append(f"{word} 0 in {count}{of} ({sure} by the interval)")
    return f"is {' and '.join(sides)}" if sides else "is 0 in every document"


def note(origins: Origins) -> str:
    """What the numbers are, and what they are not."""
    count = sum(len(found) for division in origins.divisions for found in division.arms.values())
    percent, luck = f"{100 * origins.level:g} %", count * (1 - origins.level)
    return (
        "Exploratory: none of this was declared, and none of it decides a verdict. Differences in mean loss, arm minus "
        "baseline, over parts of the final evaluation's targets, in nats; failed runs are left out. Below each its "
        f"{percent} interval over seeds (Welch), every one by itself: of the {count} in the figures about {luck:.0f} "
        "would miss the true difference by luck. Tokens seen: how many a prediction can use. Ranks: tokens by how "
        "frequent they are in the training text, 1 the most frequent, in groups of about equal share of it. The table "
        "has the ends of both, the figures all of it."
    )


def left_out(origins: Origins, study: str) -> list[str]:
    """Arms without such numbers, and how to get them."""
    told = []
    if origins.lacking:
        listed = ", ".join(f"{arm} ({plural(count, 'run')})" for arm, count in origins.lacking.items())
        asked = " ".join(f"--metric {name}" for name in METRICS)
        command = f"gpt2lab eval --study {study} {asked}"
        told.append(f"Not measured, as these runs are older than it: {listed}. `{command}` does it now.")
    if origins.apart:
        told.append(f"Not comparable, so without a difference: {', '.join(origins.apart)}.")
    return told
