"""From what was read of a study to its drawn figures, each with a title and a caption that says what is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from gpt2lab.analysis import Verdicts
from gpt2lab.evidence import Evidence
from gpt2lab.report import figures, health_figures, origin_figures, svg, tuned
from gpt2lab.report.health_figures import Parts
from gpt2lab.report.marks import Curve, Look, looks
from gpt2lab.report.read import Read
from gpt2lab.report.tables import Summary, confidence, difference_cell, is_pair, verdict_cell
from gpt2lab.results import LOSS, Study, StudyRun, contexts_of, failure_ceiling, unit
from gpt2lab.text import clean, number, plural, shorten

HEALTH, ORIGINS, TUNED = "health", "origins", "tuned"


@dataclass(frozen=True)
class Picture:
    """One drawn figure: `alone` is a file of its own, `inline` goes into the page and takes its colours from there.
    `section`: the part of the page that it belongs to, if not to the figures behind the verdicts."""

    name: str
    title: str
    caption: str
    width: str
    alone: str
    inline: str
    png: bytes
    section: str = ""


def draw(read: Read) -> list[Picture]:
    """Every figure that the study has data for; equal data gives equal text."""
    study, runs = read.study, read.runs
    look = looks(list(study["arms"]), study["baseline"])
    with svg.drawing():
        drawn = [
            _forest(study, read.verdicts, look),
            _training(study, runs, read.evidence, look),
            _seeds(study, runs, look),
            _cost(study, read.arms, look),
            _budgets(study, read.evidence, look),
            _contexts(study, runs, look),
        ]
        pictures = [picture(*parts) for parts in drawn if parts]
        behind = {
            TUNED: tuned.draw(read, look),
            ORIGINS: origin_figures.draw(read.origins, look, study["baseline"]),
            HEALTH: health_figures.draw(read.health, look),
        }
        return pictures + [replace(picture(*parts), section=part) for part in behind for parts in behind[part]]


def picture(name: str, title: str, caption: str, width: str, figure: Figure) -> Picture:
    alone, inline = svg.render(figure, name, title, caption)
    return Picture(name, title, caption, width, alone, inline, svg.png(figure))


def _forest(study: Study, verdicts: Verdicts, look: Mapping[str, Look]) -> Parts | None:
    if not verdicts.contrasts:
        return None
    effects = []
    for c in verdicts.contrasts:
        label = c.arm if c.against == study["baseline"] or not is_pair(c) else f"{c.arm} − {c.against}"
        words = "   ".join((difference_cell(c.difference, c.low, c.high).text, verdict_cell(c).text))
        effects.append(figures.Effect(label, c.arm, c.difference, c.low, c.high, words))
    caption = (
        f"Bars: {confidence(verdicts)} intervals adjusted for the family of "
        f"{plural(verdicts.members, 'contrast')}; a hollow mark has no interval, an arrow an end outside the frame. "
        f"Shaded: differences below {verdicts.smallest_effect:g} {unit(study)}, declared too small to matter."
    )
    noise = (study.get("noise") or {}).get("sd") if study["metric"] == LOSS else None
    if noise:
        caption += f" Dotted: one sd of the noise floor, {number(noise, 3)}, to either side."
    effects_of_factors = bool(study.get("factors"))
    to = "" if effects_of_factors else f" to {shorten(study['baseline'])}"
    figure = figures.forest(effects, look, verdicts.smallest_effect, to, noise)
    title = "Effects of the factors" if effects_of_factors else "Difference to the baseline"
    return "differences", title, caption, "wide", figure


def _training(study: Study, runs: Sequence[StudyRun], evidence: Evidence, look: Mapping[str, Look]) -> Parts | None:
    drawn: dict[str, tuple[list[Curve], list[Curve]]] = {arm: ([], []) for arm in look}
    without = []
    for run in runs:
        curve = evidence.curves.get(run.id, ([], []))
        if run.id in evidence.damaged:
            without.append(f"{run.arm} seed {run.seed} (damaged: {evidence.damaged[run.id]})")
        elif run.value is not None and not curve[0]:
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


def _budgets(study: Study, evidence: Evidence, look: Mapping[str, Look]) -> Parts | None:
    if not evidence.budgets:
        return None
    caption = (
        "Every dot is a run that finished a schedule of its own; lines join the means. Where an arm meets the "
        "baseline's curve, to the left or right of its own dots, is what its difference is worth."
    )
    figure = figures.budgets(evidence.budgets, look, study["metric"])
    return "budgets", "Final loss against training tokens", caption, "wide", figure


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
