"""Loads an ablation file: the config of the baseline and of every arm, seeds, contrasts and thresholds.

All mistakes in the file and in any of its arms are reported in one error.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2lab.analysis.metric_names import BITS, LOSS
from gpt2lab.analysis.verdicts import Declared
from gpt2lab.basics.shipped import found, shipped_names
from gpt2lab.config import Config, examine, fill_slots, preset_name, preset_names, preset_source, read_overrides
from gpt2lab.config.fitting import Complaint, Located, check, error_of, located
from gpt2lab.config.source import Key, Place, YamlSource, dotted, expand, overlay, read_file, read_mapping
from gpt2lab.data.curricula import LENGTH, SIZE
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, Problem, nearest, unknown
from gpt2lab.identity import digest, settings
from gpt2lab.planning.declaration import (
    CONTROL,
    FEWEST_AT_A_LOOK,
    MAX_ARMS,
    MAX_SEEDS,
    MOST_ONE_BY_ONE,
    NAME,
    SEEDS,
    Ablation,
    Axis,
    Confirm,
    Design,
    Evaluate,
    Knob,
    Written,
    file_problems,
    seed_list,
    variant_name,
)
from gpt2lab.planning.placebo import same_function
from gpt2lab.planning.space import RATE, Tune, check_search, space_complaint
from gpt2lab.records import Screened
from gpt2lab.registry import SLOTS
from gpt2lab.schema import ABSENT, convert, flatten

# Seeds are reserved by purpose, so that no verdict uses a run that was also used to choose or to plan: an ablation's
# own seeds are 0 to 99 (what a file may name), tuning uses those from 100 on, noise floors 200 to 299, control arms
# those from 500 on.
TUNING_SEED = 100
NOISE_SEEDS = 200
CONTROL_SEEDS = 500
CONTROL_STRIDE = 2 * MAX_SEEDS  # includes the seeds that a control arm is tuned on

# Keys that no arm may change, with the reason.
SHARED = {
    "data": f"all arms are trained and judged on the same tokens, unless `metric: {BITS}` judges them by all bytes of "
    "one validation text (`evaluate: {tokens: all}`)",
    "evaluation": "all arms are judged alike: see `evaluate`",
    "scale": "the scale is that of the whole ablation",
    "seed": "see `seeds`",
    "repeat": "see `seeds`",
    "model.block_size": "all arms are judged at one context length: see `evaluate.contexts` for others",
    "training.device": "all arms run on one kind of device: use --set",
    "training.threads": "all arms run with as many threads: use --set",
}
OWN = ("data.batches",)
"""Keys below those that an arm may change."""
OWN_WITH_BITS = ("data.batches", "data.corpus", "data.tokenizer", "data.validation_fraction")
"""The same where arms are judged by bits per byte."""
# Changes that move the best learning rate: at a shared rate their contrasts are exploratory (docs/statistics.md).
MOVES_RATE = ("model.init", "model.parametrization", "model.residual", "training.batch_tokens")
RESIZES = {SIZE, LENGTH}
"""Capabilities of parts of `data.batches` that move it, too."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: `changes` as written, by dotted key, and the whole `config` with seed 0."""

    name: str
    changes: Mapping[str, Any]
    config: Config
    control: bool = False
    expected: str | None = None
    first_seed: int = 0
    """Added to the ablation's seeds: each control arm has seeds that no other arm uses."""
    seeds: tuple[int, ...] | None = None
    """Replaces the ablation's seeds."""
    data: Prepared | None = None
    """Its own data, where it has other than the baseline."""


