"""The contrasts analysed in other ways, and what their intervals are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.best_rate import ErrorBudget, WeightedArm, error_budget
from gpt2lab.analysis.verdicts import FEWEST
from gpt2lab.analysis.wording import decimals
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.tables import Cell, Row, Table, columns, difference_cell, p_cell
from gpt2lab.results import Study, StudyRun, cleaned, collect, judge_runs, searches, text_noise
from gpt2lab.store import Store
from gpt2lab.text import DASH, number

NOTE = (
    "None of these decides a verdict, and none is adjusted for the number of contrasts. Paired, and arm and seed, use "
    "the seeds that both arms share; a permutation test needs 4 seeds per arm. Detectable: the true difference found "
    "four times out of five, and the same with the noise at its upper 80 % limit. Text noise: half the 95 % interval "
    "of the difference over the documents that were scored; seeds do not lessen it, more validation text does."
)
ERRORS = (
    "Half-widths in the metric's unit, at the level of the verdicts. Seeds: of the interval at the rates that were "
    "chosen. Search of rates: what is added because each arm's best rate is known only from a few trials. Validation "
    "text: of a 95 % interval over documents (Student's t); it is not part of the verdict's interval, which holds for "
    "this text. The last column says what would narrow the interval most for the training time that it takes, if "
    "spreads and curves are as they look now."
)


@section(order=110, title="Sensitivity: the same contrasts, analysed in other ways")
def sensitivity(read: StudyRead) -> Section:
    """Every contrast again, not adjusted for the family, by other estimators where the runs allow them, and how far it
    depends on the validation text."""
    titles = columns("Contrast", "Not adjusted:number", "Paired by seed:number", "Arm and seed:number",
                     "Permutation:number", "Detectable:number", "Text noise:number")  # fmt: skip
    noise = text_noise(read.study, read.runs, read.store)
    rows = []
    for c in read.verdicts.contrasts:
        cells = [difference_cell(c.difference, c.raw_low, c.raw_high, p_cell(c.p, c.alpha))]
        for name in ("paired", "blocked"):
            o = c.sensitivity.get(name)
            cells.append(
                difference_cell(o["difference"], o["low"], o["high"], p_cell(o["p"], c.alpha)) if o else Cell(DASH)
            )
        permuted = c.sensitivity.get("permutation")
        exact = "exact" if permuted and permuted["exact"] else "drawn at random"
        cells.append(Cell(f"p {p_cell(permuted['p'], c.alpha)}", exact) if permuted else Cell(DASH))
        upper = f"up to {number(c.detectable_upper, 3)}" if math.isfinite(c.detectable_upper) else ""
        cells.append(Cell(number(c.detectable, 3) if math.isfinite(c.detectable) else DASH, upper))
        text = noise.get((c.arm, c.against))
        cells.append(Cell(_give(text.halfwidth), f"{text.count} {text.unit}") if text else Cell(DASH))
        rows.append(Row((Cell(f"{c.arm} against {c.against}"), *cells)))
    return Section(table=Table(titles, rows), note=NOTE, folded=True)


@section(order=120, title="What the intervals are made of")
def errors(read: StudyRead) -> Section | None:
    """Half the width of each interval by its sources, and the step that would narrow it most for its time."""
    budgets = error_budgets(read.study, read.runs, read.verdicts, read.store)
    rows = []
    for (arm, against), budget in budgets.items():
        parts = [budget.sources.get(name) for name in ("seeds", "search", "text")]
        cells = (Cell(DASH if part is None else _give(max(part, 0.0))) for part in parts)
        rows.append(
            Row((Cell(f"{arm} against {against}"), Cell(_give(budget.halfwidth)), *cells, Cell(budget.advice())))
        )
    titles = columns("Contrast", "Interval:number", "Seeds:number", "Search of rates:number",
                     "Validation text:number", "Cheapest way to narrow it:words")  # fmt: skip
    return Section(table=Table(titles, rows), note=ERRORS) if rows else None


def _give(halfwidth: float) -> str:
    """`±0.0051`: two significant digits, as half the width of an interval is known."""
    return f"±{number(halfwidth, decimals(halfwidth, halfwidth)) if halfwidth else 0}"


def error_budgets(
    study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, store: Store
) -> dict[tuple[str, str], ErrorBudget]:
    """For every contrast that was tested by its own noise, from the seeds that it was judged by."""
    arms, found = {arm.name: arm for arm in verdicts.arms}, searches(study, store)
    seconds = {arm: _seconds(runs, arm) for arm in study.arms}
    members = len(verdicts.contrasts) + (len(study.history.dropped) if study.history else 0)
    budgets = {}
    for c in verdicts.contrasts:
        few = min(c.n_arm, c.n_against)
        if not math.isfinite(c.p_holm) or few < FEWEST or not all(seconds[name] for name in c.weights):
            continue
        weighted = [
            WeightedArm(
                weight=weight, search=found.get(name), losses=arms[name].array[: c.n_arm if weight > 0 else c.n_against]
            )
            for name, weight in c.weights.items()
        ]
        budgets[c.arm, c.against] = error_budget(
            weighted, c.halfwidths, [seconds[name] for name in c.weights], level=c.alpha / members,
            more=max(0, (c.next_look or 0) - few), next_level=c.next_alpha and c.next_alpha / members,
        )  # fmt: skip
    return budgets


def _seconds(runs: Sequence[StudyRun], arm: str) -> float:
    """Median training time of an arm's runs; 0 where none is known."""
    known = [r.result["tokens"] / r.result["tokens_per_second"] for r in runs
             if r.arm == arm and r.result.get("tokens") and r.result.get("tokens_per_second")]  # fmt: skip
    return statistics.median(known) if known else 0.0


def next_steps(name: str, store: Store) -> list[str]:
    """For every contrast of a recorded study that is open: what would narrow its interval most for its time."""
    if name not in store.studies():
        return []
    study = cleaned(store.study(name))
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, sensitivity=False)
    budgets = error_budgets(study, runs, verdicts, store)
    steps = {
        f"{c.arm} against {c.against}": budgets[c.arm, c.against].advice()
        for c in verdicts.contrasts
        if c.word.startswith("inconclusive") and (c.arm, c.against) in budgets
    }
    return [f"open so far: {pair}; narrows it most: {step}" for pair, step in steps.items() if step]
