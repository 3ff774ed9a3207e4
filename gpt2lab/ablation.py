"""An ablation file becomes configs: a baseline, arms that each change something, and what is declared beforehand.

Layer: plan. Everything that is wrong with the file and with any of its arms is said in one error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gpt2lab.arms import MAX_SEEDS, Arm, Base, between_arms, exploratory_reason, resolve_arm
from gpt2lab.config import fill_slots, preset_name, preset_names, preset_source, read_overrides
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.fitting import Complaint, check, error_of, located
from gpt2lab.layers import lay
from gpt2lab.reading import Place, Source, read_file
from gpt2lab.schema import ABSENT, Settings

__all__ = ["Ablation", "Arm", "LoadedAblation", "exploratory_reason", "load_ablation", "seed_list"]

MAX_ARMS = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
Effect = Annotated[float, Field(gt=0)]


class Evaluate(Settings):
    """How the arms of an ablation are judged; null leaves it to the scale."""

    contexts: tuple[float, ...] | None = None
    """Other context lengths, as multiples of block_size."""
    tokens: int | None = Field(None, ge=1)
    """Validation tokens."""
    context_tokens: int | None = Field(None, ge=1)
    """Validation tokens at each of the other lengths."""


class Ablation(Settings):
    """A question, as its file declares it."""

    ablation: str
    """Its name, also that of files."""
    question: str
    """What it asks, in a sentence."""
    base: str
    """Preset or file that the arms change; `--scale` replaces it."""
    baseline: str
    """The arm that others are compared with."""
    arms: dict[str, dict[str, Any]]
    """Name -> changes by dotted key. `control: true` marks an arm that is meant to change nothing."""
    seeds: int | list[int] = 3
    """How many, or which ones."""
    equalise: Literal["tokens", "parameters", "flops", "wall_clock"] = "tokens"
    """What is equal in all arms."""
    evaluate: Evaluate = Field(default_factory=Evaluate)
    expected: dict[str, str] = Field(default_factory=dict)
    """Arm -> what is expected of it, and who says so."""
    smallest_effect: dict[str, Effect] | Effect | None = None
    """Smallest difference of interest in nats: one for all scales, or by scale; null is the scale's own."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Error rate of the whole family of contrasts."""
    screen: bool = False
    """A first look only: its contrasts are exploratory."""
    contrasts: list[tuple[str, str]] | None = None
    """Pairs (arm, against); null is every arm against the baseline."""

    @field_validator("ablation")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not NAME.fullmatch(name) or name.endswith("."):
            raise ValueError("a name of letters, digits, _ . + - is expected, at most 64, the first a letter or digit")
        return name

    @field_validator("question")
    @classmethod
    def _asks(cls, question: str) -> str:
        if not question.strip():
            raise ValueError("a sentence is expected")
        return question.strip()

    @field_validator("arms", mode="before")
    @classmethod
    def _nothing_is_no_changes(cls, arms: Any) -> Any:
        """`learned:` means `learned: {}`."""
        if not isinstance(arms, Mapping):
            return arms
        return {name: {} if changes in ABSENT else changes for name, changes in arms.items()}

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, seeds: int | list[int]) -> int | list[int]:
        seed_list(seeds)
        return seeds

    @field_validator("equalise")
    @classmethod
    def _available(cls, axis: str) -> str:
        if axis != "tokens":
            raise ValueError("only tokens can be equalised yet")
        return axis


@dataclass(frozen=True)
class LoadedAblation:
    """An ablation at one scale, checked as a whole. `seeds`: those of arms that are no controls."""

    name: str
    question: str
    scale: str
    baseline: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    contrasts: tuple[tuple[str, str], ...]
    smallest_effect: float
    alpha: float
    screen: bool

    def exploratory_reason(self, arm: str) -> str | None:
        """Why contrasts of this arm may claim nothing, or None."""
        return exploratory_reason(self.arms[arm], self.arms[self.baseline])


def seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """`n` as the seeds 0 to n - 1, a list as it is. Raises ValueError for what cannot serve."""
    if isinstance(seeds, int) and not 1 <= seeds <= MAX_SEEDS:
        raise ValueError(f"from 1 to {MAX_SEEDS} seeds are expected")
    listed = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not listed or len(set(listed)) != len(listed):
        raise ValueError("at least one seed is expected, and each only once")
    if not all(0 <= seed < MAX_SEEDS for seed in listed):
        raise ValueError(f"seeds are numbers from 0 to {MAX_SEEDS - 1}; those from 500 on belong to control arms")
    return listed


def load_ablation(
    path: str | Path,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    arms: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    plugins: Sequence[str | Path] = (),
) -> LoadedAblation:
    """The ablation of a YAML file.

    scale:     preset or file in the place of the file's `base`.
    overrides: `key=value`, for every arm, before the arm's own changes.
    arms:      only these; the baseline must be among them.
    seeds:     in the place of the file's.
    plugins:   Python files that register components.
    Raises ConfigError with everything that is wrong in the file, in the overrides and in any arm.
    """
    fill_slots(plugins)
    source = read_file(path)
    declared, complaints = check(Ablation, source, stand_ins={"ablation": "unnamed", "question": "?"})
    found = [located(source, complaint) for complaint in complaints]
    if declared is None:
        raise error_of(found)
    found += [located(source, complaint) for complaint in _file_problems(declared, source)]
    try:
        chosen = _chosen_arms(declared, arms)
        listed = _chosen_seeds(declared if seeds is None else seeds)
        base = _base(declared, source, Path(path).parent, scale, overrides)
    except ConfigError as error:
        raise error_of(found, more=error.problems, hint=error.hint) from error
    found += [located(base.source, complaint) for complaint in base.complaints]
    made: dict[str, Arm] = {}
    for name in chosen:
        arm, problems = resolve_arm(
            name,
            declared.arms[name],
            source,
            base,
            is_baseline=name == declared.baseline or declared.baseline not in declared.arms,
            expected=declared.expected.get(name),
        )
        found += problems
        if arm is not None and not problems:
            made[name] = arm
    found += [located(source, complaint) for complaint in between_arms(declared.baseline, made)]
    kept = preset_name(scale or declared.base)
    if not NAME.fullmatch(kept):
        found.append((Place(""), Problem(scale or declared.base, "its file name must be of letters, digits, _ . + -")))
    if found:
        raise error_of(found)
    own = made[declared.baseline].config.scale.smallest_effect
    return LoadedAblation(
        name=declared.ablation,
        question=declared.question,
        scale=kept,
        baseline=declared.baseline,
        arms=made,
        seeds=listed,
        contrasts=_contrasts(declared, chosen),
        smallest_effect=_smallest_effect(declared, kept, own),
        alpha=declared.alpha,
        screen=declared.screen,
    )