@dataclass(frozen=True, kw_only=True)
class LoadedAblation:
    """An ablation at one scale, checked as a whole. For the meaning of its fields see `Ablation`."""

    name: str
    question: str
    scale: str
    baseline: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...] | None
    """of arms that are no controls; None: as many as the noise floor requires"""
    contrasts: tuple[Declared, ...]
    smallest_effect: float
    alpha: float
    screen: bool
    design: str = "one factor"
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    """expectations for effects of a factorial design"""
    baseline_seeds: int | None = None
    looks: tuple[int, ...] = ()
    until_decided: bool = False
    """whether the looks are at every number of seeds, as many as a budget allows"""
    tune: Tune | None = None
    axis: Axis = "tokens"
    knob: Knob | None = None
    budgets: tuple[float, ...] = ()
    budget_arms: tuple[str, ...] = ()
    tokens_per_parameter: float | None = None
    metric: str = LOSS
    judged_contexts: tuple[float, ...] = ()
    """multiples of block_size at which every arm is judged against itself at block_size"""
    campaign: str = ""
    """the line of research that its hypotheses count in"""
    confirm: Confirm | None = None
    """what follows this screen"""
    screened: Screened | None = None
    """the screen that this study confirms"""
    noise_command: str = "gpt2lab noise PRESET"
    """command that measures the noise floor of the baseline"""

    @property
    def tunes_rate(self) -> bool:
        """Whether the learning rate is tuned in every arm."""
        return self.tune is not None and RATE in self.tune.keys

    def exploratory_reason(self, arm: str) -> str | None:
        """Why contrasts of this arm are exploratory, as a clause; None where they are not."""
        trunk = self.arms[arm].config.branch or self.arms[self.baseline].config.branch
        return f"it branches from {trunk}: its seeds differ only in what came after" if trunk else None

    def moves_rate(self, arm: str) -> dict[str, str]:
        """The settings of an arm that move the best learning rate, as JSON, where they are not the baseline's; none
        where every arm has a rate of its own."""
        ours, baseline = (_moving_rate(self.arms[name].config) for name in (arm, self.baseline))
        return {} if self.tunes_rate else {key: value for key, value in ours.items() if value != baseline[key]}


def _moving_rate(config: Config) -> dict[str, str]:
    """By dotted key, as JSON with every option of every component."""
    tree = settings(config)
    parts = [part.full() for part in config.data.batches if RESIZES & SLOTS["batches"][part.name].can]
    values = {f"optim.{name}": tree["optim"].get(name) for name, _ in config.optim} | {"data.batches": parts}
    values |= {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in MOVES_RATE}
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}


def scales_of(source: str | Path | Mapping[str, Any]) -> tuple[str, ...]:
    """The `scales` at which an ablation or sweep is run one after another, files by their path; empty without the
    key."""
    file, folder = read_source(source)
    scales = file.tree.get("scales")
    names = map(str, scales) if isinstance(scales, list) else ()
    return tuple(str(folder / name) if name.endswith((".yaml", ".yml")) else name for name in names)


def read_source(source: str | Path | Mapping[str, Any]) -> tuple[YamlSource, Path]:
    """A YAML file, or a mapping with its content; and the folder that paths in it are relative to. Raises
    ConfigError."""
    if isinstance(source, Mapping):
        text = yaml.safe_dump(json.loads(json.dumps(source, default=str)), sort_keys=False)
        return read_mapping(text, "ablation"), Path()
    file = found(source)
    try:
        return read_file(file), file.parent
    except ConfigError as error:
        if not file.exists() and len(file.parts) == 1:
            if not file.suffix:
                what = unknown("ablation or sweep", file.name, shipped_names())
                raise ConfigError(what, hint="or a YAML file") from None
            if file.suffix in (".yaml", ".yml") and file.stem in shipped_names():
                what = f"no such file; did you mean '{file.stem}', which comes with gpt2lab?"
                raise ConfigError(what, where=file.name) from None
        raise error


