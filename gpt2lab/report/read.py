"""All that a report is made from, read of the run store once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2lab.analysis import Verdicts
from gpt2lab.errors import DataFault
from gpt2lab.evidence import Evidence, gather
from gpt2lab.health import Health, health
from gpt2lab.ladder import Trend, trends
from gpt2lab.origins import Origins, origins
from gpt2lab.report.tables import Summary, summaries
from gpt2lab.report.tuned_read import Tunings, tunings
from gpt2lab.results import Study, StudyRun, cleaned, collect, judge_runs
from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class Read:
    """All that was read of a study, as every part of its page needs it."""

    study: Study
    runs: Sequence[StudyRun]
    verdicts: Verdicts
    evidence: Evidence
    arms: Mapping[str, Summary]
    trends: Sequence[Trend] = ()
    health: Health = field(default_factory=dict)
    origins: Origins = field(default_factory=Origins)
    tuned: Tunings = field(default_factory=Tunings)


def read_study(name: str, root: str | Path, *, force_exploratory: bool = False) -> Read:
    """All that its page is made from. Raises ConfigError for an unknown study, DataFault for a damaged record."""
    store = Store(root)
    study = cleaned(store.study(name))
    if study.get("name") not in store.studies():  # it becomes a folder's name
        raise DataFault(f"the record calls itself '{study.get('name')}', which is no recorded study", where=name)
    runs = collect(study, store)
    verdicts = judge_runs(study, runs, store, force_exploratory=force_exploratory)
    apart = [c.arm for c in verdicts.contrasts if c.word == "not comparable" and c.against == study["baseline"]]
    return Read(
        study=study,
        runs=runs,
        verdicts=verdicts,
        evidence=gather(study, runs, verdicts, store),
        arms=summaries(study, runs, verdicts),
        trends=trends(study, store),
        health=health(study, runs, store),
        origins=origins(study, runs, store, apart),
        tuned=tunings(study, store),
    )
