"""The page across studies: what each found, whether it was expected and published, and how it goes with scale.

Verdicts are judged from the present runs, by the same code as in the study's own report. A damaged record or run costs
its own lines only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.analysis.results import LOSS, Study, StudyRun, cleaned, collect, judge_runs, noise_of, unit
from gpt2lab.basics.text import clean, number, plural, quantity, time_taken
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports.page import Page, Remark, index_of, made_of, write_page
from gpt2lab.reports.published import (
    PublishedAgreement,
    PublishedEffect,
    expectation,
    matching,
    with_published,
)
from gpt2lab.reports.read import Once, error_text, read_sweep
from gpt2lab.reports.sweep import answer, counted
from gpt2lab.reports.tables import Cell, difference_cell, verdict_cell
from gpt2lab.store import Store

Result = TypeVar("Result")
UNREADABLE = (Gpt2labError, KeyError, TypeError, ValueError, AttributeError)
"""What a damaged record raises."""


def write_index(root: str | Path = "runs", out: str | Path = "reports") -> Path:
    """Write `out`/index.html, index.md, index.json and index.svg over every study and sweep of the store below `root`;
    returns index.html.

    Raises EnvironmentFault when the folder cannot be written (the old page stays).
    """
    across = gather(root, out)
    page = Page(
        about="all studies",
        heading="What the studies found",
        title="All studies – gpt2lab",
        warnings=[Remark(f"The record of {record.name} cannot be read.", record.why) for record in across.damaged],
        answer=[_summary(across)],
        sections=made_of(across, "index"),
        files=("index.md", "index.json"),
        also=", and a folder for each study whose report was written",
        figures="",
    )
    folder = Path(out)  # that users name, and may have linked elsewhere
    return write_page(folder.resolve() if folder.is_symlink() else folder, page, {"index.json": _json(across, page)})


def _summary(across: Overview) -> str:
    if not across.entries:
        return "" if across.sweeps else "Nothing is recorded yet. This makes a first study:"
    count = len(across.entries)
    studies = "1 study" if count == 1 else f"{count} studies"
    total = compute((entry.study, run) for entry in across.entries for run in entry.runs)
    return f"{studies}, {plural(len(across.findings), 'contrast')}, {total}; runs that studies share are counted once."


def _json(across: Overview, page: Page) -> str:
    """All of it for programs."""
    record: dict[str, Any] = {"studies": [as_json(entry) for entry in across.entries]}
    record["damaged"] = [{"name": damaged.name, "why": damaged.why} for damaged in across.damaged]
    record["sweeps"] = [entry.to_json() for entry in across.sweeps]
    return page.json(record)


@dataclass(frozen=True, kw_only=True)
class StudyContrast:
    """One contrast of a study."""

    contrast: Contrast
    verdict: Cell
    difference: Cell
    expected: str
    """what the study's file says of it; "" for nothing"""
    agreement: PublishedAgreement | None
    """with what was expected; None where nothing was"""
    published: Sequence[tuple[PublishedEffect, PublishedAgreement]]

    @property
    def label(self) -> str:
        return f"{self.contrast.arm} against {self.contrast.against}"

    @property
    def agreements(self) -> list[PublishedAgreement]:
        """With what was expected and with what was published."""
        return [*([self.agreement] if self.agreement else []), *(agreement for _, agreement in self.published)]


@dataclass(frozen=True, kw_only=True)
class StudyEntry:
    """One study."""

    study: Study
    runs: Sequence[StudyRun]
    verdicts: Verdicts
    findings: Sequence[StudyContrast]
    sharing: int
    """how many studies rest on runs of this one's baseline, itself among them"""
    link: str
    """its own report, relative to the page; "" where none was written"""

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def scale(self) -> str:
        return self.study.scale or self.study.scope.preset or self.name

    @property
    def unit(self) -> str:
        return unit(self.study)

    @property
    def compute(self) -> Compute:
        return compute((self.study, run) for run in self.runs)

    @property
    def sizes(self) -> str:
        scope = self.study.scope
        return f"{quantity(scope.parameters)} parameters, {quantity(scope.tokens)} tokens"


