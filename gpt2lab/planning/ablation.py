"""An ablation file becomes configs: a baseline, arms that each change something, and what is declared beforehand.

All mistakes in the file and in any of its arms are reported in one error.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.config import Config, examine, fill_slots, preset_name, preset_names, preset_source, read_overrides
from gpt2lab.config.fitting import Complaint, Located, check, error_of, located
from gpt2lab.config.source import Key, Place, YamlSource, dotted, expand, lay, read_file, read_mapping
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.identity import digest, settings
from gpt2lab.planning.declaration import (
    CONTROL,
    MAX_ARMS,
    MAX_SEEDS,
    NAME,
    SEEDS,
    Ablation,
    Axis,
    Design,
    Evaluate,
    Knob,
    Written,
    file_problems,
    seed_list,
)
from gpt2lab.planning.placebo import same_function
from gpt2lab.planning.space import RATE, Tune, check_search
from gpt2lab.schema import ABSENT, convert

# Seeds are reserved by purpose, so that no verdict uses a run that was also used to choose or to plan: an ablation's
# own seeds are 0 to 99 (what a file may name), tuning uses those from 100 on, noise floors 200 to 299, control arms
# those from 500 on.
TUNING_SEED = 100
NOISE_SEEDS = 200
CONTROL_SEEDS = 500
CONTROL_STRIDE = 2 * MAX_SEEDS  # a control arm is tuned on a seed of its own, too

# What all arms share, because runs are compared on it, or because another key sets it.
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
# What moves the best learning rate: at a single shared rate such a contrast claims little (docs/statistics.md).
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
    """Its own seeds, instead of the ablation's."""


@dataclass(frozen=True, kw_only=True)
class LoadedAblation:
    """An ablation at one scale, checked as a whole. For the meaning of its fields see `Ablation`."""

    name: str
    question: str
    scale: str
    baseline: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...] | None
    """those of arms that are no controls; None for as many as the noise floor asks for"""
    contrasts: tuple[Declared, ...]
    smallest_effect: float
    alpha: float
    screen: bool
    design: str = "one factor"
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    """of effects that belong to no single arm"""
    baseline_seeds: int | None = None
    looks: tuple[int, ...] = ()
    tune: Tune | None = None
    axis: Axis = "tokens"
    knob: Knob | None = None
    budgets: tuple[float, ...] = ()
    budget_arms: tuple[str, ...] = ()
    tokens_per_parameter: float | None = None
    noise_command: str = "gpt2lab noise PRESET"
    """measures the noise floor of its baseline's recipe"""

    @property
    def tunes_rate(self) -> bool:
        """Whether every arm looks for its own learning rate."""
        return self.tune is not None and RATE in self.tune.keys

    def exploratory_reason(self, arm: str) -> str | None:
        """Why contrasts of this arm may claim nothing, as the end of a sentence, or None."""
        ours, theirs = self.arms[arm].config, self.arms[self.baseline].config
        trunk = ours.branch or theirs.branch
        if trunk:
            return f"it branches from {trunk}: its seeds differ only in what came after"
        if self.tunes_rate:
            return None
        moved = [f"optim.{name}" for name, value in ours.optim if value != getattr(theirs.optim, name)]
        for key in MOVES_RATE:
            section, name = key.split(".")
            if getattr(getattr(ours, section), name) != getattr(getattr(theirs, section), name):
                moved.append(key)
        if not moved:
            return None
        return f"it changes {', '.join(moved)}, which moves the best learning rate, and rates were not bracketed"


def ladder_of(source: str | Path | Mapping[str, Any]) -> tuple[str, ...]:
    """The scales that an ablation is run at one after another; none for one without `scales`."""
    scales = read_source(source)[0].tree.get("scales")
    return tuple(map(str, scales)) if isinstance(scales, list) else ()


def read_source(source: str | Path | Mapping[str, Any]) -> tuple[YamlSource, Path]:
    """A YAML file, or the mapping that one would hold, and the folder that files named in it are relative to. Raises
    ConfigError."""
    if isinstance(source, Mapping):
        text = yaml.safe_dump(json.loads(json.dumps(source, default=str)), sort_keys=False)
        return read_mapping(text, "ablation"), Path()
    return read_file(source), Path(source).parent


