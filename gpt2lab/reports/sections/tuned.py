"""What tuning did: each contrast as written and tuned, and every arm's search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.tuning import OPEN, sensitivity
from gpt2lab.analysis.wording import decimals
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import DIVERGED, Axis, Search, StudyRead, read_record
from gpt2lab.reports.sections.searches import beside, edge_cell, flat_cell, optimum_cell, settings_text, span_of
from gpt2lab.reports.tables import Cell, Row, Table, columns, difference_cell, p_cell, verdict_cell
from gpt2lab.results import RATE, Study, StudyRun, as_written, collect, judge_runs, searched
from gpt2lab.text import DASH, number, plural, quantity, setting, signed

NOTE = (
    "Every arm searched the same space around its own settings, with the same number of trials on seeds that serve "
    "nothing else; the verdicts rest on fresh seeds at the best trial of each. The other difference is on the same "
    "seeds at the settings as written: description that carries no verdict, its interval adjusted for the family alike."
)
CAPTION = (
    "Every mark is the final loss of one trial; crosses along the upper edge diverged, triangles lie above the frame. "
    "Lines: curves through the trials near each arm's best; shaded: 95 % intervals of where they are lowest."
)
ARMS_NOTE = (
    "Optimum: where a curve through the trials near the best one is lowest, with its 95 % interval. Flat: between "
    "these one loses less than the smallest effect of interest. Sensitivity: what is lost on average over the whole "
    "space against the best rate (Wortsman et al. 2023); an arm with a small one forgives a bad rate."
)


@dataclass(frozen=True, kw_only=True)
class Tunings:
    """The searches of a study's arms, and the study at its settings as written; empty where nothing was tuned."""

    searches: Mapping[str, Search] = field(default_factory=dict)
    """arm -> its search, of those whose record is at hand"""
    problem: str = ""
    """why there is no such record"""
    written: Verdicts | None = None
    """the contrasts on the runs at the settings as written; None before there are any"""
    runs: Sequence[StudyRun] = ()
    """those runs, without those that are the study's own"""

    def axis(self, name: str) -> Axis | None:
        """A dimension over the spaces of all arms; None where it is no number."""
        axes = [search.axes[name] for search in self.searches.values() if name in search.axes]
        return None if not axes or axes[0].choices else span_of(axes)


def tunings(read: StudyRead) -> Tunings:
    """From the study's record, the runs and the record of the searches."""
    study, store = read.study, read.store
    if not searched(study):
        return Tunings()
    twin = as_written(study)
    runs = collect(twin, store)
    written = judge_runs(twin, runs, store, sensitivity=False) if any(run.value is not None for run in runs) else None
    own = {run for entry in study.arms.values() for run in entry.runs.values()}
    others = [run for run in runs if run.id not in own]
    try:
        found = read_record(_of_this_study(read), store).searches
    except (Gpt2labError, KeyError) as error:
        return Tunings(problem=f"the record of its searches cannot be read: {error}", written=written, runs=others)
    return Tunings(searches=found, written=written, runs=others)


def _of_this_study(read: StudyRead) -> dict[str, Any]:
    """The record of the arms' searches, with those alone that the study's runs rest on: a later command, of other code
    or with other arms, may have written it anew. Raises ConfigError, DataFault."""
    tuned = {arm: entry.tuned for arm, entry in read.study.arms.items() if entry.tuned}
    record = read.store.sweep(next(iter(tuned.values())).sweep).plain()
    kept = {
        arm: record["searches"][one.label]
        for arm, one in tuned.items()
        if record["searches"].get(one.label, {}).get("study") == one.study
    }
    return {**record, "searches": kept}


@section(order=30, title="Each arm tuned")
def tuned(read: StudyRead) -> list[Section]:
    """What tuning changed, and what each search found; nothing for a study without searches."""
    found = read.once(tunings)
    data = {"as_written": found.written.to_json()["contrasts"]} if found.written else {}
    contrasts, arms, points = _contrast_table(read), _arm_table(read), _points(read) if searched(read.study) else []
    if contrasts is None and arms is None and not points:
        return [Section(data=data)]
    first = Section(table=contrasts, note=NOTE, points=points, figures=_drawn(read), data=data)
    return [first, *([Section(title="What each arm's search found", table=arms, note=ARMS_NOTE)] if arms else [])]


