"""What an ablation's file may say, and what is wrong with it whatever the scale."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from gpt2lab.config import preset_name, preset_names
from gpt2lab.config.fitting import Complaint
from gpt2lab.config.source import Source
from gpt2lab.errors import unknown
from gpt2lab.planning.designs import Design, design_problems, factorial, leave_one_out, one_factor
from gpt2lab.planning.samplers import Tune
from gpt2lab.results import LOSS
from gpt2lab.schema import ABSENT, Settings

MAX_ARMS = 100
MAX_SEEDS = 100
SEEDS = 3
FEWEST_AT_A_LOOK = 3
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
Effect = Annotated[float, Field(gt=0)]
Axis = Literal["tokens", "parameters", "flops", "wall_clock"]
Knob = Literal["mlp_width", "depth", "tokens"]


class Evaluate(Settings):
    """How the arms of an ablation are judged; null leaves it to the scale."""

    contexts: tuple[float, ...] | None = None
    """Other context lengths, as multiples of block_size."""
    tokens: int | None = Field(None, ge=1)
    """Validation tokens."""
    context_tokens: int | None = Field(None, ge=1)
    """Validation tokens at each of the other lengths."""


class Equalise(Settings):
    """What is made equal in all arms, and by which knob."""

    axis: Axis = "tokens"
    """tokens, parameters, flops (of a whole run) or wall_clock."""
    by: Knob | None = None
    """What is turned to reach it: mlp_width, depth or tokens; null is mlp_width for parameters, else tokens."""


class BudgetCurve(Settings):
    """Runs of some arms at other budgets, to say what a difference is worth."""

    budgets: tuple[Annotated[float, Field(gt=0)], ...]
    """Multiples of the training tokens; 1 is the study's own runs."""
    arms: tuple[str, ...] = ()
    """Which arms, besides the baseline."""

    @field_validator("budgets")
    @classmethod
    def _a_curve(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in budgets or len(set(budgets)) < 2 or len(set(budgets)) < len(budgets):
            raise ValueError("at least two different multiples are expected, 1 among them")
        return tuple(sorted(budgets))


class Ablation(Settings):
    """A question, as its file declares it."""

    ablation: str
    """Its name, also that of files."""
    question: str
    """What it asks, in a sentence."""
    base: str
    """Preset or file that the arms change; `--scale` replaces it."""
    baseline: str | None = None
    """The arm that others are compared with; designs other than `arms` have one of their own."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> changes by dotted key. `control: true` marks an arm that is meant to change nothing."""
    leave_one_out: dict[str, dict[str, Any]] | None = None
    """Part -> its changes: the baseline has all parts, every other arm lacks one."""
    factors: dict[str, Any] | None = None
    """Dotted key -> values, or name -> levels with their changes: every combination is an arm."""
    seeds: int | list[int] | Literal["auto"] | None = None
    """How many, or which ones; auto takes what the noise floor asks for, null is 3, or the number of the last look."""
    baseline_seeds: int | None = Field(None, ge=1, le=MAX_SEEDS)
    """Seeds of the baseline, where it has more than the arms: the cheapest way to more power."""
    looks: tuple[int, ...] | None = None
    """Seeds per arm at which results are looked at; arms that are decided stop there."""
    lr_bracket: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Multiples of each arm's learning rate that are tried with one seed; the best one is then used."""
    tune: Tune | None = None
    """A search that every arm makes first: the same space around its own settings, with the same budget."""
    equalise: Equalise = Field(default_factory=Equalise)
    """What is equal in all arms."""
    budget_curve: BudgetCurve | None = None
    """Other budgets at which the baseline is trained, such as [0.5, 1, 2]."""
    scales: tuple[str, ...] | None = None
    """A ladder: presets that the ablation is run at, one study each."""
    tokens_per_parameter: float | None = Field(None, gt=0)
    """Training tokens for each parameter of the baseline, in the place of the preset's steps."""
    evaluate: Evaluate = Field(default_factory=Evaluate)
    expected: dict[str, str] = Field(default_factory=dict)
    """Arm, or effect of a factorial design such as `norm=rmsnorm`, -> what is expected of it, and who says so."""
    smallest_effect: dict[str, Effect] | Effect | None = None
    """Smallest difference of interest in nats: one for all scales, or by scale; null is the scale's own."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Error rate of the whole family of contrasts."""
    screen: bool = False
    """A first look only: its contrasts are exploratory."""
    contrasts: list[tuple[str, str]] | None = None
    """Pairs (arm, against); null is what the design asks for."""

    @field_validator("equalise", mode="before")
    @classmethod
    def _axis_alone(cls, value: Any) -> Any:
        """`equalise: flops` means `{axis: flops}`."""
        if isinstance(value, str) and value not in (*get_args(Axis), *ABSENT):
            raise ValueError("tokens, parameters, flops or wall_clock is expected")
        return {"axis": value} if isinstance(value, str) and value not in ABSENT else value

    @field_validator("budget_curve", mode="before")
    @classmethod
    def _budgets_alone(cls, value: Any) -> Any:
        """`budget_curve: [0.5, 1]` means `{budgets: [0.5, 1]}`."""
        return {"budgets": value} if isinstance(value, list) else value

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

    @field_validator("arms", "leave_one_out", mode="before")
    @classmethod
    def _nothing_is_no_changes(cls, arms: Any) -> Any:
        """`learned:` means `learned: {}`."""
        if not isinstance(arms, Mapping):
            return arms
        return {name: {} if changes in ABSENT else changes for name, changes in arms.items()}

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, seeds: int | list[int] | str | None) -> int | list[int] | str | None:
        if seeds is not None and not isinstance(seeds, str):
            seed_list(seeds)
        return seeds

    @field_validator("looks")
    @classmethod
    def _rising(cls, looks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if looks is None:
            return None
        if list(looks) != sorted(set(looks)) or not looks or looks[0] < FEWEST_AT_A_LOOK or looks[-1] > MAX_SEEDS:
            raise ValueError(f"rising numbers of seeds are expected, from {FEWEST_AT_A_LOOK} to {MAX_SEEDS}")
        return looks

    @field_validator("lr_bracket")
    @classmethod
    def _around_one(cls, factors: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if factors is None or not factors:
            return None
        if len(factors) < 3 or len(set(factors)) < len(factors) or 1.0 not in factors:
            raise ValueError("at least three different multiples are expected, 1 among them")
        return tuple(sorted(factors))

    def design(self) -> Design:
        """Its arms and their contrasts, as the design has them; none where the file says them wrongly."""
        if any(design_problems(self.arms, self.leave_one_out, self.factors)):
            return Design("none", "", {})
        if self.factors:
            return factorial(self.factors)
        if self.leave_one_out:
            return leave_one_out(self.leave_one_out)
        return one_factor(self.arms, self.baseline or next(iter(self.arms), ""))


def seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """`n` as the seeds 0 to n - 1, a list as it is. Raises ValueError for what cannot serve."""
    if isinstance(seeds, int) and not 1 <= seeds <= MAX_SEEDS:
        raise ValueError(f"from 1 to {MAX_SEEDS} seeds are expected")
    listed = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not listed or len(set(listed)) != len(listed):
        raise ValueError("at least one seed is expected, and each only once")
    if not all(0 <= seed < MAX_SEEDS for seed in listed):
        raise ValueError(f"seeds are numbers from 0 to {MAX_SEEDS - 1}; those from 100 on serve other purposes")
    return listed


def file_problems(declared: Ablation, source: Source) -> Iterator[Complaint]:
    """What is wrong with names and references, whatever the scale."""
    wrong = list(design_problems(declared.arms, declared.leave_one_out, declared.factors))
    yield from wrong
    if wrong:
        return
    design = declared.design()
    names = list(design.arms)
    at = {name: design.arms[name].at for name in names}
    for name in names:
        if not name.isprintable() or not 0 < len(name) <= 64 or name != name.strip(" .") or set(name) & set("/\\,"):
            what = "an arm's name is printable text without / \\ and commas, at most 64, no dot or space at its ends"
            yield Complaint(f"{what}: {name}" if at[name] == ("factors",) else what, (at[name],))
    by_folded: dict[str, str] = {}
    for name in names:
        twin = by_folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if twin != name:
            line = source.place(at[twin]).line
            yield Complaint(f"'{name}' and '{twin}' (line {line}) differ only in case", (at[name],))
    if len(names) > MAX_ARMS:
        yield Complaint(f"{len(names)} arms: an ablation compares at most {MAX_ARMS}", (at[names[-1]][:1],))
    if len(names) < 2:
        yield Complaint("at least one arm besides the baseline is expected", (("arms",),))
    if design.kind == "one factor":
        if declared.baseline is None:
            yield Complaint("is missing, and has no default", (("baseline",),))
        elif declared.baseline not in names:
            yield Complaint(unknown("arm", declared.baseline, names), (("baseline",),))
    elif declared.baseline is not None and declared.baseline != design.baseline:
        yield Complaint(f"the baseline of this design is '{design.baseline}'; leave the key out", (("baseline",),))
    yield from _references(declared, names)
    yield from _settings(declared)


def _references(declared: Ablation, names: Sequence[str]) -> Iterator[Complaint]:
    effects = [contrast.arm for contrast in declared.design().contrasts if not contrast.is_pair]
    for name in declared.expected:
        if name not in (*names, *effects):
            yield Complaint(unknown("arm", name, [*names, *effects]), (("expected", name),))
    for index, name in enumerate(declared.budget_curve.arms if declared.budget_curve else ()):
        if name not in names:
            yield Complaint(unknown("arm", name, names), (("budget_curve", "arms", index),))
    yield from _contrast_problems(declared, names)
    yield from _centres(declared, names)
    known = preset_names()
    if isinstance(declared.smallest_effect, dict):
        for scale in declared.smallest_effect:
            if preset_name(scale) not in known and not scale.endswith((".yaml", ".yml")):
                yield Complaint(unknown("scale", scale, known), (("smallest_effect", scale),))
    for index, scale in enumerate(declared.scales or ()):
        if preset_name(scale) not in known and not scale.endswith((".yaml", ".yml")):
            yield Complaint(unknown("scale", scale, known), (("scales", index),))


def _centres(declared: Ablation, names: Sequence[str]) -> Iterator[Complaint]:
    """Centres of searches that belong to no arm or to no relative dimension."""
    space = declared.tune.space if declared.tune else {}
    for name, centre in (declared.tune.centre if declared.tune else {}).items():
        if name not in names:
            yield Complaint(unknown("arm", name, names), (("tune", "centre", name),))
        for key in centre:
            if key not in space:
                yield Complaint(unknown("dimension", key, list(space)), (("tune", "centre", name, key),))
            elif not space[key].relative:
                what = "only a dimension with `relative: true` has a centre"
                yield Complaint(what, (("tune", "centre", name, key),))


def _settings(declared: Ablation) -> Iterator[Complaint]:
    """Settings that cannot stand together."""
    if declared.looks is not None:
        if declared.seeds == "auto":
            yield Complaint("`looks` says how many seeds there are; leave out `seeds: auto`", (("looks",), ("seeds",)))
        elif declared.seeds is not None and len(seed_list(declared.seeds)) != declared.looks[-1]:
            yield Complaint(f"the last look is at {declared.looks[-1]} seeds; `seeds` says otherwise", (("looks",),))
        if declared.baseline_seeds is not None:
            yield Complaint("looks give every arm as many seeds as the baseline", (("baseline_seeds",),))
    tune = declared.tune
    if tune is not None and declared.lr_bracket is not None:
        what = "`tune` and `lr_bracket` both look for each arm's own settings; drop one of the two"
        yield Complaint(what, (("tune",), ("lr_bracket",)))
    if tune is not None and (tune.metric, tune.direction) != (LOSS, "minimize"):
        key = "metric" if tune.metric != LOSS else "direction"
        yield Complaint(f"arms are judged by a low {LOSS}, so they are tuned for it", (("tune", key),))
    axis, knob = declared.equalise.axis, declared.equalise.by
    if knob is not None and (axis == "tokens" or (axis == "parameters" and knob == "tokens")):
        yield Complaint(f"`by: {knob}` cannot make {axis} equal", (("equalise", "by"),))
    if axis == "wall_clock" and knob not in (None, "tokens"):
        yield Complaint("wall clock can be made equal by tokens only", (("equalise", "by"),))
    if declared.scales is not None and len(set(map(preset_name, declared.scales))) < len(declared.scales):
        yield Complaint("the same scale twice", (("scales",),))


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
        what = "an empty list: nothing would be compared; leave it out for what the design asks for"
        yield Complaint(what, (("contrasts",),))
