"""The tables of a report, as plain text in cells; HTML and Markdown are made from the same ones."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.scaling import Reach, bounds
from gpt2lab.analysis.wording import decimals
from gpt2lab.analysis.wording import probability as p_value
from gpt2lab.evidence import Evidence
from gpt2lab.report.svg import ARMS
from gpt2lab.results import Study, StudyRun
from gpt2lab.text import DASH, change, interval, memory, number, quantity, signed

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


@dataclass(frozen=True)
class Cell:
    """`detail` is a second, quieter line; `chip` a class that makes the text a coloured label; `link` an address."""

    text: str = ""
    detail: str = ""
    chip: str = ""
    link: str = ""


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


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One arm in numbers; `n`, `mean` and `sd` are over the runs that did not fail."""

    arm: str
    look: int
    n: int
    failed: int
    missing: int
    mean: float | None
    sd: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    mfu: float | None = None


def summaries(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts) -> dict[str, Summary]:
    """Every arm of the study, the baseline first."""
    judged = {arm.name: arm for arm in verdicts.arms}
    names = [study["baseline"], *(arm for arm in study["arms"] if arm != study["baseline"])]
    found = {}
    for position, name in enumerate(names):
        results = [run.result for run in runs if run.arm == name]
        speeds = [result["tokens_per_second"] for result in results if result.get("tokens_per_second")]
        peaks = [result["peak_memory_bytes"] for result in results if result.get("peak_memory_bytes")]
        shares = [share for result in results if isinstance(share := result.get("mfu"), float)]
        arm = judged[name]
        found[name] = Summary(
            arm=name,
            look=(position - 1) % len(ARMS) + 1 if position else 0,
            n=arm.n,
            failed=arm.failed,
            missing=arm.missing,
            mean=arm.mean if arm.n else None,
            sd=arm.sd if arm.n > 1 else None,
            tokens_per_second=statistics.median(speeds) if speeds else None,
            peak_memory_bytes=max(peaks) if peaks else None,
            mfu=statistics.median(shares) if shares else None,
        )
    return found


def verdict_table(study: Study, arms: Mapping[str, Summary], verdicts: Verdicts, evidence: Evidence) -> Table:
    """One row for the baseline, one per contrast, one for every arm that no contrast names. What differences are worth
    in compute, and what was expected, have columns where the study has them."""
    columns = [
        Column("Arm"), Column("Mean", "number"), Column("n", "number"), Column("Difference", "number"),
        Column("Holm p", "number"), Column("Verdict", "words"), Column("Worth", "number"), Column("Cost", "number"),
        Column("Expected", "words"),
    ]  # fmt: skip
    rows = [_arm_row(study, arms, study["baseline"], Cell("baseline", chip="grey"))]
    rows += [_contrast_row(study, arms, contrast, evidence) for contrast in verdicts.contrasts]
    judged = {study["baseline"], *(contrast.arm for contrast in verdicts.contrasts)}
    chip = Cell("part of effects" if study.get("factors") else "not judged", chip="grey")
    rows += [_arm_row(study, arms, name, chip) for name in arms if name not in judged]
    kept = [i for i, column in enumerate(columns) if column.title not in ("Worth", "Expected") or _filled(rows, i)]
    return Table([columns[i] for i in kept], [replace(row, cells=[row.cells[i] for i in kept]) for row in rows])


def _filled(rows: Sequence[Row], column: int) -> bool:
    return any(row.cells[column].text for row in rows)


def _contrast_row(study: Study, arms: Mapping[str, Summary], contrast: Contrast, evidence: Evidence) -> Row:
    """A pair shows its arm; an effect of a factorial design has no arm of its own, only the cells it is made from."""
    numbers = (
        difference_cell(contrast.difference, contrast.low, contrast.high),
        Cell(p_cell(contrast.p_holm, contrast.alpha)),
        verdict_cell(contrast),
    )
    arm = arms.get(contrast.arm) if is_pair(contrast) else None
    if arm is None:
        counts = f"{contrast.n_arm} + {contrast.n_against}"
        name = Cell(contrast.arm, f"against {contrast.against}, over {len(contrast.weights)} cells")
        expected = Cell((study.get("expected") or {}).get(contrast.arm) or "")
        return Row((name, Cell(), Cell(counts), *numbers, Cell(), Cell(), expected))
    against = "" if contrast.against == study["baseline"] else f"against {contrast.against}; "
    name = Cell(arm.arm, against + changes(study, arm.arm))
    worth = worth_cell(evidence.multipliers.get(arm.arm)) if contrast.against == study["baseline"] else Cell()
    expected = Cell(study["arms"][arm.arm].get("expected") or "")
    return Row(
        (name, *_statistics(arm, contrast.n_arm), *numbers, worth, cost_cell(study, arms, arm.arm), expected),
        look=arm.look,
    )


def _arm_row(study: Study, arms: Mapping[str, Summary], name: str, verdict: Cell) -> Row:
    arm, expected = arms[name], Cell(study["arms"][name].get("expected") or "")
    cells = (Cell(name, changes(study, name)), *_statistics(arm), Cell(), Cell(), verdict, Cell())
    return Row((*cells, cost_cell(study, arms, name), expected), arm.look, name == study["baseline"])


