"""What was declared under a study's name before, which results could be seen by then, and what that means for it.

A declaration counts as it was before the first results. So a study may be stopped, run again and extended, and its
words keep their meaning:

- Seeds that are added after a verdict are judged at the looks that every study has (analysis/planning.py).
- Looks that are written down, changed or left out after results were there do not count; those declared first do.
- Leaving out seeds that have results is a choice among results, and so is ending before the first look: exploratory.
- Contrasts that are left out stay members of the family; a contrast whose results were there before it was declared is
  exploratory. Smallest effect and alpha are those of the first declaration.
- Fresh seeds alone begin anew, and may be added to likewise.

Layer: plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpt2lab.analysis.verdicts import FEWEST
from gpt2lab.analysis.wording import listed
from gpt2lab.store import Store
from gpt2lab.text import plural

Record = Mapping[str, Any]

KEPT = ("hash", "created", "reproduce", "seeds", "baseline_seeds", "looks", "contrasts", "smallest_effect", "alpha")
"""What is remembered of an earlier declaration, beside its arms and the seeds that had results."""


def with_history(record: dict[str, Any], store: Store) -> dict[str, Any]:
    """The record, with what was declared under its name before. The same declaration again keeps its date."""
    if record["name"] not in store.studies():
        return {**record, "earlier": [], "history": history(record, [])}
    before = store.study(record["name"])
    earlier = list(before.get("earlier", []))
    if before["hash"] == record["hash"]:
        return {**record, "created": before["created"], "earlier": earlier, "history": history(record, earlier)}
    arms = {name: entry.get("settings") for name, entry in before["arms"].items()}
    earlier.append({**{key: before.get(key) for key in KEPT}, "arms": arms, "finished": seeds_finished(before, store)})
    return {**record, "earlier": earlier, "history": history(record, earlier)}


def seeds_finished(record: Record, store: Store) -> list[int]:
    """The seeds at which two arms of a record have results, so that somebody may have compared them. An arm with seeds
    of its own has them in the place of the study's, one by one."""
    arms = [{int(seed): run for seed, run in arm["runs"].items()} for arm in record["arms"].values()]
    found = []
    for position, seed in enumerate(record["seeds"]):
        own = [runs.get(seed) or dict(enumerate(runs[s] for s in sorted(runs))).get(position) for runs in arms]
        ids = {run for run in own if run}
        if sum(store.run(run).result() is not None for run in ids) > 1:
            found.append(seed)
    return found


def history(record: Record, earlier: Sequence[Record]) -> dict[str, Any]:
    """What earlier declarations with results mean for this one, as plain data:

    looks, first_seeds, first_baseline: what was declared when no result could be seen.
    undeclared: why nothing can be claimed, or None. late: contrasts of which alone nothing can. dropped: contrasts that
    still count in the family. smallest_effect, alpha: as first declared. changed: what is told of all that.
    """
    seen = _gone_on_from(record, [one for one in earlier if one.get("finished") and len(_alike(record, one)) > 1])
    now, had = set(record["seeds"]), {seed for one in seen for seed in one["finished"]}
    fresh: dict[str, Any] = {
        "looks": list(record["looks"]), "first_seeds": len(now), "first_baseline": record["baseline_seeds"],
        "undeclared": None, "late": [], "dropped": [], "smallest_effect": record["smallest_effect"],
        "alpha": record["alpha"], "changed": [],
    }  # fmt: skip
    if not had & now:
        return fresh
    declared = [_named(contrast) for contrast in record["contrasts"]]
    before = [_named(contrast) for one in seen for contrast in one.get("contrasts") or ()]
    known = {arm for one in seen for arm in _alike(record, one)}
    found = {
        **fresh,
        "undeclared": _chosen_among(had, now),
        "late": [c for c in declared if before and c not in before and set(c) <= known],
        "dropped": [c for c in dict.fromkeys(map(tuple, before)) if list(c) not in declared],
    }
    found["looks"] = list(seen[0].get("looks") or ())
    found["smallest_effect"] = seen[0].get("smallest_effect") or record["smallest_effect"]
    found["alpha"] = seen[0].get("alpha") or record["alpha"]
    first = next((one for one in seen if len(one["finished"]) >= FEWEST), None)  # fewer allow no word
    if first is not None:
        found["first_seeds"], found["first_baseline"] = len(first["seeds"]), first.get("baseline_seeds")
        found["undeclared"] = found["undeclared"] or _stopped_early(found, now)
    found["changed"] = _changed(record, found, first or seen[0])
    return found


def _gone_on_from(record: Record, seen: Sequence[Record]) -> Sequence[Record]:
    """The earlier declarations from the last one on whose seeds were all fresh; all of them, where this one has seeds
    from before that again."""
    began, had = 0, set[int]()
    for i, one in enumerate(seen):
        if not had & set(one["seeds"]):
            began = i
        had |= set(one["finished"])
    older = {seed for one in seen[:began] for seed in one["finished"]}
    return seen if older & set(record["seeds"]) else seen[began:]


def _alike(record: Record, one: Record) -> list[str]:
    """The arms of an earlier declaration that this one trains in the same way."""
    settings = one.get("arms") or {}
    if not isinstance(settings, Mapping):  # records from before settings were remembered have the names alone
        return [name for name in settings if name in record["arms"]]
    return [name for name, own in settings.items() if record["arms"].get(name, {}).get("settings") == own]


def _named(contrast: Any) -> list[str]:
    return [contrast["arm"], contrast["against"]] if isinstance(contrast, Mapping) else [str(one) for one in contrast]


def _chosen_among(had: set[int], now: set[int]) -> str | None:
    """Why the seeds are a choice among results, or None."""
    left_out, added = sorted(had - now), now - had
    if left_out:
        seeds = listed(map(str, left_out))
        verb = "has results and is" if len(left_out) == 1 else "have results and are"
        return f"{'seed' if len(left_out) == 1 else 'seeds'} {seeds} {verb} left out"
    if added and min(added) < max(had):
        return f"added seeds must follow those that have results, up to {max(had)}"
    return None


def _stopped_early(found: Record, now: set[int]) -> str | None:
    """Why it ends before its first look, or None: whoever may stop where results please has looked after every seed."""
    due = (found["looks"] or [found["first_seeds"]])[0]
    if len(now) >= due:
        return None
    return f"{due} seeds were declared before results were there, and only {len(now)} are now"


def _changed(record: Record, found: Record, first: Record) -> list[str]:
    """What counts otherwise than the record now says, in sentences without a stop."""
    told = []
    n = len(first["finished"])
    if set(record["seeds"]) - set(first["seeds"]) and not found["undeclared"]:
        told.append(f"Seeds were added after {n} had results")
    if found["looks"] and list(record["looks"]) != found["looks"]:
        looks = listed(map(str, found["looks"]))
        told.append(f"`looks` were changed after {n} seeds had results; those that count are {looks}")
    elif record["looks"] and not found["looks"]:
        told.append(f"`looks` were written down after {n} seeds had results, and do not count as declared")
    for key, name in (("smallest_effect", "The smallest effect of interest"), ("alpha", "alpha")):
        if record[key] != found[key]:
            told.append(f"{name} was changed to {record[key]:g} after results were there; it counts as {found[key]:g}")
    if found["dropped"]:
        contrasts = listed(f"{arm} against {against}" for arm, against in found["dropped"])
        told.append(f"{plural(len(found['dropped']), 'contrast')} with results left out, still counted in the family: "
                    f"{contrasts}")  # fmt: skip
    return told
