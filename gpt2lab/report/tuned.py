"""The part of a page that says what tuning did: each contrast as written and tuned, and every arm's search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpt2lab.analysis import Contrast
from gpt2lab.analysis.tuning import OPEN
from gpt2lab.analysis.wording import decimals
from gpt2lab.report.health_figures import Parts
from gpt2lab.report.marks import Look
from gpt2lab.report.read import Read
from gpt2lab.report.sweep import figures
from gpt2lab.report.sweep.tables import edge_cell, flat_cell, optimum_cell, settings_text
from gpt2lab.report.tables import Cell, Column, Row, Table, difference_cell, p_cell, verdict_cell
from gpt2lab.report.tuned_read import Tunings, rate_sensitivity
from gpt2lab.results import RATE, Study, searched, unit
from gpt2lab.text import DASH, number, plural, quantity, setting, signed

NOTE = (
    "Every arm searched the same space around its own settings, with the same number of trials on seeds that serve "
    "nothing else; the verdicts rest on fresh seeds at the best trial of each. The other difference is on the same "
    "seeds at the settings as written: description that carries no verdict, its interval adjusted for the family alike."
)
ARMS_NOTE = (
    "Optimum: where a curve through the trials near the best one is lowest, with its 95 % interval. Flat: between "
    "these one loses less than the smallest effect of interest. Sensitivity: what is lost on average over the whole "
    "space against the best rate (Wortsman et al. 2023); an arm with a small one forgives a bad rate."
)


def names_of(study: Study) -> tuple[str, str]:
    """What the two ways are called: at the settings as written, and at those that were found."""
    entries = [entry.get("shared") or {} for entry in study["arms"].values()]
    if searched(study) != [RATE]:
        return "at the settings as written", "at its own best settings"
    rates = {entry.get("lr") for entry in entries}
    return ("at the shared rate" if len(rates) == 1 else "at the rates as written"), "at its own rate"


def contrast_table(read: Read) -> Table | None:
    """Every contrast as written beside the tuned one, which has the verdict; None before both can be had."""
    written = read.tuned.written
    if written is None:
        return None
    before = {(c.arm, c.against): c for c in written.contrasts}
    shared, own = names_of(read.study)
    columns = (
        Column("Contrast"), Column(shared[0].upper() + shared[1:], "number"),
        Column(own.replace("at its own", "Each at its own"), "number"), Column("Holm p", "number"),
        Column("Verdict", "words"),
    )  # fmt: skip
    rows = []
    for c in read.verdicts.contrasts:
        other = before.get((c.arm, c.against))
        failed = f"{other.failed_arm} of {other.failed_arm + other.n_arm} failed" if other and other.failed_arm else ""
        first = difference_cell(other.difference, other.low, other.high) if other else Cell(DASH)
        if failed:
            first = Cell(first.text, "; ".join(filter(None, (first.detail, failed))))
        arm = read.arms.get(c.arm)
        cells = (
            Cell(c.arm, f"against {c.against}"), first, difference_cell(c.difference, c.low, c.high),
            Cell(p_cell(c.p_holm, c.alpha)), verdict_cell(c),
        )  # fmt: skip
        rows.append(Row(cells, arm.look if arm else None))
    return Table(columns, rows)


def arm_table(read: Read) -> Table | None:
    """Every arm's search: what it found, how surely, how much it matters, what it cost."""
    if not read.tuned.searches:
        return None
    columns = (
        Column("Arm"), Column("Best trial", "number"), Column("As written", "number"), Column("Optimum", "number"),
        Column("Flat", "number"), Column("Sensitivity", "number"), Column("Edge", "words"),
        Column("Trials", "number"), Column("Tokens", "number"),
    )  # fmt: skip
    rows = []
    for name, search in read.tuned.searches.items():
        entry, best = read.study["arms"][name], search.best
        found = search.optima.get(RATE) or next(iter(search.optima.values()), None)
        lost = rate_sensitivity(search)
        ended = {outcome: count for outcome, count in search.counts.items() if outcome not in OPEN}
        written = (entry.get("shared") or {}).get("settings") or {}
        several = len(searched(read.study)) > 1
        cells = (
            Cell(name),
            Cell(_settings(best["settings"], alone=not several) if best else DASH,
                 f"{read.study['metric']} {number(best['value'])}" if best else ""),
            Cell(_settings(written, alone=not several)),
            optimum_cell(found, search) if found else Cell(DASH),
            flat_cell(found, search, unit(read.study)) if found else Cell(DASH),
            Cell(DASH if lost is None else number(lost, 3)),
            edge_cell(found) if found and best else Cell(),
            Cell(str(sum(ended.values())), ", ".join(f"{count} {outcome}" for outcome, count in ended.items())),
            Cell(quantity(tuning_tokens(read.tuned, name)), _in_runs(read, name)),
        )  # fmt: skip
        rows.append(Row(cells, read.arms[name].look, name == read.study["baseline"]))
    return Table(columns, rows)


def _settings(settings: Mapping[str, object], *, alone: bool) -> str:
    if alone:
        return ", ".join(setting(value) for value in settings.values()) or DASH
    return settings_text(settings) or DASH


