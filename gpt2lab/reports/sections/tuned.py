"""How settings were found: what tuning did to each contrast, every arm's search, and brackets of learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.results import Study, StudyRun, collect
from gpt2lab.analysis.studies import RATE, as_written, judge_runs, trial_loss, tuned_settings
from gpt2lab.analysis.tuning import OPEN
from gpt2lab.analysis.wording import decimals
from gpt2lab.basics.text import DASH, number, plural, quantity, setting, signed
from gpt2lab.errors import Gpt2labError
from gpt2lab.records import Bracket, SweepRecord
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import SearchRead, StudyRead, Summary, read_record
from gpt2lab.reports.sections.searches import beside, edge_cell, flat_cell, optimum_cell, settings_text, span_of
from gpt2lab.reports.tables import Cell, Table, difference_cell, p_text, tabulate, verdict_cell

NOTE = (
    "Every arm searched the same space around its own settings, with the same number of trials on seeds used for "
    "nothing else; the verdicts use fresh seeds at each arm's best trial. The other difference is on the same "
    "seeds at the settings as written: it is descriptive, without a verdict; its interval is family-adjusted, too."
)
CAPTION = (
    "Every mark is the final loss of one trial; crosses at the upper edge diverged, triangles lie above the frame. "
    "Lines: curves through the trials near each arm's best; shaded: 95 % intervals of where they are lowest."
)
ARMS_NOTE = (
    "Optimum: the minimum of a curve through the trials near the best one, with its 95 % interval. Flat: the range in "
    "which less than the smallest effect of interest is lost."
)
BRACKET_NOTE = (
    "Final loss of one run for each multiple of the arm's own learning rate, on a seed used for nothing else. The "
    "verdict uses fresh seeds at each arm's best rate; a best rate still at the edge after the bracket was widened "
    "three times makes an arm not comparable."
)


@dataclass(frozen=True, kw_only=True)
class Tunings:
    """The searches of a study's arms, and the study at its settings as written; empty where nothing was tuned."""

    searches: Mapping[str, SearchRead] = field(default_factory=dict)
    """arm -> its search, of those whose record is at hand"""
    problem: str = ""
    """why there is no such record"""
    written: Verdicts | None = None
    """the contrasts on the runs at the settings as written; None before there are any"""
    runs: tuple[StudyRun, ...] = ()
    """those runs, without those that are the study's own"""


def tunings(read: StudyRead) -> Tunings:
    """From the study's record, the runs and the record of the searches."""
    study, store = read.study, read.store
    if not tuned_settings(study):
        return Tunings()
    twin = as_written(study)
    runs = collect(twin, store)
    written = judge_runs(twin, runs, store, sensitivity=False) if any(run.value is not None for run in runs) else None
    counted = {run for entry in study.arms.values() for run in entry.runs.values()}
    others = tuple(run for run in runs if run.id not in counted)
    try:
        searches = read_record(_of_this_study(read), store).searches
    except Gpt2labError as error:
        return Tunings(problem=f"the record of its searches cannot be read: {error}", written=written, runs=others)
    return Tunings(searches=searches, written=written, runs=others)


def _of_this_study(read: StudyRead) -> SweepRecord:
    """The record of the arms' searches, with those alone that the study's runs rest on: a later command, of other code
    or with other arms, may have written it anew. Raises ConfigError, DataFault."""
    tuned = {arm: entry.tuned for arm, entry in read.study.arms.items() if entry.tuned}
    record = read.store.sweep(next(iter(tuned.values())).sweep)
    searches = {
        arm: search
        for arm, entry in tuned.items()
        if (search := record.searches.get(entry.label)) and search.study == entry.study
    }
    return record.with_(searches=searches)


@section(order=30, title="Each arm tuned")
def tuned(read: StudyRead) -> list[Section]:
    """What tuning changed, and what each search found; nothing for a study without searches."""
    written = read.once(tunings).written
    data = {"as_written": written.to_json()["contrasts"]} if written else {}
    contrasts, arms = _contrast_table(read), _search_table(read)
    points = _points(read) if tuned_settings(read.study) else []
    if contrasts is None and arms is None and not points:
        return [Section(data=data)]
    first = Section(table=contrasts, note=NOTE, points=points, figures=_drawn(read), data=data)
    return [first, *([Section(title="What each arm's search found", table=arms, note=ARMS_NOTE)] if arms else [])]