def load_ablation(
    source: str | Path | Mapping[str, Any],
    *,
    name: str | None = None,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    arms: Sequence[str] | None = None,
    seeds: int | Sequence[int] | Literal["auto"] | None = None,
    until_decided: bool = False,
    plugins: Sequence[str | Path] = (),
    campaign: str | None = None,
    untuned: bool = False,
) -> LoadedAblation:
    """The ablation of a YAML file, or of a mapping with its content.

    name:      instead of the file's, for a variant with a record and page of its own.
    scale:     preset or file instead of the file's `base`.
    overrides: `key=value`, for every arm, before the arm's own changes.
    arms:      only these; the baseline must be among them.
    seeds:     instead of the file's.
    until_decided: look at every number of seeds from 3 on, up to `seeds`.
    plugins:   Python files that register components.
    campaign:  that of a file which names none.
    untuned:   ignore the file's `tune`, if it has one: every arm trains with its settings as written.
    Raises ConfigError with everything that is wrong in the file, in the overrides and in any arm.
    """
    fill_slots(plugins)
    document, folder = read_source(source)
    declared, complaints = check(Ablation, document, stand_ins={"ablation": "unnamed", "question": "?", "base": "nano"})
    problems = [located(document, complaint) for complaint in complaints]
    if declared is None:
        raise error_of(problems)
    replaced = {} if name is None else {"ablation": variant_name(name)}
    declared = declared.model_copy(update=replaced | ({"tune": None} if untuned else {}))
    problems += [located(document, complaint) for complaint in file_problems(declared, document)]
    design = declared.design()
    try:
        chosen = _chosen_arms(design, arms)
        listed, looks = _chosen_seeds(declared, seeds, until_decided)
        base = base_of(declared.base, document, folder, scale, overrides)
    except ConfigError as error:
        raise error_of(problems, more=error.problems, hint=error.hint) from error
    problems += [located(base.source, complaint) for complaint in base.complaints]
    resolved: dict[str, Arm] = {}
    for name in chosen:
        is_baseline = name == design.baseline or design.baseline not in design.arms
        expected = declared.expected.get(name)
        allowed = OWN_WITH_BITS if declared.metric == BITS else OWN
        arm, arm_problems = resolve_arm(
            design.arms[name], document, base, is_baseline=is_baseline, expected=expected, own=allowed
        )
        problems += arm_problems
        if arm is not None and not arm_problems:
            resolved[name] = arm
    keys = {name: written.at for name, written in design.arms.items()}
    arm_complaints = [*_between_arms(declared, design.baseline, resolved, keys)]
    tune_unreadable = any(key[:1] == ("tune",) for complaint in complaints for key in complaint.keys)
    if resolved and not base.complaints and not (tune_unreadable and declared.tune and not declared.tune.keys):
        arm_complaints += _tune_problems(declared, resolved, keys)
    problems += [located(document, complaint) for complaint in arm_complaints]
    scale_label, name_problems = scale_name(scale or declared.base)
    problems += name_problems
    effects = declared.smallest_effect
    if declared.metric != LOSS and isinstance(effects, dict) and scale_label not in map(preset_name, effects):
        what = f"none for {scale_label}: one in the unit of {declared.metric} is expected"
        problems.append(located(document, Complaint(what, (("smallest_effect",),))))
    if problems:
        raise error_of(problems)
    curve, per_parameter = declared.budget_curve, declared.tokens_per_parameter
    return LoadedAblation(
        name=declared.ablation,
        question=declared.question,
        scale=scale_label if per_parameter is None else f"{scale_label}-{per_parameter:g}tpp",
        baseline=design.baseline,
        arms=resolved,
        seeds=listed,
        contrasts=_contrasts(declared, design, chosen),
        smallest_effect=smallest_effect(declared.smallest_effect, scale_label, resolved[design.baseline].config),
        alpha=declared.alpha,
        screen=declared.screen,
        confirm=declared.confirm,
        metric=declared.metric,
        design=design.kind,
        factors=design.factors,
        expected={name: text for name, text in declared.expected.items() if name not in design.arms},
        baseline_seeds=None if until_decided else declared.baseline_seeds,
        looks=looks,
        until_decided=until_decided,
        tune=declared.tune,
        axis=declared.equalise.axis,
        knob=declared.equalise.by,
        budgets=curve.budgets if curve else (),
        budget_arms=tuple(a for a in (design.baseline, *curve.arms) if a in chosen) if curve else (),
        tokens_per_parameter=per_parameter,
        judged_contexts=declared.evaluate.judged_contexts,
        campaign=declared.campaign or (variant_name(campaign, "--campaign") if campaign else ""),
        noise_command=_noise_command(declared, folder, scale, overrides),
    )


