"""Tables behind the verdicts: other estimators, the search for rates, other budgets, early order, runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.scaling import Reach
from gpt2lab.analysis.wording import decimals
from gpt2lab.evidence import Evidence, Trial
from gpt2lab.report.tables import Cell, Column, Row, Summary, Table, difference_cell, p_cell, worth_cell
from gpt2lab.results import Study, StudyRun, failure_ceiling
from gpt2lab.text import DASH, interval, number, quantity, signed


def sensitivity_table(verdicts: Verdicts, evidence: Evidence) -> Table:
    """Every contrast again, not adjusted for the family, by other estimators where the runs allow them, and how far it
    depends on the validation text."""
    columns = (
        Column("Contrast"), Column("Not adjusted", "number"), Column("Paired by seed", "number"),
        Column("Arm and seed", "number"), Column("Permutation", "number"), Column("Detectable", "number"),
        Column("Text noise", "number"),
    )  # fmt: skip
    rows = []
    for c in verdicts.contrasts:
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
        text = evidence.text_noise.get((c.arm, c.against))
        cells.append(Cell(_give(text.halfwidth), f"{text.count} {text.unit}") if text else Cell(DASH))
        rows.append(Row((Cell(f"{c.arm} against {c.against}"), *cells)))
    return Table(columns, rows)


def error_table(verdicts: Verdicts, evidence: Evidence) -> Table:
    """Half the width of each interval by its sources, and the step that would narrow it most for its time."""
    columns = (
        Column("Contrast"), Column("Interval", "number"), Column("Seeds", "number"),
        Column("Search of rates", "number"), Column("Validation text", "number"),
        Column("Cheapest way to narrow it", "words"),
    )  # fmt: skip
    rows = []
    for c in verdicts.contrasts:
        budget = evidence.error_budgets.get((c.arm, c.against))
        if budget is None:
            continue
        parts = [budget.sources.get(name) for name in ("seeds", "search", "text")]
        cells = (Cell(DASH if part is None else _give(max(part, 0.0))) for part in parts)
        name = Cell(f"{c.arm} against {c.against}")
        rows.append(Row((name, Cell(_give(budget.halfwidth)), *cells, Cell(budget.told()))))
    return Table(columns, rows)


def _give(halfwidth: float) -> str:
    """`±0.0051`: two significant digits, as half the width of an interval is known."""
    return f"±{number(halfwidth, decimals(halfwidth, halfwidth)) if halfwidth else 0}"


def run_table(study: Study, runs: Sequence[StudyRun], evidence: Evidence) -> Table:
    """Every declared run: what became of it, why where it has no value, and what else rests on it."""
    columns = (
        Column("Arm"), Column("Seed", "number"), Column("Run", "id"), Column("Status"),
        Column(f"Final {study['metric']}", "number"), Column("Remarks", "words"),
    )  # fmt: skip
    ceiling = failure_ceiling(study)
    rows = []
    for run in runs:
        status, reason = run.status, run.reason or ""
        if run.value is not None and math.isfinite(run.value) and run.value >= ceiling:
            status, reason = "did not learn", f"not below {number(ceiling, 3)}, the unigram floor less the margin"
        value = number(run.value) if run.value is not None else DASH
        remarks = "; ".join(filter(None, (reason, *_origins(run, evidence))))
        link = mlflow_link(evidence, run.id)
        rows.append(
            Row((Cell(run.arm), Cell(str(run.seed)), Cell(run.id, link=link), Cell(status), Cell(value), Cell(remarks)))
        )
    return Table(columns, rows)


def _origins(run: StudyRun, evidence: Evidence) -> list[str]:
    """Where a run that this study did not train alone comes from."""
    adopted = [f"taken over from {run.adopted_from}, bit for bit the same"] if run.adopted_from else []
    others = evidence.elsewhere.get(run.id, ())
    return adopted + ([f"shared with {', '.join(others)}"] if others else [])


def mlflow_link(evidence: Evidence, run: str) -> str:
    """Where the run is in MLflow's pages: at the tracking server, or at what `gpt2lab ui` serves here."""
    copy, experiment = (evidence.links.get("runs") or {}).get(run), evidence.links.get("experiment_id")
    if not all(re.fullmatch(r"\w+", str(part or "")) for part in (copy, experiment)):
        return ""
    uri = str(evidence.links.get("uri") or "")
    server = uri.rstrip("/") if re.fullmatch(r"https?://[\w.:/-]+", uri) else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment}/runs/{copy}"