def names_of(study: Study) -> tuple[str, str]:
    """What the two ways are called: at the settings as written, and at those that were found."""
    if searched(study) != [RATE]:
        return "at the settings as written", "at its own best settings"
    rates = {entry.shared.lr for entry in study.arms.values() if entry.shared}
    return ("at the shared rate" if len(rates) == 1 else "at the rates as written"), "at its own rate"


def _contrast_table(read: StudyRead) -> Table | None:
    """Every contrast as written beside the tuned one, which has the verdict; None before both can be had."""
    written = read.once(tunings).written
    if written is None:
        return None
    before = {(c.arm, c.against): c for c in written.contrasts}
    shared, own = names_of(read.study)
    titles = columns("Contrast", f"{shared[0].upper()}{shared[1:]}:number",
                     own.replace("at its own", "Each at its own") + ":number", "Holm p:number",
                     "Verdict:words")  # fmt: skip
    rows = []
    for c in read.verdicts.contrasts:
        other = before.get((c.arm, c.against))
        failed = f"{other.failed_arm} of {other.failed_arm + other.n_arm} failed" if other and other.failed_arm else ""
        first = difference_cell(other.difference, other.low, other.high) if other else Cell(DASH)
        if failed:
            first = Cell(first.text, "; ".join(filter(None, (str(first.detail), failed))))
        arm = read.arms.get(c.arm)
        cells = (
            Cell(c.arm, f"against {c.against}"), first, difference_cell(c.difference, c.low, c.high),
            Cell(p_cell(c.p_holm, c.alpha)), verdict_cell(c),
        )  # fmt: skip
        rows.append(Row(cells, arm.look if arm else None))
    return Table(titles, rows)


def _arm_table(read: StudyRead) -> Table | None:
    """Every arm's search: what it found, how surely, how much it matters, what it cost."""
    if not read.once(tunings).searches:
        return None
    titles = columns("Arm", "Best trial:number", "As written:number", "Optimum:number", "Flat:number",
                     "Sensitivity:number", "Edge:words", "Trials:number", "Tokens:number")  # fmt: skip
    rows = []
    for name, search in read.once(tunings).searches.items():
        entry, best = read.study.arms[name], search.best
        found = search.optima.get(RATE) or next(iter(search.optima.values()), None)
        lost = rate_sensitivity(search)
        ended = {outcome: count for outcome, count in search.counts.items() if outcome not in OPEN}
        written = entry.shared.settings if entry.shared else {}
        several = len(searched(read.study)) > 1
        cells = (
            Cell(name),
            Cell(_settings(best["settings"], alone=not several) if best else DASH,
                 f"{read.metric} {number(best['value'])}" if best else ""),
            Cell(_settings(written, alone=not several)),
            optimum_cell(found, search) if found else Cell(DASH),
            flat_cell(found, search, read.unit) if found else Cell(DASH),
            Cell(DASH if lost is None else number(lost, 3)),
            edge_cell(found) if found and best else Cell(),
            Cell(str(sum(ended.values())), ", ".join(f"{count} {outcome}" for outcome, count in ended.items())),
            Cell(quantity(_tokens(read.once(tunings), name)), _in_runs(read, name)),
        )  # fmt: skip
        rows.append(Row(cells, read.arms[name].look, name == read.baseline))
    return Table(titles, rows)


def _settings(settings: Mapping[str, object], *, alone: bool) -> str:
    if alone:
        return ", ".join(setting(value) for value in settings.values()) or DASH
    return settings_text(settings) or DASH


def _tokens(tunings: Tunings, arm: str) -> int | None:
    """Tokens that the trials of an arm were trained on, all together; None where that is not known."""
    search = tunings.searches.get(arm)
    return sum(int(trial.get("tokens") or 0) for trial in search.trials) if search else None


def _in_runs(read: StudyRead, arm: str) -> str:
    spent, one = _tokens(read.once(tunings), arm), read.study.arms[arm].tokens
    return f"{spent / one:.1f} runs" if spent and one else ""