def load_ablation(
    source: str | Path | Mapping[str, Any],
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    arms: Sequence[str] | None = None,
    seeds: int | Sequence[int] | Literal["auto"] | None = None,
    plugins: Sequence[str | Path] = (),
) -> LoadedAblation:
    """The ablation of a YAML file, or of the mapping that one would hold.

    scale:     preset or file instead of the file's `base`.
    overrides: `key=value`, for every arm, before the arm's own changes.
    arms:      only these; the baseline must be among them.
    seeds:     instead of the file's.
    plugins:   Python files that register components.
    Raises ConfigError with everything that is wrong in the file, in the overrides and in any arm.
    """
    fill_slots(plugins)
    read, folder = read_source(source)
    declared, complaints = check(Ablation, read, stand_ins={"ablation": "unnamed", "question": "?", "base": "nano"})
    found = [located(read, complaint) for complaint in complaints]
    if declared is None:
        raise error_of(found)
    found += [located(read, complaint) for complaint in file_problems(declared, read)]
    design = declared.design()
    try:
        chosen = _chosen_arms(design, arms)
        listed, looks = _chosen_seeds(declared, seeds)
        base = base_of(declared.base, read, folder, scale, overrides)
    except ConfigError as error:
        raise error_of(found, more=error.problems, hint=error.hint) from error
    found += [located(base.source, complaint) for complaint in base.complaints]
    made: dict[str, Arm] = {}
    for name in chosen:
        is_baseline = name == design.baseline or design.baseline not in design.arms
        expected = declared.expected.get(name)
        arm, problems = resolve_arm(design.arms[name], read, base, is_baseline=is_baseline, expected=expected)
        found += problems
        if arm is not None and not problems:
            made[name] = arm
    at = {name: written.at for name, written in design.arms.items()}
    beside = [*_between_arms(declared, design.baseline, made, at)]
    unread = any(key[:1] == ("tune",) for complaint in complaints for key in complaint.keys)
    if made and not base.complaints and not (unread and declared.tune and not declared.tune.keys):
        beside += _tune_problems(declared, made, at)
    found += [located(read, complaint) for complaint in beside]
    kept, problem = scale_name(scale or declared.base)
    found += problem
    if found:
        raise error_of(found)
    curve, per_parameter = declared.budget_curve, declared.tokens_per_parameter
    return LoadedAblation(
        name=declared.ablation,
        question=declared.question,
        scale=kept if per_parameter is None else f"{kept}-{per_parameter:g}tpp",
        baseline=design.baseline,
        arms=made,
        seeds=listed,
        contrasts=_contrasts(declared, design, chosen),
        smallest_effect=smallest_effect(declared.smallest_effect, kept, made[design.baseline].config),
        alpha=declared.alpha,
        screen=declared.screen,
        design=design.kind,
        factors=design.factors,
        expected={name: text for name, text in declared.expected.items() if name not in design.arms},
        baseline_seeds=declared.baseline_seeds,
        looks=looks,
        tune=declared.tuning,
        axis=declared.equalise.axis,
        knob=declared.equalise.by,
        budgets=curve.budgets if curve else (),
        budget_arms=tuple(a for a in (design.baseline, *curve.arms) if a in chosen) if curve else (),
        tokens_per_parameter=per_parameter,
        noise_command=_noise_command(scale or _relative(folder, declared.base), per_parameter, overrides),
    )


def scale_name(scale: str) -> tuple[str, list[Located]]:
    """The name that results at a scale are kept under, and what is wrong with it."""
    name = preset_name(scale)
    if NAME.fullmatch(name):
        return name, []
    return name, [(Place(""), Problem(scale, "its file name must be of letters, digits, _ . + -"))]


def smallest_effect(declared: float | Mapping[str, float] | None, scale: str, config: Config) -> float:
    """In nats at `scale`; the config's own where none was declared for it."""
    if isinstance(declared, Mapping):
        declared = {preset_name(name): value for name, value in declared.items()}.get(scale)
    return config.scale.smallest_effect if declared is None else declared


def _relative(folder: Path, base: str) -> str:
    """A file's base as one would name it from the working directory."""
    return base if preset_name(base) in preset_names() else str(folder / base)


def _noise_command(preset: str, per_parameter: float | None, overrides: Sequence[str]) -> str:
    tokens = ["--tokens-per-parameter", f"{per_parameter:g}"] if per_parameter else []
    return shlex.join(["gpt2lab", "noise", preset, *tokens, *(word for item in overrides for word in ("--set", item))])


