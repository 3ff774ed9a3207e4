"""From what was read of a sweep to its drawn figures, each with a title and a caption that says what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gpt2lab.report import svg
from gpt2lab.report.health_figures import Parts
from gpt2lab.report.marks import looks
from gpt2lab.report.pictures import Picture, picture
from gpt2lab.report.sweep import curves, figures, scales
from gpt2lab.report.sweep.axes import Axis
from gpt2lab.report.sweep.read import RATE, ReadSweep, Search
from gpt2lab.results import LOSS
from gpt2lab.text import number

SEARCHES, SIZES, COORDINATES = "searches", "sizes", "coordinates"
"""Parts of the page whose figures do not stand among the first ones."""

MARKS = (
    "Filled: finished; hollow: pruned, at its last value; along the upper edge a cross diverged, a plus failed, and a "
    "triangle lies above the frame."
)


def draw(read: ReadSweep) -> list[Picture]:
    """Every figure that the sweep has data for; equal data gives equal text."""
    with svg.drawing():
        if read.single:
            found = [(part, "") for part in _of_one(read, read.single)]
        else:
            found = [(part, "") for part in _beside_each_other(read)]
            found += [
                (part, SEARCHES) for place, s in enumerate(read.searches.values()) for part in _of_one(read, s, place)
            ]
        found += [(part, SIZES) for part in _sizes(read)] + [(part, COORDINATES) for part in _coordinates(read)]
        return [replace(picture(*part), section=section) for part, section in found]


def _of_one(read: ReadSweep, search: Search, place: int | None = None) -> Iterator[Parts]:
    """The figures of one search; `place`: its number among several."""
    before = "" if place is None else f"search-{place}-"
    of = "" if place is None else f" ({search.label})"
    metric, close, maximize = read.record["metric"], read.record.get("smallest_effect") or 0.05, search.maximize
    alone = len(search.axes) == 1
    for i, axis in enumerate(search.axes.values()):
        figure = figures.against(
            axis, search.points, search.fitted(axis.name), metric, close, alone=alone, maximize=maximize
        )
        caption = f"One mark per trial. {MARKS}" + (_fit_caption(read, search, axis) if alone else _others_vary(i))
        yield f"{before}against-{i}", f"Loss against {axis.name}{of}", caption, "wide" if alone else "half", figure
    if len(search.axes) > 1:
        yield (
            f"{before}parallel", f"Settings of every trial{of}",
            "One line per trial through its settings to its value: the darker, the better; the best in bold, pruned "
            "ones in grey, diverged ones dotted.",
            "wide", curves.parallel(list(search.axes.values()), search.points, metric, maximize=maximize),
        )  # fmt: skip
    if any(point.curve[0] for point in search.points):
        yield (f"{before}curves", f"Training curves by {_rate(search).name}{of}", _CURVES, "wide",
               curves.curves(_rate(search), search.points, _floors(read), metric, maximize=maximize))  # fmt: skip
    yield (f"{before}history", f"The best so far{of}", f"Line: the best finished trial so far. {MARKS}",
           "wide" if alone else "half",
           figures.history(search.points, metric, alone=alone, maximize=maximize))  # fmt: skip
    weighed = search.record.get("importance")
    if weighed and len(search.axes) > 1:
        shares = {name: float(share) for name, share in weighed["values"].items() if share is not None}
        caption = (
            f"How much of the variation between finished trials each setting explains ({weighed['method']}). It "
            "describes this space: a wider range makes a setting more important."
        )
        yield f"{before}importance", f"What mattered{of}", caption, "half", figures.importance(shares)


_CURVES = (
    "One line per trial, the best in bold; hollow ends were pruned, dashed ones with a cross diverged. Grey lines: "
    "what counting tokens (unigram) and pairs of tokens (bigram) reach. Values of trials rest on the final evaluation, "
    "which scores other tokens than these."
)


def _fit_caption(read: ReadSweep, search: Search, axis: Axis) -> str:
    found = search.optima.get(axis.name)
    if found is None or found.curve is None:
        return f" No curve was fitted: {found.reason}." if found and found.reason else ""
    flat = f" Grey: less than {number(found.effect, 3)} {read.unit} is lost." if found.flat and found.effect else ""
    band = " Blue band: the 95 % interval of the best setting." if found.interval else ""
    return f" Line: two half parabolas that meet at the optimum (dashed), fitted to the trials near it.{band}{flat}"


def _others_vary(i: int) -> str:
    return " The other settings differ between the marks." if i == 0 else ""


def _floors(read: ReadSweep) -> Mapping[str, float]:
    floors: Mapping[str, float] = (read.record.get("floors") or {}) if read.record["metric"] == LOSS else {}
    return floors


def _rate(search: Search) -> Axis:
    """What curves are coloured by: the learning rate, else the first number, else the first setting."""
    numeric = [axis for axis in search.axes.values() if not axis.choices]
    return search.axes.get(RATE) or next(iter(numeric), None) or next(iter(search.axes.values()))


def _beside_each_other(read: ReadSweep) -> Iterator[Parts]:
    """Several searches in one figure for every number that all of them search."""
    searches = list(read.searches.values())
    look = looks([s.label for s in searches], searches[0].label)
    shared = [a for a in searches[0].axes.values() if not a.choices and all(a.name in s.axes for s in searches)]
    for i, axis in enumerate(shared):
        ranges = [search.axes[axis.name] for search in searches]
        whole = replace(axis, low=min(one.low for one in ranges), high=max(one.high for one in ranges))
        found = {search.label: (search.points, search.fitted(axis.name)) for search in searches}
        caption = (
            "One mark per finished trial; lines: the fitted curves; bands: the 95 % intervals of the best settings; "
            "crosses along the upper edge diverged. Pruned trials are left out."
        )
        figure = figures.searches(whole, found, look, read.record["metric"], maximize=searches[0].maximize)
        yield f"beside-{i}", f"Loss against {axis.name}, search by search", caption, "wide", figure


def _sizes(read: ReadSweep) -> Iterator[Parts]:
    if not read.across:
        return
    labels = list(read.across)
    name = next(iter(read.across.values())).name
    caption = (
        "The best value at each size with its 95 % interval. Line: the power law that was fitted; hollow: what it "
        "predicts for the next size, with its interval."
    )
    trends = {label: one.trend() for label, one in read.across.items()}
    figure = scales.across(trends, looks(labels, labels[0]), name)
    yield "across", f"The best {name} against the size of the model", caption, "wide", figure


def _coordinates(read: ReadSweep) -> Iterator[Parts]:
    found = read.record.get("coordinates")
    if found:
        changes = all("change" in one for one in found.values())
        key = "change" if changes else "rms"
        variants = {label: (one["widths"], one["steps"], one[key]) for label, one in found.items()}
        caption = (
            "How far each part has moved from where it started, in models of growing width after the same few steps. "
            "Flat lines: every part moves as far at every width, so that one rate may serve all of them (Yang et al. "
            "2022, arXiv:2203.03466)."
        )
        figure = scales.coordinates(variants, "rms of the change" if changes else "rms of activations")
        yield "coordinates", "Change of activations against width", caption, "wide", figure


def of_section(pictures: Sequence[Picture], section: str) -> list[Picture]:
    """The figures of one part of the page."""
    return [one for one in pictures if one.section == section]