def cost_points(read: StudyRead) -> list[str]:
    """What tuning cost beside the runs that are judged."""
    spent = {arm: tokens for arm in read.study.arms if (tokens := _tokens(read.once(tunings), arm))}
    if not spent:
        return []
    runs = {arm: len(entry.runs) * entry.tokens for arm, entry in read.study.arms.items()}
    listed = ", ".join(f"{quantity(tokens)} of {arm}" for arm, tokens in spent.items())
    return [
        f"Tuning took {quantity(sum(spent.values()))} tokens ({listed}), beside the {quantity(sum(runs.values()))} of "
        "the runs that the verdicts rest on."
    ]


def _points(read: StudyRead) -> list[str]:
    """Where the two ways disagree, why arms cannot be compared, and what is missing."""
    told = [line for c in read.verdicts.contrasts if (line := disagreement(read, c))]
    told += [f"{arm} is not comparable: {why}." for arm, why in refused(read).items()]
    missing = [run for run in read.once(tunings).runs if run.value is None]
    if missing:
        told.append(f"{plural(len(missing), 'run')} at the settings as written without a final value; see Runs.")
    if read.once(tunings).problem:
        told.append(f"{read.once(tunings).problem}.")
    return told


def progress(read: StudyRead) -> str:
    """How far searches are that are still open; "" without any."""
    entries = [one for entry in read.study.arms.values() if (one := entry.tuned)]
    if all(one.over for one in entries):
        return ""
    done, due = sum(one.trials for one in entries), len(entries) * int((read.study.tune or {})["trials"])
    return (
        f"The settings of the arms are still being searched: {done} of {due} "
        "trials had ended when the study's record was written; the same command goes on."
    )


def refused(read: StudyRead) -> dict[str, str]:
    """Arm -> why its search bars it from every comparison, with what to do about an edge."""
    found = {}
    for arm, entry in read.study.arms.items():
        if not entry.tuned or not entry.not_comparable:
            continue
        search = read.once(tunings).searches.get(arm)
        widen = {name: o.widen for name, o in search.optima.items() if o.edge and o.widen} if search else {}
        hint = "; ".join(f"{name} from {setting(low, 2)} to {setting(high, 2)} would close it"
                         for name, (low, high) in widen.items())  # fmt: skip
        found[arm] = entry.not_comparable + (f" ({hint})" if hint else "")
    return found


def before(read: StudyRead, contrast: Contrast) -> Contrast | None:
    """The same contrast on the runs at the settings as written."""
    written = read.once(tunings).written
    same = written.contrasts if written else ()
    return next((c for c in same if (c.arm, c.against) == (contrast.arm, contrast.against)), None)


def disagreement(read: StudyRead, contrast: Contrast) -> str:
    """A sentence where the word for a contrast depends on the tuning, or its size does by more than X and the noise of
    both; "" elsewhere."""
    other = before(read, contrast)
    if other is None:
        return ""
    moved, small = contrast.difference - other.difference, read.verdicts.smallest_effect
    noise = math.hypot(contrast.high - contrast.low, other.high - other.low) / 2
    apart = abs(moved) > noise  # not so where either is unknown
    if _kind(other) == _kind(contrast) and not (apart and abs(moved) > small):
        return ""
    shared, own = names_of(read.study)
    text = f"{shared[0].upper()}{shared[1:]} {contrast.arm} {_state(other, small)}; {own} it {_state(contrast, small)}"
    if not apart:
        return text + ("; the two lie within their noise." if math.isfinite(noise) else ".")
    size = f"by {_size(moved, noise)} {read.unit}"
    rate, arm = shared.removeprefix("at "), contrast.arm
    return text + (f": {rate} flattered {arm} {size}." if moved > 0 else f": {rate} held {arm} back {size}.")


def summary(read: StudyRead, contrast: Contrast) -> str:
    """Both differences in one line."""
    other = before(read, contrast)
    if other is None or not math.isfinite(contrast.difference):
        return ""
    shared, own = names_of(read.study)
    return (
        f"{contrast.arm} against {contrast.against}: {_difference(other)} {shared}, {_difference(contrast)} {own}"
        + (f" ({contrast.word})" if contrast.word else "")
    )


