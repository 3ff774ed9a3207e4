"""Fair tuning: every arm tries multiples of its learning rate with one seed, and is judged at its best on fresh seeds.

One shared rate can mislead by ten times: at nano, post-LN was 0.96 nats worse at pre-LN's rate and 0.10 at its own.

Layer: plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpt2lab.data.prepared import Prepared
from gpt2lab.planning.arms import BRACKET_SEED, Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import Run, final_loss, make_run
from gpt2lab.store import Store

EXTENSIONS = 3
"""How often a bracket is widened, by a doubling or a halving, when the best rate lies at its edge."""


@dataclass(frozen=True)
class Bracket:
    """The search for an arm's learning rate: multiples of its own rate, one seed each. As `Tuned`, it says whether it
    is open, which runs a study trains for it, why its arm cannot be compared, and the arm at what was found."""

    around: Arm
    trials: Mapping[float, Run]
    losses: Mapping[float, float]
    """of the trials that are done; infinity for one that failed"""
    best: float | None
    """the multiple with the lowest loss; None while trials are open"""
    at_edge: bool = False
    """whether it is the first or last one although the bracket was widened as far as it may be"""

    @property
    def reason(self) -> str | None:
        """Why the arm cannot be compared, or None."""
        if not self.at_edge:
            return None
        return f"its best learning rate lies at the edge of the bracket (x{self.best:g})"

    @property
    def open(self) -> bool:
        """Whether trials are still to come."""
        return self.best is None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The trials, which a study trains beside its own runs."""
        return tuple(self.trials.values())

    def arm(self) -> Arm:
        """The arm at the best rate; as it was while that is unknown."""
        return self.around if self.best is None else at_rate(self.around, self.best)


def bracket(arm: Arm, factors: Sequence[float], data: Prepared, machine: Machine, store: Store) -> Bracket:
    """How far the search is, by what the store holds: the trials that are done or due, and the best rate once found."""
    seed = arm.first_seed + BRACKET_SEED
    tried = sorted(factors)
    for extension in range(EXTENSIONS + 1):
        trials = {factor: make_run(at_rate(arm, factor), seed, data, machine) for factor in tried}
        found = {factor: final_loss(run, store, data.floors) for factor, run in trials.items()}
        losses = {factor: loss for factor, loss in found.items() if loss is not None}
        if len(losses) < len(trials):
            return Bracket(arm, trials, losses, None)
        best = min(tried, key=lambda factor: (losses[factor], abs(factor - 1)))
        if tried[0] < best < tried[-1]:
            return Bracket(arm, trials, losses, best)
        if extension < EXTENSIONS:
            tried = sorted([*tried, best / 2 if best == tried[0] else best * 2])
    return Bracket(arm, trials, losses, best, at_edge=True)


def at_rate(arm: Arm, factor: float) -> Arm:
    """The arm with its learning rate multiplied."""
    if factor == 1:
        return arm
    rate = arm.config.optim.lr * factor
    return replace(arm, config=arm.config.with_changes({"optim.lr": repr(rate)}, f"arm {arm.name}, lr x{factor:g}"))