def names_of(study: Study) -> tuple[str, str]:
    """What the two ways are called: at the settings as written, and at those that were found."""
    if tuned_settings(study) != [RATE]:
        return "at the settings as written", "at its own best settings"
    rates = {entry.shared.lr for entry in study.arms.values() if entry.shared}
    return ("at the shared rate" if len(rates) == 1 else "at the rates as written"), "at its own rate"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _contrast_table(read: StudyRead) -> Table | None:
    """Every contrast as written beside the tuned one, which has the verdict; None before both can be had."""
    if read.once(tunings).written is None:
        return None

    shared, at_own = names_of(read.study)

    def cells(c: Contrast) -> dict[str, Cell | str]:
        other, written = before(read, c), Cell(DASH)
        if other:
            failed = _failures(other) if other.failed_arm else ""
            cell = difference_cell(other.difference, other.low, other.high)
            written = Cell(cell.text, "; ".join(filter(None, (str(cell.detail), failed))))
        return {
            "Contrast": Cell(c.arm, f"against {c.against}"),
            f"{_capitalised(shared)}:number": written,
            f"Each {at_own}:number": difference_cell(c.difference, c.low, c.high),
            "Holm p:number": p_text(c.p_holm, c.alpha),
            "Verdict:words": verdict_cell(c),
        }

    return tabulate(read.verdicts.contrasts, cells, lambda c: read.arms[c.arm].look if c.arm in read.arms else None)


def _search_table(read: StudyRead) -> Table | None:
    """Every arm's search: what it found, how surely, how much it matters, what it cost."""
    searches, several = read.once(tunings).searches, len(tuned_settings(read.study)) > 1

    def settings(values: Mapping[str, object]) -> str:
        return (settings_text(values) if several else ", ".join(map(setting, values.values()))) or DASH

    def cells(arm: Summary) -> dict[str, Cell | str]:
        search, entry = searches[arm.arm], read.study.arms[arm.arm]
        best, spent = search.best, sum(trial.tokens for trial in search.trials)
        optimum = search.optima.get(RATE) or next(iter(search.optima.values()), None)
        ended = {outcome: count for outcome, count in search.counts.items() if outcome not in OPEN}
        reached = f"{read.metric} {number(best.value)}" if best else ""
        runs = f"{spent / entry.tokens:.1f} runs" if spent and entry.tokens else ""
        return {
            "Best trial:number": Cell(settings(best.settings) if best else DASH, reached),
            "As written:number": settings(entry.shared.settings if entry.shared else {}),
            "Optimum:number": optimum_cell(optimum, search) if optimum else DASH,
            "Flat:number": flat_cell(optimum, search, read.unit) if optimum else DASH,
            "Edge:words": edge_cell(optimum) if optimum and best else "",
            "Trials:number": Cell(str(sum(ended.values())), ", ".join(f"{n} {what}" for what, n in ended.items())),
            "Tokens:number": Cell(quantity(spent), runs),
        }

    return read.arm_table(cells, searches)


def _points(read: StudyRead) -> list[str]:
    """Why arms cannot be compared, and what is missing."""
    sentences = [f"{arm} is not comparable: {why}." for arm, why in refused(read).items()]
    missing = [run for run in read.once(tunings).runs if run.value is None]
    if missing:
        sentences.append(f"{plural(len(missing), 'run')} at the settings as written without a final value; see Runs.")
    if read.once(tunings).problem:
        sentences.append(f"{read.once(tunings).problem}.")
    return sentences


def progress(read: StudyRead) -> str:
    """How far searches are that are still open; "" without any."""
    searches = [entry.tuned for entry in read.study.arms.values() if entry.tuned]
    if all(search.over for search in searches):
        return ""
    done, due = sum(search.trials for search in searches), len(searches) * int((read.study.tune or {})["trials"])
    return (
        f"The settings of the arms are still being searched: {done} of {due} "
        "trials had ended when the study's record was written; the same command continues."
    )


def refused(read: StudyRead) -> dict[str, str]:
    """Arm -> why its search bars it from every comparison, with what to do about an edge."""
    reasons = {}
    for arm, entry in read.study.arms.items():
        if not entry.tuned or not entry.not_comparable:
            continue
        search = read.once(tunings).searches.get(arm)
        widen = {name: o.widen for name, o in search.optima.items() if o.edge and o.widen} if search else {}
        hint = "; ".join(f"{name} from {setting(low, 2)} to {setting(high, 2)} would close it"
                         for name, (low, high) in widen.items())  # fmt: skip
        reasons[arm] = entry.not_comparable + (f" ({hint})" if hint else "")
    return reasons


def before(read: StudyRead, contrast: Contrast) -> Contrast | None:
    """The same contrast on the runs at the settings as written."""
    written = read.once(tunings).written
    same = written.contrasts if written else ()
    return next((c for c in same if (c.arm, c.against) == (contrast.arm, contrast.against)), None)


def summary(read: StudyRead, contrast: Contrast) -> str:
    """Both differences in one line."""
    other = before(read, contrast)
    if other is None or not math.isfinite(contrast.difference):
        return ""
    shared, at_own = names_of(read.study)
    return (
        f"{contrast.arm} against {contrast.against}: {_difference(other)} {shared}, {_difference(contrast)} {at_own}"
        + (f" ({contrast.word})" if contrast.word else "")
    )