def _chosen_arms(design: Design, wanted: Sequence[str] | None) -> list[str]:
    """The arms to resolve, in the file's order. Raises ConfigError."""
    names = list(design.arms)[: MAX_ARMS + 1]
    if wanted is None:
        return names
    problems = [Problem("--arms", unknown("arm", name, names)) for name in wanted if name not in names]
    if design.kind == "factorial":
        problems = [Problem("--arms", "a factorial design needs all of its arms")]
    elif design.baseline not in wanted:
        problems.append(Problem("--arms", f"must keep the baseline '{design.baseline}'"))
    elif len(set(wanted)) < 2 and not problems:
        problems.append(Problem("--arms", "at least one arm besides the baseline is expected"))
    if problems:
        raise ConfigError(problems, hint=f"--arms {','.join(names)}")
    return [name for name in names if name in wanted]


def _chosen_seeds(
    declared: Ablation, wanted: int | Sequence[int] | Literal["auto"] | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """(seeds, None for automatic; looks). Asking for other seeds than the file's drops its looks."""
    looks = declared.looks if wanted is None and declared.looks else ()
    seeds = (declared.seeds or (looks[-1] if looks else SEEDS)) if wanted is None else wanted
    try:
        return None if isinstance(seeds, str) else seed_list(seeds), looks
    except ValueError as error:
        raise ConfigError(str(error), where="--seeds") from error


def _contrasts(declared: Ablation, design: Design, chosen: Sequence[str]) -> tuple[Declared, ...]:
    """What is compared among the chosen arms."""
    pairs = tuple(Declared.pair(*pair) for pair in declared.contrasts or ()) or design.contrasts
    return tuple(contrast for contrast in pairs if contrast.weights.keys() <= set(chosen))


# --- the arms ---


@dataclass(frozen=True)
class Base:
    """What every arm changes, with what is wrong with it already."""

    source: YamlSource
    complaints: tuple[Complaint, ...]

    @property
    def layer(self) -> int:
        """The layer of changes laid over it."""
        return 1 + max((place.layer for place in self.source.places.values()), default=0)


def base_of(name: str, source: YamlSource, folder: Path, scale: str | None, overrides: Sequence[str]) -> Base:
    """What the arms change: the scale, then `evaluate`, then overrides."""
    changes = read_overrides(overrides)
    try:
        base = preset_source(scale) if scale else preset_source(name, folder)
    except ConfigError as error:
        if error.problems[0].where:
            raise
        where = "--scale" if scale else source.place(("base",)).prefix + "base"
        raise ConfigError(error.problems[0].what, where=where, hint=error.hint) from error
    given = source.tree.get("evaluate", {})
    judged = [
        (f"evaluation.{key}", source.part(("evaluate", key)))
        for key in Evaluate.model_fields
        if isinstance(given, dict) and key in given and given[key] not in ABSENT
    ]
    laid = lay(lay(base, judged), changes)
    return Base(laid, tuple(examine(laid)[1]))


def resolve_arm(
    written: Written, file: YamlSource, base: Base, *, is_baseline: bool, expected: str | None
) -> tuple[Arm | None, list[Located]]:
    """One arm of an ablation's `file` over `base`, or None; and what is wrong with it that is not so with the base."""
    name = written.name
    changes = [item for one in written.changes for item in expand(one.key, file.part(one.at).marked(one.prefix))]
    control, found = _control(written, file, nothing=not changes, is_baseline=is_baseline)
    own: list[tuple[str, YamlSource]] = []
    for key, value in changes:
        if why := _why_shared(key):
            place = value.place(())
            found.append((place, Problem(place.prefix + key, f"an arm cannot change this: {why}")))
        else:
            own.append((key, value))
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


def _why_shared(key: str) -> str | None:
    """Why no arm may change `key`, or None."""
    return next((why for shared, why in SHARED.items() if f"{key}.".startswith(f"{shared}.")), None)


def first_control_seed(name: str, file: YamlSource) -> int:
    """500 for the first control arm of the file, 700 for the second, ...; the same whichever arms are chosen."""
    controls = [arm for arm, written in file.tree["arms"].items() if isinstance(written, dict) and CONTROL in written]
    return CONTROL_SEEDS + CONTROL_STRIDE * controls.index(name)


def _control(written: Written, file: YamlSource, *, nothing: bool, is_baseline: bool) -> tuple[bool, list[Located]]:
    """Whether the arm is a control, and what is wrong with that."""
    complaints = []
    own = file.tree.get("arms", {}).get(written.name) if written.at[:1] == ("arms",) else None
    control = False
    try:
        control = bool(convert(own.get(CONTROL, "false"), bool)) if isinstance(own, dict) else False
    except ValueError as error:
        complaints.append(Complaint(str(error), ((*written.at, CONTROL),)))
    if nothing and not control and not is_baseline:
        complaints.append(Complaint("changes nothing; if that is meant, write `control: true`", (written.at,)))
    return control, [located(file, complaint) for complaint in complaints]


def _at_arm(written: Written, file: YamlSource, laid: YamlSource, base: Base, complaint: Complaint) -> Located:
    """The complaint at the arm's own change; at the arm itself where what it clashes with was written elsewhere."""
    place, problem = located(laid, complaint)
    if place.layer == base.layer:
        return place, problem
    here = file.place(written.at)
    return here, Problem(f"{here.prefix}{dotted(written.at)}: {dotted(complaint.keys[0])}", complaint.what)


def _between_arms(
    declared: Ablation, baseline: str, arms: Mapping[str, Arm], at: Mapping[str, Key]
) -> Iterator[Complaint]:
    """Arms that are the same, and those that train on unequal amounts. `at`: each arm's key in the file."""
    if baseline not in arms:
        return
    tokens = {name: arm.config.training.steps * arm.config.training.batch_tokens for name, arm in arms.items()}
    seen: dict[str, str] = {}
    distinct: list[Arm] = []
    for name, arm in sorted(arms.items(), key=lambda item: item[0] != baseline):
        if declared.equalise.axis in ("tokens", "parameters") and tokens[name] != tokens[baseline]:
            unequal = f"trains on {tokens[name]} tokens, the baseline on {tokens[baseline]}"
            yield Complaint(f"{unequal}: `equalise: tokens` wants them equal", (at[name],))
        if not arm.control:
            twin, what = seen.setdefault(digest(settings(arm.config)), name), "is the same training as"
            if twin == name:
                alike = (other.name for other in distinct if _same_function(other.config, arm.config))
                twin, what = next(alike, name), "has other settings and computes the same as"
                distinct.append(arm)
            if twin != name and arm.changes:
                yield Complaint(f"{what} arm '{twin}'; if that is meant, write `control: true`", (at[name],))


def _same_function(one: Config, other: Config) -> bool:
    """Whether two configs differ in nothing but models that compute the same."""
    around, theirs = ({**settings(config), "model": None} for config in (one, other))
    return around == theirs and same_function(one.model, other.model)


def _tune_problems(declared: Ablation, arms: Mapping[str, Arm], at: Mapping[str, Key]) -> Iterator[Complaint]:
    """What is wrong with the tuning at these arms, the controls among them. `at`: each arm's key in the file."""
    tune = declared.tuning
    if tune is None:
        return
    shared = dict(_shared_keys(tune, declared.equalise.axis))
    if shared:
        yield from (
            Complaint(f"no arm may change this: {why}", (("tune", "space", key),)) for key, why in shared.items()
        )
        return
    spelled = "tune" if declared.tune else "lr_bracket"
    for name, arm in arms.items():
        for key in () if arm.control else tune.keys:
            if _sets(arm.changes, key):
                yield Complaint(f"sets {key}, which `{spelled}` is to find; drop one of the two", (at[name],))
    misfits: dict[Problem, list[str]] = {}
    for name, arm in arms.items() if not tune.grid else ():
        try:
            check_search(tune.of(name), arm.config)
        except ConfigError as error:
            for problem in error.problems:
                misfits.setdefault(problem, []).append(name)
    for problem, names in misfits.items():
        of = "" if len(names) == len(arms) else f"at arm{'s' if len(names) > 1 else ''} {', '.join(names)}: "
        where: Key = ("tune", "space", problem.where) if problem.where in tune.space else ("tune", "space")
        if problem.where.startswith("enqueue"):
            where, of = ("tune", "enqueue"), of + problem.where.removeprefix("enqueue").lstrip(": ") + ": "
        yield Complaint(f"{of}{problem.what}", (where,))


def _shared_keys(tune: Tune, axis: str) -> Iterator[tuple[str, str]]:
    """Dimensions that would make arms differ in what they have to share, and why."""
    for key in tune.space:
        why = _why_shared(key)
        if key == "training.steps":
            why = "arms train on as many tokens, whatever is tried"
        elif axis != "tokens" and not key.startswith("optim."):
            why = f"it could change what `equalise: {axis}` makes equal"
        if why is not None:
            yield key, why


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    """Whether an arm's changes have a value for `key`."""
    for changed, value in changes.items():
        if f"{changed}.".startswith(f"{key}."):
            return True
        inner: Any = value if key.startswith(f"{changed}.") else None
        for step in key.removeprefix(f"{changed}.").split("."):
            inner = inner.get(step) if isinstance(inner, Mapping) else None
        if inner is not None:
            return True
    return False
