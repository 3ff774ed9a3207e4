"""The tables of a report, as plain text in cells; HTML and Markdown are made from the same ones."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.words import decimals
from gpt2lab.analysis.words import probability as p_value
from gpt2lab.report.svg import ARMS
from gpt2lab.results import Study, StudyRun, failure_ceiling
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
    """`detail` is a second, quieter line; `chip` a class that makes the text a coloured label."""

    text: str = ""
    detail: str = ""
    chip: str = ""


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


def summaries(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts) -> dict[str, Summary]:
    """Every arm of the study, the baseline first."""
    judged = {arm.name: arm for arm in verdicts.arms}
    names = [study["baseline"], *(arm for arm in study["arms"] if arm != study["baseline"])]
    found = {}
    for position, name in enumerate(names):
        results = [run.result for run in runs if run.arm == name]
        speeds = [result["tokens_per_second"] for result in results if result.get("tokens_per_second")]
        peaks = [result["peak_memory_bytes"] for result in results if result.get("peak_memory_bytes")]
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
        )
    return found


def verdict_table(study: Study, arms: Mapping[str, Summary], verdicts: Verdicts) -> Table:
    """One row for the baseline, one per contrast, one for every arm that no contrast names."""
    columns = (
        Column("Arm"), Column("Mean", "number"), Column("sd", "number"), Column("n", "number"),
        Column("Difference", "number"), Column("Holm p", "number"), Column("Verdict", "words"),
        Column("Expected", "words"),
    )  # fmt: skip
    rows = [_arm_row(study, arms[study["baseline"]], Cell("baseline", chip="grey"))]
    rows += [_contrast_row(study, arms[contrast.arm], contrast) for contrast in verdicts.contrasts]
    judged = {study["baseline"], *(contrast.arm for contrast in verdicts.contrasts)}
    rows += [_arm_row(study, arm, Cell("not judged", chip="grey")) for arm in arms.values() if arm.arm not in judged]
    if any(entry.get("expected") for entry in study["arms"].values()):
        return Table(columns, rows)
    return Table(columns[:-1], [replace(row, cells=row.cells[:-1]) for row in rows])


def _contrast_row(study: Study, arm: Summary, contrast: Contrast) -> Row:
    against = "" if contrast.against == study["baseline"] else f"against {contrast.against}; "
    cells = (
        Cell(arm.arm, against + changes(study, arm.arm)),
        *_statistics(arm),
        difference_cell(contrast.difference, contrast.low, contrast.high),
        Cell(_p(contrast.p_holm, study["alpha"])),
        verdict_cell(contrast),
        Cell(study["arms"][arm.arm].get("expected") or ""),
    )
    return Row(cells, look=arm.look)


def _arm_row(study: Study, arm: Summary, verdict: Cell) -> Row:
    name = Cell(arm.arm, changes(study, arm.arm))
    expected = Cell(study["arms"][arm.arm].get("expected") or "")
    return Row((name, *_statistics(arm), Cell(), Cell(), verdict, expected), arm.look, arm.arm == study["baseline"])


def _statistics(arm: Summary) -> tuple[Cell, Cell, Cell]:
    remarks = [f"{count} {what}" for count, what in ((arm.failed, "failed"), (arm.missing, "missing")) if count]
    return Cell(number(arm.mean)), Cell(number(arm.sd)), Cell(str(arm.n), ", ".join(remarks))


def difference_cell(difference: float, low: float, high: float, p: str = "") -> Cell:
    """A difference over its interval, with the digits that the interval supports, and its p where one is given."""
    if not math.isfinite(difference):
        return Cell(DASH)
    digits = decimals((high - low) / 2, difference)
    bounds = "" if math.isnan(low) or math.isnan(high) else interval(low, high, digits)
    return Cell(signed(difference, digits) + (f" (p {p})" if p not in ("", DASH) else ""), bounds)


def _p(value: float, alpha: float) -> str:
    return DASH if math.isnan(value) else p_value(value, alpha)


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
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cost_table(study: Study, arms: Mapping[str, Summary]) -> Table:
    """Size, work, speed and memory of every arm, and how they compare with the baseline's."""
    columns = (
        Column("Arm"), Column("Parameters", "number"), Column("Non-embedding", "number"), Column("Active", "number"),
        Column("FLOPs per token", "number"), Column("Tokens", "number"), Column("Tokens per second", "number"),
        Column("Peak memory", "number"),
    )  # fmt: skip
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
        rows.append(Row((Cell(name), *cells), arm.look, is_baseline))
    return Table(columns, rows)


def sensitivity_table(study: Study, verdicts: Verdicts) -> Table:
    """Every contrast again, not adjusted for the family, and by other estimators where the runs allow them."""
    columns = (
        Column("Contrast"), Column("Welch, raw", "number"), Column("Paired by seed", "number"),
        Column("Arm and seed", "number"), Column("Permutation", "number"), Column("Detectable", "number"),
    )  # fmt: skip
    rows = []
    for c in verdicts.contrasts:
        cells = [difference_cell(c.difference, c.raw_low, c.raw_high, _p(c.p, study["alpha"]))]
        for name in ("paired", "blocked"):
            o = c.sensitivity.get(name)
            cells.append(
                difference_cell(o["difference"], o["low"], o["high"], _p(o["p"], study["alpha"])) if o else Cell(DASH)
            )
        permuted = c.sensitivity.get("permutation")
        exact = "exact" if permuted and permuted["exact"] else "drawn at random"
        cells.append(Cell(f"p {_p(permuted['p'], study['alpha'])}", exact) if permuted else Cell(DASH))
        upper = f"up to {number(c.detectable_upper, 3)}" if math.isfinite(c.detectable_upper) else ""
        cells.append(Cell(number(c.detectable, 3) if math.isfinite(c.detectable) else DASH, upper))
        rows.append(Row((Cell(f"{c.arm} against {c.against}"), *cells)))
    return Table(columns, rows)


def run_table(study: Study, runs: Sequence[StudyRun]) -> Table:
    """Every declared run: what became of it, and why where it has no value."""
    columns = (
        Column("Arm"), Column("Seed", "number"), Column("Run", "id"), Column("Status"),
        Column(f"Final {study['metric']}", "number"), Column("Reason", "words"),
    )  # fmt: skip
    ceiling = failure_ceiling(study)
    rows = []
    for run in runs:
        status, reason = run.status, run.reason or ""
        if run.value is not None and math.isfinite(run.value) and run.value >= ceiling:
            status, reason = "did not learn", f"not below {number(ceiling, 3)}, the unigram floor less the margin"
        value = number(run.value) if run.value is not None else DASH
        rows.append(Row((Cell(run.arm), Cell(str(run.seed)), Cell(run.id), Cell(status), Cell(value), Cell(reason))))
    return Table(columns, rows)
