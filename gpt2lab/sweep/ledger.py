"""The study of one search in its storage, and what it takes to keep it whole: every slot enqueued, every turn that was
lost given back, nothing there twice.

All of it is derived from what is stored, so any worker may do it at any time, and again, whatever others do meanwhile.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpt2lab.store import now
from gpt2lab.sweep import sampling
from gpt2lab.sweep.liveness import Watch
from gpt2lab.sweep.turns import LOSSES, STATES, Standing, last_turns, past_of, standings

if TYPE_CHECKING:
    from gpt2lab.planning.space import Space

FILLING_SECONDS = 3.0
"""How long others are waited for to enqueue the slots."""
ELECTION_SECONDS = 0.06
"""How long a worker that is going to do it looks whether another one is."""


class Ledger:
    """One study. `fixed`: parameters of the first slots, `known` of which are known points. `worker`: who looks."""

    def __init__(
        self,
        storage: BaseStorage,
        study: str,
        *,
        space: Space,
        slots: int,
        fixed: Sequence[Mapping[str, Any]],
        known: int,
        direction: sampling.Direction,
        worker: str,
        watch: Watch,
    ) -> None:
        self.storage, self.study, self.space, self.slots = storage, study, space, slots
        self._fixed, self._known, self._worker, self._watch = fixed, known, worker, watch
        self.id = self._find_study(StudyDirection.MINIMIZE if direction == "minimize" else StudyDirection.MAXIMIZE)

    def _find_study(self, direction: StudyDirection) -> int:
        try:
            return self.storage.get_study_id_from_name(self.study)
        except KeyError:
            pass
        try:
            return self.storage.create_new_study([direction], self.study)
        except DuplicatedStudyError:  # another worker came first
            return self.storage.get_study_id_from_name(self.study)

    def trials(self) -> list[FrozenTrial]:
        """All turns, as they are stored now. Not to be changed."""
        return self.storage.get_all_trials(self.id, deepcopy=False)

    def standings(self) -> dict[int, Standing]:
        """Every slot, as it stands now."""
        return standings(self.trials(), self.slots)

    def past(self, besides: int | None = None) -> list[sampling.Past]:
        """What samplers and pruners may know, of all slots but one."""
        found = (
            past_of(one, sampling.is_complete(self.space, one.last.params if one.last else {}))
            for one in self.standings().values()
            if one.slot != besides
        )
        return [one for one in found if one is not None]

    def mend(self, found: Mapping[int, Standing] | None = None) -> None:
        """Enqueue what is missing. `found`: how things stand, where that was just read."""
        found = self.standings() if found is None else found
        if any(one.last is None for one in found.values()):
            self._fill()
            found = self.standings()
        self._heal(found)

    def _fill(self) -> None:
        """Enqueue slots that were never enqueued. Several workers may: one goes ahead, so that not everything is there
        twice, and the others wait a little; a turn that is there twice is sorted out by `drop_repeated`."""
        seen, since = -1, time.monotonic()
        while missing := [slot for slot, one in self.standings().items() if one.last is None]:
            if len(missing) != seen:
                seen, since = len(missing), time.monotonic()
            filler = self.storage.get_study_user_attrs(self.id).get("filler")
            if filler == self._worker:
                for slot in missing:
                    self._enqueue(slot, 0, 0, self._fixed[slot] if slot < len(self._fixed) else {})
            elif filler is None or self._watch.gone(filler, None) or time.monotonic() - since >= FILLING_SECONDS:
                self.storage.set_study_user_attr(self.id, "filler", self._worker)
                time.sleep(
                    ELECTION_SECONDS * random.uniform(0.3, 1)
                )  # of several who do this, the last one is who fills
            else:
                time.sleep(0.1)

    def _heal(self, found: Mapping[int, Standing]) -> None:
        """Enqueue the next turn of every slot that needs one, with the same parameters."""
        for one in found.values():
            if one.due and one.last is not None and one.slot < self.slots:
                complete = sampling.is_complete(self.space, one.last.params)
                self._enqueue(one.slot, one.next_turn, one.losses, one.last.params if complete else {})

    def _enqueue(self, slot: int, turn: int, losses: int, params: Mapping[str, Any]) -> None:
        attrs = {"slot": slot, "turn": turn, "losses": losses} | ({"enqueued": True} if slot < self._known else {})
        trial = FrozenTrial(
            number=-1, trial_id=-1, state=TrialState.WAITING, value=None, datetime_start=None, datetime_complete=None,
            params=dict(params), distributions=sampling.distributions(self.space, params), user_attrs=attrs,
            system_attrs={}, intermediate_values={},
        )  # fmt: skip
        self.storage.create_new_trial(self.id, trial)

    def drop_repeated(self, trials: Sequence[FrozenTrial]) -> None:
        """End every turn that is there a second time."""
        for trial in last_turns(trials)[1]:
            if not trial.state.is_finished():
                try:
                    self.storage.set_trial_user_attr(trial._trial_id, "end", {"outcome": "duplicate"})
                    self.storage.set_trial_state_values(trial._trial_id, STATES["duplicate"])
                except UpdateFinishedTrialError:
                    continue

    def take_back(self, trial: FrozenTrial, why: str) -> list[str]:
        """End a turn whose worker is gone: as its worker said if it got so far, as lost otherwise. -> what was done"""
        end, number = trial.user_attrs.get("end"), trial.number
        try:
            if end:
                values = None if end.get("value") is None else [end["value"]]
                self.storage.set_trial_state_values(trial._trial_id, STATES[end["outcome"]], values)
                return [f"trial {number}: {why}, but it had told what came of it: {end['outcome']}"]
            self.storage.set_trial_user_attr(trial._trial_id, "lost", {"why": why, "by": self._worker, "at": now()})
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:  # another worker was first, or the one that was missed is back
            return []
        again = int(trial.user_attrs.get("losses", 0)) + 1 < LOSSES
        slot = f"slot {trial.user_attrs['slot']}"
        return [f"trial {number} was lost: {why}; {slot} {'is tried once more' if again else 'has failed'}"]
