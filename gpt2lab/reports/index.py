"""The page across studies: every question with its answer at each scale, whether it was expected and published, and
every sweep. Questions are shown as on the page of published results (front.py).

Verdicts are judged from the present runs, by the same code as in the study's own report. A damaged record or run costs
its own lines only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from gpt2lab.analysis import Contrast, in_words
from gpt2lab.analysis.metric_names import LOSS, reading
from gpt2lab.analysis.results import Study, StudyRun, cleaned, collect
from gpt2lab.analysis.studies import judge_runs
from gpt2lab.analysis.verdicts import as_json
from gpt2lab.basics.text import clean, plural, quantity, time_taken
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports.page import Page, Remark, index_of, made_of, write_page
from gpt2lab.reports.published import expectation, matching, with_published
from gpt2lab.reports.read import read_sweep
from gpt2lab.reports.sweep import answer, counted
from gpt2lab.store import Store

Result = TypeVar("Result")
Record = Mapping[str, Any]
UNREADABLE = (Gpt2labError, KeyError, TypeError, ValueError, AttributeError)
"""What a damaged record raises."""


def write_index(root: str | Path = "runs", out: str | Path = "reports") -> Path:
    """Write `out`/index.html, index.md and index.json over every study and sweep of the store below `root`; returns
    index.html.

    Raises EnvironmentFault when the folder cannot be written (the old page stays).
    """
    across = gather(root, out)
    page = Page(
        about="all studies",
        heading="What the studies found",
        title="All studies – gpt2lab",
        warnings=[Remark(f"The record of {name} cannot be read.", why) for name, why in across.damaged],
        answer=[_summary(across)],
        sections=made_of(across, "index"),
        files=("index.md", "index.json"),
        also=", and a folder for each study whose report was written",
        figures="",
    )
    folder = Path(out)  # that users name, and may have linked elsewhere
    return write_page(folder.resolve() if folder.is_symlink() else folder, page, {"index.json": _json(across, page)})


def _summary(across: Overview) -> str:
    if not across.studies:
        return "" if across.sweeps else "Nothing is recorded yet. This makes a first study:"
    count, contrasts = len(across.studies), sum(len(study["contrasts"]) for study in across.studies)
    counts = f"{plural(count, 'study')}, {plural(contrasts, 'contrast')}"
    return f"{counts}, {across.total}; runs that studies share are counted once."


def _json(across: Overview, page: Page) -> str:
    """All of it for programs."""
    damaged = [{"name": name, "why": why} for name, why in across.damaged]
    return page.json({"studies": across.studies, "damaged": damaged, "sweeps": across.sweeps})


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All studies and sweeps of a store, as in index.json, the newest first; total: of the runs of all studies."""

    studies: Sequence[Record]
    total: Compute
    sweeps: Sequence[Record] = ()
    damaged: Sequence[tuple[str, str]] = ()
    """names of records that cannot be read or judged, and why"""


def gather(root: str | Path, out: str | Path) -> Overview:
    """Read and judge every study and sweep of the store below `root`; `out` is where their own reports lie. Sweeps by
    which an ablation tunes its arms are part of that study's page."""
    store, out = Store(root), Path(out)
    damaged: list[tuple[str, str]] = []
    read = _each(store.studies(), lambda name: _study(name, store, link_to(store, "study", name, out)), damaged)
    sweeps = _each(store.sweeps(), lambda name: _sweep(name, store, root, out), damaged)
    return Overview(
        studies=_newest_first(study for study, _ in read),
        total=compute(run for _, runs in read for run in runs),
        sweeps=_newest_first(sweep for sweep in sweeps if sweep),
        damaged=damaged,
    )


def _newest_first(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: str(record["created"]), reverse=True)


def _each(names: Iterable[str], read: Callable[[str], Result], damaged: list[tuple[str, str]]) -> list[Result]:
    """What `read` makes of each, in their order; what cannot be read goes to `damaged`."""
    results = []
    for name in names:
        try:
            results.append(read(name))
        except UNREADABLE as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            damaged.append((name, clean(why)))
    return results