def scale_name(scale: str) -> tuple[str, list[Located]]:
    """The name under which results at a scale are stored, and what is wrong with it."""
    name = preset_name(scale)
    if NAME.fullmatch(name):
        return name, []
    return name, [(Place(""), Problem(scale, "its file name must be of letters, digits, _ . + -"))]


def smallest_effect(declared: float | Mapping[str, float] | None, scale: str, config: Config) -> float:
    """In nats at `scale`; the config's default where none is declared."""
    if isinstance(declared, Mapping):
        declared = {preset_name(name): value for name, value in declared.items()}.get(scale)
    return config.scale.smallest_effect if declared is None else declared


def _noise_command(declared: Ablation, folder: Path, scale: str | None, overrides: Sequence[str]) -> str:
    base = declared.base if preset_name(declared.base) in preset_names() else str(folder / declared.base)
    per_parameter = declared.tokens_per_parameter
    tokens = ["--tokens-per-parameter", f"{per_parameter:g}"] if per_parameter else []
    settings = [word for item in overrides for word in ("--set", item)]
    return shlex.join(["gpt2lab", "noise", scale or base, *tokens, *settings])


def _chosen_arms(design: Design, requested: Sequence[str] | None) -> list[str]:
    """The arms to resolve, in the file's order. Raises ConfigError."""
    names = list(design.arms)[: MAX_ARMS + 1]
    if requested is None:
        return names
    problems = [Problem("--arms", unknown("arm", name, names)) for name in requested if name not in names]
    if design.kind == "factorial":
        problems = [Problem("--arms", "a factorial design needs all of its arms")]
    elif design.baseline not in requested:
        problems.append(Problem("--arms", f"must keep the baseline '{design.baseline}'"))
    elif len(set(requested)) < 2 and not problems:
        problems.append(Problem("--arms", "at least one arm besides the baseline is expected"))
    if problems:
        meant = {name if name in names else nearest(name, names) for name in requested} | {design.baseline}
        meant = meant if len(meant) > 1 and design.kind != "factorial" else set(names)
        raise ConfigError(problems, hint=f"--arms {','.join(name for name in names if name in meant)}")
    return [name for name in names if name in requested]


