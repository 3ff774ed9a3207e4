"""The verdicts: a table with a row for every contrast, the figure of their differences, and the same contrasts analysed
in other ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.alternatives import LeftOut, alternatives, claim, without_each_seed
from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.analysis.planning import FIRST
from gpt2lab.analysis.results import Study
from gpt2lab.analysis.verdicts import TextNoise
from gpt2lab.analysis.wording import decimals, listed
from gpt2lab.basics.text import DASH, apart, change, number, plural, quantity, shorten
from gpt2lab.reports import style, tables
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.published import expectation, found_direction
from gpt2lab.reports.read import StudyRead, Summary, speed_change
from gpt2lab.reports.sections.scaling import worth
from gpt2lab.reports.tables import (
    Cell,
    Row,
    Table,
    columns,
    difference_cell,
    is_pair,
    p_text,
    tabulate,
    verdict_cell,
    worth_cell,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENSITIVITY = (
    "None of these decides a verdict, and none is adjusted for the number of contrasts. Paired, and arm and seed, use "
    "the seeds that both arms share; a permutation test needs 4 seeds per arm. Detectable: the true difference found "
    "with 80 % power, and the same with the noise at its upper 80 % limit. Text noise: half the 95 % interval "
    "of the difference over the scored documents; more validation text reduces it, more seeds do not. Search "
    "of rates: the part of the interval that is due to knowing each arm's best rate only from a few trials. Other "
    "claim: how many of these analyses (adjusted for the family), of those that leave out one seed, and of other text, "
    "would not make the verdict's claim."
)
BOUNDS = (
    "At least: the near end of the joint interval over all contrasts. At most: the smallest X for which "
    '"no difference larger than X" would pass, that is, what these runs rule out regardless of the declared X. In '
    "verdicts.json they are at_least, at_most and next."
)
EFFECT = style.ArmStyle(style.ARMS[0], "D", "solid")
"""How an effect is drawn that belongs to no single arm."""


@section(order=0, title="Verdicts")
def verdicts(read: StudyRead) -> Section:
    return Section(table=verdict_table(read), note=_note(read), front=_forest(read))


def verdict_table(read: StudyRead) -> Table:
    """One row for the baseline, one per contrast, one for every arm that no contrast names. What differences are worth
    in compute, and what was expected, have columns where the study has them."""
    titles = columns("Arm", "Mean:number", "n:number", "Difference:number", "Holm p:number", "Verdict:words",
                     "Worth:number", "Cost:number", "Expected:words")  # fmt: skip
    judged = {read.baseline, *(contrast.arm for contrast in read.verdicts.contrasts)}
    chip = Cell("part of effects" if read.study.factors else "not judged", chip="grey")
    rows = [
        _arm_row(read, read.baseline, Cell("baseline", chip="grey")),
        *(_contrast_row(read, contrast) for contrast in read.verdicts.contrasts),
        *(_arm_row(read, name, chip) for name in read.arms if name not in judged),
    ]
    shown = [i for i, title in enumerate(titles)
             if title.title not in ("Worth", "Expected") or any(row.cells[i].text for row in rows)]  # fmt: skip
    return Table([titles[i] for i in shown], [replace(row, cells=[row.cells[i] for i in shown]) for row in rows])


def _contrast_row(read: StudyRead, contrast: Contrast) -> Row:
    """A pair shows its arm; an effect of a factorial design has no arm of its own, only the cells it is made from."""
    study = read.study
    numbers = (
        difference_cell(contrast.difference, contrast.low, contrast.high),
        Cell(p_text(contrast.p_holm, contrast.alpha)),
        replace(verdict_cell(contrast), remark=read.standing.unsupported(contrast) if read.standing else ""),
    )
    arm = read.arms.get(contrast.arm) if is_pair(contrast) else None
    if arm is None:
        counts = f"{contrast.n_arm} + {contrast.n_against}"
        name = Cell(contrast.arm, f"against {contrast.against}, over {len(contrast.weights)} cells")
        return Row((name, Cell(), Cell(counts), *numbers, Cell(), Cell(), _expected_cell(study, contrast)))
    to_baseline = contrast.against == read.baseline
    name = Cell(
        arm.arm, ("" if to_baseline else f"against {contrast.against}; ") + changes(study, arm.arm, contrast.against)
    )
    multiplier = read.once(worth).multipliers.get(arm.arm) if to_baseline else None
    cells = (name, *_statistics(arm, contrast.n_arm), *numbers, worth_cell(multiplier), _cost_cell(read, arm.arm))
    return Row((*cells, _expected_cell(study, contrast)), look=arm.look)


def _expected_cell(study: Study, contrast: Contrast) -> Cell:
    """What was expected; where the verdict decides something, below a label of how it agrees with that."""
    expected, agreement = expectation(study, contrast)
    if agreement is None or found_direction(contrast) is None:
        return Cell(expected)
    return Cell(agreement.word, expected, agreement.chip, remark=agreement.why)


def _arm_row(read: StudyRead, name: str, verdict: Cell) -> Row:
    arm, expected = read.arms[name], Cell(read.study.arms[name].expected or "")
    cells = (Cell(name, changes(read.study, name)), *_statistics(arm), Cell(), Cell(), verdict, Cell())
    return Row((*cells, _cost_cell(read, name), expected), arm.look, name == read.baseline)


def _statistics(arm: Summary, judged: int | None = None) -> tuple[Cell, Cell]:
    """Mean and n; `judged` is shown where it is fewer, for seeds beyond a look do not count."""
    counts = {"failed": arm.failed, "missing": arm.missing, "judged": judged if judged and judged < arm.n else 0}
    spread = f"sd {number(arm.sd)}" if arm.sd is not None else ""
    units = ""
    if arm.mean is not None and math.isfinite(arm.bits_per_byte):
        units = f"{arm.bits_per_byte:.3f} bpb, {math.exp(arm.mean):.4g} ppl"
    return Cell(number(arm.mean), spread, remark=units), Cell(
        str(arm.n), ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    )


def _cost_cell(read: StudyRead, name: str) -> Cell:
    """FLOPs of a run against the baseline's, and below it the speed."""
    arms = read.study.arms
    flops, base = (arms[arm].flops_per_token * arms[arm].tokens for arm in (name, read.baseline))
    arm, reference = read.arms[name], read.arms[read.baseline]
    if name == read.baseline:
        return Cell(f"{quantity(flops)}FLOP", f"{quantity(arm.tokens_per_second)} tokens/s")
    ratio, faster = change(flops, base), speed_change(arm, reference)
    return Cell(f"{ratio} FLOPs" if ratio else DASH, f"{faster} speed" if faster else "")


