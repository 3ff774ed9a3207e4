"""The sweeps of a store as the page across studies lists them: what each answers, and where its own page is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import Gpt2labError
from gpt2lab.report.across import Damaged, link_to
from gpt2lab.report.sweep.content import answer, counted
from gpt2lab.report.sweep.read import read_sweep
from gpt2lab.store import Store
from gpt2lab.text import clean, quantity


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


def sweep_entries(root: str | Path, out: str | Path) -> tuple[list[SweepEntry], list[Damaged]]:
    """Every sweep that is asked for itself, the newest first, and those that cannot be read. What an ablation tunes its
    arms by is part of that study's page."""
    store, entries, damaged = Store(root), [], []
    for name in store.sweeps():
        try:
            if not store.sweep(name).get("part_of"):
                entries.append(_entry(name, root, Path(out)))
        except (Gpt2labError, KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(Damaged(name, clean(error)))
    return sorted(entries, key=lambda entry: entry.created, reverse=True), damaged


def _entry(name: str, root: str | Path, out: Path) -> SweepEntry:
    read = read_sweep(name, root)
    record = read.record
    created = str(record.get("created") or "")
    parts = [str(record["scale"]), f"{quantity(record['scope'].get('parameters'))} parameters", counted(read.counts),
             created[:10], record.get("caveat") or ""]  # fmt: skip
    return SweepEntry(
        name=name, question=str(record["question"]), answer=answer(read),
        line=" · ".join(part for part in parts if part), link=link_to(name, out), created=created,
    )  # fmt: skip
