"""From what was read of a study to its drawn figures, each with a title and a caption that says what is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from gpt2lab.analysis import Verdicts
from gpt2lab.errors import DataFault
from gpt2lab.report import figures, svg
from gpt2lab.report.marks import Curve, Look, looks
from gpt2lab.report.tables import Summary, difference_cell, summaries, verdict_cell
from gpt2lab.results import LOSS, Study, StudyRun, contexts_of, curve_of, failure_ceiling, unit
from gpt2lab.store import Store
from gpt2lab.text import clean, plural


@dataclass(frozen=True)
class Picture:
    """One drawn figure: `alone` is a file of its own, `inline` goes into the page and takes its colours from there."""

    name: str
    title: str
    caption: str
    width: str
    alone: str
    inline: str


def draw(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts, store: Store) -> list[Picture]:
    """Every figure that the study has data for; equal data gives equal text."""
    look = looks(list(study["arms"]), study["baseline"])
    arms = summaries(study, runs, verdicts)
    with svg.drawing():
        drawn = [
            _forest(study, verdicts, look),
            _training(study, runs, store, look),
            _seeds(study, runs, look),
            _cost(study, arms, look),
            _contexts(study, runs, look),
        ]
        return [_picture(*parts) for parts in drawn if parts]


Parts = tuple[str, str, str, str, Figure]
"""name, title, caption, width, figure"""


def _picture(name: str, title: str, caption: str, width: str, figure: Figure) -> Picture:
    alone, inline = svg.render(figure, name, title, caption)
    return Picture(name, title, caption, width, alone, inline)


def _forest(study: Study, verdicts: Verdicts, look: Mapping[str, Look]) -> Parts | None:
    if not verdicts.contrasts:
        return None
    effects = []
    for c in verdicts.contrasts:
        label = c.arm if c.against == study["baseline"] else f"{c.arm} − {c.against}"
        words = "   ".join((difference_cell(c.difference, c.low, c.high).text, verdict_cell(c).text))
        effects.append(figures.Effect(label, c.arm, c.difference, c.low, c.high, words))
    caption = (
        f"Bars: {100 * (1 - study['alpha']):g} % intervals adjusted for the family of "
        f"{plural(len(effects), 'contrast')}; a hollow mark has no interval, an arrow an end outside the frame. "
        f"Shaded: differences below {study['smallest_effect']:g} {unit(study)}, declared too small to matter."
    )
    figure = figures.forest(effects, look, study["smallest_effect"], study["baseline"])
    return "differences", "Difference to the baseline", caption, "wide", figure


def _training(study: Study, runs: Sequence[StudyRun], store: Store, look: Mapping[str, Look]) -> Parts | None:
    drawn: dict[str, tuple[list[Curve], list[Curve]]] = {arm: ([], []) for arm in look}
    without = []
    for run in runs:
        try:
            curve = curve_of(store, run, LOSS)
        except DataFault as fault:  # one damaged file must not cost the others their curves
            curve = ([], [])
            without.append(f"{run.arm} seed {run.seed} (damaged: {fault})")
        else:
            if run.value is not None and not curve[0]:
                without.append(f"{run.arm} seed {run.seed} (no evaluations recorded)")
        drawn[run.arm][run.status not in ("finished", "unevaluated")].append(curve)
    curves = [figures.Curves(arm, healthy, failed) for arm, (healthy, failed) in drawn.items()]
    caption = (
        "Mean over seeds; the band runs from the lowest seed to the highest. Dashed with a cross: a run that diverged "
        "or has not finished, up to its last finite loss. Grey lines: what counting tokens (unigram) and pairs of "
        "tokens (bigram) reach. These evaluations during training are not what the verdicts rest on."
    )
    if without:
        caption += f" Without a curve: {clean('; '.join(without))}."
    figure = figures.training(curves, look, study.get("floors") or {}, LOSS)
    return "training", "Validation loss during training", caption, "wide", figure


def _contexts(study: Study, runs: Sequence[StudyRun], look: Mapping[str, Look]) -> Parts | None:
    ceiling = failure_ceiling(study)
    frame = contexts_of(study, [run for run in runs if run.value is not None and run.value < ceiling])
    if frame["multiple"].nunique() < 2:
        return None
    losses: dict[str, dict[float, list[float]]] = {arm: {} for arm in look}
    for arm, length, loss in zip(frame["arm"], frame["length"], frame["loss"], strict=True):
        if math.isfinite(loss):
            losses[arm].setdefault(float(length), []).append(float(loss))
    present = {arm: by_length for arm, by_length in losses.items() if by_length}
    caption = (
        "The same target tokens are scored at every length. Lines: mean over seeds; dots: seeds. An arm whose "
        "positions cannot be extended ends at the training length. Failed runs are left out."
    )
    figure = figures.contexts(present, look, study["evaluation"]["block_size"], study["metric"])
    return "contexts", "Loss against context length", caption, "wide", figure


def _seeds(study: Study, runs: Sequence[StudyRun], look: Mapping[str, Look]) -> Parts | None:
    finals = {arm: [r.value for r in runs if r.arm == arm and r.value is not None] for arm in look}
    if not any(math.isfinite(value) for values in finals.values() for value in values):
        return None
    figure = figures.seeds(finals, look, failure_ceiling(study), study["metric"])
    return "seeds", "Every seed", "Final loss of each run; its height within the row means nothing.", "half", figure


def _cost(study: Study, arms: Mapping[str, Summary], look: Mapping[str, Look]) -> Parts | None:
    speeds = {name: arm.tokens_per_second for name, arm in arms.items()}
    axis, costs = "training speed, tokens per second", speeds
    if not any(speeds.values()):
        axis = "FLOPs per token"
        costs = {name: study["arms"][name].get("flops_per_token") for name in arms}
    points = {
        name: (float(cost), arm.mean)
        for name, arm in arms.items()
        if (cost := costs[name]) is not None and arm.mean is not None
    }
    if not points:
        return None
    figure = figures.cost(points, look, axis, study["metric"])
    return (
        "cost",
        "Loss and cost",
        "Mean final loss against the median over runs. Names at the height of their marks.",
        "half",
        figure,
    )
