"""The winning config as YAML that trains as it is: the preset with what the best trial changed, or, where the scale was
no preset, the whole config of the best trial's run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import gpt2lab
from gpt2lab.report.sweep_across import Record
from gpt2lab.report.sweep_read import ReadSweep, Search
from gpt2lab.text import number

FOLLOWING = {
    "training.batch_tokens": (
        "training.steps", "optim.warmup_steps", "evaluation.every_steps", "training.checkpoint_every_steps",
    )
}  # fmt: skip
"""Setting -> what a trial changes with it, so that it trains on as many tokens."""

BEST = "best.yaml"
PLAIN = re.compile(r"[\w.+-]+")


def best_files(read: ReadSweep) -> dict[str, Search]:
    """Name of the winning config's file -> its search."""
    if read.single:
        return {BEST: read.single}
    named = {f"best-{re.sub(r'[^A-Za-z0-9_.+-]', '_', label)}.yaml": one for label, one in read.searches.items()}
    if len(named) == len(read.searches):
        return named
    return {f"best-{place}.yaml": one for place, one in enumerate(read.searches.values())}


def best_yaml(read: ReadSweep, search: Search) -> str | None:
    """The config of the best trial; None where no trial finished, or it cannot be told from here."""
    best = search.best
    if best is None:
        return None
    head = _head(read, search, best)
    config = _tree(read.configs.get(search.label))
    changed = _changed(read, search, best, config)
    if changed is not None and is_preset(str(read.record["scale"])) and not _scale_is_file(read):
        return head + _dump({"extends": read.record["scale"]} | changed)
    return None if config is None else head + _dump(config)


def _head(read: ReadSweep, search: Search, best: Record) -> str:
    of = "" if read.single else f", search {search.label}"
    told = f"{read.record['metric']} {number(best['value'])} in the search, on seed {next(iter(best['values']), '?')}"
    return f"# The best trial of {read.record['name']}{of} (trial {best['slot']}): {told}.\n"


def _changed(read: ReadSweep, search: Search, best: Record, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the trial's config has over the preset, by dotted key; None where that cannot be told."""
    changed: dict[str, Any] = {**_overrides(read.record), **(search.record.get("changes") or {})}
    for name, value in best["settings"].items():
        axis = search.axes.get(name)
        if axis is not None and axis.choices and not PLAIN.fullmatch(str(value)):
            return None  # a component with options, by its short name only
        for other in FOLLOWING.get(name, ()):
            if other in best["settings"]:
                continue
            if config is None:
                return None
            section, _, key = other.partition(".")
            if (following := (config.get(section) or {}).get(key)) is not None:
                changed[other] = following
        changed[name] = value
    return changed


def _overrides(record: Record) -> dict[str, Any]:
    """`--set key=value` of the command that made the sweep."""
    words = _words(record)
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--set"]
    given += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in given)}


def _words(record: Record) -> list[str]:
    try:
        return shlex.split(str(record.get("reproduce") or ""))
    except ValueError:  # an open quote: not a command of ours
        return []


def is_preset(scale: str) -> bool:
    """Whether `extends: scale` means something; presets are files of the package, so no config need be read."""
    return bool(PLAIN.fullmatch(scale)) and (Path(gpt2lab.__file__).parent / "presets" / f"{scale}.yaml").is_file()


def _scale_is_file(read: ReadSweep) -> bool:
    """Whether the command named a file that only ends in the name of a preset."""
    words = _words(read.record)
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--scale"]
    return any("/" in one or one.endswith((".yaml", ".yml")) for one in named)


def _tree(text: str | None) -> Mapping[str, Any] | None:
    try:
        tree = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return None
    return tree if isinstance(tree, Mapping) else None


def _dump(tree: Mapping[str, Any]) -> str:
    written: str = yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return written


class _Dumper(yaml.SafeDumper):
    """Writes what gpt2lab's reader reads: no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