def _statistics(arm: Summary, judged: int | None = None) -> tuple[Cell, Cell]:
    """Mean and n; `judged` is told where it is fewer, for seeds beyond a look do not count."""
    counts = [(arm.failed, "failed"), (arm.missing, "missing")]
    counts += [(judged, "judged")] if judged is not None and judged < arm.n else []
    remarks = [f"{count} {what}" for count, what in counts if count]
    spread = f"sd {number(arm.sd)}" if arm.sd is not None else ""
    return Cell(number(arm.mean), spread), Cell(str(arm.n), ", ".join(remarks))


def is_pair(contrast: Contrast) -> bool:
    """Whether it compares two arms and nothing else."""
    return dict(contrast.weights) == {contrast.arm: 1.0, contrast.against: -1.0}


def worth_cell(reach: Reach | None) -> Cell:
    """A compute multiplier over its interval."""
    if reach is None:
        return Cell()
    shown = f"{reach.value:.2f}x" if math.isfinite(reach.value) else DASH
    unbounded = reach.low == 0 and math.isinf(reach.high)
    return Cell(shown, reach.reason if unbounded and reach.reason else bounds(reach))


def cost_cell(study: Study, arms: Mapping[str, Summary], name: str) -> Cell:
    """FLOPs of a run against the baseline's, and below it the speed."""
    own, base = study["arms"][name], study["arms"][study["baseline"]]
    speed, reference = arms[name].tokens_per_second, arms[study["baseline"]].tokens_per_second
    if name == study["baseline"]:
        return Cell(f"{quantity(own['flops_per_token'] * own['tokens'])}FLOP", f"{quantity(speed)} tokens/s")
    ratio = change(own["flops_per_token"] * own["tokens"], base["flops_per_token"] * base["tokens"])
    faster = change(speed, reference)
    return Cell(f"{ratio} FLOPs" if ratio else DASH, f"{faster} speed" if faster else "")


def difference_cell(difference: float, low: float, high: float, p: str = "") -> Cell:
    """A difference over its interval, with the digits that the interval supports, and its p where one is given."""
    if not math.isfinite(difference):
        return Cell(DASH)
    digits = decimals((high - low) / 2, difference)
    bounds = "" if math.isnan(low) or math.isnan(high) else interval(low, high, digits)
    return Cell(signed(difference, digits) + (f" (p {p})" if p not in ("", DASH) else ""), bounds)


def confidence(verdicts: Verdicts) -> str:
    """Of the contrasts' intervals: `96 %`, or `96 to 99.4 %` where some were judged at other levels."""
    levels = sorted({contrast.alpha for contrast in verdicts.contrasts} or {verdicts.alpha}, reverse=True)
    return " to ".join(f"{100 * (1 - level):.3g}" for level in dict.fromkeys((levels[0], levels[-1]))) + " %"


def p_cell(value: float, alpha: float) -> str:
    """`0.036`, `< 1e-15`: a p value in a column that is called so."""
    return DASH if math.isnan(value) else p_value(value, alpha).removeprefix("= ")


def verdict_cell(contrast: Contrast) -> Cell:
    """The verdict's word as a label; what it adds, why, and what to beware of on the line below."""
    start = max((known for known in CHIPS if contrast.word.startswith(known)), key=len)
    label = contrast.word if start == "no difference" else start
    details = [contrast.word.removeprefix(label).strip(" :()")]
    if contrast.survivors:
        details.append(f"conditional on not failing: {contrast.survivors}")
    if contrast.reason and start in ("exploratory", "not comparable"):
        details.append(contrast.reason)
    return Cell(label, "; ".join(filter(None, (*details, *contrast.notes))), CHIPS[start])


def changes(study: Study, arm: str) -> str:
    """What sets an arm apart from the base, as `model.norm = rmsnorm`."""
    entry = study["arms"][arm]
    if not entry.get("changes"):
        return "control: changes nothing" if entry.get("control") else "nothing changed"
    return "; ".join(f"{key} = {_shown(value)}" for key, value in entry["changes"].items())


def _shown(value: Any) -> str:
    """A value as people say it: `rotary`, `plain(qk_norm=true)`, `rotary, none`."""
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={_shown(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cost_table(study: Study, arms: Mapping[str, Summary]) -> Table:
    """Size, work, speed and memory of every arm, and how they compare with the baseline's; MFU where it is known."""
    columns = [
        Column("Arm"), Column("Parameters", "number"), Column("Non-embedding", "number"), Column("Active", "number"),
        Column("FLOPs per token", "number"), Column("Tokens", "number"), Column("Tokens per second", "number"),
        Column("Peak memory", "number"),
    ]  # fmt: skip
    with_mfu = any(arm.mfu is not None for arm in arms.values())
    columns += [Column("MFU", "number")] if with_mfu else []
    base, reference = study["arms"][study["baseline"]], arms[study["baseline"]]
    declared = ("parameters", "non_embedding_parameters", "active_parameters", "flops_per_token", "tokens")
    rows = []
    for name, arm in arms.items():
        entry, is_baseline = study["arms"][name], name == study["baseline"]
        speed, peak = arm.tokens_per_second, arm.peak_memory_bytes
        numbers = [(quantity(entry.get(key)), entry.get(key), base.get(key)) for key in declared]
        numbers.append((quantity(speed), speed, reference.tokens_per_second))
        numbers.append((memory(peak), peak, reference.peak_memory_bytes))
        cells = [Cell(shown, "" if is_baseline else change(value, other)) for shown, value, other in numbers]
        cells += [Cell(DASH if arm.mfu is None else f"{100 * arm.mfu:.1f} %")] if with_mfu else []
        rows.append(Row((Cell(name), *cells), arm.look, is_baseline))
    return Table(columns, rows)
