"""Does small predict large? Each published contrast beside the same one at a larger scale, in larger models that others
published, and at the end of its own training.

It reads `verdicts.json` files alone. The method and its limits: docs/does-small-predict-large.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import scipy

from gpt2lab.basics.text import clean, number, plural
from gpt2lab.reports import style
from gpt2lab.reports.page import Section
from gpt2lab.reports.published import FOUND
from gpt2lab.reports.tables import Cell, tabulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LITERATURE = "in larger models, as published"
END = "at the end of training"
LARGER = 2.0
"""Published models count as larger from this multiple of the study's parameters on."""
FEWEST = 4
"""Contrasts that a rank correlation needs."""
NOTE = (
    "Same winner: the two differences have the same sign; with the exact 95 % interval of that share, assuming "
    "independent contrasts, although those of a study share its baseline. Decided: the smaller side's verdict is "
    "better or worse, likely ones included. Rank correlation: Spearman's, of differences in nats. A published result "
    "counts by its sign; of several, the one with the largest models. Published equalities have no winner and are left "
    "out."
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A contrast on a smaller and on a larger side: by scale, by publication or by share of training."""

    ablation: str
    label: str
    parts: tuple[str, ...]
    """slots and settings in which its arms differ"""
    small: str
    large: str
    early: float
    """difference on the smaller side; negative where the arm is better"""
    late: float
    """difference on the larger side; its sign alone where no size is known"""
    decided: bool | None
    """whether the verdict of the smaller side says better or worse; None where that side has no verdict"""
    in_nats: bool
    """whether both sides are sizes in nats"""

    @property
    def same(self) -> bool:
        """Whether the same arm wins on both sides."""
        return self.early * self.late > 0


def predictions(records: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """All of them, from `verdicts.json` files; of contrasts with a difference on both sides."""
    by_contrast: dict[tuple[str, str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for study in sorted(records, key=lambda study: (study["parameters"] or 0) * (study["tokens"] or 0)):
        for contrast in study["contrasts"]:
            key = (study["ablation"], contrast["arm"], contrast["against"])
            by_contrast.setdefault(key, []).append((study, contrast))
    found: list[Prediction] = []
    for found_at in by_contrast.values():
        for (small, one), (large, other) in pairwise(found_at):
            if small["scale"] != large["scale"]:
                nats = small["unit"] == large["unit"] == "nats"
                found += _pair(small, one, f"at {large['scale']}", other["difference"], nats=nats)
        for study, contrast in found_at:
            found += _published(study, contrast)
            for fraction, difference in contrast.get("early", {}).items():
                part = {**contrast, "difference": difference, "word": None}
                nats, side = study["unit"] == "nats", f"{100 * float(fraction):g} % of training"
                found += _pair(study, part, END, contrast["difference"], nats=nats, small=side)
    return found


def _published(study: Mapping[str, Any], contrast: Mapping[str, Any]) -> Iterator[Prediction]:
    larger = [
        effect for effect in contrast["published"]
        if effect["direction"] and (effect["parameters"] or 0) >= LARGER * (study["parameters"] or math.inf)
    ]  # fmt: skip
    if larger:
        effect = max(larger, key=lambda effect: effect["parameters"])
        late = effect["direction"] * (effect["size"] or 1.0)
        yield from _pair(study, contrast, LITERATURE, late, nats=study["unit"] == "nats" and bool(effect["size"]))


def _pair(
    study: Mapping[str, Any], contrast: Mapping[str, Any], large: str, late: float | None, *, nats: bool,
    small: str | None = None,
) -> Iterator[Prediction]:  # fmt: skip
    """Nothing where a side has no difference."""
    early, word = contrast["difference"], contrast["word"]
    if early and late:
        yield Prediction(
            ablation=study["ablation"], label=f"{contrast['arm']} against {contrast['against']}",
            parts=tuple(contrast.get("parts", ())), small=small or study["scale"], large=large, early=early, late=late,
            decided=None if word is None else any(word.startswith(said) and side for said, side in FOUND.items()),
            in_nats=nats,
        )  # fmt: skip


def groups(found: Sequence[Prediction]) -> dict[tuple[str, str], list[Prediction]]:
    """The two sides -> contrasts that have these; scales first, then publications, then shares of training."""
    by_sides: dict[tuple[str, str], list[Prediction]] = {}
    for item in sorted(found, key=lambda item: (item.large == END, item.large == LITERATURE)):
        by_sides.setdefault((item.small, item.large), []).append(item)
    return by_sides


def share(same: int, of: int) -> Cell:
    """`4 of 5` with its exact 95 % interval."""
    if not of:
        return Cell()
    bounds = scipy.stats.binomtest(same, of).proportion_ci(method="exact")
    return Cell(f"{same} of {of}", f"[{100 * bounds.low:.0f}, {100 * bounds.high:.0f}] %")


def section(records: Sequence[Mapping[str, Any]]) -> Section | None:
    """The section of the page of published results; None where nothing was measured twice."""
    predicted = predictions(records)

    def cells(group: tuple[tuple[str, str], list[Prediction]]) -> dict[str, Cell | str | None]:
        (small, large), items = group
        decided = [item for item in items if item.decided]
        pairs = [(item.early, item.late) for item in items if item.in_nats]
        rank = scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic if len(pairs) >= FEWEST else None
        other = [f"{item.ablation}: {item.label}" for item in items if not item.same]
        return {
            "From": small,
            "To": large,
            "Same winner:number": share(sum(item.same for item in items), len(items)),
            "Same winner where decided:number": share(sum(item.same for item in decided), len(decided)),
            "Rank correlation:number": "" if rank is None else number(float(rank), 2),
            "Other winner:words": clean("; ".join(other)),
        }

    table = tabulate(groups(predicted).items(), cells)
    if table is None:
        return None
    with style.drawing():
        pictures = [style.picture("prediction", TITLE, CAPTION, figure)] if (figure := draw(predicted)) else []
    lead = [f"{plural(len(predicted), 'pair')} of measurements of one contrast, on a smaller and a larger side."]
    return Section(title=TITLE, lead=lead, table=table, note=NOTE, figures=pictures)


TITLE = "Does small predict large?"
CAPTION = (
    "Each contrast by its difference on the smaller side (across) and the larger one (up), in nats, on axes that are "
    "linear within 0.01 and logarithmic beyond. In the shaded quarters the same arm wins on both sides; on the line "
    "the differences are equal."
)


def draw(found: Sequence[Prediction]) -> Figure | None:
    """Differences on both sides, a marker for each pair of sides; None without two sizes in nats."""
    shown = groups([item for item in found if item.in_nats])
    if not shown:
        return None
    figure, axes = style.panel(style.WIDE, 4.2, "difference on the smaller side, nats", "on the larger side, nats")
    limit = 1.5 * max(abs(value) for items in shown.values() for item in items for value in (item.early, item.late))
    for corner in ((0, 0), (-limit, -limit)):
        axes.fill_between([corner[0], corner[0] + limit], corner[1], corner[1] + limit, color=style.BAND, linewidth=0)
    axes.plot([-limit, limit], [-limit, limit], color=style.GRID, zorder=1)
    for (sides, items), marker, colour in zip(shown.items(), style.MARKERS, style.ARMS, strict=False):
        early, late = ([getattr(item, side) for item in items] for side in ("early", "late"))
        axes.plot(early, late, marker, color=colour, label=", ".join(sides), markersize=6, zorder=3)
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=0.01, linscale=0.5)
        getattr(axes, f"set_{axis}lim")(-limit, limit)
    axes.legend(loc="upper left", frameon=False)
    return figure


def counts(records: Sequence[Mapping[str, Any]]) -> str:
    """The file that plans read (planning/prediction.py): of the contrasts decided at a scale, by the one slot or
    setting in which their arms differ, how many have the same winner on a larger side."""
    decided = [item for item in predictions(records) if item.decided and len(item.parts) == 1]
    of = Counter((item.small, item.large, item.parts[0]) for item in decided)
    same = Counter((item.small, item.large, item.parts[0]) for item in decided if item.same)
    rows = [
        {"small": small, "large": large, "part": part, "same": same[small, large, part], "of": total}
        for (small, large, part), total in sorted(of.items())
    ]
    return json.dumps({"counts": rows}, indent=1) + "\n"
