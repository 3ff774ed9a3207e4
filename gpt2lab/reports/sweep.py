"""The page of a sweep: its answer, the numbers and the winning config beside it, and what a terminal shows. From the
run store alone: no torch, no Optuna, no tracker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.analysis.studies import scope_text
from gpt2lab.analysis.wording import listed
from gpt2lab.basics.text import number, plural, setting
from gpt2lab.records import page_folder
from gpt2lab.reports.page import Page, Remark, csv_text, made_of, page_place, sum_of, terminal_table, write_page
from gpt2lab.reports.read import (
    DIVERGED,
    FAILED,
    FINISHED,
    OUTCOMES,
    SearchRead,
    SweepRead,
)
from gpt2lab.reports.sections.searches import settings_text
from gpt2lab.reports.sections.trials import best_configs, best_files

TOP = 5
"""Trials that a terminal shows."""


def write_sweep_report(read: SweepRead, out: str | Path = "reports", *, images: bool = False) -> Path:
    """Write `out`/<sweep>/ with index.html, report.md, figures/, trials.csv, sweep.json and, once a trial has finished,
    best.yaml (best-<search>.yaml for each of several searches); returns index.html.

    Raises EnvironmentFault when the folder cannot be written (the old report stays).
    """
    page, folder, configs = build(read), page_folder(out, read.name), best_configs(read)
    numbers = {"trials.csv": _csv(read), "sweep.json": _json(read, page), **configs}
    declaration = read.store.declaration(read.name, "sweep")
    index = write_page(folder, page, numbers, declaration, sum_of(read), images=images)
    for stale in set(folder.glob("best*.yaml")) - {folder / file for file in configs}:
        stale.unlink()
    return index


def build(read: SweepRead) -> Page:
    """The page of a sweep from what was read of it."""
    record = read.record
    return Page(
        about=read.name,
        heading=record.question,
        title=f"{record.question} – {read.name}",
        warnings=[*([Remark("Caveat:", record.caveat)] if record.caveat else []), *warnings(read)],
        answer=answer(read),
        basis=[_basis(read), *([winners_caution(read)] if read.counts[FINISHED] else [])],
        sections=made_of(read, "sweep"),
        files=("report.md", "trials.csv", "sweep.json", *best_configs(read), "figures/"),
    )


def answer(read: SweepRead) -> list[str]:
    """What was found, in a paragraph per search."""
    if not read.counts[FINISHED]:
        return [nothing_finished(read)]
    if read.single:
        return [_best(read, read.single)]
    sentences = [f"{label}: {_best(read, search)}" for label, search in read.searches.items()]
    return [*sentences, _between(read)] if len(read.searches) > 1 else sentences


def _best(read: SweepRead, search: SearchRead) -> str:
    best = search.best
    if best is None:
        return f"nothing finished ({counted(search.counts)})."
    if search.alone:
        return str(search.optima[search.alone])
    sentences = [
        f"The best of {plural(search.counts[FINISHED], 'finished trial')} reached {read.metric} "
        f"{number(best.value)} with {settings_text(best.settings)}."
    ]
    edges = {name: optimum for name, optimum in search.optima.items() if optimum.edge}
    for name, optimum in edges.items():
        low, high = (setting(end, 2) for end in optimum.widen or (0, 0))
        wider = f": widen it to {low} to {high}" if optimum.widen else ""
        sentences.append(f"{name} is best at the {optimum.edge} edge of the space{wider}.")
    if search.optima and not edges:
        sentences.append(f"No best value lies at an edge of the space ({listed(search.optima)}).")
    shares = {name: share for name, share in search.importance.items() if share is not None}
    if len(shares) > 1:
        first = max(shares, key=lambda name: shares[name])
        sentences.append(f"{first} explains most of the variation between trials ({100 * shares[first]:.0f} %).")
    return " ".join(sentences)


def _between(read: SweepRead) -> str:
    """The searches beside each other, at their best."""
    bests = {label: search.best for label, search in read.searches.items()}
    known = {label: best.value for label, best in bests.items() if best}
    if len(known) < 2:
        return "Fewer than two searches have a finished trial, so they cannot be compared."
    shown = ", ".join(f"{label} {number(value)}" for label, value in known.items())
    return (
        f"Best values: {shown}. Each is the best of its own trials on the same seed as all others: enough to choose a "
        "setting, not to call one search better than another."
    )


def nothing_finished(read: SweepRead) -> str:
    """That there is no answer, why, and what to try."""
    sentences = [f"No trial finished, so nothing is known of the best setting: {counted(read.counts)}."]
    for search in read.searches.values():
        sentences += _too_high(search)
    if read.counts[FAILED] and not read.counts[DIVERGED]:
        sentences.append("The reasons are in the list of trials.")
    return " ".join(sentences)


def _too_high(search: SearchRead) -> Iterator[str]:
    """The lowest values that diverged, and a space below them."""
    for name, axis in search.axes.items():
        diverged = [axis.place(trial) for trial in search.trials if trial.outcome == DIVERGED]
        lowest = min((x for x in diverged if math.isfinite(x)), default=None)
        if axis.choices or not axis.log or lowest is None:
            continue
        of = f" ({search.label})" if len(search.axes) > 1 and search.label != name else ""
        space = f"{{low: {setting(lowest / 100, 2)}, high: {setting(lowest, 2)}, log: true}}"
        yield (
            f"Even the lowest {name} that was tried{of}, {setting(lowest, 3)}, diverged: lower its low end, for "
            f"example {name}: {space}."
        )


def counted(counts: Mapping[str, int]) -> str:
    """`11 finished, 9 pruned, 4 diverged`"""
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts.get(outcome)) or "none was begun"


def warnings(read: SweepRead) -> list[Remark]:
    """What the reader must know first."""
    record, remarks = read.record, []
    if not read.counts[FINISHED]:
        remarks.append(Remark("No answer.", f"None of {_trials(read)} has a final value."))
    if record.stopped:
        remarks.append(Remark("It ended before all trials were done.", f"{record.stopped}."))
    if read.open:
        text = f"{read.open} of {_trials(read)} are open; the same command continues them."
        remarks.append(Remark("This sweep is incomplete.", text))
    if read.counts[FAILED]:
        text = (
            "They raised an error or were lost twice, which says nothing about their settings; see the reasons below."
        )
        remarks.append(Remark(f"{plural(read.counts[FAILED], 'trial')} failed.", text))
    return remarks


def _trials(read: SweepRead) -> str:
    return plural(read.slots, "trial")


def _basis(read: SweepRead) -> str:
    searches = "" if read.single else f" in {len(read.searches)} searches"
    seeds = plural(read.seeds, "seed")
    return f"{_trials(read)}{searches}, {seeds} each: {counted(read.counts)}. Holds {scope_text(read.record)}."


def winners_caution(read: SweepRead) -> str:
    """That the best of many is no estimate, and how many are as good within the noise."""
    counts, seeds = sorted({search.counts[FINISHED] for search in read.searches.values()}), read.seeds
    if counts[-1] < 2:
        return "Only one trial finished, so there was nothing to choose from yet."
    finished = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    sentences = [
        f"The best of {finished} finished trials on {plural(seeds, 'seed')} is partly luck: its "
        f"{read.metric} is a biased estimate of what its settings reach. Check with fresh "
        f"seeds: gpt2lab train {next(iter(best_files(read)))} --seed 0."
    ]
    noise = read.record.noise
    if noise and noise.sd and read.metric == LOSS:
        reach = 2 * math.sqrt(2 / seeds) * noise.sd
        near = sum(within(search, reach) for search in read.searches.values())
        of = "the best" if read.single else "the best of their search"
        sentences.append(
            f"{plural(near, 'other trial')} lie{'s' if near == 1 else ''} within noise of {of} (two standard errors of "
            f"a difference, {number(reach, 3)} {read.unit}, by the noise floor of this scale)."
        )
    return " ".join(sentences)


def within(search: SearchRead, reach: float) -> int:
    """Finished trials, besides the best, that are no further than `reach` from it."""
    best, *others = search.ranked
    return sum(abs(trial.result - best.result) <= reach for trial in others)


def _csv(read: SweepRead) -> str:
    """One line per trial of every search, with a column for each setting."""
    names = list(dict.fromkeys(name for search in read.searches.values() for name in search.axes))
    first = ("slot", "number", "outcome", "value")
    rest = ("stopped_at", "tokens", "retries", "enqueued", "found", "reason")
    rows = [
        [search.label, *map(trial.plain().get, first), *map(trial.settings.get, names), *map(trial.plain().get, rest),
         " ".join(trial.runs.values())]
        for search, trial in read.trials
    ]  # fmt: skip
    return csv_text([["search", *first, *names, *rest, "runs"], *rows])


def _json(read: SweepRead, page: Page) -> str:
    """What the page concludes, and the record that it rests on."""
    whole = ("vertex", "interval", "flat", "effect", "edge", "widen", "reason")
    searches = {}
    for label, search in read.searches.items():
        best, keys = search.best, whole if search.alone else ("edge",)
        searches[label] = {
            "best": {"slot": best.index, "value": best.value, "settings": best.settings} if best else None,
            "outcomes": dict(search.counts),
            "optima": {name: {key: getattr(o, key) for key in keys} for name, o in search.optima.items()},
        }
    return page.json(
        {"answer": page.answer, "caveat": read.record.caveat, "searches": searches, "record": read.record.plain()}
    )


def terminal_sweep(read: SweepRead, out: str | Path = "reports", *, kept: bool = False) -> Group:
    """What a terminal shows at the end of a sweep: the answer, the best five of every search, where the page lies.
    kept: the page lay there already."""
    shown: list[RenderableType] = [Text(f"{remark.head} {remark.text}", style="yellow") for remark in warnings(read)]
    shown += [Text(sentence, style="bold") for sentence in answer(read)]
    for label, search in read.searches.items():
        titles = dict.fromkeys(("trial", read.metric, *search.axes), "right")
        rows = [
            [str(t.index), number(t.result), *(setting(t.settings.get(name, "")) for name in search.axes)]
            for t in search.ranked[:TOP]
        ]
        if rows:
            shown.append(terminal_table(titles, rows, "" if read.single else label))
    folder = page_folder(out, read.name)
    files = [folder / file for file in best_files(read) if (folder / file).exists()]
    return Group(*shown, page_place(folder, kept=kept), *(Text(f"winning config: {file}") for file in files))