def _study(name: str, store: Store, link: str) -> tuple[Record, list[tuple[Study, StudyRun]]]:
    """A study as plain data, without numbers that are not finite, and its runs."""
    study: Study = cleaned(store.study(name))
    if study.name != name:
        raise ValueError(f"the record calls itself '{study.name}'")
    collected = collect(study, store)
    runs = [(study, run) for run in collected]
    verdicts, total = judge_runs(study, collected, store, sensitivity=False), compute(runs)
    copied = ("name", "hash", "ablation", "scale", "question", "created", "metric")
    record = {key: getattr(study, key) for key in copied} | {
        "ablation": study.ablation or study.name, "scale": study.scale or study.scope.preset or study.name,
        "unit": reading(study.metric).unit, "smallest_effect": verdicts.smallest_effect, "caveat": study.caveat,
        "scope": list(verdicts.scope), "parameters": study.scope.parameters, "tokens": study.scope.tokens,
        "seeds": {arm.name: arm.n for arm in verdicts.arms}, "baseline": study.baseline, "report": link or None,
        "runs": len(runs), "missing": sum(run.value is None for run in collected), "flops": total.flops,
        "seconds": total.seconds, "noise": study.noise.plain() if study.noise and study.metric == LOSS else None,
        "answer": in_words(replace(verdicts, caveat=None)).splitlines()[0],
        "conclusion": clean(store.conclusion(study)) or None,
        "contrasts": [_contrast(study, contrast) for contrast in verdicts.contrasts],
    }  # fmt: skip
    plain: Record = as_json(record)
    return plain, runs


def _contrast(study: Study, contrast: Contrast) -> dict[str, Any]:
    keys = ("arm", "against", "word", "difference", "low", "high", "p_holm", "n_arm")
    return {**{key: getattr(contrast, key) for key in keys}, **agreements(study, contrast)}


def _sweep(name: str, store: Store, root: str | Path, out: Path) -> Record | None:
    """A sweep as plain data; `line`: `nano · 842 k parameters · 11 finished, 9 pruned · 2026-11-23`."""
    if store.sweep(name).part_of:
        return None
    read = read_sweep(name, root)
    record = read.record
    parts = [record.scale, f"{quantity(record.scope.parameters)} parameters", counted(read.counts),
             record.created[:10], record.caveat]  # fmt: skip
    return {
        "name": name, "question": record.question, "answer": answer(read), "created": record.created,
        "line": " · ".join(part for part in parts if part), "report": link_to(store, "sweep", name, out) or None,
    }  # fmt: skip


def link_to(store: Store, kind: str, name: str, out: Path) -> str:
    """The own report of a study or sweep, or the copy of it that is published."""
    published = out / "published" / name / "index.html"
    index = index_of(store, kind, name, out) or (published if published.is_file() else None)
    return quote(index.relative_to(out).as_posix()) if index else ""


@dataclass(frozen=True)
class Compute:
    """Runs, and what those that have a result took."""

    runs: int
    flops: float
    seconds: float

    def __str__(self) -> str:
        """`9 runs, 38.3 TFLOP, 6.6 minutes of training`"""
        parts = [plural(self.runs, "run")]
        parts += [quantity(self.flops, "FLOP")] if self.flops else []
        parts += [f"{time_taken(self.seconds)} of training"] if self.seconds else []
        return ", ".join(parts)


def compute(runs: Iterable[tuple[Study, StudyRun]]) -> Compute:
    """Of runs of studies; one that several studies or arms share is counted once."""
    once = {run.id: (study.arms[run.arm].flops_per_token, run.result) for study, run in runs}
    flops = sum((per_token * (result.get("tokens") or 0) for per_token, result in once.values()), 0.0)
    return Compute(len(once), flops, sum((result.get("seconds") or 0.0 for _, result in once.values()), 0.0))


def agreements(study: Study, contrast: Contrast) -> dict[str, Any]:
    """What was expected and published of a contrast, and how its verdict agrees with that, for programs."""
    effects = matching(study, contrast.arm, contrast.against) if len(contrast.weights) == 2 else []
    expected, agreement = expectation(study, contrast)
    return {
        "expected": expected or None,
        "agreement": agreement and agreement.to_json(),
        "published": [
            {"effect": str(effect), "direction": effect.direction, "size": effect.size, "source": effect.source,
             "address": effect.address or None, "parameters": effect.parameters,
             **with_published(study, contrast, effect).to_json()}
            for effect in effects
        ],
    }  # fmt: skip
