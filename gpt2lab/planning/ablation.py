"""An ablation file becomes configs: a baseline, arms that each change something, and what is declared beforehand.

Everything that is wrong with the file and with any of its arms is said in one error.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2lab.analysis.verdicts import Declared
from gpt2lab.config import fill_slots, preset_name, preset_names, preset_source, read_overrides
from gpt2lab.config.fitting import check, error_of, located
from gpt2lab.config.source import Place, Source, lay, read_file, read_mapping
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.planning.arms import Arm, Base, between_arms, exploratory_reason, resolve_arm
from gpt2lab.planning.declaration import MAX_ARMS, NAME, SEEDS, Ablation, Axis, Evaluate, Knob, file_problems, seed_list
from gpt2lab.planning.designs import Design
from gpt2lab.planning.samplers import Tune
from gpt2lab.planning.tuning import tune_problems
from gpt2lab.schema import ABSENT

RATE = "optim.lr"

__all__ = ["Arm", "LoadedAblation", "exploratory_reason", "ladder_of", "load_ablation"]


@dataclass(frozen=True, kw_only=True)
class LoadedAblation:
    """An ablation at one scale, checked as a whole. What its fields mean, `Ablation` says."""

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
    lr_bracket: tuple[float, ...] = ()
    tune: Tune | None = None
    axis: Axis = "tokens"
    knob: Knob | None = None
    budgets: tuple[float, ...] = ()
    budget_arms: tuple[str, ...] = ()
    tokens_per_parameter: float | None = None
    noise_command: str = "gpt2lab noise PRESET"
    """what measures the noise floor of its baseline's recipe"""

    def exploratory_reason(self, arm: str) -> str | None:
        """Why contrasts of this arm may claim nothing, or None."""
        trunk = next(
            (self.arms[name].config.branch for name in (arm, self.baseline) if self.arms[name].config.branch), ""
        )
        if trunk:
            return f"it branches from {trunk}: its seeds differ only in what came after"
        if self.lr_bracket or (self.tune is not None and RATE in self.tune.space):
            return None
        return exploratory_reason(self.arms[arm], self.arms[self.baseline])


def ladder_of(source: str | Path | Mapping[str, Any]) -> tuple[str, ...]:
    """The scales that an ablation is run at one after another; none for one without `scales`."""
    scales = read_source(source)[0].tree.get("scales")
    return tuple(map(str, scales)) if isinstance(scales, list) else ()


def read_source(source: str | Path | Mapping[str, Any]) -> tuple[Source, Path]:
    """A YAML file, or the mapping that one would hold, and the folder that files named in it are looked for in. Raises
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

    scale:     preset or file in the place of the file's `base`.
    overrides: `key=value`, for every arm, before the arm's own changes.
    arms:      only these; the baseline must be among them.
    seeds:     in the place of the file's.
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
        arm, problems = resolve_arm(
            design.arms[name],
            read,
            base,
            is_baseline=name == design.baseline or design.baseline not in design.arms,
            expected=declared.expected.get(name),
        )
        found += problems
        if arm is not None and not problems:
            made[name] = arm
    at = {name: written.at for name, written in design.arms.items()}
    equal_tokens = declared.equalise.axis in ("tokens", "parameters")
    beside = between_arms(
        design.baseline, made, at, equal_tokens=equal_tokens, bracketed=declared.lr_bracket is not None
    )
    found += [located(read, complaint) for complaint in beside]
    if declared.tune is not None and made and not base.complaints:
        misfits = tune_problems(declared.tune, made, at, declared.equalise.axis)
        found += [located(read, complaint) for complaint in misfits]
    kept = preset_name(scale or declared.base)
    if not NAME.fullmatch(kept):
        found.append((Place(""), Problem(scale or declared.base, "its file name must be of letters, digits, _ . + -")))
    if found:
        raise error_of(found)
    own = made[design.baseline].config.scale.smallest_effect
    curve = declared.budget_curve
    return LoadedAblation(
        name=declared.ablation,
        question=declared.question,
        scale=kept if declared.tokens_per_parameter is None else f"{kept}-{declared.tokens_per_parameter:g}tpp",
        baseline=design.baseline,
        arms=made,
        seeds=listed,
        contrasts=_contrasts(declared, design, chosen),
        smallest_effect=_smallest_effect(declared, kept, own),
        alpha=declared.alpha,
        screen=declared.screen,
        design=design.kind,
        factors=design.factors,
        expected={name: said for name, said in declared.expected.items() if name not in design.arms},
        baseline_seeds=declared.baseline_seeds,
        looks=looks,
        lr_bracket=declared.lr_bracket or (),
        tune=declared.tune,
        axis=declared.equalise.axis,
        knob=declared.equalise.by,
        budgets=curve.budgets if curve else (),
        budget_arms=tuple(a for a in (design.baseline, *curve.arms) if a in chosen) if curve else (),
        tokens_per_parameter=declared.tokens_per_parameter,
        noise_command=_noise_command(scale or _beside(folder, declared.base), declared, overrides),
    )


def _beside(folder: Path, base: str) -> str:
    """A file's base as one would name it from here."""
    return base if preset_name(base) in preset_names() else str(folder / base)


def _noise_command(preset: str, declared: Ablation, overrides: Sequence[str]) -> str:
    per = declared.tokens_per_parameter
    words = ["gpt2lab", "noise", preset, *(["--tokens-per-parameter", f"{per:g}"] if per else [])]
    return shlex.join([*words, *(word for item in overrides for word in ("--set", item))])


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
    try:
        if wanted is None:
            looks = declared.looks or ()
            seeds = declared.seeds or (looks[-1] if looks else SEEDS)
            return (None if seeds == "auto" else seed_list(seeds)), looks
        return (None if wanted == "auto" else seed_list(wanted)), ()
    except ValueError as error:
        raise ConfigError(str(error), where="--seeds") from error


def base_of(name: str, source: Source, folder: Path, scale: str | None, overrides: Sequence[str]) -> Base:
    """What the arms change: the scale, then how it is judged, then overrides."""
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
    return Base.of(lay(lay(base, judged), changes))


def _contrasts(declared: Ablation, design: Design, chosen: Sequence[str]) -> tuple[Declared, ...]:
    """What is compared among the chosen arms."""
    asked = tuple(Declared.pair(*pair) for pair in declared.contrasts) if declared.contrasts else design.contrasts
    return tuple(one for one in asked if one.weights.keys() <= set(chosen))


def _smallest_effect(declared: Ablation, scale: str, own: float) -> float:
    """In nats at `scale`, whose own value is `own`."""
    effect = declared.smallest_effect
    if isinstance(effect, dict):
        return {preset_name(name): value for name, value in effect.items()}.get(scale, own)
    return own if effect is None else effect