@dataclass(frozen=True, kw_only=True)
class SweepEntry:
    """One sweep on the page across studies."""

    name: str
    question: str
    answer: Sequence[str]
    line: str
    """`nano · 842 k parameters · 11 finished, 9 pruned · 2026-11-23`"""
    link: str
    """its own page, relative to this one; "" where none was written"""
    created: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "question": self.question, "answer": list(self.answer), "created": self.created,
                "report": self.link or None}  # fmt: skip


@dataclass(frozen=True)
class Damaged:
    """A record that cannot be read or judged, and why."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Overview(Once):
    """All studies and sweeps of a store, the newest first."""

    entries: Sequence[StudyEntry]
    sweeps: Sequence[SweepEntry] = ()
    damaged: Sequence[Damaged] = ()
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def findings(self) -> list[StudyContrast]:
        return [finding for entry in self.entries for finding in entry.findings]


def gather(root: str | Path, out: str | Path) -> Overview:
    """Read and judge every study and sweep of the store below `root`; `out` is where their own reports lie. Sweeps by
    which an ablation tunes its arms are part of that study's page."""
    store, out = Store(root), Path(out)
    damaged: list[Damaged] = []
    records = _each(store.studies(), lambda name: _record(name, store), damaged)
    entries = _each(
        records, lambda name: _entry(records[name], records, store, link_to(store, "study", name, out)), damaged
    )
    sweeps = _each(store.sweeps(), lambda name: _sweep_entry(name, store, root, out), damaged)
    newest = sorted(sorted(entries.values(), key=lambda e: e.name), key=lambda e: e.study.created, reverse=True)
    own_sweeps = sorted((sweep for sweep in sweeps.values() if sweep), key=lambda sweep: sweep.created, reverse=True)
    return Overview(entries=newest, sweeps=own_sweeps, damaged=damaged)


def _each(names: Iterable[str], read: Callable[[str], Result], damaged: list[Damaged]) -> dict[str, Result]:
    """Name -> what `read` makes of it; what cannot be read goes to `damaged`."""
    results = {}
    for name in names:
        try:
            results[name] = read(name)
        except UNREADABLE as error:
            damaged.append(Damaged(name, clean(error_text(error))))
    return results


def _record(name: str, store: Store) -> Study:
    study: Study = cleaned(store.study(name))
    if study.name != name:
        raise ValueError(f"the record calls itself '{study.name}'")
    _runs_of(study, study.baseline)
    return study


def _entry(study: Study, records: Mapping[str, Study], store: Store, link: str) -> StudyEntry:
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, sensitivity=False)
    findings = [finding(study, contrast) for contrast in verdicts.contrasts]
    sharing = shared_by(study, records)
    return StudyEntry(study=study, runs=runs, verdicts=verdicts, findings=findings, sharing=sharing, link=link)


def _sweep_entry(name: str, store: Store, root: str | Path, out: Path) -> SweepEntry | None:
    if store.sweep(name).part_of:
        return None
    read = read_sweep(name, root)
    record = read.record
    created = str(record.get("created") or "")
    parts = [str(record["scale"]), f"{quantity(record['scope'].get('parameters'))} parameters", counted(read.counts),
             created[:10], record.get("caveat") or ""]  # fmt: skip
    return SweepEntry(
        name=name, question=str(record["question"]), answer=answer(read),
        line=" · ".join(part for part in parts if part), link=link_to(store, "sweep", name, out), created=created,
    )  # fmt: skip


def finding(study: Study, contrast: Contrast) -> StudyContrast:
    """A contrast beside what its study expects and what others published."""
    effects = matching(study, contrast.arm, contrast.against) if len(contrast.weights) == 2 else []
    expected, agreement = expectation(study, contrast)
    return StudyContrast(
        contrast=contrast,
        verdict=verdict_cell(contrast),
        difference=difference_cell(contrast.difference, contrast.low, contrast.high),
        expected=expected,
        agreement=agreement,
        published=[(effect, with_published(study, contrast, effect)) for effect in effects],
    )


def link_to(store: Store, kind: str, name: str, out: Path) -> str:
    """The own report of a study or sweep, or the copy of it that is published."""
    published = out / "published" / name / "index.html"
    index = index_of(store, kind, name, out) or (published if published.is_file() else None)
    return quote(index.relative_to(out).as_posix()) if index else ""