def changes(study: Study, arm: str, against: str | None = None) -> str:
    """What sets an arm apart from another one, or from the base, as `model.norm = rmsnorm`."""
    entry = study.arms[arm]
    other = study.arms[against].changes if against in study.arms else {}
    if not entry.changes and not other:
        return "control: changes nothing" if entry.control else "nothing changed"
    return "; ".join(apart(entry.changes, other, shown)) or "the same changes"


def shown(value: Any) -> str:
    """`rotary`, `plain(qk_norm=true)`, `rotary, none`."""
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={shown(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _note(read: StudyRead) -> str:
    verdicts, small = read.verdicts, f"{read.verdicts.smallest_effect:g} {read.unit}"
    alone = [
        f"{c.arm} against {c.against}"
        for c in verdicts.contrasts
        if math.isfinite(c.low) and (c.low, c.high) != (c.joint_low, c.joint_high)
    ]
    together = "these intervals hold jointly"
    if alone:
        together += (
            f", except for {listed(alone)}: decided at a later step of Holm's method, each holds individually, and "
            "the joint ones are in the CSV and JSON as joint_low and joint_high"
        )
    holm = f", as p is by Holm's method: {together}" if verdicts.members > 1 else ""
    better = "higher" if verdicts.higher_is_better else "lower"
    return (
        f"Difference: arm minus baseline in {read.measured}, {read.unit}; {better} is better. Below it the "
        f"{tables.confidence(verdicts)} interval (Welch){_level(verdicts)}; {_family(verdicts)}"
        f"{holm}. A difference below {small} was "
        "declared too small to matter. Bpb: bits per byte; ppl: perplexity of the mean. Cost: FLOPs of a whole run, "
        "and training speed, relative to the baseline; speed is left out if the speeds of single runs overlap, or if "
        "one arm was trained after the other, when the load of the machine may have changed."
    )


def _level(verdicts: Verdicts) -> str:
    """Why the intervals are wider than alpha asks for; "" where they are not for this reason."""
    if not verdicts.extendable or all(contrast.alpha >= verdicts.alpha for contrast in verdicts.contrasts):
        return ""
    usual, kept = 100 * (1 - verdicts.alpha), 100 * (1 - FIRST)
    return f", not {usual:g} %, because {kept:.0f} % of alpha {verdicts.alpha:g} is reserved for seeds added later"


def _family(verdicts: Verdicts) -> str:
    if verdicts.members == 1:
        return "a single contrast needs no adjustment"
    return f"adjusted for the family of {plural(verdicts.members, 'contrast')}"


def _forest(read: StudyRead) -> list[style.Picture]:
    verdicts = read.verdicts
    if not verdicts.contrasts:
        return []
    effects = []
    for c in verdicts.contrasts:
        label = c.arm if c.against == read.baseline or not is_pair(c) else f"{c.arm} − {c.against}"
        text = "   ".join((difference_cell(c.difference, c.low, c.high).text, verdict_cell(c).text))
        look = read.styles.get(c.arm, EFFECT)
        effects.append(style.Interval(label, c.difference, c.low, c.high, text, look.colour, look.marker))
    caption = (
        f"Bars: {tables.confidence(verdicts)} intervals, {_family(verdicts)}; a hollow mark has no interval, an "
        "arrow marks an end outside the frame. "
        f"Shaded: differences below {verdicts.smallest_effect:g} {read.unit}, declared too small to matter."
    )
    noise = read.study.noise.sd if read.study.noise and read.metric == LOSS else None
    if noise:
        caption += f" Dotted: one sd of the noise floor, {number(noise, 3)}, on either side."
    title, to = "Difference to the baseline", f" to {shorten(read.baseline)}"
    if read.study.factors:
        title, to = "Effects of the factors", ""
    called = "final loss" if read.metric == LOSS else read.measured
    figure = forest(effects, verdicts.smallest_effect, to, noise, called, read.unit)
    return [style.picture("differences", title, caption, figure)]


def forest(
    effects: Sequence[style.Interval], smallest_effect: float, to: str, noise: float | None = None,
    called: str = "final loss", unit: str = "nats",
) -> Figure:  # fmt: skip
    """Differences with their family-adjusted intervals, over the band of effects too small to matter; dotted lines one
    sd of the noise floor away from nothing. `to`: what the differences are to, as ` to learned`."""
    x = f"difference in {called}{to}, {unit} (shaded: ±{smallest_effect:g})"
    figure, axes = style.panel(style.WIDE, 1.1 + 0.4 * max(2, len(effects)), x)
    points = [e.difference for e in effects if math.isfinite(e.difference)] or [0.0]
    ends = [end for e in effects for end in (e.low, e.high)]
    widest = 3 * max(*(abs(p) for p in points), 2 * smallest_effect)
    low, high = style.intervals_within([*points, -1.6 * smallest_effect, 1.6 * smallest_effect], ends, widest)
    margin = 0.04 * (high - low) or 1.0
    axes.axvspan(-smallest_effect, smallest_effect, color=style.BAND, linewidth=0, zorder=0)
    style.zero_line(axes, "vertical")
    for side in (-noise, noise) if noise else ():
        axes.axvline(side, color=style.MUTED, linewidth=1, dashes=(1, 2), zorder=1)
    what = called.removeprefix("final ")
    style.draw_intervals(axes, effects, (low - margin, high + margin), (f"lower {what}", f"higher {what}"))
    return figure


@section(order=12, title="Bounds, and what to do next")
def bounds(read: StudyRead) -> Section | None:
    """How large every difference is at least and at most, and what its verdict suggests to do."""

    def cells(c: Contrast) -> dict[str, Cell | str]:
        digits = decimals((c.high - c.low) / 2, c.difference)
        least, most = (number(x, digits) if math.isfinite(x) else DASH for x in (c.at_least, c.at_most))
        return {
            "Contrast": f"{c.arm} against {c.against}",
            "At least:number": least if c.at_least else DASH,
            "At most:number": most,
            "Next:words": c.next.text,
        }

    table = tabulate(read.verdicts.contrasts, cells)
    return Section(table=table, note=BOUNDS) if table else None


@section(order=110, title="Sensitivity: the same contrasts, analysed in other ways")
def sensitivity(read: StudyRead) -> Section | None:
    """Every contrast again, not adjusted for the family, by other estimators where the runs allow them, and how far it
    depends on the validation text."""
    searched = read.study.bracketed or read.study.tune is not None
    left_out = () if searched else without_each_seed(read.verdicts)

    def cells(c: Contrast) -> dict[str, Cell | str | None]:
        def estimated(name: str) -> Cell:
            result = c.sensitivity.get(name)
            if not result:
                return Cell(DASH)
            return difference_cell(result["difference"], result["low"], result["high"], p_text(result["p"], c.alpha))

        permuted, text = c.sensitivity.get("permutation"), read.text.get((c.arm, c.against))
        upper = f"up to {number(c.detectable_upper, 3)}" if math.isfinite(c.detectable_upper) else ""
        exact = "exact" if permuted and permuted["exact"] else "drawn at random"
        return {
            "Contrast": f"{c.arm} against {c.against}",
            "Not adjusted:number": difference_cell(c.difference, c.raw_low, c.raw_high, p_text(c.p, c.alpha)),
            "Paired by seed:number": estimated("paired"),
            "Arm and seed:number": estimated("blocked"),
            "Permutation:number": Cell(f"p {p_text(permuted['p'], c.alpha)}", exact) if permuted else DASH,
            "Detectable:number": Cell(number(c.detectable, 3) if math.isfinite(c.detectable) else DASH, upper),
            "Text noise:number": Cell(_halfwidth(text.halfwidth), f"{text.count} {text.unit}") if text else DASH,
            "Search of rates:number": _halfwidth(c.halfwidths["search"]) if "search" in c.halfwidths else None,
            "Other claim": _others(read, c, text, left_out),
        }

    table = tabulate(read.verdicts.contrasts, cells)
    return Section(table=table, note=SENSITIVITY, folded=True) if table else None


def _others(read: StudyRead, contrast: Contrast, text: TextNoise | None, left_out: LeftOut) -> Cell:
    """How many of the alternatives would claim something else, and which."""
    claims = alternatives(read.verdicts, contrast, text, left_out)
    other = [name for name, kind in claims.items() if kind != claim(contrast.word)]
    return Cell(f"{len(other)} of {len(claims)}", ", ".join(other)) if claims else Cell(DASH)


def _halfwidth(value: float) -> str:
    """`±0.0051`: two significant digits, as half the width of an interval is known."""
    return f"±{number(value, decimals(value, value)) if value else 0}"
