"""The arms of an ablation: each a few changes to what all share, checked against the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2lab.config import Config, examine
from gpt2lab.config.fitting import Complaint, Located, located
from gpt2lab.config.source import Key, Source, dotted, expand, lay
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.identity import digest, settings
from gpt2lab.planning.declaration import MAX_SEEDS
from gpt2lab.planning.designs import CONTROL, Written
from gpt2lab.schema import convert

# Who draws which seeds, so that no run is judged that was also used to choose or to plan: an ablation's own seeds are 0
# to 99 (what a file may name), bracketing the rate 100, noise floors 200 to 299, control arms from 500 on.
BRACKET_SEED = 100
NOISE_SEEDS = 200
CONTROL_SEEDS = 500
CONTROL_STRIDE = 2 * MAX_SEEDS  # a control arm brackets its rate on a seed of its own, too

# What all arms share, because runs are compared on it or because it is not theirs to say.
SHARED = {
    "data": "all arms are trained and judged on the same tokens",
    "evaluation": "all arms are judged alike: see `evaluate`",
    "scale": "the scale is that of the whole ablation",
    "seed": "see `seeds`",
    "repeat": "see `seeds`",
    "model.block_size": "all arms are judged at one context length: see `evaluate.contexts` for others",
    "training.device": "all arms run on one kind of device: use --set",
    "training.threads": "all arms run with as many threads: use --set",
}
# What moves the best learning rate: at a single shared rate such a contrast says little (docs/statistics.md).
MOVES_RATE = ("model.init", "model.parametrization", "model.residual", "training.batch_tokens")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: `changes` as written, by dotted key, and the whole `config` with seed 0."""

    name: str
    changes: Mapping[str, Any]
    config: Config
    control: bool = False
    expected: str | None = None
    first_seed: int = 0
    """What is added to the ablation's seeds: control arms draw seeds of their own, each apart from all others."""
    seeds: tuple[int, ...] | None = None
    """Its own seeds, in the place of the ablation's."""


@dataclass(frozen=True)
class Base:
    """What every arm changes, with what is wrong with it already."""

    source: Source
    complaints: tuple[Complaint, ...]

    @classmethod
    def of(cls, source: Source) -> Base:
        """`source`, examined."""
        return cls(source, tuple(examine(source)[1]))

    @property
    def layer(self) -> int:
        """The layer of changes laid over it."""
        return 1 + max((place.layer for place in self.source.places.values()), default=0)


Change = tuple[str, Source]


def resolve_arm(
    written: Written, file: Source, base: Base, *, is_baseline: bool, expected: str | None
) -> tuple[Arm | None, list[Located]]:
    """One arm of an ablation's `file` over `base`, or None; and what is wrong with it that is not so with the base."""
    name = written.name
    changes = [change for one in written.changes for change in expand(one.key, file.part(one.at).marked(one.prefix))]
    control, found = _control(written, file, nothing=not changes, is_baseline=is_baseline)
    own, refused = _own_changes(changes)
    found += refused
    try:
        laid = lay(base.source, own)
    except ConfigError as error:
        return None, [*found, *((file.place(written.at), problem) for problem in error.problems)]
    config, complaints = examine(laid)
    found += [_at_arm(written, file, laid, base, c) for c in complaints if c not in base.complaints]
    if config is None:
        return None, found
    first = first_control_seed(name, file) if control else 0
    return Arm(name, {key: value.tree for key, value in changes}, config, control, expected, first), found


def first_control_seed(name: str, file: Source) -> int:
    """500 for the first control arm of the file, 700 for the second, ...; the same whichever arms are chosen."""
    controls = [arm for arm, written in file.tree["arms"].items() if isinstance(written, dict) and CONTROL in written]
    return CONTROL_SEEDS + CONTROL_STRIDE * controls.index(name)


def _control(written: Written, file: Source, *, nothing: bool, is_baseline: bool) -> tuple[bool, list[Located]]:
    """Whether the arm is a control, and what is wrong with that."""
    complaints = []
    own = file.tree.get("arms", {}).get(written.name) if written.at[:1] == ("arms",) else None
    control, key = False, (*written.at, CONTROL)
    try:
        control = bool(convert(own.get(CONTROL, "false"), bool)) if isinstance(own, dict) else False
    except ValueError as error:
        complaints.append(Complaint(str(error), (key,)))
    if nothing and not control and not is_baseline:
        complaints.append(Complaint("changes nothing; if that is meant, write `control: true`", (written.at,)))
    return control, [located(file, complaint) for complaint in complaints]


def _own_changes(changes: list[Change]) -> tuple[list[Change], list[Located]]:
    """The changes that an arm may make, and complaints about the others."""
    own, refused = [], []
    for key, value in changes:
        why = next((why for shared, why in SHARED.items() if f"{key}.".startswith(f"{shared}.")), None)
        if why is None:
            own.append((key, value))
        else:
            place = value.place(())
            refused.append((place, Problem(place.prefix + key, f"an arm cannot change this: {why}")))
    return own, refused


def _at_arm(written: Written, file: Source, laid: Source, base: Base, complaint: Complaint) -> Located:
    """The complaint at the arm's own change; at the arm itself where what it clashes with was written elsewhere."""
    place, problem = located(laid, complaint)
    if place.layer == base.layer:
        return place, problem
    here = file.place(written.at)
    return here, Problem(f"{here.prefix}{dotted(written.at)}: {dotted(complaint.keys[0])}", complaint.what)


def between_arms(
    baseline: str, arms: Mapping[str, Arm], at: Mapping[str, Key], *, equal_tokens: bool, bracketed: bool
) -> Iterator[Complaint]:
    """What is wrong with arms beside each other: two that are the same, training on unequal amounts, and rates that
    were set where they are to be bracketed. `at`: where each arm stands in the file."""
    if baseline not in arms:
        return
    tokens = _tokens(arms[baseline])
    seen: dict[str, str] = {}
    for name, arm in sorted(arms.items(), key=lambda item: item[0] != baseline):
        key = at[name]
        if equal_tokens and _tokens(arm) != tokens:
            what = f"trains on {_tokens(arm)} tokens, the baseline on {tokens}: `equalise: tokens` wants them equal"
            yield Complaint(what, (key,))
        if bracketed and "optim.lr" in arm.changes and not arm.control:
            yield Complaint("sets optim.lr, which `lr_bracket` is to find; drop one of the two", (key,))
        if arm.control:
            continue
        twin = seen.setdefault(digest(settings(arm.config)), name)
        if twin != name and arm.changes:
            yield Complaint(f"is the same training as arm '{twin}'; if that is meant, write `control: true`", (key,))


def _tokens(arm: Arm) -> int:
    return arm.config.training.steps * arm.config.training.batch_tokens


def exploratory_reason(arm: Arm, baseline: Arm) -> str | None:
    """Why a contrast of the two at one shared learning rate may claim nothing, as the end of a sentence, or None."""
    ours, theirs = arm.config, baseline.config
    moved = [f"optim.{name}" for name, value in ours.optim if value != getattr(theirs.optim, name)]
    for key in MOVES_RATE:
        section, name = key.split(".")
        if getattr(getattr(ours, section), name) != getattr(getattr(theirs, section), name):
            moved.append(key)
    if not moved:
        return None
    return f"it changes {', '.join(moved)}, which moves the best learning rate, and rates were not bracketed"
