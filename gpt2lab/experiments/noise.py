"""The study of repeats for a noise floor: one recipe with different seeds; and repeats of one seed.

Repeats of a seed show whether kernels on this machine are deterministic; if so, a single repeat suffices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2lab.analysis.results import NOISE_DESIGN
from gpt2lab.config import load_config, preset_name
from gpt2lab.errors import ConfigError
from gpt2lab.planning.ablation import NOISE_SEEDS, Arm, LoadedAblation
from gpt2lab.planning.declaration import MAX_SEEDS
from gpt2lab.planning.noise import Floor, make_floor, write_floor
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import final_loss
from gpt2lab.records import NoiseFloor, StudyRecord
from gpt2lab.store import Store

REPEATS, AGAIN = "repeats", "same seed"
FEWEST = 3


def aa_study(
    preset: str | Path,
    *,
    seeds: int,
    same_seed: int,
    overrides: Sequence[str] = (),
    tokens_per_parameter: float | None = None,
    plugins: Sequence[str | Path] = (),
) -> LoadedAblation:
    """The study of a preset: `seeds` runs of its recipe, on reserved seeds, and the first of them `same_seed` times in
    all. Raises ConfigError."""
    if not FEWEST <= seeds <= MAX_SEEDS:
        raise ConfigError(f"from {FEWEST} to {MAX_SEEDS} seeds are expected, not {seeds}", where="--seeds")
    config, name = load_config(preset, overrides, plugins=plugins), preset_name(preset)
    repeat_seeds = tuple(range(NOISE_SEEDS, NOISE_SEEDS + seeds))
    arms = {REPEATS: Arm(REPEATS, {}, config, seeds=repeat_seeds)}
    for repeat in range(1, same_seed):
        again = config.model_copy(update={"repeat": config.repeat + repeat})
        arms[f"{AGAIN} {repeat + 1}"] = Arm(f"{AGAIN} {repeat + 1}", {}, again, control=True, seeds=repeat_seeds[:1])
    return LoadedAblation(
        name="noise",
        question=f"How far do repeats of {name} lie apart?",
        scale=name if tokens_per_parameter is None else f"{name}-{tokens_per_parameter:g}tpp",
        baseline=REPEATS,
        arms=arms,
        seeds=repeat_seeds,
        contrasts=(),
        smallest_effect=config.scale.smallest_effect,
        alpha=0.05,
        screen=False,
        design=NOISE_DESIGN,
        tokens_per_parameter=tokens_per_parameter,
    )


def keep_floor(plan: Plan, record: StudyRecord, store: Store) -> Floor:
    """Store the noise floor of a finished study of repeats, and put it into the study's record. Raises ConfigError when
    too few runs learned anything."""
    losses = {run.seed: final_loss(run, store, plan.data.floors) for run in plan.arms[REPEATS].runs}
    good = {str(seed): loss for seed, loss in losses.items() if loss is not None and loss < float("inf")}
    if len(good) < FEWEST:
        problem = f"{len(good)} of {len(losses)} runs ended with a loss that means something, {FEWEST} are needed"
        raise ConfigError(problem, where=f"noise floor of {plan.ablation.scale}", hint="gpt2lab report noise")
    first = [losses[plan.seeds[0]], *(final_loss(arm.runs[0], store, plan.data.floors) for name, arm in
             plan.arms.items() if name != REPEATS)]  # fmt: skip
    runs, failed = [run.id for run in plan.arms[REPEATS].runs], sum(loss == float("inf") for loss in losses.values())
    floor = make_floor(plan, good, runs, failed, [loss for loss in first if loss is not None])
    write_floor(floor, store)
    store.write_study(record.with_(noise=NoiseFloor(**floor.as_record())))
    return floor