def _chosen_seeds(
    declared: Ablation, requested: int | Sequence[int] | Literal["auto"] | None, until_decided: bool
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """(seeds, None for automatic; looks). Seeds that differ from the file's drop its looks; `until_decided` looks at
    every number of seeds, from the fewest on."""
    looks = declared.looks if requested is None and declared.looks else ()
    default = declared.seeds or (looks[-1] if looks else SEEDS)
    wanted = (MOST_ONE_BY_ONE if until_decided else default) if requested is None else requested
    try:
        seeds = None if isinstance(wanted, str) else seed_list(wanted)
    except ValueError as error:
        raise ConfigError(str(error), where="--seeds") from error
    if not until_decided:
        return seeds, looks
    if declared.looks:
        problem = "the file declares its own `looks`"
    elif seeds is None:
        problem = "seeds are added as results require, so `--seeds` is the most per arm"
    elif len(seeds) <= FEWEST_AT_A_LOOK:
        problem = f"it judges at {FEWEST_AT_A_LOOK} seeds first, so more than that are expected, not {len(seeds)}"
    else:
        return seeds, tuple(range(FEWEST_AT_A_LOOK, len(seeds) + 1))
    hint = "leave out --until" if requested is None else f"--until decided --seeds {MOST_ONE_BY_ONE}"
    raise ConfigError(problem, where="--until decided", hint=hint)


def _contrasts(declared: Ablation, design: Design, chosen: Sequence[str]) -> tuple[Declared, ...]:
    """The contrasts whose arms are all among the chosen ones."""
    pairs = tuple(Declared.pair(*pair) for pair in declared.contrasts or ()) or design.contrasts
    return tuple(contrast for contrast in pairs if contrast.weights.keys() <= set(chosen))


# --- the arms ---


@dataclass(frozen=True)
class Base:
    """The config that every arm changes, and what is wrong with it."""

    source: YamlSource
    complaints: tuple[Complaint, ...]

    @property
    def layer(self) -> int:
        """The layer of changes over it."""
        return 1 + max((place.layer for place in self.source.places.values()), default=0)


def base_of(name: str, source: YamlSource, folder: Path, scale: str | None, overrides: Sequence[str]) -> Base:
    """The preset or file of the scale, then `evaluate`, then overrides."""
    changes = read_overrides(overrides)
    if scale:
        base = preset_source(scale, where="--scale")
    else:
        base = preset_source(name, folder, where=source.place(("base",)).prefix + "base")
    evaluate = source.tree.get("evaluate", {})
    evaluation_changes = [
        (f"evaluation.{key}", source.part(("evaluate", key)))
        for key in Evaluate.model_fields
        if isinstance(evaluate, dict) and key in evaluate and evaluate[key] not in ABSENT and key != "judged_contexts"
    ]
    merged = overlay(overlay(base, evaluation_changes), changes)
    return Base(merged, tuple(examine(merged)[1]))


def resolve_arm(
    written: Written,
    file: YamlSource,
    base: Base,
    *,
    is_baseline: bool,
    expected: str | None,
    own: tuple[str, ...] = OWN,
) -> tuple[Arm | None, list[Located]]:
    """One arm of an ablation's `file` over `base`, or None; and its problems that are not already those of the base."""
    name = written.name
    changes = [
        item for change in written.changes for item in expand(change.key, file.part(change.at).marked(change.prefix))
    ]
    control, problems = _control(written, file, unchanged=not changes, is_baseline=is_baseline)
    allowed: list[tuple[str, YamlSource]] = []
    for key, value in changes:
        if reason := _why_shared(key, own):
            place = value.place(())
            problems.append((place, Problem(place.prefix + key, f"an arm cannot change this: {reason}")))
        else:
            allowed.append((key, value))
    try:
        merged = overlay(base.source, allowed)
    except ConfigError as error:
        return None, [*problems, *((file.place(written.at), problem) for problem in error.problems)]
    config, complaints = examine(merged)
    problems += [_at_arm(written, file, merged, base, c) for c in complaints if c not in base.complaints]
    if config is None:
        return None, problems
    first_seed = first_control_seed(name, file) if control else 0
    return Arm(name, {key: value.tree for key, value in changes}, config, control, expected, first_seed), problems


def _why_shared(key: str, own: tuple[str, ...] = OWN) -> str | None:
    """Why no arm may change `key`, or None."""
    if f"{key}.".startswith(tuple(f"{one}." for one in own)):
        return None
    return next((why for shared, why in SHARED.items() if f"{key}.".startswith(f"{shared}.")), None)


def first_control_seed(name: str, file: YamlSource) -> int:
    """500 for the first control arm of the file, 700 for the second, ...; the same whichever arms are chosen."""
    controls = [arm for arm, written in file.tree["arms"].items() if isinstance(written, dict) and CONTROL in written]
    return CONTROL_SEEDS + CONTROL_STRIDE * controls.index(name)


def _control(written: Written, file: YamlSource, *, unchanged: bool, is_baseline: bool) -> tuple[bool, list[Located]]:
    """Whether the arm is a control, and problems with that key."""
    complaints = []
    declared = file.tree.get("arms", {}).get(written.name) if written.at[:1] == ("arms",) else None
    control = False
    try:
        control = bool(convert(declared.get(CONTROL, "false"), bool)) if isinstance(declared, dict) else False
    except ValueError as error:
        complaints.append(Complaint(str(error), ((*written.at, CONTROL),)))
    if unchanged and not control and not is_baseline:
        complaints.append(Complaint("changes nothing; if that is meant, write `control: true`", (written.at,)))
    return control, [located(file, complaint) for complaint in complaints]


def _at_arm(written: Written, file: YamlSource, merged: YamlSource, base: Base, complaint: Complaint) -> Located:
    """The complaint located at the arm's change that caused it, else at the arm."""
    place, problem = located(merged, complaint)
    if place.layer == base.layer:
        return place, problem
    place_of_arm = file.place(written.at)
    return place_of_arm, Problem(
        f"{place_of_arm.prefix}{dotted(written.at)}: {dotted(complaint.keys[0])}", complaint.what
    )


def _between_arms(
    declared: Ablation, baseline: str, arms: Mapping[str, Arm], keys: Mapping[str, Key]
) -> Iterator[Complaint]:
    """Arms that are the same, and those that train on unequal amounts. `keys`: of each arm in the file."""
    if baseline not in arms:
        return
    tokens = {name: arm.config.training.steps * arm.config.training.batch_tokens for name, arm in arms.items()}
    seen: dict[str, str] = {}
    distinct: list[Arm] = []
    for name, arm in sorted(arms.items(), key=lambda item: item[0] != baseline):
        own_data = arm.config.data.written() != arms[baseline].config.data.written()
        if own_data and arm.config.evaluation.tokens != "all":
            what = "has other data than the baseline, so all of one text must be scored: `evaluate: {tokens: all}`"
            yield Complaint(what, (keys[name],))
        if declared.equalise.axis in ("tokens", "parameters") and tokens[name] != tokens[baseline]:
            unequal = f"trains on {tokens[name]} tokens, the baseline on {tokens[baseline]}"
            yield Complaint(f"{unequal}: `equalise: tokens` wants them equal", (keys[name],))
        if not arm.control:
            trained = {**settings(arm.config), "prepared": arm.config.data.written()}
            twin, what = seen.setdefault(digest(trained), name), "is the same training as"
            if twin == name:
                alike = (other.name for other in distinct if _same_function(other.config, arm.config))
                twin, what = next(alike, name), "has other settings and computes the same as"
                distinct.append(arm)
            if twin != name and arm.changes:
                yield Complaint(f"{what} arm '{twin}'; if that is meant, write `control: true`", (keys[name],))


def _same_function(one: Config, other: Config) -> bool:
    """Whether two configs differ in nothing but models that compute the same."""
    around, theirs = ({**settings(config), "model": None, "prepared": config.data.written()} for config in (one, other))
    return around == theirs and same_function(one.model, other.model)


def _tune_problems(declared: Ablation, arms: Mapping[str, Arm], keys: Mapping[str, Key]) -> Iterator[Complaint]:
    """Problems of tuning these arms, controls included. `keys`: of each arm in the file."""
    tune = declared.tune
    if tune is None:
        return
    shared = dict(_shared_keys(tune, declared.equalise.axis))
    if shared:
        yield from (
            Complaint(f"no arm may change this: {reason}", (("tune", "space", key),)) for key, reason in shared.items()
        )
        return
    for name, arm in arms.items():
        for key in () if arm.control else tune.keys:
            if _sets(arm.changes, key):
                yield Complaint(f"sets {key}, which `tune` is to find; drop one of the two", (keys[name],))
    arms_with: dict[Problem, list[str]] = {}
    for name, arm in arms.items() if not tune.grid else ():
        try:
            check_search(tune.of(name), arm.config)
        except ConfigError as error:
            for problem in error.problems:
                arms_with.setdefault(problem, []).append(name)
    for problem, names in arms_with.items():
        complaint = space_complaint(problem, tune.space, ("tune",))
        at = "" if len(names) == len(arms) else f"at arm{'s' if len(names) > 1 else ''} {', '.join(names)}: "
        yield replace(complaint, what=at + complaint.what)


def _shared_keys(tune: Tune, axis: str) -> Iterator[tuple[str, str]]:
    """Dimensions that would change what all arms must share, and the reason."""
    for key in tune.space:
        reason = _why_shared(key)
        if key == "training.steps":
            reason = "arms train on as many tokens, whatever is tried"
        elif axis != "tokens" and not key.startswith("optim."):
            reason = f"it could change what `equalise: {axis}` makes equal"
        if reason is not None:
            yield key, reason


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    """Whether an arm's changes set `key`, or a part of it."""
    return any(f"{changed}.".startswith(f"{key}.") for changed in flatten(changes))
