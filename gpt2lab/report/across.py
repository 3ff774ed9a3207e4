"""Every recorded study as the page across studies tells it: verdicts by the same code as in the study's own report,
what they say of expected and published results, and what they rest on.

Nothing is kept from one time to the next: a verdict is judged from the runs that are there now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpt2lab.analysis import Contrast, Verdicts
from gpt2lab.errors import Gpt2labError
from gpt2lab.report.agreement import Agreement, expected_of, with_expected, with_published
from gpt2lab.report.published import Effect, matching
from gpt2lab.report.tables import Cell, difference_cell, verdict_cell
from gpt2lab.results import LOSS, Study, StudyRun, cleaned, collect, judge_runs, noise_of, unit
from gpt2lab.store import Store
from gpt2lab.text import clean, number, plural, quantity


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One contrast of a study."""

    contrast: Contrast
    verdict: Cell
    difference: Cell
    expected: str
    """what the study's file says of it; "" for nothing"""
    agreement: Agreement | None
    """with what was expected; None where nothing was"""
    published: Sequence[tuple[Effect, Agreement]]

    @property
    def label(self) -> str:
        return f"{self.contrast.arm} against {self.contrast.against}"

    @property
    def agreements(self) -> list[Agreement]:
        """With what was expected and with what was published."""
        return [*([self.agreement] if self.agreement else []), *(agreement for _, agreement in self.published)]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One study."""

    study: Study
    runs: Sequence[StudyRun]
    verdicts: Verdicts
    findings: Sequence[Finding]
    sharing: int
    """how many studies rest on runs of this one's baseline, itself among them"""
    link: str
    """its own report, relative to the page; "" where none was written"""

    @property
    def name(self) -> str:
        return str(self.study["name"])

    @property
    def scale(self) -> str:
        return str(self.study.get("scale") or self.study["scope"].get("preset") or self.name)

    @property
    def unit(self) -> str:
        return unit(self.study)


@dataclass(frozen=True)
class Damaged:
    """A record that cannot be read or judged, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Across:
    """All studies of a store: the newest first."""

    entries: Sequence[Entry]
    damaged: Sequence[Damaged]

    @property
    def findings(self) -> list[Finding]:
        return [finding for entry in self.entries for finding in entry.findings]


def gather(root: str | Path, out: str | Path) -> Across:
    """Read and judge every study of the store below `root`; `out` is where their own reports lie."""
    store = Store(root)
    records, damaged = _records(store)
    sharing = {name: shared_by(study, records) for name, study in records.items()}
    entries = []
    for name, study in records.items():
        try:
            entries.append(_entry(study, store, sharing[name], link_to(name, Path(out))))
        except (Gpt2labError, KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(Damaged(name, _why(error)))
    entries.sort(key=lambda entry: entry.name)
    entries.sort(key=lambda entry: str(entry.study.get("created") or ""), reverse=True)
    return Across(entries, damaged)


def _records(store: Store) -> tuple[dict[str, Study], list[Damaged]]:
    """Every record by its name, and those that cannot be read."""
    records: dict[str, Study] = {}
    damaged = []
    for name in store.studies():
        try:
            study = cleaned(store.study(name))
            if study["name"] != name:
                raise ValueError(f"the record calls itself '{study['name']}'")
            _runs_of(study, study["baseline"])
            records[name] = study
        except (Gpt2labError, KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(Damaged(name, _why(error)))
    return records, damaged


def _why(error: Exception) -> str:
    return clean(f"it lacks {error}" if isinstance(error, KeyError) else error)


def _entry(study: Study, store: Store, sharing: int, link: str) -> Entry:
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, sensitivity=False)
    findings = [_finding(study, contrast) for contrast in verdicts.contrasts]
    return Entry(study=study, runs=runs, verdicts=verdicts, findings=findings, sharing=sharing, link=link)


def _finding(study: Study, contrast: Contrast) -> Finding:
    pair = len(contrast.weights) == 2  # effects over more arms repeat nothing, whatever they are called
    effects = matching(study, contrast.arm, contrast.against) if pair else []
    effects_expected = study.get("expected") or {}
    expected = expected_of(study, contrast) if pair else str(effects_expected.get(contrast.arm) or "")
    return Finding(
        contrast=contrast,
        verdict=verdict_cell(contrast),
        difference=difference_cell(contrast.difference, contrast.low, contrast.high),
        expected=expected,
        agreement=with_expected(study, contrast, expected, effects) if expected else None,
        published=[(effect, with_published(study, contrast, effect)) for effect in effects],
    )


def link_to(name: str, out: Path) -> str:
    """The study's own report, or the copy of it that is published."""
    for folder in (name, f"published/{name}"):
        if (out / folder / "index.html").is_file():
            return quote(f"{folder}/index.html")
    return ""


def _runs_of(study: Study, arm: str) -> set[str]:
    return set(study["arms"][arm]["runs"].values())


def shared_by(study: Study, records: Mapping[str, Study]) -> int:
    """How many of the studies rest on runs of this one's baseline."""
    pool = _runs_of(study, study["baseline"])
    return sum(any(pool & _runs_of(other, arm) for arm in other["arms"]) for other in records.values()) if pool else 1