def bracket_table(study: Study, evidence: Evidence, arms: Mapping[str, Summary], verdicts: Verdicts) -> Table:
    """Every learning rate that was tried, with one seed each, and what that does to the difference."""
    factors = sorted({trial.factor for tried in evidence.trials.values() for trial in tried})
    columns = (
        Column("Arm"), *(Column(f"x{factor:g}", "number") for factor in factors), Column("Best rate", "number"),
        Column("At the shared rate", "number"), Column("Each at its best", "number"),
    )  # fmt: skip
    judged = {c.arm: c for c in verdicts.contrasts if c.against == study["baseline"]}
    base = at_shared(evidence.trials.get(study["baseline"], ()))
    rows = []
    for name, tried in evidence.trials.items():
        by_factor = {trial.factor: trial for trial in tried}
        search, lr = study["arms"][name]["bracket"], study["arms"][name]["lr"]
        best = "" if search["best"] is None else "at the edge" if search["at_edge"] else f"x{search['best']:g}"
        own, tuned = at_shared(tried), judged.get(name)
        shared = "" if own is None or base is None or name == study["baseline"] else signed(own - base, 3)
        rows.append(
            Row(
                (
                    Cell(name),
                    *(_trial_cell(by_factor.get(factor), search["best"]) for factor in factors),
                    Cell(f"{lr:.3g}" if best else DASH, best),
                    Cell(shared, "one seed" if shared else ""),
                    difference_cell(tuned.difference, tuned.low, tuned.high) if tuned else Cell(),
                ),
                arms[name].look,
                name == study["baseline"],
            )
        )
    return Table(columns, rows)


def at_shared(tried: Sequence[Trial]) -> float | None:
    """The loss at the arm's own rate as it was declared."""
    losses = [trial.loss for trial in tried if trial.factor == 1 and trial.loss is not None]
    return losses[0] if losses and math.isfinite(losses[0]) else None


def _trial_cell(trial: Trial | None, best: float | None) -> Cell:
    if trial is None:
        return Cell()
    if trial.loss is None:
        return Cell(DASH, "not finished")
    if not math.isfinite(trial.loss):
        return Cell(DASH, "failed")
    return Cell(number(trial.loss), "best" if trial.factor == best else "")


def budget_table(study: Study, evidence: Evidence, arms: Mapping[str, Summary]) -> Table:
    """Final losses at other budgets, each at the end of its own schedule, and what differences are worth by them."""
    budgets = sorted({tokens for curve in evidence.budgets.values() for tokens in curve})
    columns = (
        Column("Arm"), *(Column(f"{quantity(tokens)} tokens", "number") for tokens in budgets),
        Column("Worth, compute", "number"), Column("Worth, tokens", "number"), Column("Tokens to baseline", "number"),
    )  # fmt: skip
    rows = []
    for name, arm in arms.items():
        curve = evidence.budgets.get(name, {float(study["arms"][name]["tokens"]): ()})
        cells = [_losses_cell(curve.get(tokens, ())) for tokens in budgets]
        if not any(cell.text for cell in cells) and arm.mean is not None:
            cells[budgets.index(float(study["arms"][name]["tokens"]))] = Cell(number(arm.mean))
        worth = (evidence.multipliers.get(name), evidence.in_tokens.get(name))
        shown = (*map(worth_cell, worth), _share_cell(evidence.shares.get(name)))
        rows.append(Row((Cell(name), *cells, *shown), arm.look, name == study["baseline"]))
    return Table(columns, rows)


def _losses_cell(losses: Sequence[float]) -> Cell:
    if not losses:
        return Cell()
    return Cell(number(sum(losses) / len(losses)), f"{len(losses)} seeds" if len(losses) > 1 else "1 seed")


def _share_cell(reach: Reach | None) -> Cell:
    if reach is None:
        return Cell()
    low = f"{100 * reach.low:.0f}" if reach.low > 0 else "less"
    high = f"{100 * reach.high:.0f}" if math.isfinite(reach.high) else "more"
    return Cell(f"{100 * reach.value:.0f} %" if math.isfinite(reach.value) else DASH, f"[{low}, {high}]")


def horizon_table(evidence: Evidence) -> Table:
    """Rank agreement of the arms during training with their order at the end."""
    columns = (Column("Share of training"), Column("Kendall's tau", "number"), Column("Arms", "number"),
               Column("Seeds", "number"))  # fmt: skip
    rows = []
    for one in evidence.horizon:
        inside = interval(one.low, one.high, 2) if math.isfinite(one.low) else ""
        cells = (Cell(f"{100 * one.fraction:g} %"), Cell(signed(one.tau, 2), inside), Cell(str(one.arms)),
                 Cell(str(one.seeds)))  # fmt: skip
        rows.append(Row(cells))
    return Table(columns, rows)
