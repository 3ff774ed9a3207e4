"""The keys of an ablation file, the arms and contrasts of its design, and the checks that do not depend on the scale.

arms:           one factor at a time: every arm against the baseline
leave_one_out:  a baseline with all parts, and for each part an arm without it
cumulative:     the base, and for each step an arm with its changes and those of all steps before it
factors:        every combination of levels, for main effects and two-way interactions
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from gpt2lab.analysis.metric_names import BITS, LOSS, target_name, target_of
from gpt2lab.analysis.verdicts import Declared
from gpt2lab.basics.text import in_short
from gpt2lab.config import preset_name, preset_names
from gpt2lab.config.fitting import Complaint
from gpt2lab.config.source import Key, YamlSource
from gpt2lab.errors import ConfigError, unknown
from gpt2lab.evaluation.validation import WholeOrCount
from gpt2lab.planning.space import Tune
from gpt2lab.schema import ABSENT, Settings

MAX_ARMS = 100
MAX_SEEDS = 100
SEEDS = 3
FEWEST_AT_A_LOOK = 3
MOST_ONE_BY_ONE = 12
"""Seeds per arm up to which `--until decided` adds them, unless given."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
CONTROL = "control"  # the one key of an arm that is no change
ALL = "all"
START = "start"
WITHOUT = "without "
TOGETHER = "their effects added"

Effect = Annotated[float, Field(gt=0)]
Axis = Literal["tokens", "parameters", "flops", "wall_clock"]
Knob = Literal["mlp_width", "depth", "tokens"]


@dataclass(frozen=True)
class Change:
    """One change of an arm. key: dotted. at: the key of its value in the file. prefix: of the key in error messages."""

    key: str
    at: Key
    prefix: str


@dataclass(frozen=True)
class Written:
    """An arm as its file declares it. `at`: the key of errors about the whole arm."""

    name: str
    changes: tuple[Change, ...]
    at: Key


@dataclass(frozen=True)
class Design:
    """The arms of an ablation, its baseline, and the contrasts that follow from it."""

    kind: str
    """one factor, leave one out, cumulative, or factorial"""
    baseline: str
    arms: Mapping[str, Written]
    contrasts: tuple[Declared, ...] = ()
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """of a factorial design: factor -> levels, the reference first"""


def changes_at(at: Key, keys: Mapping[str, Any] | None) -> tuple[Change, ...]:
    """The changes that a file has in the mapping at `at`."""
    prefix = ".".join(map(str, at)) + "."
    return tuple(Change(key, (*at, key), prefix) for key in keys or ())


def one_factor(arms: Mapping[str, Mapping[str, Any]], baseline: str) -> Design:
    """Arms as they are written, each against the baseline."""
    changes = {
        n: changes_at(("arms", n), {k: v for k, v in settings.items() if k != CONTROL}) for n, settings in arms.items()
    }
    written = {n: Written(n, settings, ("arms", n)) for n, settings in changes.items()}
    return Design("one factor", baseline, written, tuple(Declared.pair(n, baseline) for n in arms if n != baseline))


def leave_one_out(parts: Mapping[str, Mapping[str, Any]]) -> Design:
    """`all` with the changes of every part, and `without X` for each part X: a worse loss without X means that X
    helps."""
    at = {ALL: ("leave_one_out",), **{WITHOUT + part: ("leave_one_out", part) for part in parts}}
    changes = {part: changes_at(("leave_one_out", part), keys) for part, keys in parts.items()}
    arms = {
        name: Written(
            name,
            tuple(c for part, part_changes in changes.items() if name != WITHOUT + part for c in part_changes),
            key,
        )
        for name, key in at.items()
    }
    return Design("leave one out", ALL, arms, tuple(Declared.pair(WITHOUT + part, ALL) for part in parts))


def cumulative(steps: Mapping[str, Mapping[str, Any]]) -> Design:
    """`start` without changes, and for each step an arm with its changes on top of those before; a later change of a
    key replaces an earlier one. Each step is compared with the one before it."""
    arms, changes = {START: Written(START, (), ("cumulative",))}, dict[str, Change]()
    for step, keys in steps.items():
        changes |= {change.key: change for change in changes_at(("cumulative", step), keys)}
        arms[step] = Written(step, tuple(changes.values()), ("cumulative", step))
    names = list(arms)
    return Design("cumulative", START, arms, tuple(map(Declared.pair, names[1:], names[:-1])))