def tuning_tokens(tunings: Tunings, arm: str) -> int | None:
    """Tokens that the trials of an arm were trained on, all together; None where that is not known."""
    search = tunings.searches.get(arm)
    return sum(int(trial.get("tokens") or 0) for trial in search.trials) if search else None


def _in_runs(read: Read, arm: str) -> str:
    spent, one = tuning_tokens(read.tuned, arm), read.study["arms"][arm]["tokens"]
    return f"{spent / one:.1f} runs" if spent and one else ""


def cost_points(read: Read) -> list[str]:
    """What tuning cost beside the runs that are judged."""
    spent = {arm: tokens for arm in read.study["arms"] if (tokens := tuning_tokens(read.tuned, arm))}
    if not spent:
        return []
    runs = {arm: len(entry["runs"]) * entry["tokens"] for arm, entry in read.study["arms"].items()}
    listed = ", ".join(f"{quantity(tokens)} of {arm}" for arm, tokens in spent.items())
    return [
        f"Tuning took {quantity(sum(spent.values()))} tokens ({listed}), beside the {quantity(sum(runs.values()))} of "
        "the runs that the verdicts rest on."
    ]


def points(read: Read) -> list[str]:
    """Where the two ways disagree, why arms cannot be compared, and what is missing."""
    told = [line for c in read.verdicts.contrasts if (line := disagreement(read, c))]
    told += [f"{arm} is not comparable: {why}." for arm, why in refused(read).items()]
    missing = [run for run in read.tuned.runs if run.value is None]
    if missing:
        told.append(f"{plural(len(missing), 'run')} at the settings as written without a final value; see Runs.")
    if read.tuned.problem:
        told.append(f"{read.tuned.problem}.")
    return told


def progress(read: Read) -> str:
    """How far searches are that are still open; "" without any."""
    entries = [one for entry in read.study["arms"].values() if (one := entry.get("tuned"))]
    if all(one["over"] for one in entries):
        return ""
    done = sum(one["trials"] for one in entries)
    return (
        f"The settings of the arms are still being searched: {done} of {len(entries) * read.study['tune']['trials']} "
        "trials had ended when the study's record was written; the same command goes on."
    )


def refused(read: Read) -> dict[str, str]:
    """Arm -> why its search bars it from every comparison, with what to do about an edge."""
    found = {}
    for arm, entry in read.study["arms"].items():
        if not entry.get("tuned") or not entry.get("not_comparable"):
            continue
        search = read.tuned.searches.get(arm)
        widen = {name: o.widen for name, o in search.optima.items() if o.edge and o.widen} if search else {}
        hint = "; ".join(f"{name} from {setting(low, 2)} to {setting(high, 2)} would close it"
                         for name, (low, high) in widen.items())  # fmt: skip
        found[arm] = entry["not_comparable"] + (f" ({hint})" if hint else "")
    return found


def before(read: Read, contrast: Contrast) -> Contrast | None:
    """The same contrast on the runs at the settings as written."""
    same = read.tuned.written.contrasts if read.tuned.written else ()
    return next((c for c in same if (c.arm, c.against) == (contrast.arm, contrast.against)), None)


def disagreement(read: Read, contrast: Contrast) -> str:
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
    size = f"by {_size(moved, noise)} {unit(read.study)}"
    rate, arm = shared.removeprefix("at "), contrast.arm
    return text + (f": {rate} flattered {arm} {size}." if moved > 0 else f": {rate} held {arm} back {size}.")


def summary(read: Read, contrast: Contrast) -> str:
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


def draw(read: Read, look: Mapping[str, Look]) -> list[Parts]:
    """Each arm's loss against the learning rate, or against the first number that was searched."""
    names = [name for name in dict.fromkeys([RATE, *searched(read.study)]) if read.tuned.axis(name)]
    if not names:
        return []
    axis = read.tuned.axis(names[0])
    assert axis is not None
    found = {arm: (search.points, search.fitted(names[0])) for arm, search in read.tuned.searches.items()}
    if not any(point.finished for drawn, _ in found.values() for point in drawn):
        return []
    caption = (
        "Every mark is the final loss of one trial; crosses along the upper edge diverged, triangles lie above the "
        "frame. Lines: curves through the trials near each arm's best; shaded: 95 % intervals of where they are lowest."
    )
    drawing = figures.searches(axis, found, look, read.study["metric"])
    title = f"Each arm's loss against {'its learning rate' if names[0] == RATE else names[0]}"
    return [("tuned", title, caption, "wide", drawing)]


def method(study: Study) -> list[str]:
    """What was declared of the searches, in sentences."""
    tune = study.get("tune")
    if not tune:
        return []
    space = ", ".join(f"{name} {_range(one)}" for name, one in tune["space"].items())
    pruner = tune["pruner"]["name"]
    told = (
        f"Tuning: every arm, the baseline included, had {plural(tune['trials'], 'trial')} over {space}; sampler "
        f"{tune['sampler']['name']} with seed {tune['sampler']['seed']} for all, "
        f"{'no pruning' if pruner == 'none' else f'pruner {pruner}'}; trained on "
        f"{'seed' if tune['seeds'] == 1 else 'seeds'} {_listed(tune['tuning_seeds'])}, by which nothing is judged. "
        f"Verdicts rest on seeds {_listed(study['seeds'])} at each arm's best trial."
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
