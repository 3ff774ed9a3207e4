"""One search, as one of its workers deals with it: take a slot, report, say what came of it, look after the others.

Two rules carry everything. A trial that has ended stays as it is, whoever asks, so of two workers with a result for one
turn the second is refused. And what is missing follows from what is stored (ledger.py), so it does not matter where a
worker died, nor how many others notice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gpt2lab.store import now
from gpt2lab.sweep import sampling
from gpt2lab.sweep.ledger import Ledger
from gpt2lab.sweep.liveness import GRACE_SECONDS, Watch, shown, worker_id
from gpt2lab.sweep.turns import OWN_ATTRIBUTES, STATES, TOKENS, End, as_record, ended, standings

if TYPE_CHECKING:
    from gpt2lab.planning.search import SearchSettings
    from gpt2lab.planning.space import Space

BEAT_SECONDS = 10.0
"""Between two heartbeats of a worker; well below the grace period, of which a locked storage may take a minute."""
UNOWNED_SECONDS = 15.0
"""How long a turn may be taken without saying by whom: between two writes of one worker."""


@dataclass(frozen=True)
class Turn:
    """One attempt at a slot. `params`: as they were drawn; `Space.settings` says what is trained for them. `retries`:
    how often the slot was lost before. `enqueued`: a known point."""

    slot: int
    turn: int
    number: int
    params: dict[str, Any]
    retries: int
    enqueued: bool


@dataclass
class _Held:
    """A turn that this worker is at: its trial, its reports as step -> (tokens, value), and what was decided."""

    trial_id: int
    steps: dict[int, tuple[int, float]] = field(default_factory=dict)
    stop_at: int | None = None
    lost: bool = False


class Slots:
    """The slots of one search, for one worker. From one thread only, and one object per search and process.

    slots: how many there are in all. known: complete points that take the first slots. tokens: of one whole run.
    worker: who asks (`liveness.worker_id`). say: takes sentences for people. Raises what the storage does.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study: str,
        *,
        space: Space,
        settings: SearchSettings,
        slots: int,
        known: Sequence[Mapping[str, Any]] = (),
        tokens: int,
        direction: sampling.Direction = "minimize",
        worker: str | None = None,
        say: Callable[[str], None] = lambda _: None,
        grace_seconds: float = GRACE_SECONDS,
        unowned_seconds: float = UNOWNED_SECONDS,
    ) -> None:
        self.space, self.settings, self.slots, self.direction = space, settings, slots, direction
        self.worker = worker or worker_id()
        self._storage, self._say, self._tokens = storage, say, tokens
        self._watch, self._unowned = Watch(grace_seconds), Watch(unowned_seconds)
        self._held: dict[int, _Held] = {}
        self._beat_at = -math.inf
        self._ledger = Ledger(
            storage, study, space=space, slots=slots, fixed=self._fixed_points(known), known=len(known),
            direction=direction, worker=self.worker, watch=self._watch,
        )  # fmt: skip
        self._ledger.mend()

    def _fixed_points(self, known: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Parameters of the slots that have theirs from the start."""
        name, rest = self.settings.sampler.name, max(0, self.slots - len(known))
        drawn = self.space.points(name, self.settings.sampler.seed, rest) if name != "tpe" and rest else []
        return [*known, *drawn]

    # What there is to do

    def unfinished(self) -> int:
        """Slots that have not come to their end: they wait, or somebody works on them."""
        trials = self._ledger.trials()
        count = sum(one.open for one in standings(trials, self.slots).values() if one.slot < self.slots)
        if not count:
            self._ledger.drop_repeated(trials)  # nobody will claim anything any more
        return count

    def failures(self) -> int:
        """Slots that failed."""
        return sum(one.outcome == "failed" for one in self._ledger.standings().values())

    def claim(self) -> Turn | None:
        """The lowest slot that waits, with its parameters; it is this worker's from now on. None if nothing waits."""
        trials = self._ledger.trials()
        self._ledger.drop_repeated(trials)
        for one in standings(trials, self.slots).values():
            trial = one.last
            if trial is None or trial.state != TrialState.WAITING or one.slot >= self.slots:
                continue
            try:
                if not self._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    continue
                self._storage.set_trial_user_attr(trial._trial_id, "worker", self.worker)
                params = self._params_for(trial, one.slot)
            except UpdateFinishedTrialError:  # another worker's already; or this one was so slow that it seemed dead
                continue
            self._held[trial.number] = _Held(trial._trial_id)
            self.beat()
            turn, known = trial.user_attrs["turn"], bool(trial.user_attrs.get("enqueued"))
            return Turn(one.slot, turn, trial.number, params, one.losses, known)
        return None

    def _params_for(self, trial: FrozenTrial, slot: int) -> dict[str, Any]:
        if trial.params and sampling.is_complete(self.space, trial.params):
            return dict(trial.params)
        params = sampling.draw(
            self.space, self.settings.sampler, slot=slot, slots=self.slots, past=self._ledger.past(besides=slot),
            direction=self.direction,
        )  # fmt: skip
        for name, one in sampling.distributions(self.space, params).items():
            self._storage.set_trial_param(trial._trial_id, name, one.to_internal_repr(params[name]), one)
        return params

    # What comes of a turn

    def note(self, turn: Turn, **facts: Any) -> None:
        """Keep something about a turn while it runs, as plain data. The record takes settings, runs, values, tokens and
        found."""
        assert not OWN_ATTRIBUTES & facts.keys()
        held = self._held[turn.number]
        for name, value in facts.items():
            try:
                self._storage.set_trial_user_attr(held.trial_id, name, value)
            except UpdateFinishedTrialError:
                held.lost = True

    def report(self, turn: Turn, step: int, tokens: int, value: float) -> bool:
        """Keep an intermediate value, and say whether the trial should be stopped, now or since an earlier report.

        A step that was reported is not asked again. A value that is not finite is not kept, and decides nothing: who
        trains will say that it diverged. True as well when the turn was given to somebody else.
        """
        held = self._held[turn.number]
        if held.lost or step in held.steps or not math.isfinite(value):
            return held.lost or (held.stop_at is not None and step >= held.stop_at)
        try:
            self._storage.set_trial_system_attr(held.trial_id, TOKENS.format(step=step), tokens)
            self._storage.set_trial_intermediate_value(held.trial_id, step, float(value))
            held.steps[step] = (tokens, float(value))
            if held.stop_at is None and self._should_stop(turn, held):
                held.stop_at = step
                self._storage.set_trial_user_attr(held.trial_id, "would_stop_at", step)
        except UpdateFinishedTrialError:
            held.lost = True
        self.beat()
        return held.lost or held.stop_at is not None

    def _should_stop(self, turn: Turn, held: _Held) -> bool:
        if self.settings.pruner.name == "none":
            return False
        return sampling.stops(
            self.settings.pruner, slot=turn.slot, curve=[held.steps[step] for step in sorted(held.steps)],
            others=self._ledger.past(besides=turn.slot), tokens=self._tokens, direction=self.direction,
        )  # fmt: skip

    def lost(self, turn: Turn) -> bool:
        """Whether the turn is known to have been given to somebody else, who took this worker for dead."""
        return turn.number in self._held and self._held[turn.number].lost

    def finish(self, turn: Turn, value: float, **facts: Any) -> bool:
        """The trial came to its end. False, here and below, if the turn was somebody else's by then: it counts not."""
        if not math.isfinite(value):
            return self.diverge(turn, "its value is not a finite number", **facts)
        return self._end(turn, "finished", facts, value=float(value))

    def prune(self, turn: Turn, step: int, **facts: Any) -> bool:
        """The trial was stopped at a step because others did better."""
        steps = self._held[turn.number].steps
        return self._end(turn, "pruned", facts, value=steps[max(steps)][1] if steps else None, step=step)

    def diverge(self, turn: Turn, reason: str, **facts: Any) -> bool:
        """Its numbers ceased to be finite: a result, never the best, and one that the sampler learns from."""
        return self._end(turn, "diverged", facts, reason=reason)

    def fail(self, turn: Turn, reason: str, **facts: Any) -> bool:
        """It could not be trained. The slot is not tried again."""
        return self._end(turn, "failed", facts, reason=reason)

    def release(self, turn: Turn) -> bool:
        """Stopped in good order: another turn of the slot continues, with the same parameters. No retry."""
        accepted = self._end(turn, "stopped", {})
        self._ledger.mend()
        return accepted

    def _end(
        self, turn: Turn, outcome: End, facts: Mapping[str, Any], *, value: float | None = None, **more: Any
    ) -> bool:
        """Two writes: what came of it, then that it is over. Of who dies in between all is told: `repair` does the
        rest."""
        trial_id, values = self._held[turn.number].trial_id, None if value is None else [value]
        end = {"outcome": outcome, "value": value, "facts": dict(facts), **more}
        try:
            self._storage.set_trial_user_attr(trial_id, "end", end)
            accepted = bool(self._storage.set_trial_state_values(trial_id, STATES[outcome], values))
        except UpdateFinishedTrialError:  # or this worker did it, and the answer to it was lost on the way
            accepted = ended(self._storage.get_trial(trial_id)) == outcome
        del self._held[turn.number]
        if not accepted:
            self._say(
                f"trial {turn.number} had been given to another worker, because this one was thought to be gone: its "
                "result is not counted"
            )
        return accepted

    # Workers that are gone

    def beat(self) -> None:
        """Say that this worker lives, if that is due. Cheap: to be called often."""
        if self._held and time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._storage.set_study_user_attr(self._ledger.id, f"beat:{self.worker}", now())
            self._beat_at = time.monotonic()

    def repair(self) -> list[str]:
        """Give back what workers hold that are gone, and enqueue what is missing. Every worker calls it now and then.

        -> what was done, in sentences
        """
        self.beat()
        trials = self._ledger.trials()
        running = [
            trial
            for trial in trials
            if trial.state == TrialState.RUNNING and trial.number not in self._held and "slot" in trial.user_attrs
        ]
        beats = self._storage.get_study_user_attrs(self._ledger.id) if running else {}
        told = []
        for trial in running:
            why = self._why_lost(trial, beats)
            if why:
                told += self._ledger.take_back(trial, why)
        self._ledger.mend(None if told else standings(trials, self.slots))
        return told

    def _why_lost(self, trial: FrozenTrial, beats: Mapping[str, Any]) -> str | None:
        owner = trial.user_attrs.get("worker")
        if owner is None:
            silent = self._unowned.silent(str(trial.number), None)
            return "its worker ended as soon as it had taken it" if silent else None
        if owner == self.worker:
            return "its worker could not begin it"
        if self._watch.gone(owner, beats.get(f"beat:{owner}")):
            return f"its worker {shown(owner)} is gone"
        return None

    # What came of it all

    def trials(self) -> list[dict[str, Any]]:
        """Every slot, as the record of the sweep has it."""
        found = self._ledger.standings().values()
        return [as_record(one, self.space.settings(one.last.params if one.last else {})) for one in found]

    def best(self) -> dict[str, Any] | None:
        """The finished trial with the best value, as in `trials`; the first of several equal ones."""
        sign = 1 if self.direction == "minimize" else -1
        finished = [one for one in self.trials() if one["outcome"] == "finished"]
        return min(finished, key=lambda one: sign * one["value"], default=None)

    def importance(self) -> dict[str, Any] | None:
        """How much each dimension mattered; None where too few trials were finished."""
        return sampling.importance(self.space, self._ledger.past(), self.direction)
