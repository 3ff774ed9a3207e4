"""A run: one config with one seed, its identity, its costs, and its result in the store."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml

from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.basics.text import plural, quantity
from gpt2lab.config import Config
from gpt2lab.data.files import data_home
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import Gpt2labError
from gpt2lab.evaluation.validation import evaluation_key
from gpt2lab.identity import choices, component_code, core_code, digest, run_id, run_identity, settings
from gpt2lab.inspection.costs import Costs, costs
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.store import Store, read_json, write_json
from gpt2lab.training.compiling import decide
from gpt2lab.training.diagnostics import DEFAULT

MOST_EPOCHS = 4
"""Up to here repeated text is nearly as good as new text, by Muennighoff et al. 2023, arXiv:2305.16264."""


@dataclass(frozen=True)
class Run:
    """One training, finished or not: `config` with its seed, and the id that follows from it."""

    id: str
    arm: str
    config: Config
    identity: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def evaluation_key(self) -> str:
        """Key of the final evaluation."""
        return evaluation_key(self.config.evaluation.spec(self.config.model.block_size))


def make_run(arm: Arm, seed: int, data: Prepared, machine: Machine) -> Run:
    """One arm with one seed, on its own data where it has any."""
    config = arm.config.model_copy(update={"seed": seed})
    identity = run_identity(
        config,
        data=(arm.data or data).fingerprint,
        device=machine.device,
        threads=machine.threads if machine.device == "cpu" else 0,
        torch_version=machine.torch,
        compiled=is_compiled(config, machine.device),
    )
    return Run(run_id(identity), arm.name, config, identity)


def is_compiled(config: Config, device: str) -> bool:
    """Whether a run of `config` on that type of device compiles its model."""
    setting = config.training.compile
    flops = known_costs(config).flops_per_token * tokens_of(config) if setting == "auto" and device != "cpu" else 0.0
    return decide(setting, device, flops)[0]


def make_runs(arm: Arm, seeds: Sequence[int], data: Prepared, machine: Machine) -> tuple[Run, ...]:
    """One arm with several seeds; everything of the identity except the seed is computed once."""
    if not seeds:
        return ()
    first = make_run(arm, seeds[0], data, machine)
    runs = [first]
    for seed in seeds[1:]:
        identity = {**first.identity, "seed": seed}
        runs.append(Run(run_id(identity), arm.name, arm.config.model_copy(update={"seed": seed}), identity))
    return tuple(runs)


def is_finished(run: Run, store: Store) -> bool:
    """Whether it is trained, and evaluated with this study's evaluation key, or diverged."""
    folder = store.run(run.id)
    status = folder.status()
    return status == "diverged" or (status == "finished" and folder.evaluation(run.evaluation_key) is not None)


def unmeasured_lines(runs: Iterable[Run], store: Store) -> list[str]:
    """Diagnostics without values in finished runs, because these trained before it was listed; as sentences."""
    missing = Counter[str]()
    for run in runs:
        listed = {str(choice): choice.written() for choice in run.config.evaluation.diagnostics}
        if listed.keys() <= set(DEFAULT) or store.run(run.id).status() != "finished":
            continue
        trained = yaml.safe_load(store.run(run.id).config() or "") or {}
        measured = (trained.get("evaluation") or {}).get("diagnostics", list(DEFAULT))
        missing.update(name for name, written in listed.items() if written not in measured)
    return [
        f"{name} has no values in {plural(count, 'run')} that finished before it was listed: diagnostics are measured "
        "while a run trains"
        for name, count in missing.items()
    ]


def final_loss(run: Run, store: Store, floors: dict[str, float] | None) -> float | None:
    """The final validation loss; infinity for a run that diverged or learned nothing, None for one not finished, or
    damaged."""
    folder = store.run(run.id)
    status = folder.status()
    if status == "diverged":
        return math.inf
    if status != "finished":
        return None
    value = ((folder.evaluation(run.evaluation_key) or {}).get("metrics") or {}).get(LOSS)
    if value is None:
        return None
    return float(value) if math.isfinite(value) and value < failure_ceiling_of(floors) else math.inf


def tokens_of(config: Config) -> int:
    """Training tokens of one run."""
    return config.training.steps * config.training.batch_tokens


def tokens_left(config: Config) -> int:
    """Training tokens of one run, excluding those of the run from which it branches."""
    return (config.training.steps - config.first_step) * config.training.batch_tokens


def repetition(tokens: int, data: Prepared) -> list[str]:
    """A sentence, where a training of so many tokens sees its text much more often than pays."""
    epochs = tokens / len(data.train)
    if epochs <= MOST_EPOCHS:
        return []
    text = f"{quantity(tokens)} tokens are {epochs:,.1f} epochs of a text of {quantity(len(data.train))}"
    return [f"{text}: beyond {MOST_EPOCHS}, repeated text teaches little (arXiv:2305.16264)"]


def known_costs(config: Config) -> Costs:
    """The costs of a model, cached in the user's cache folder: counting them imports torch's compiler, which takes more
    than a second."""
    parts = {
        "model": settings(config)["model"],
        "code": [core_code(), *(component_code(choice) for choice in choices(config))],
        "torch": torch.__version__,
    }
    path = data_home() / "costs" / f"{digest(parts)[:32]}.json"
    with contextlib.suppress(Gpt2labError, TypeError):  # an unreadable record counts as absent
        record = read_json(path)
        if record is not None:
            return Costs(**record)
    model_costs = costs(config.model)
    with contextlib.suppress(Gpt2labError):
        write_json(path, asdict(model_costs))
    return model_costs
