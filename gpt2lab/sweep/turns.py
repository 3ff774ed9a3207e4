"""What the trials in the storage mean: slots, their turns, and what became of them.

A slot is one trial of a search. Each attempt at it is a turn, which is one trial of Optuna with `slot`, `turn` and
`losses` (how often the slot was lost before) among its attributes. The storage is all there is: whoever reads it comes
to the same conclusions, so a worker may die between any two writes and any other can go on from what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from gpt2lab.sweep.liveness import shown
from gpt2lab.sweep.sampling import Past

Outcome = Literal["waiting", "running", "finished", "pruned", "diverged", "failed"]
End = Literal["finished", "pruned", "diverged", "failed", "stopped", "duplicate"]
STATES: dict[str, TrialState] = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,  # never the best; an infinite value would be complete to Optuna
    "failed": TrialState.FAIL,
    "stopped": TrialState.FAIL,
    "duplicate": TrialState.FAIL,
}
LOSSES = 4
"""A slot that was lost so often ends as failed: whatever kills its workers would kill the next. Every loss before is
followed by one more turn; three workers killed at random may well have been at the same slot."""
OWN_ATTRIBUTES = frozenset({"slot", "turn", "losses", "enqueued", "worker", "end", "lost", "would_stop_at"})
TOKENS = "gpt2lab:tokens:{step}"
"""System attribute with the tokens of a report: Optuna keeps its step and value only."""


@dataclass(frozen=True)
class Standing:
    """What one slot has come to. `last`: its last turn; None before the first. `due`: it needs another one."""

    slot: int
    last: FrozenTrial | None
    outcome: Outcome
    reason: str | None = None
    due: bool = False

    @property
    def losses(self) -> int:
        """How often it was lost, by the time that its next turn begins."""
        if self.last is None:
            return 0
        return int(self.last.user_attrs.get("losses", 0)) + int(ended(self.last) == "lost")

    @property
    def next_turn(self) -> int:
        """The number of its next turn."""
        return 0 if self.last is None else int(self.last.user_attrs["turn"]) + 1

    @property
    def open(self) -> bool:
        """Whether it has not come to its end."""
        return self.outcome in ("waiting", "running")


def last_turns(trials: Iterable[FrozenTrial]) -> tuple[dict[int, FrozenTrial], list[FrozenTrial]]:
    """The last turn of every slot; and trials that repeat a turn, of which the first alone counts.

    Two workers may create the same turn at the same time. Trials get their numbers in the order in which they come to
    be in the storage, so whoever sees the second sees the first as well. Trials of others in the study are left alone.
    """
    first: dict[tuple[int, int], FrozenTrial] = {}
    repeated = []
    last: dict[int, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        slot, turn = trial.user_attrs.get("slot"), trial.user_attrs.get("turn")
        if not isinstance(slot, int) or not isinstance(turn, int):
            continue
        if first.setdefault((slot, turn), trial) is not trial:
            repeated.append(trial)
        elif slot not in last or last[slot].user_attrs["turn"] < turn:
            last[slot] = trial
    return last, repeated


def standings(trials: Iterable[FrozenTrial], slots: int) -> dict[int, Standing]:
    """Every slot below `slots`, and those above that were begun when there were more."""
    last, _ = last_turns(trials)
    found = {slot: _standing(slot, last.get(slot)) for slot in range(slots)}
    above = {slot: _standing(slot, trial) for slot, trial in sorted(last.items()) if slot >= slots}
    return found | {slot: one for slot, one in above.items() if one.outcome != "waiting"}


def _standing(slot: int, trial: FrozenTrial | None) -> Standing:
    if trial is None:
        return Standing(slot, None, "waiting", due=True)
    became = ended(trial)
    reason = (trial.user_attrs.get("end") or {}).get("reason")
    if became == "stopped":
        return Standing(slot, trial, "waiting", due=True)
    if became == "lost":
        why = str(trial.user_attrs["lost"].get("why"))
        if int(trial.user_attrs.get("losses", 0)) + 1 < LOSSES:
            return Standing(slot, trial, "waiting", why, due=True)
        return Standing(slot, trial, "failed", f"lost {LOSSES} times, at last because {why}")
    if became == "failed" and reason is None:
        reason = "it was marked as failed from outside"
    return Standing(slot, trial, became, reason)


def ended(trial: FrozenTrial) -> Any:
    """What became of a turn: an Outcome, "stopped" or "lost". Optuna's state decides; the attributes say more."""
    end = trial.user_attrs.get("end") or {}
    if trial.state == TrialState.FAIL:
        told = end.get("outcome")
        if told in ("failed", "stopped"):
            return told
        return "lost" if "lost" in trial.user_attrs else "failed"
    if trial.state == TrialState.PRUNED:
        return "diverged" if end.get("outcome") == "diverged" else "pruned"
    return {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "finished"}[trial.state]


def curve_of(trial: FrozenTrial) -> list[tuple[int, int, float]]:
    """Its reports: (step, tokens, value)."""
    tokens = {step: trial.system_attrs.get(TOKENS.format(step=step)) for step in trial.intermediate_values}
    return [(step, int(at), trial.intermediate_values[step]) for step, at in sorted(tokens.items()) if at is not None]


def past_of(one: Standing, complete: bool) -> Past | None:
    """A slot for samplers and pruners; None where nothing is known. `complete`: whether its parameters are."""
    if one.last is None or not complete or one.outcome in ("waiting", "failed"):
        return None
    curve = curve_of(one.last)
    stop = one.last.user_attrs.get("would_stop_at")
    went_on = one.outcome in ("finished", "running") and stop is not None
    return Past(
        slot=one.slot,
        outcome=one.outcome,  # type: ignore[arg-type]  # the others were sent away above
        params=one.last.params,
        value=one.last.value if one.outcome == "finished" else None,
        curve=[(tokens, value) for _, tokens, value in curve],
        stop_tokens=next((tokens for step, tokens, _ in curve if step == stop), None) if went_on else None,
    )


def as_record(one: Standing, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A slot as the record of a sweep has it. `settings`: what its parameters stand for, where nothing was noted."""
    blank: dict[str, Any] = {
        "slot": one.slot, "number": None, "outcome": one.outcome, "reason": one.reason, "settings": dict(settings),
        "value": None, "values": {}, "curve": [], "stopped_at": None, "would_stop_at": None, "runs": {}, "tokens": 0,
        "found": False, "enqueued": False, "retries": 0, "worker": None, "started": None, "ended": None,
    }  # fmt: skip
    if one.last is None:
        return blank
    attrs = one.last.user_attrs
    end = attrs.get("end") or {}
    noted = attrs | end.get("facts", {})
    stop = attrs.get("would_stop_at")
    worker = attrs.get("worker")
    return blank | {
        "number": one.last.number,
        **{key: noted[key] for key in ("settings", "values", "runs", "tokens", "found") if key in noted},
        "value": one.last.value if one.outcome == "finished" else None,
        "curve": [list(point) for point in curve_of(one.last)],
        "stopped_at": end.get("step") if one.outcome == "pruned" else None,
        "would_stop_at": None if one.outcome == "pruned" else stop,
        "enqueued": bool(attrs.get("enqueued")),
        "retries": int(attrs.get("losses", 0)),
        "worker": shown(worker) if worker else None,
        "started": iso(one.last.datetime_start),
        "ended": iso(one.last.datetime_complete) if not one.open else None,
    }


def iso(when: datetime | None) -> str | None:
    """A time of Optuna's, which is local and says nothing of its zone, as records hold it."""
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds")