def _runs_of(study: Study, arm: str) -> set[str]:
    return set(study.arms[arm].runs.values())


def shared_by(study: Study, records: Mapping[str, Study]) -> int:
    """How many of the studies rest on runs of this one's baseline."""
    pool = _runs_of(study, study.baseline)
    return sum(any(pool & _runs_of(other, arm) for arm in other.arms) for other in records.values()) if pool else 1


def facts(entry: StudyEntry) -> Iterator[tuple[str, str]]:
    """What a study rests on, as (name, text)."""
    study, scope = entry.study, entry.study.scope
    yield "Scale", ", ".join([f"{entry.scale}: {entry.sizes}", *entry.verdicts.scope[1:]])
    yield "On", ", ".join(part for part in (scope.data, scope.optimizer) if part)
    yield "Declared", study.created[:10]
    yield "Seeds", seeds(entry)
    others = f"serve {entry.sharing} studies" if entry.sharing > 1 else "serve this study alone"
    yield "Baseline", f"{study.baseline}; its runs {others}"
    yield "Noise floor", noise_floor(study)
    yield "Compute", str(entry.compute)


def seeds(entry: StudyEntry) -> str:
    """`3 per arm`, with what failed or is missing."""
    counts = sorted({arm.n for arm in entry.verdicts.arms})
    text = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) + " per arm" if counts else "none"
    failed = sum(arm.failed for arm in entry.verdicts.arms)
    others = {"failed": failed, "without a value": sum(run.value is None for run in entry.runs)}
    return ", ".join([text, *(f"{plural(count, 'run')} {what}" for what, count in others.items() if count)])


def noise_floor(study: Study) -> str:
    """The measured noise that the study was planned with; "" for none."""
    noise, floor = noise_of(study), study.noise
    if noise is None or floor is None:
        return ""
    bounds = f" [{number(floor.low, 4)}, {number(floor.high, 4)}]"
    when = f", measured {floor.created[:10]}" if floor.created else ""
    return f"sd {number(noise.sd, 4)}{bounds} over {plural(noise.runs, 'repeat')} at {noise.scale}, {noise.stack}{when}"


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


def as_json(entry: StudyEntry) -> dict[str, Any]:
    """A study for programs: plain data, without numbers that are not finite."""
    study, verdicts, total = entry.study, entry.verdicts, entry.compute
    copied = ("name", "hash", "ablation", "scale", "question", "created", "metric")
    return {key: getattr(study, key) for key in copied} | {
        "unit": entry.unit, "smallest_effect": verdicts.smallest_effect, "caveat": study.caveat,
        "scope": list(verdicts.scope), "parameters": study.scope.parameters, "tokens": study.scope.tokens,
        "seeds": {arm.name: arm.n for arm in verdicts.arms}, "baseline": study.baseline,
        "baseline_serves": entry.sharing, "report": entry.link or None, "runs": len(entry.runs),
        "missing": sum(run.value is None for run in entry.runs), "flops": total.flops, "seconds": total.seconds,
        "noise": study.noise.plain() if study.noise and study.metric == LOSS else None,
        "contrasts": [_contrast_json(shown) for shown in entry.findings],
    }  # fmt: skip


def _contrast_json(finding: StudyContrast) -> dict[str, Any]:
    c = finding.contrast
    numbers = {key: getattr(c, key) for key in ("difference", "low", "high", "p_holm")}
    return {
        "arm": c.arm, "against": c.against, "word": c.word,
        **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
        **agreements(finding),
    }  # fmt: skip


def agreements(finding: StudyContrast) -> dict[str, Any]:
    """What was expected and published of a contrast, for programs."""
    return {
        "expected": finding.expected or None,
        "agreement": finding.agreement and finding.agreement.to_json(),
        "published": [
            {"effect": str(effect), "direction": effect.direction, "size": effect.size, "source": effect.source,
             "address": effect.address or None, "parameters": effect.parameters, **agreement.to_json()}
            for effect, agreement in finding.published
        ],
    }  # fmt: skip
