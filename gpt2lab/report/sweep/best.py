"""The winning config as YAML that trains as it is, which whoever made the sweep has put into its record."""

from __future__ import annotations

import re
from typing import Any

import yaml

from gpt2lab.report.sweep.across import Record
from gpt2lab.report.sweep.read import ReadSweep, Search
from gpt2lab.text import number

BEST = "best.yaml"


def best_files(read: ReadSweep) -> dict[str, Search]:
    """Name of the winning config's file -> its search."""
    if read.single:
        return {BEST: read.single}
    named = {f"best-{re.sub(r'[^A-Za-z0-9_.+-]', '_', label)}.yaml": one for label, one in read.searches.items()}
    if len(named) == len(read.searches):
        return named
    return {f"best-{place}.yaml": one for place, one in enumerate(read.searches.values())}


def best_yaml(read: ReadSweep, search: Search) -> str | None:
    """The config of the best trial; None where no trial finished."""
    best, config = search.best, search.record.get("best_config")
    if best is None or not config:
        return None
    written: str = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return _head(read, search, best) + written


class _Dumper(yaml.SafeDumper):
    """Writes what gpt2lab's reader reads: no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _head(read: ReadSweep, search: Search, best: Record) -> str:
    of = "" if read.single else f", search {search.label}"
    told = f"{read.record['metric']} {number(best['value'])} in the search, on seed {next(iter(best['values']), '?')}"
    return f"# The best trial of {read.record['name']}{of} (trial {best['slot']}): {told}.\n"