def facts(entry: Entry) -> Iterator[tuple[str, str]]:
    """What a study rests on, in words: (what, that)."""
    study, scope = entry.study, entry.study["scope"]
    sizes = f"{quantity(scope.get('parameters'))} parameters, {quantity(scope.get('tokens'))} tokens"
    yield "Scale", ", ".join([f"{entry.scale}: {sizes}", *entry.verdicts.scope[1:]])
    yield "On", ", ".join(str(scope[key]) for key in ("data", "optimizer") if scope.get(key))
    yield "Declared", str(study.get("created") or "")[:10]
    yield "Seeds", seeds(entry)
    yield "Baseline", baseline(entry)
    yield "Noise floor", noise_floor(study)
    yield "Compute", compute(entry.runs, study)


def seeds(entry: Entry) -> str:
    """`3 per arm`, with what failed or is missing."""
    counts = sorted({arm.n for arm in entry.verdicts.arms})
    text = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) + " per arm" if counts else "none"
    failed = sum(arm.failed for arm in entry.verdicts.arms)
    missing = sum(run.value is None for run in entry.runs)
    return ", ".join([text, *([plural(failed, "run") + " failed"] if failed else []),
                      *([plural(missing, "run") + " without a value"] if missing else [])])  # fmt: skip


def baseline(entry: Entry) -> str:
    """`learned; its runs serve this study alone`"""
    others = f"serve {entry.sharing} studies" if entry.sharing > 1 else "serve this study alone"
    return f"{entry.study['baseline']}; its runs {others}"


def noise_floor(study: Study) -> str:
    """The measured noise that the study was planned with; "" for none."""
    noise, kept = noise_of(study), study.get("noise") or {}
    if noise is None:
        return ""
    low, high = kept.get("low"), kept.get("high")
    bounds = "" if low is None or high is None else f" [{number(low, 4)}, {number(high, 4)}]"
    when = f", measured {str(kept['created'])[:10]}" if kept.get("created") else ""
    return f"sd {number(noise.sd, 4)}{bounds} over {plural(noise.runs, 'repeat')} at {noise.scale}, {noise.stack}{when}"


def compute(runs: Sequence[StudyRun], study: Study) -> str:
    """`9 runs, 38.3 TFLOP, 6.6 minutes of training`, shared runs among them."""
    flops, seconds = spent(runs, study)
    parts = [plural(len({run.id for run in runs}), "run")]
    parts += [quantity(flops, "FLOP")] if flops else []
    parts += [f"{duration(seconds)} of training"] if seconds else []
    return ", ".join(parts)


def spent(runs: Sequence[StudyRun], study: Study) -> tuple[float, float]:
    """(FLOPs, seconds) of the runs that have a result."""
    flops = seconds = 0.0
    for run in {run.id: run for run in runs}.values():
        per_token = study["arms"][run.arm].get("flops_per_token")
        flops += (per_token or 0.0) * (run.result.get("tokens") or 0)
        seconds += run.result.get("seconds") or 0.0
    return flops, seconds


def duration(seconds: float) -> str:
    """`44 seconds`, `6.6 minutes`, `12.3 hours`."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"


def total(entries: Sequence[Entry]) -> tuple[int, float, float]:
    """(runs, FLOPs, seconds) over all studies, a run that several share counted once."""
    seen: set[str] = set()
    flops = seconds = 0.0
    for entry in entries:
        fresh = [run for run in entry.runs if run.id not in seen]
        seen.update(run.id for run in fresh)
        more = spent(fresh, entry.study)
        flops, seconds = flops + more[0], seconds + more[1]
    return len(seen), flops, seconds


def as_json(entry: Entry) -> dict[str, Any]:
    """A study for programs: plain data, without numbers that are not finite."""
    flops, seconds = spent(entry.runs, entry.study)
    own = {key: entry.study.get(key) for key in ("name", "hash", "ablation", "scale", "question", "created", "metric")}
    own |= {"unit": entry.unit, "smallest_effect": entry.verdicts.smallest_effect, "caveat": entry.study.get("caveat")}
    own |= {"scope": list(entry.verdicts.scope), "parameters": entry.study["scope"].get("parameters")}
    own |= {"tokens": entry.study["scope"].get("tokens"), "seeds": {arm.name: arm.n for arm in entry.verdicts.arms}}
    own |= {"baseline": entry.study["baseline"], "baseline_serves": entry.sharing, "report": entry.link or None}
    own |= {"runs": len(entry.runs), "missing": sum(run.value is None for run in entry.runs)}
    own |= {
        "flops": flops,
        "seconds": seconds,
        "noise": entry.study.get("noise") if entry.study["metric"] == LOSS else None,
    }
    return own | {"contrasts": [_contrast_json(finding) for finding in entry.findings]}


def _contrast_json(finding: Finding) -> dict[str, Any]:
    c = finding.contrast
    numbers = {key: getattr(c, key) for key in ("difference", "low", "high", "p_holm")}
    return {
        "arm": c.arm,
        "against": c.against,
        "word": c.word,
        **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
        "expected": finding.expected or None,
        "agreement": finding.agreement and _agreement_json(finding.agreement),
        "published": [
            {"effect": str(effect), "direction": effect.direction, "size": effect.size, "source": effect.source,
             "address": effect.address or None, "parameters": effect.parameters, **_agreement_json(agreement)}
            for effect, agreement in finding.published
        ],
    }  # fmt: skip


def _agreement_json(agreement: Agreement) -> dict[str, str]:
    return {"kind": agreement.kind, "word": agreement.word, "why": agreement.why}