def _difference(c: Contrast) -> str:
    if not math.isfinite(c.difference):
        return f"{c.failed_arm} of {c.failed_arm + c.n_arm} failed" if c.failed_arm else DASH
    return signed(c.difference, decimals((c.high - c.low) / 2, c.difference))


def _size(value: float, noise: float) -> str:
    return f"{abs(value):.{decimals(noise, value)}f}"


def _kind(c: Contrast) -> str:
    word = c.survivors or c.word
    kinds = ("better", "worse", "likely better", "likely worse", "no difference", "inconclusive", "unstable")
    return next((kind for kind in kinds if word.startswith(kind)), word.partition(" ")[0])


def _state(c: Contrast, small: float) -> str:
    """What a contrast says, as the end of a sentence about its arm."""
    kind, size = _kind(c), _size(c.difference, (c.high - c.low) / 2) if math.isfinite(c.difference) else ""
    if c.word.startswith("unstable") and not c.survivors:
        return f"fails in {c.failed_arm} of {c.failed_arm + c.n_arm} runs" if c.failed_arm else "meets failed runs"
    if kind in ("better", "worse", "likely better", "likely worse"):
        return f"is {kind} by {size}"
    if kind == "no difference":
        return f"differs from {c.against} by less than {small:g}"
    if c.word.startswith("not comparable"):
        return "is not comparable"
    return f"cannot be told from {c.against}" + (f" ({_difference(c)})" if size else "")


def _drawn(read: StudyRead) -> list[style.Picture]:
    """Each arm's loss against the learning rate, or against the first number that was searched."""
    tunings_ = read.once(tunings)
    axes = [axis for name in dict.fromkeys([RATE, *searched(read.study)]) if (axis := tunings_.axis(name))]
    found = tunings_.searches
    if not axes or not any(point.finished for search in found.values() for point in search.points):
        return []
    title = f"Each arm's loss against {'its learning rate' if axes[0].name == RATE else axes[0].name}"
    return [style.picture("tuned", title, CAPTION, beside(axes[0], found, read.looks, read.metric))]


def method(study: Study) -> list[str]:
    """What was declared of the searches, in sentences."""
    tune = study.tune
    if not tune:
        return []
    space = ", ".join(f"{name} {_range(one)}" for name, one in tune["space"].items())
    pruner = tune["pruner"]["name"]
    told = (
        f"Tuning: every arm, the baseline included, had {plural(tune['trials'], 'trial')} over {space}; sampler "
        f"{tune['sampler']['name']} with seed {tune['sampler']['seed']} for all, "
        f"{'no pruning' if pruner == 'none' else f'pruner {pruner}'}; trained on "
        f"{'seed' if tune['seeds'] == 1 else 'seeds'} {_listed(tune['tuning_seeds'])}, by which nothing is judged. "
        f"Verdicts rest on seeds {_listed(study.seeds)} at each arm's best trial."
    )
    centres = [f"{arm} around {multiple:g} times its {key}" for arm, own in (tune.get("centre") or {}).items()
               for key, multiple in own.items()]  # fmt: skip
    return [told, *([f"Searched elsewhere, as declared beforehand: {', '.join(centres)}."] if centres else [])]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _range(one: Mapping[str, object]) -> str:
    choices = one.get("choices")
    if isinstance(choices, (list, tuple)):
        return "of " + ", ".join(map(str, choices))
    scale = " on a log scale" if one.get("log") else ""
    times = " times the arm's own" if one.get("relative") else ""
    return f"from {setting(one['low'])} to {setting(one['high'])}{times}{scale}"


def rate_sensitivity(search: Search) -> float | None:
    """What is lost on average over the rates of its space against the best of them (Wortsman et al. 2023); None where
    something else was searched as well, and where no first loss is known."""
    axis = search.axes.get(RATE)
    if axis is None or len(search.axes) > 1:
        return None
    start = next((p.curve[1][0] for p in search.points if p.curve[0] and not p.curve[0][0]), None)
    if start is None:
        return None
    tried = [
        (float(p.settings[RATE]), p.value if p.finished else float("inf"))
        for p in search.points
        if p.finished or p.outcome == DIVERGED
    ]
    return sensitivity(tried, axis.low, axis.high, start)
