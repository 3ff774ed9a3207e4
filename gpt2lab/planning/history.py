"""What was declared under a study's name before, which results could be seen by then, and what that means for it.

A declaration counts as it was before the first results. So a study may be stopped, run again and extended, and its
words keep their meaning:

- Seeds that are added after a verdict are judged at the looks that every study has (analysis/looks.py).
- Looks that are written down, changed or left out after results were there do not count; those declared first do.
- Leaving out seeds that have results is a choice among results, and so is ending before the first look: exploratory.
- Contrasts that are left out stay members of the family; a contrast whose results were there before it was declared is
  exploratory. Smallest effect and alpha are those of the first declaration.
- Fresh seeds alone begin anew, and may be added to likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt2lab.analysis.verdicts import FEWEST
from gpt2lab.analysis.words import listed, plural
from gpt2lab.records import Earlier, Effect, History, StudyRecord
from gpt2lab.store import Store

KEPT = ("hash", "created", "reproduce", "seeds", "baseline_seeds", "looks", "contrasts", "smallest_effect", "alpha")
"""What is remembered of an earlier declaration, beside its arms and the seeds that had results."""


def with_history(record: StudyRecord, store: Store) -> StudyRecord:
    """The record, with what was declared under its name before. The same declaration again keeps its date."""
    if record.name not in store.studies():
        return record.with_(earlier=[], history=history(record, []))
    before = store.study(record.name)
    earlier = list(before.earlier)
    if before.hash == record.hash:
        return record.with_(created=before.created, earlier=earlier, history=history(record, earlier))
    replaced = {key: getattr(before, key) for key in KEPT}
    arms = {name: arm.settings for name, arm in before.arms.items()}
    earlier.append(Earlier(**replaced, arms=arms, finished=seeds_finished(before, store)))
    return record.with_(earlier=earlier, history=history(record, earlier))


def seeds_finished(record: StudyRecord, store: Store) -> list[int]:
    """The seeds at which two arms of a record have results, so that somebody may have compared them. An arm with seeds
    of its own has them in the place of the study's, one by one."""
    arms = [{int(seed): run for seed, run in arm.runs.items()} for arm in record.arms.values()]
    found = []
    for position, seed in enumerate(record.seeds):
        own = [runs.get(seed) or dict(enumerate(runs[s] for s in sorted(runs))).get(position) for runs in arms]
        ids = {run for run in own if run}
        if sum(store.run(run).result() is not None for run in ids) > 1:
            found.append(seed)
    return found


def history(record: StudyRecord, earlier: Sequence[Earlier]) -> History:
    """What earlier declarations with results mean for this one: looks, first_seeds, first_baseline, smallest_effect and
    alpha are those that were declared when no result could be seen."""
    seen = _gone_on_from(record, [past for past in earlier if past.finished and len(_alike(record, past)) > 1])
    now, had = set(record.seeds), {seed for past in seen for seed in past.finished}
    fresh = History(
        looks=list(record.looks), first_seeds=len(now), first_baseline=record.baseline_seeds,
        smallest_effect=record.smallest_effect, alpha=record.alpha,
    )  # fmt: skip
    if not had & now:
        return fresh
    declared = [_named(contrast) for contrast in record.contrasts]
    before = [_named(contrast) for past in seen for contrast in past.contrasts or ()]
    known = {arm for past in seen for arm in _alike(record, past)}
    counting = fresh.with_(
        undeclared=_chosen_among(had, now),
        late=[pair for pair in declared if before and pair not in before and set(pair) <= known],
        dropped=[list(pair) for pair in dict.fromkeys(map(tuple, before)) if list(pair) not in declared],
        looks=list(seen[0].looks or ()),
        smallest_effect=seen[0].smallest_effect or record.smallest_effect,
        alpha=seen[0].alpha or record.alpha,
    )
    first = next((past for past in seen if len(past.finished) >= FEWEST), None)  # fewer allow no word
    if first is not None:
        counting = counting.with_(first_seeds=len(first.seeds or ()), first_baseline=first.baseline_seeds)
        counting = counting.with_(undeclared=counting.undeclared or _stopped_early(counting, now))
    return counting.with_(changed=_changed(record, counting, first or seen[0]))


def _gone_on_from(record: StudyRecord, seen: Sequence[Earlier]) -> Sequence[Earlier]:
    """The earlier declarations from the last one on whose seeds were all fresh; all of them, where this one has seeds
    from before that again."""
    began, had = 0, set[int]()
    for i, past in enumerate(seen):
        if not had & set(past.seeds or ()):
            began = i
        had |= set(past.finished)
    older = {seed for past in seen[:began] for seed in past.finished}
    return seen if older & set(record.seeds) else seen[began:]


def _alike(record: StudyRecord, past: Earlier) -> list[str]:
    """The arms of an earlier declaration that this one trains in the same way."""
    if not isinstance(past.arms, Mapping):  # records from before settings were remembered have the names alone
        return [name for name in past.arms if name in record.arms]
    return [name for name, hashed in past.arms.items() if name in record.arms and record.arms[name].settings == hashed]


def _named(contrast: list[str] | Effect) -> list[str]:
    """(arm, against), whichever kind of contrast it is."""
    return [contrast.arm, contrast.against] if isinstance(contrast, Effect) else contrast


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


def _stopped_early(counting: History, now: set[int]) -> str | None:
    """Why it ends before its first look, or None: whoever may stop where results please has looked after every seed."""
    due = (counting.looks or [counting.first_seeds])[0]
    if len(now) >= due:
        return None
    return f"{due} seeds were declared before results were there, and only {len(now)} are now"


def _changed(record: StudyRecord, counting: History, first: Earlier) -> list[str]:
    """What counts otherwise than the record now says, in sentences without a stop."""
    changes = []
    n = len(first.finished)
    if set(record.seeds) - set(first.seeds or ()) and not counting.undeclared:
        changes.append(f"Seeds were added after {n} had results")
    if counting.looks and list(record.looks) != counting.looks:
        looks = listed(map(str, counting.looks))
        changes.append(f"`looks` were changed after {n} seeds had results; those that count are {looks}")
    elif record.looks and not counting.looks:
        changes.append(f"`looks` were written down after {n} seeds had results, and do not count as declared")
    for key, name in (("smallest_effect", "The smallest effect of interest"), ("alpha", "alpha")):
        new, old = getattr(record, key), getattr(counting, key)
        if new != old:
            changes.append(f"{name} was changed to {new:g} after results were there; it counts as {old:g}")
    if counting.dropped:
        contrasts = listed(f"{arm} against {against}" for arm, against in counting.dropped)
        changes.append(
            f"{plural(len(counting.dropped), 'contrast')} with results left out, still counted in the family: "
            f"{contrasts}"
        )
    return changes
