"""The reproduction of GPT-2 124M: what it takes on this machine, and the training itself."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.config import Config, load_config
from gpt2lab.costs import Costs, costs
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.experiments.single import check_ranks
from gpt2lab.planning.machine import Machine, probe
from gpt2lab.planning.probes import MicroBatch, given, micro_batch
from gpt2lab.published import BATCH_TOKENS, CURVE, FINAL, HELLASWAG, SOURCE, STEPS, departures, tolerance
from gpt2lab.registry import Choice
from gpt2lab.store import Store
from gpt2lab.text import duration, memory, quantity
from gpt2lab.training.precision import choose_device

PRESET = "gpt2-124m"
PUBLISHED_CORPUS = "fineweb-10b"
SMALL_CORPORA = {"shakespeare": 16_384}
"""Tokens to evaluate on, of texts too small for the recipe's."""
EVALUATION_TOKENS = 10_485_760
TOKENS_BYTES = {
    "fineweb-10b": 2 * 10_000_000_000,
    "fineweb-edu-10b": 2 * 10_000_000_000,
    "openwebtext": 2 * 9_000_000_000,
}
"""Of large corpora as prepared, about: two bytes for each token."""
TASK, TASK_DOCUMENTS = "hellaswag_nanogpt", {"cuda": 1000, "cpu": 40, "mps": 40}
"""Asked at every evaluation; of its 10,042 documents so many, as a device is fast."""
WARMUP_SHARE = 10
"""A training of fewer steps than ten warm-ups warms up for a tenth of them."""
DAY = 86_400
MICRO = "training.micro_batch_sequences"


@dataclass(frozen=True)
class Baseline:
    """The reproduction, as this machine would train it.

    overrides: of the preset, the micro-batch included.  ranks: processes that share every batch.
    """

    config: Config
    overrides: tuple[str, ...]
    ranks: int
    machine: Machine
    costs: Costs
    micro: MicroBatch

    @property
    def seconds(self) -> float:
        """Of training, evaluations and exchange between ranks left out."""
        return self.config.training.steps * self.micro.step_seconds(self.share)

    @property
    def share(self) -> int:
        """Sequences of one rank in a step."""
        return self.config.training.batch_tokens // self.config.model.block_size // self.ranks

    @property
    def disk_bytes(self) -> int:
        """Of checkpoints: weights and AdamW's averages in float32, of those that stay and one that is being written."""
        return 12 * self.costs.parameters * (self.config.training.keep_checkpoints + 1)

    @property
    def differs(self) -> list[str]:
        """In what the published curve does not apply, in words; empty where it does."""
        training, found = self.config.training, []
        if not is_published(self.config.data.corpus):
            found.append(f"the text is {self.config.data.corpus.name}, not {PUBLISHED_CORPUS}")
        if training.batch_tokens != BATCH_TOKENS:
            found.append(f"a batch has {training.batch_tokens:,} tokens, not the recipe's {BATCH_TOKENS:,}")
        if training.steps != STEPS:
            found.append(f"it has {training.steps:,} steps, not {STEPS:,}, and the rate follows its own schedule")
        recipe = load_config(PRESET)
        found += [f"{name} is not the recipe's" for name in ("model", "optim") if not self.same(recipe, name)]
        return found

    def same(self, recipe: Config, section: str) -> bool:
        """Whether a section is the recipe's; another warm-up goes with another number of steps."""
        mine, theirs = (getattr(config, section).model_dump() for config in (self.config, recipe))
        mine.pop("warmup_steps", None), theirs.pop("warmup_steps", None)
        return bool(mine == theirs)


def is_published(corpus: Choice) -> bool:
    """Whether this is FineWeb's sample of 10B tokens: ours, or the token files that llm.c makes of it."""
    written = str(corpus.full()).lower()
    return corpus.name == PUBLISHED_CORPUS or (corpus.name == "tokens" and "fineweb10b" in written.replace("_", ""))