def _file_problems(declared: Ablation, source: Source) -> Iterator[Complaint]:
    """What is wrong with names and references, whatever the scale."""
    names = list(declared.arms)
    for name in names:
        if not name.isprintable() or not 0 < len(name) <= 64 or name != name.strip(" .") or set(name) & set("/\\,"):
            what = "an arm's name is printable text without / \\ and commas, at most 64, no dot or space at its ends"
            yield Complaint(what, (("arms", name),))
    by_folded: dict[str, str] = {}
    for name in names:
        twin = by_folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if twin != name:
            line = source.place(("arms", twin)).line
            yield Complaint(f"'{name}' and '{twin}' (line {line}) differ only in case", (("arms", name),))
    if len(names) > MAX_ARMS:
        yield Complaint(f"{len(names)} arms: an ablation compares at most {MAX_ARMS}", (("arms",),))
    if len(names) < 2:
        yield Complaint("at least one arm besides the baseline is expected", (("arms",),))
    if declared.baseline not in names:
        yield Complaint(unknown("arm", declared.baseline, names), (("baseline",),))
    for name in declared.expected:
        if name not in names:
            yield Complaint(unknown("arm", name, names), (("expected", name),))
    yield from _contrast_problems(declared, names)
    if isinstance(declared.smallest_effect, dict):
        for scale in declared.smallest_effect:
            if preset_name(scale) not in preset_names() and not scale.endswith((".yaml", ".yml")):
                yield Complaint(unknown("scale", scale, preset_names()), (("smallest_effect", scale),))


def _contrast_problems(declared: Ablation, names: Sequence[str]) -> Iterator[Complaint]:
    seen: set[frozenset[str]] = set()
    for index, pair in enumerate(declared.contrasts or []):
        key = ("contrasts", index)
        for side, name in enumerate(pair):
            if name not in names:
                yield Complaint(unknown("arm", name, names), ((*key, side),))
        if pair[0] == pair[1]:
            yield Complaint(f"'{pair[0]}' against itself", (key,))
        elif frozenset(pair) in seen:
            yield Complaint(f"'{pair[0]}' and '{pair[1]}' are compared twice", (key,))
        seen.add(frozenset(pair))
    if declared.contrasts == []:
        what = "an empty list: nothing would be compared; leave it out for every arm against the baseline"
        yield Complaint(what, (("contrasts",),))


def _chosen_arms(declared: Ablation, wanted: Sequence[str] | None) -> list[str]:
    """The arms to resolve, in the file's order. Raises ConfigError."""
    names = list(declared.arms)[: MAX_ARMS + 1]
    if wanted is None:
        return names
    problems = [Problem("--arms", unknown("arm", name, names)) for name in wanted if name not in names]
    if declared.baseline not in wanted:
        problems.append(Problem("--arms", f"must keep the baseline '{declared.baseline}'"))
    elif len(set(wanted)) < 2 and not problems:
        problems.append(Problem("--arms", "at least one arm besides the baseline is expected"))
    if problems:
        raise ConfigError(problems, hint=f"--arms {','.join(names)}")
    return [name for name in names if name in wanted]


def _chosen_seeds(seeds: Ablation | int | Sequence[int]) -> tuple[int, ...]:
    try:
        return seed_list(seeds.seeds if isinstance(seeds, Ablation) else seeds)
    except ValueError as error:
        raise ConfigError(str(error), where="--seeds") from error


def _base(declared: Ablation, source: Source, folder: Path, scale: str | None, overrides: Sequence[str]) -> Base:
    """What the arms change: the scale, then how it is judged, then overrides."""
    changes = read_overrides(overrides)
    try:
        base = preset_source(scale) if scale else preset_source(declared.base, folder)
    except ConfigError as error:
        if error.problems[0].where:
            raise
        where = "--scale" if scale else source.place(("base",)).prefix + "base"
        raise ConfigError(error.problems[0].what, where=where, hint=error.hint) from error
    given = source.tree.get("evaluate", {})
    judged = [
        (f"evaluation.{key}", source.part(("evaluate", key)))
        for key in Evaluate.model_fields
        if key in given and given[key] not in ABSENT
    ]
    return Base.of(lay(lay(base, judged), changes))


def _contrasts(declared: Ablation, chosen: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (arm, against) among the chosen arms."""
    every = [(name, declared.baseline) for name in chosen if name != declared.baseline]
    return tuple(pair for pair in declared.contrasts or every if set(pair) <= set(chosen))


def _smallest_effect(declared: Ablation, scale: str, own: float) -> float:
    """In nats at `scale`, whose own value is `own`."""
    effect = declared.smallest_effect
    if isinstance(effect, dict):
        return {preset_name(name): value for name, value in effect.items()}.get(scale, own)
    return own if effect is None else effect