def factorial(factors: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> Design:
    """Every combination of levels; the first level of each factor is its reference.

    A factor is a dotted key with a list of values, or a name with levels that are sets of changes as of an arm.
    """
    levels = {factor_name(key): _levels(key, values) for key, values in factors.items()}
    cells = [dict(zip(levels, combination, strict=True)) for combination in itertools.product(*levels.values())]
    arms = {}
    for cell in cells:
        changes = itertools.chain(*(levels[factor][level] for factor, level in cell.items()))
        arms[_cell_name(cell)] = Written(_cell_name(cell), tuple(changes), ("factors",))
    names = {factor: tuple(factor_levels) for factor, factor_levels in levels.items()}
    return Design("factorial", _cell_name(cells[0]), arms, tuple(_effects(names)), names)


def factor_name(key: str) -> str:
    """`norm` for `model.norm`."""
    return key.rsplit(".", 1)[-1]


def _levels(key: str, values: Sequence[Any] | Mapping[str, Any]) -> dict[str, tuple[Change, ...]]:
    """Level -> its changes."""
    if isinstance(values, Mapping):
        return {
            str(level): changes_at(("factors", key, level), {} if changes in ABSENT else changes)
            for level, changes in values.items()
        }
    return {in_short(value): (Change(key, ("factors", key, i), "factors."),) for i, value in enumerate(values)}


def _cell_name(cell: Mapping[str, str]) -> str:
    return "+".join(cell.values()).replace(",", ";").replace("/", ":")


def _effects(factors: Mapping[str, tuple[str, ...]]) -> Iterator[Declared]:
    """Main effects of every level against its factor's reference, then every two-way interaction, each averaged over
    the other factors."""
    signs: dict[tuple[str, ...], float]
    for factor, levels in factors.items():
        for level in levels[1:]:
            signs = {(level,): 1.0, (levels[0],): -1.0}
            weights = _weights(factors, (factor,), signs)
            yield Declared(arm=f"{factor}={level}", against=f"{factor}={levels[0]}", weights=weights)
    for f, g in itertools.combinations(factors, 2):
        for a, b in itertools.product(factors[f][1:], factors[g][1:]):
            x, y = factors[f][0], factors[g][0]
            signs = {(a, b): 1.0, (x, y): 1.0, (a, y): -1.0, (x, b): -1.0}
            yield Declared(arm=f"{f}={a} with {g}={b}", against=TOGETHER, weights=_weights(factors, (f, g), signs))


def _weights(
    factors: Mapping[str, tuple[str, ...]], of: tuple[str, ...], signs: Mapping[tuple[str, ...], float]
) -> dict[str, float]:
    """Weight of every cell whose levels of the factors `of` have a sign, shared evenly over the other factors."""
    repeats = math.prod(len(levels) for factor, levels in factors.items() if factor not in of)
    cells = (dict(zip(factors, combination, strict=True)) for combination in itertools.product(*factors.values()))
    weights = {_cell_name(c): signs.get(tuple(c[factor] for factor in of), 0.0) / repeats for c in cells}
    return {cell: weight for cell, weight in sorted(weights.items(), key=lambda item: -item[1]) if weight}


class Evaluate(Settings):
    """How the arms of an ablation are evaluated; null: as the scale's preset says."""

    contexts: tuple[float, ...] | None = None
    """Other context lengths, as multiples of block_size."""
    judged_contexts: tuple[float, ...] = ()
    """Those at which every arm is judged against itself at block_size: a second family of contrasts."""
    tokens: WholeOrCount | None = None
    """Validation tokens, or all."""
    tasks: tuple[str, ...] | None = None
    """Tasks that are evaluated with each validation."""
    context_tokens: int | None = Field(None, ge=1)
    """Validation tokens at each of the other lengths."""
    diagnostics: tuple[Any, ...] | None = None
    """What is measured while runs train, see `gpt2lab components diagnostic`."""


class Equalise(Settings):
    """The quantity that is made equal in all arms, and the setting that is adjusted for it."""

    axis: Axis = "tokens"
    """tokens, parameters, flops (of a whole run) or wall_clock."""
    by: Knob | None = None
    """The setting that is adjusted: mlp_width, depth or tokens; null is mlp_width for parameters, else tokens."""


class BudgetCurve(Settings):
    """Runs of some arms at other budgets, to express a difference in loss as a compute multiplier."""

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


class Confirm(Settings):
    """What follows a screen: its best arms, judged on seeds that it did not use."""

    best: int = Field(ge=1)
    """How many arms, by the mean over the screen's seeds."""
    seeds: int = Field(5, ge=3, le=MAX_SEEDS)
    """Fresh seeds per arm."""


def variant_name(name: str, where: str = "--name") -> str:
    """A name in the place of a file's own. Raises ConfigError."""
    try:
        return file_name(name)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None


def file_name(name: str) -> str:
    """A name that files can have. Raises ValueError."""
    if not NAME.fullmatch(name) or name.endswith("."):
        raise ValueError("a name of letters, digits, _ . + - is expected, at most 64, the first a letter or digit")
    return name


def _sentence(text: str) -> str:
    if not text.strip():
        raise ValueError("a sentence is expected")
    return text.strip()


def _nothing_is_no_changes(arms: Any) -> Any:
    """`learned:` means `learned: {}`."""
    return (
        {n: {} if changes in ABSENT else changes for n, changes in arms.items()} if isinstance(arms, Mapping) else arms
    )


def seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """`n` as the seeds 0 to n - 1, a list unchanged. Raises ValueError for seeds that are reserved or repeated."""
    if isinstance(seeds, int) and not 1 <= seeds <= MAX_SEEDS:
        raise ValueError(f"from 1 to {MAX_SEEDS} seeds are expected")
    listed = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not listed or len(set(listed)) != len(listed):
        raise ValueError("at least one seed is expected, and each only once")
    if not all(0 <= seed < MAX_SEEDS for seed in listed):
        raise ValueError(f"seeds are numbers from 0 to {MAX_SEEDS - 1}; those from 100 on serve other purposes")
    return listed


FileName = Annotated[str, AfterValidator(file_name)]
Sentence = Annotated[str, AfterValidator(_sentence)]
Named = Annotated[dict[str, dict[str, Any]], BeforeValidator(_nothing_is_no_changes)]
"""Name -> changes by dotted key."""


class Ablation(Settings):
    """The keys of an ablation file."""

    ablation: FileName
    """Its name, also that of files."""
    question: Sentence
    """The question that it answers, as a sentence."""
    campaign: FileName | None = None
    """The line of research that its hypotheses count in; null: that of the project file, or else the whole store."""
    base: str
    """Preset or file that the arms change; `--scale` replaces it."""
    baseline: str | None = None
    """The arm that others are compared with; the other designs define their own."""
    arms: Named = Field(default_factory=dict)
    """Name -> changes by dotted key. `control: true` marks an arm that is meant to change nothing."""
    leave_one_out: Named | None = None
    """Part -> its changes: the baseline has all parts, every other arm lacks one."""
    cumulative: Named | None = None
    """Step -> its changes, on top of those of the steps before it: each step is compared with the one before."""
    factors: dict[str, Any] | None = None
    """Dotted key -> values, or name -> levels with their changes: every combination is an arm."""
    seeds: int | list[int] | Literal["auto"] | None = None
    """How many, or which ones; auto: as many as the noise floor requires, null: 3, or the number of the last look."""
    baseline_seeds: int | None = Field(None, ge=1, le=MAX_SEEDS)
    """Seeds of the baseline, where it has more than the arms: the cheapest way to increase power."""
    looks: tuple[int, ...] | None = None
    """Seeds per arm at which results are looked at; arms that are decided stop there."""
    tune: Tune | None = None
    """How every arm is tuned first: a grid of learning rates, or the same search for each arm."""
    equalise: Equalise = Field(default_factory=Equalise)
    """The quantity that is equal in all arms."""
    budget_curve: BudgetCurve | None = None
    """Other budgets at which the baseline is trained, such as [0.5, 1, 2]."""
    scales: tuple[str, ...] | None = None
    """A ladder: presets that the ablation is run at, one study each."""
    tokens_per_parameter: float | None = Field(None, gt=0)
    """Training tokens for each parameter of the baseline, instead of the preset's steps."""
    evaluate: Evaluate = Field(default_factory=Evaluate)
    expected: dict[str, str] = Field(default_factory=dict)
    """Arm, or effect of a factorial design such as `norm=rmsnorm`, -> the expected result, and its source."""
    smallest_effect: dict[str, Effect] | Effect | None = None
    """Smallest difference of interest in nats: one for all scales, or by scale; null is the scale's own."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Error rate of the whole family of contrasts."""
    metric: str = LOSS
    """What arms are judged by: val/loss, val/bits_per_byte, task/NAME/MEASURE at the end of training, or
    {tokens_to: LOSS}, {steps_to: LOSS} or {seconds_to: LOSS}, the training until the validation loss is at most
    that."""
    screen: bool = False
    """A screening study: its contrasts are exploratory."""
    confirm: Confirm | None = None
    """The study that follows a screen, of its best arms on fresh seeds."""
    contrasts: list[tuple[str, str]] | None = None
    """Pairs (arm, against); null: the contrasts of the design."""

    @field_validator("equalise", mode="before")
    @classmethod
    def _axis_alone(cls, value: Any) -> Any:
        """`equalise: flops` means `{axis: flops}`."""
        if isinstance(value, str) and value not in (*get_args(Axis), *ABSENT):
            raise ValueError("tokens, parameters, flops or wall_clock is expected")
        return {"axis": value} if isinstance(value, str) and value not in ABSENT else value

    @field_validator("metric", mode="before")
    @classmethod
    def _target(cls, value: Any) -> Any:
        """`{tokens_to: 3.2}` as the name of that metric."""
        if not isinstance(value, Mapping):
            return value
        try:
            [(key, loss)] = value.items()
            return target_name(key, float(loss))
        except (ValueError, TypeError, KeyError):
            problem = "{tokens_to: LOSS}, {steps_to: LOSS} or {seconds_to: LOSS} is expected, with a loss above 0"
            raise ValueError(problem) from None

    @field_validator("metric")
    @classmethod
    def _measured(cls, name: str) -> str:
        if name not in (LOSS, BITS) and not name.startswith("task/") and target_of(name) is None:
            raise ValueError(
                f"{LOSS}, {BITS}, task/NAME/MEASURE, or {{tokens_to: LOSS}}, {{steps_to: LOSS}} or "
                "{seconds_to: LOSS} is expected"
            )
        return name

    @field_validator("budget_curve", mode="before")
    @classmethod
    def _budgets_alone(cls, value: Any) -> Any:
        """`budget_curve: [0.5, 1]` means `{budgets: [0.5, 1]}`."""
        return {"budgets": value} if isinstance(value, list) else value

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

    def design(self) -> Design:
        """The arms and contrasts; an empty design where the file declares them wrongly."""
        if any(design_problems(self)):
            return Design("none", "", {})
        if self.cumulative:
            return cumulative(self.cumulative)
        if self.factors:
            return factorial(self.factors)
        if self.leave_one_out:
            return leave_one_out(self.leave_one_out)
        return one_factor(self.arms, self.baseline or next(iter(self.arms), ""))


def design_problems(ablation: Ablation) -> Iterator[Complaint]:
    """Problems in how a file declares its arms."""
    parts, factors = ablation.leave_one_out, ablation.factors
    declared = [name for name in ("arms", "leave_one_out", "cumulative", "factors") if getattr(ablation, name)]
    if len(declared) != 1:
        problem = "one of `arms`, `leave_one_out`, `cumulative` and `factors` is expected" + (
            f", not {len(declared)}" if declared else ""
        )
        yield Complaint(problem, ((declared[-1],) if declared else (),))
    if parts and len(parts) < 2:
        yield Complaint("at least two parts are expected", (("leave_one_out",),))
    for step, changes in (ablation.cumulative or {}).items():
        if not changes or step == START:
            problem = f"the arm without changes is called `{START}` already" if step == START else "changes nothing"
            yield Complaint(problem, (("cumulative", step),))
    first_parts: dict[str, str] = {}
    for part, changes in (parts or {}).items():
        if not changes:
            yield Complaint("changes nothing, so there is nothing to leave out", (("leave_one_out", part),))
        for key in changes:
            twin = first_parts.setdefault(key, part)
            if twin != part:
                yield Complaint(f"'{key}' is changed by '{twin}' as well", (("leave_one_out", part, key),))
    for key, values in (factors or {}).items():
        at: tuple[Key, ...] = (("factors", key),)
        if not isinstance(values, (list, Mapping)) or len(values) < 2:
            yield Complaint("at least two levels are expected: a list of values, or names with their changes", at)
        elif isinstance(values, Mapping) and not all(isinstance(v, Mapping) or v in ABSENT for v in values.values()):
            yield Complaint("each level is a set of changes by dotted key, or {} for none", at)
        elif isinstance(values, list) and len({in_short(value) for value in values}) < len(values):
            yield Complaint("the same level twice", at)
    if factors is not None and len({factor_name(key) for key in factors}) < len(factors):
        yield Complaint("two factors end in the same name; give one of them a name of its own", (("factors",),))
    if factors is not None and len(factors) < 2:
        yield Complaint("at least two factors are expected; a single one is what `arms` is for", (("factors",),))


def file_problems(declared: Ablation, source: YamlSource) -> Iterator[Complaint]:
    """Problems of names, references and combinations of keys, which do not depend on the scale."""
    wrong = list(design_problems(declared))
    yield from wrong
    if wrong:
        return
    design = declared.design()
    yield from _name_problems({name: written.at for name, written in design.arms.items()}, source)
    if design.kind == "one factor":
        if declared.baseline is None:
            yield Complaint("is missing, and has no default", (("baseline",),))
        else:
            yield from _unknown("arm", {("baseline",): declared.baseline}, design.arms)
    elif declared.baseline not in (None, design.baseline):
        yield Complaint(f"the baseline of this design is '{design.baseline}'; leave the key out", (("baseline",),))
    yield from _references(declared, design)
    yield from _contrast_problems(declared.contrasts)
    yield from _combinations(declared)


def _name_problems(at: Mapping[str, Key], source: YamlSource) -> Iterator[Complaint]:
    by_folded: dict[str, str] = {}
    for name, key in at.items():
        if not name.isprintable() or not 0 < len(name) <= 64 or name != name.strip(" .") or set(name) & set("/\\,"):
            problem = "an arm's name is printable text without / \\ and commas, at most 64, no dot or space at its ends"
            yield Complaint(f"{problem}: {name}" if key == ("factors",) else problem, (key,))
        twin = by_folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if twin != name:
            line = source.place(at[twin]).line
            yield Complaint(f"'{name}' and '{twin}' (line {line}) differ only in case", (key,))
    if len(at) > MAX_ARMS:
        yield Complaint(f"{len(at)} arms: an ablation compares at most {MAX_ARMS}", ([*at.values()][-1][:1],))
    if len(at) < 2:
        yield Complaint("at least one arm besides the baseline is expected", (("arms",),))


def _unknown(kind: str, names: Mapping[Key, str], choices: Sequence[str] | Mapping[str, Any]) -> Iterator[Complaint]:
    """A complaint for each name that does not exist. `names`: by the key that has it."""
    yield from (Complaint(unknown(kind, name, choices), (key,)) for key, name in names.items() if name not in choices)


def _references(declared: Ablation, design: Design) -> Iterator[Complaint]:
    """Names of arms, dimensions and scales that do not exist."""
    arms = design.arms
    effects = [contrast.arm for contrast in design.contrasts if not contrast.is_pair]
    curve = declared.budget_curve.arms if declared.budget_curve else ()
    pairs = declared.contrasts or ()
    yield from _unknown("arm", {("expected", name): name for name in declared.expected}, [*arms, *effects])
    yield from _unknown("arm", {("budget_curve", "arms", i): name for i, name in enumerate(curve)}, arms)
    yield from _unknown(
        "arm", {("contrasts", i, side): pair[side] for i, pair in enumerate(pairs) for side in (0, 1)}, arms
    )
    if declared.tune is not None:
        space, centres = declared.tune.space, declared.tune.centre
        at: dict[Key, str] = {("tune", "centre", name, key): key for name, centre in centres.items() for key in centre}
        yield from _unknown("arm", {("tune", "centre", name): name for name in centres}, arms)
        yield from _unknown("dimension", at, space)
        absolute = [where for where, key in at.items() if key in space and not space[key].relative]
        yield from (Complaint("only a dimension with `relative: true` has a centre", (where,)) for where in absolute)
    effect = declared.smallest_effect
    scales: dict[Key, str] = {("smallest_effect", scale): scale for scale in effect} if isinstance(effect, dict) else {}
    scales |= {("scales", index): scale for index, scale in enumerate(declared.scales or ())}
    named = {key: scale for key, scale in scales.items() if not scale.endswith((".yaml", ".yml"))}
    presets = preset_names()
    yield from (
        Complaint(unknown("scale", scale, presets), (key,))
        for key, scale in named.items()
        if preset_name(scale) not in presets
    )


def _contrast_problems(contrasts: Sequence[tuple[str, str]] | None) -> Iterator[Complaint]:
    if contrasts == []:
        problem = "an empty list: nothing would be compared; leave it out for what the design asks for"
        yield Complaint(problem, (("contrasts",),))
    pairs: set[frozenset[str]] = set()
    for index, pair in enumerate(contrasts or ()):
        if pair[0] == pair[1]:
            yield Complaint(f"'{pair[0]}' against itself", (("contrasts", index),))
        elif frozenset(pair) in pairs:
            yield Complaint(f"'{pair[0]}' and '{pair[1]}' are compared twice", (("contrasts", index),))
        pairs.add(frozenset(pair))


def _combinations(declared: Ablation) -> Iterator[Complaint]:
    """Settings that exclude each other."""
    if declared.confirm and not declared.screen:
        yield Complaint("the study before it is to be a screen: `screen: true`", (("confirm",),))
    if declared.confirm and (declared.contrasts or not declared.arms):
        yield Complaint("follows a screen of `arms`, each against the baseline", (("confirm",),))
    looks, tune, scored = declared.looks, declared.tune, declared.evaluate.contexts or ()
    if any(at == 1 or not {at, 1.0} <= set(scored) for at in declared.evaluate.judged_contexts):
        yield Complaint("are some of `contexts`, which holds 1 as well", (("evaluate", "judged_contexts"),))
    if looks is not None:
        if declared.seeds == "auto":
            yield Complaint(
                "`looks` determine how many seeds there are; leave out `seeds: auto`", (("looks",), ("seeds",))
            )
        elif declared.seeds is not None and len(seed_list(declared.seeds)) != looks[-1]:
            yield Complaint(f"the last look is at {looks[-1]} seeds, `seeds` has another number", (("looks",),))
        if declared.baseline_seeds is not None:
            yield Complaint("looks give every arm as many seeds as the baseline", (("baseline_seeds",),))
    if tune is not None:
        for key in sorted(tune.model_fields_set - {"grid"}) if tune.grid else ():
            yield Complaint("is no part of a grid, which trains one run for each multiple", (("tune", key),))
        if (tune.metric, tune.direction) != (LOSS, "minimize"):
            key = "metric" if tune.metric != LOSS else "direction"
            yield Complaint(f"arms are judged by a low {LOSS}, so they are tuned for it", (("tune", key),))
    if declared.metric != LOSS and declared.smallest_effect is None:
        yield Complaint(
            f"one in the unit of {declared.metric} is expected: that of a scale is in nats", (("smallest_effect",),)
        )
    tasks = declared.evaluate.tasks or ()
    if declared.metric.startswith("task/") and not any(declared.metric.split("/")[1] == t.split(":")[0] for t in tasks):
        yield Complaint("its task is not evaluated: name it in `evaluate: {tasks: [...]}`", (("metric",),))
    axis, knob = declared.equalise.axis, declared.equalise.by
    if knob is not None and (axis == "tokens" or (axis == "parameters" and knob == "tokens")):
        yield Complaint(f"`by: {knob}` cannot make {axis} equal", (("equalise", "by"),))
    if axis == "wall_clock" and knob not in (None, "tokens"):
        yield Complaint("wall clock can be made equal by tokens only", (("equalise", "by"),))
    if declared.scales is not None and len(set(map(preset_name, declared.scales))) < len(declared.scales):
        yield Complaint("the same scale twice", (("scales",),))