def plan_baseline(
    store: Store,
    *,
    ranks: int,
    corpus: str = PUBLISHED_CORPUS,
    steps: int | None = None,
    batch_tokens: int | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Baseline:
    """What is to be trained, with the micro-batch that this machine holds; no data is touched. Raises ConfigError for
    what cannot be, EnvironmentFault where the model does not fit."""
    asked = [*recipe_overrides(corpus, steps, batch_tokens), *overrides]
    own = any(item.startswith(f"{MICRO}=") for item in overrides)
    config = load_config(PRESET, asked if own else [*asked, f"{MICRO}=1"])  # 1 divides every batch
    check_ranks(config, ranks, ranks)
    found = costs(config.model)
    machine = probe(store, config.training, found.flops_per_token, ranks)
    micro = given(config, machine, ranks) if own else micro_batch(config, machine, ranks, store.root, say)
    asked += [] if own else [f"{MICRO}={micro.sequences}"]
    return Baseline(load_config(PRESET, asked), tuple(asked), ranks, machine, found, micro)


def recipe_overrides(corpus: str, steps: int | None, batch_tokens: int | None) -> list[str]:
    """What the short options stand for."""
    asked = [
        f"data.corpus={corpus}",
        f"evaluation.tokens={SMALL_CORPORA.get(corpus, EVALUATION_TOKENS)}",
        f"evaluation.tasks=[{TASK}]",
        f"evaluation.task_documents={TASK_DOCUMENTS[choose_device().type]}",
    ]
    if steps is not None:
        recipe = load_config(PRESET).optim.warmup_steps
        asked += [f"training.steps={steps}", f"optim.warmup_steps={min(recipe, max(1, steps // WARMUP_SHARE))}"]
    if batch_tokens is not None:
        asked.append(f"training.batch_tokens={batch_tokens}")
    return asked


def lines(base: Baseline) -> list[str]:
    """What it is, what it takes here, and what to expect, in sentences."""
    config, training = base.config, base.config.training
    tokens = training.steps * training.batch_tokens
    size = TOKENS_BYTES.get(config.data.corpus.name)
    text = (
        f", and about {memory(size)} for the tokens of {config.data.corpus.name}, once they are prepared"
        if size
        else ""
    )
    many = f" on each of {base.ranks} ranks" if base.ranks > 1 else ""
    micro = -(-base.share // base.micro.sequences)
    work = base.costs.flops_per_token * tokens
    speed = training.batch_tokens / base.micro.step_seconds(base.share)
    return [
        f"GPT-2 124M: {base.costs.parameters:,} parameters, {quantity(tokens)} tokens of {config.data.corpus.name} in "
        f"{training.steps:,} steps of {training.batch_tokens:,}",
        f"work: {base.costs.flops_per_token / 1e6:,.1f} MFLOP a token, {work:.3g} FLOP in all",
        f"batch: {base.share:,} sequences of {config.model.block_size:,}{many}, {base.micro.sequences} at a time "
        f"({micro:,} micro-batch{'es' * (micro > 1)} a step)",
        f"time: about {duration(base.seconds)} at {speed:,.0f} tokens/s, measured on {base.machine.device_name} "
        f"({base.machine.device}), evaluations not counted",
        f"memory: {memory(base.micro.memory_bytes)} a rank, of {memory(base.micro.available_bytes)} that it may use",
        f"disk: {memory(base.disk_bytes)} for checkpoints{text}",
        *expectation(base),
        *([f"the same by torchrun: {by_torchrun(base)}"] if base.machine.device == "cuda" else []),
    ]


def expectation(base: Baseline) -> list[str]:
    """The published curve, or why it does not apply."""
    if base.differs:
        return [f"not the published recipe, so its loss curve does not apply: {'; '.join(base.differs)}"]
    points = [
        f"{CURVE[step]:.2f} +- {tolerance(step):.2f} at {step:,}" for step in (0, 250, 500, 1000, 2000, 4000, 10000)
    ]
    return [
        f"expected validation loss by step: {', '.join(points)}, {FINAL[0]} to {FINAL[1]} in the end; HellaSwag about "
        f"{HELLASWAG:.0%} then ({TASK}, acc_norm)",
        f"from {SOURCE}",
    ]


def refuse_hopeless(base: Baseline, max_days: float) -> None:
    """Raises EnvironmentFault, with advice, when it would take longer than `max_days` days here."""
    days = base.seconds / DAY
    if days > max_days:
        raise EnvironmentFault(
            f"it would take {days:,.0f} days here, more than {max_days:g}",
            where="baseline",
            hint="a machine with GPUs (8 H100 take about an hour at 40 % MFU); or a piece of it, as "
            "make baseline STEPS=20 BATCH_TOKENS=4096 CORPUS=shakespeare; or MAX_DAYS=N to start all the same",
        )


def refuse_full_disk(base: Baseline, store: Store) -> None:
    """Raises EnvironmentFault when checkpoints would not fit."""
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free
    if free < base.disk_bytes:
        raise EnvironmentFault(
            f"checkpoints need {memory(base.disk_bytes)}, {memory(free)} are free",
            where=str(store.root),
            hint="free some space, or --runs FOLDER on a larger disk",
        )


def watch(base: Baseline) -> Callable[[Sequence[Mapping[str, Any]]], Iterable[str]]:
    """Says when validation loss leaves the published curve, where that applies."""
    applies = not base.differs
    return lambda rows: [f"off the published curve: {found}" for found in departures(rows)] if applies else []


def by_torchrun(base: Baseline) -> str:
    """The same training where torchrun starts the ranks, over several machines say."""
    words = ["torchrun", "--nproc-per-node", str(base.ranks), "-m", "gpt2lab", "train", PRESET]
    return shlex.join([*words, *(word for item in base.overrides for word in ("--set", item))])


def refuse_torchrun(size: int) -> None:
    """Raises ConfigError: every rank would look for a micro-batch on the same devices."""
    if size > 1:
        raise ConfigError(
            "torchrun's ranks cannot each look for the micro-batch",
            where="baseline",
            hint="gpt2lab baseline --dry-run on one machine, which says the command for torchrun",
        )