def _failures(c: Contrast) -> str:
    return f"{c.failed_arm} of {c.failed_arm + c.n_arm} failed"


def _difference(c: Contrast) -> str:
    if not math.isfinite(c.difference):
        return _failures(c) if c.failed_arm else DASH
    return signed(c.difference, decimals((c.high - c.low) / 2, c.difference))


def _drawn(read: StudyRead) -> list[style.Picture]:
    """Each arm's loss against the learning rate, or against the first number that was searched."""
    searches = read.once(tunings).searches
    if not any(search.best for search in searches.values()):
        return []
    for name in dict.fromkeys([RATE, *tuned_settings(read.study)]):
        axes = [search.axes[name] for search in searches.values() if name in search.axes]
        if axes and not axes[0].choices:
            title = f"Each arm's loss against {'its learning rate' if name == RATE else name}"
            figure = beside(span_of(axes), searches, read.styles, read.metric)
            return [style.picture("tuned", title, CAPTION, figure)]
    return []


def method(study: Study) -> list[str]:
    """What was declared of the searches, in sentences."""
    tune = study.tune
    if not tune:
        return []
    space = ", ".join(f"{name} {_range(dimension)}" for name, dimension in tune["space"].items())
    pruner = tune["pruner"]["name"]
    seeds, tuning_seeds = (", ".join(map(str, seeds)) for seeds in (study.seeds, tune["tuning_seeds"]))
    sentences = [
        f"Tuning: every arm, the baseline included, had {plural(tune['trials'], 'trial')} over {space}; sampler "
        f"{tune['sampler']['name']} with seed {tune['sampler']['seed']} for all, "
        f"{'no pruning' if pruner == 'none' else f'pruner {pruner}'}; trained on "
        f"{'seed' if tune['seeds'] == 1 else 'seeds'} {tuning_seeds}, which no verdict uses. "
        f"Verdicts use seeds {seeds} at each arm's best trial."
    ]
    centres = [f"{arm} around {multiple:g} times its {key}" for arm, own in (tune.get("centre") or {}).items()
               for key, multiple in own.items()]  # fmt: skip
    if centres:
        sentences.append(f"Searched elsewhere, as declared beforehand: {', '.join(centres)}.")
    return sentences


def _range(dimension: Mapping[str, Any]) -> str:
    if dimension.get("choices"):
        return "of " + ", ".join(map(str, dimension["choices"]))
    scale = " on a log scale" if dimension.get("log") else ""
    times = " times the arm's own" if dimension.get("relative") else ""
    return f"from {setting(dimension['low'])} to {setting(dimension['high'])}{times}{scale}"


@section(order=80, title="How each arm's learning rate was found")
def rates(read: StudyRead) -> Section | None:
    """Every learning rate of the brackets, with one seed each, and what that does to the difference."""
    study = read.study
    brackets = {arm: entry.bracket for arm, entry in study.arms.items() if entry.bracket and entry.bracket.trials}
    if not brackets:
        return None
    losses = {
        arm: {trial.factor: trial_loss(study, read.store, arm, trial) for trial in bracket.trials}
        for arm, bracket in brackets.items()
    }
    judged = {c.arm: c for c in read.verdicts.contrasts if c.against == read.baseline}

    factors = sorted({factor for by_factor in losses.values() for factor in by_factor})
    base = losses.get(read.baseline, {}).get(1)

    def cells(arm: Summary) -> dict[str, Cell | str]:
        bracket, by_factor, contrast = brackets[arm.arm], losses[arm.arm], judged.get(arm.arm)
        best, at_shared, at_one = Cell(DASH), Cell(), by_factor.get(1)
        if bracket.best is not None:
            best = Cell(f"{study.arms[arm.arm].lr:.3g}", "at the edge" if bracket.at_edge else f"x{bracket.best:g}")
        if at_one is not None and base is not None and math.isfinite(at_one + base) and arm.arm != read.baseline:
            at_shared = Cell(signed(at_one - base, 3), "one seed")
        return {
            **{f"x{factor:g}:number": _trial_cell(by_factor, factor, bracket) for factor in factors},
            "Best rate:number": best,
            "At the shared rate:number": at_shared,
            "Each at its best:number":
                difference_cell(contrast.difference, contrast.low, contrast.high) if contrast else "",
        }  # fmt: skip

    return Section(table=read.arm_table(cells, brackets), note=BRACKET_NOTE)


def _trial_cell(losses: Mapping[float, float | None], factor: float, bracket: Bracket) -> Cell:
    if factor not in losses:
        return Cell()
    loss = losses[factor]
    if loss is None or not math.isfinite(loss):
        return Cell(DASH, "not finished" if loss is None else "failed")
    return Cell(number(loss), "best" if factor == bracket.best else "")
