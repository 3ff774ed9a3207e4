"""A sweep as the follower and the mirror see it: a study whose arms are its trials."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2lab.errors import ConfigError, unknown
from gpt2lab.store import Store

OUTCOME = "gpt2lab.outcome"
ENDED = ("finished", "pruned", "diverged", "failed")
"""Outcomes after which nothing more is done about a trial."""


def as_followed(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's record as one of a study: arms are trials, `trial 007`, after the label of their search where there are
    several. `open` counts the trials that have not ended, those included that were never begun; `seeds`, the runs of
    each. Beside what a study says of it, an arm has `tags`, for the mirror to show, and `params`, its settings."""
    searches = sweep["searches"]
    arms: dict[str, dict[str, Any]] = {}
    for label, search in searches.items():
        for trial in search["trials"]:
            name = f"trial {trial['slot']:03d}"
            arms[f"{label} {name}" if len(searches) > 1 else name] = _arm(trial, label, search["components"])
    slots = sum(search.get("slots", sweep["trials"]) for search in searches.values())
    ended = sum(trial["outcome"] in ENDED for search in searches.values() for trial in search["trials"])
    about = ("name", "scale", "question", "evaluation", "stack", "reproduce", "hash", "created", "metric")
    return {
        **{key: sweep[key] for key in about if key in sweep},
        "kind": "sweep",
        "ablation": sweep["sweep"],
        "baseline": None,
        "seeds": max((len(search.get("seeds") or sweep.get("seeds", ())) for search in searches.values()), default=0),
        "open": max(0, slots - ended),
        "arms": arms,
    }


def _arm(trial: Mapping[str, Any], label: str, components: Mapping[str, str]) -> dict[str, Any]:
    tags = {
        OUTCOME: trial["outcome"],
        "gpt2lab.slot": trial["slot"],
        "gpt2lab.search": label,
        "gpt2lab.stopped_at": trial.get("stopped_at"),
        "gpt2lab.would_stop_at": trial.get("would_stop_at"),
    }
    chosen = {key.rpartition(".")[2]: str(value) for key, value in trial["settings"].items() if key.count(".") == 1}
    return {
        "components": {slot: chosen.get(slot, name) for slot, name in components.items()},
        "runs": dict(trial["runs"]),
        "tags": {key: str(value) for key, value in tags.items() if value is not None},
        "params": dict(trial["settings"]),
    }


def followed(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """What a mirror is to show: the records of all studies and sweeps, or of those called `name`, at whichever scale.

    Raises ConfigError when nothing is called so.
    """

    def named(known: Sequence[str]) -> list[str]:
        return [one for one in known if name in (None, one, one.partition("@")[0])]

    studies, sweeps = named(store.studies()), named(store.sweeps())
    if name is not None and not studies and not sweeps:
        known = dict.fromkeys([*store.studies(), *store.sweeps()])
        raise ConfigError(unknown("study or sweep", name, list(known)), hint="gpt2lab runs")
    return [store.study(one).plain() for one in studies] + [as_followed(store.sweep(one)) for one in sweeps]


def dashboard_command(storage: str) -> str:
    """The command that opens optuna-dashboard on a storage, which is addressed as a sweep's record has it."""
    kind, _, rest = storage.partition(":")
    journal = rest.partition("?")[0].removeprefix("//")  # it wants the file alone
    return shlex.join(["optuna-dashboard", journal if kind == "journal" else storage])
