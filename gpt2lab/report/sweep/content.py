"""What the page of a sweep says, before it is HTML or Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpt2lab.analysis.wording import listed
from gpt2lab.report.content import Page, Remark
from gpt2lab.report.pictures import Picture
from gpt2lab.report.sweep import method, tables
from gpt2lab.report.sweep.axes import DIVERGED, FAILED, FINISHED
from gpt2lab.report.sweep.best import best_files, best_yaml
from gpt2lab.report.sweep.read import OUTCOMES, ReadSweep, Search
from gpt2lab.report.sweep.sections import sections
from gpt2lab.results import LOSS, scope_text
from gpt2lab.text import number, plural, setting

FILES = ("report.md", "trials.csv", "sweep.json", "figures/")


def build(read: ReadSweep, figures: Sequence[Picture]) -> Page:
    """The page of a sweep from what was read of it."""
    record = read.record
    finished = read.counts[FINISHED] > 0
    configs = [file for file, search in best_files(read).items() if best_yaml(read, search)]
    return Page(
        name=record["name"],
        question=record["question"],
        warnings=warnings(read),
        answer=answer(read),
        basis=[_basis(read), *([winners_caution(read)] if finished else [])],
        caveat=record.get("caveat"),
        heading="Best settings",
        verdicts=tables.best_table(read),
        verdicts_note=_table_note(read),
        figures=[figure for figure in figures if not figure.section],
        sections=sections(read, figures),
        command=record["reproduce"],
        facts=method.facts(read),
        files=(*FILES[:3], *configs, *FILES[3:]),
    )


def answer(read: ReadSweep) -> list[str]:
    """What was found, in a paragraph per search."""
    if not read.counts[FINISHED]:
        return [nothing_finished(read)]
    if read.single:
        return [_found(read, read.single), *(str(one.transfer) for one in read.across.values())]
    told = [f"{label}: {_found(read, search)}" for label, search in read.searches.items()]
    return [*told, _between(read)] if len(read.searches) > 1 else told


def _found(read: ReadSweep, search: Search) -> str:
    best = search.best
    if best is None:
        return f"nothing finished ({counted(search.counts)})."
    if search.alone:
        return str(search.optima[search.alone])
    told = [
        f"The best of {plural(search.counts[FINISHED], 'finished trial')} reached {read.record['metric']} "
        f"{number(best['value'])} with {tables.settings_text(best['settings'])}."
    ]
    edges = [(name, found) for name, found in search.optima.items() if found.edge]
    for name, found in edges:
        wider = f": widen it to {setting(found.widen[0], 2)} to {setting(found.widen[1], 2)}" if found.widen else ""
        told.append(f"{name} is best at the {found.edge} edge of what was searched{wider}.")
    if search.optima and not edges:
        told.append(f"No best value lies at an edge of what was searched ({listed(search.optima)}).")
    shares = {k: v for k, v in ((search.record.get("importance") or {}).get("values") or {}).items() if v is not None}
    if len(shares) > 1:
        first = max(shares, key=lambda name: shares[name])
        told.append(f"{first} explains most of the variation between trials ({100 * shares[first]:.0f} %).")
    return " ".join(told)


def _between(read: ReadSweep) -> str:
    """The searches beside each other, at their best."""
    bests = {label: search.best for label, search in read.searches.items()}
    known = {label: best["value"] for label, best in bests.items() if best}
    if len(known) < 2:
        return "Fewer than two searches have a finished trial, so they cannot be set beside each other."
    shown = ", ".join(f"{label} {number(value)}" for label, value in known.items())
    return (
        f"Best values: {shown}. Each is the best of its own trials on the same seed as all others: enough to choose a "
        "setting, not to call one search better than another."
    )


def nothing_finished(read: ReadSweep) -> str:
    """That there is no answer, why, and what to try."""
    told = [f"No trial finished, so nothing is known of the best setting: {counted(read.counts)}."]
    for search in read.searches.values():
        told += _too_high(search)
    if read.counts[FAILED] and not read.counts[DIVERGED]:
        told.append("The reasons stand in the table of failures.")
    return " ".join(told)


def _too_high(search: Search) -> list[str]:
    """The lowest values that diverged, and a space below them."""
    told = []
    for name, axis in search.axes.items():
        diverged = [axis.number(p.settings.get(name)) for p in search.points if p.outcome == DIVERGED]
        known = sorted(x for x in diverged if math.isfinite(x))
        if axis.choices or not axis.log or not known:
            continue
        low, high = setting(known[0] / 100, 2), setting(known[0], 2)
        of = "" if search.label == name else f" ({search.label})"
        lowest = f"Even the lowest {name} that was tried{of if len(search.axes) > 1 else ''}, {setting(known[0], 3)}, "
        told.append(
            f"{lowest}diverged: lower its low end, for example {name}: {{low: {low}, high: {high}, log: true}}."
        )
    return told


def counted(counts: Mapping[str, int]) -> str:
    """`11 finished, 9 pruned, 4 diverged`"""
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts.get(outcome)) or "none was begun"


def warnings(read: ReadSweep) -> list[Remark]:
    """What the reader must know first."""
    record, found = read.record, []
    if not read.counts[FINISHED]:
        found.append(Remark("No answer.", f"None of {_trials(read)} has a final value."))
    if record.get("stopped"):
        found.append(Remark("It ended before all trials were done.", f"{record['stopped']}."))
    if read.open:
        text = f"{read.open} of {_trials(read)} are open; the same command goes on with them."
        found.append(Remark("This sweep is incomplete.", text))
    if read.counts[FAILED]:
        text = "They raised an error or were lost twice, which says nothing of their settings; see the reasons below."
        found.append(Remark(f"{plural(read.counts[FAILED], 'trial')} failed.", text))
    return found


def _seeds(read: ReadSweep) -> int:
    return max((len(search.seeds) for search in read.searches.values()), default=1)


def _trials(read: ReadSweep) -> str:
    return plural(read.slots, "trial")


def _basis(read: ReadSweep) -> str:
    searches = "" if read.single else f" in {len(read.searches)} searches"
    seeds = plural(_seeds(read), "seed")
    return f"{_trials(read)}{searches}, {seeds} each: {counted(read.counts)}. Holds {scope_text(read.record)}."


def winners_caution(read: ReadSweep) -> str:
    """That the best of many is no estimate, and how many cannot be told from it."""
    counts, seeds = sorted({search.counts[FINISHED] for search in read.searches.values()}), _seeds(read)
    if counts[-1] < 2:
        return "Only one trial finished, so nothing was chosen yet."
    finished = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    told = [
        f"The best of {finished} finished trials on {plural(seeds, 'seed')} is lucky as well as good: its "
        f"{read.record['metric']} is no estimate of what its settings reach. Fresh seeds "
        f"tell: gpt2lab train {next(iter(best_files(read)))} --seed 0."
    ]
    noise = (read.record.get("noise") or {}).get("sd") if read.record["metric"] == LOSS else None
    if noise:
        reach = 2 * math.sqrt(2 / seeds) * noise
        near = sum(within(search, reach) for search in read.searches.values())
        of = "the best" if read.single else "the best of their search"
        told.append(
            f"{plural(near, 'other trial')} lie{'s' if near == 1 else ''} within noise of {of} (two standard errors of "
            f"a difference, {number(reach, 3)} {read.unit}, by the noise floor of this scale)."
        )
    return " ".join(told)


def within(search: Search, reach: float) -> int:
    """Finished trials, besides the best, that are no further than `reach` from it."""
    best = search.best
    if best is None:
        return 0
    near = [p for p in search.points if p.finished and abs(p.value - best["value"]) <= reach]
    return len(near) - 1


def _table_note(read: ReadSweep) -> str:
    alone = any(search.alone for search in read.searches.values())
    if not read.counts[FINISHED]:
        return "No trial has a final value, so there is no best one."
    told = ["Best trial: the settings of the best finished trial."]
    if alone:
        told.append(
            "Optimum: where the curve that was fitted to the trials is best, with its 95 % interval. Flat: as far as "
            "one may go before losing what was declared to matter."
        )
    if not all(search.alone for search in read.searches.values()):
        told.append("Where several settings vary at once no curve is fitted to one of them alone.")
    return " ".join([*told, "Edge: a best value at the edge of the space may lie beyond it."])
