"""The reproduction of GPT-2 124M: its published curve, its cost on this machine, and the training."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.basics.text import duration, memory, quantity
from gpt2lab.config import Config, load_config
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.experiments.single import Watch
from gpt2lab.inspection.costs import Costs, costs
from gpt2lab.planning.machine import Machine, check_ranks, probe
from gpt2lab.planning.probes import MicroBatch, micro_batch, micro_batch_of
from gpt2lab.registry import Choice
from gpt2lab.store import Store
from gpt2lab.training.precision import choose_device

SOURCE = "llm.c's reproduction of GPT-2 124M (KellerJordan/modded-nanogpt, records/track_1_short/2024-10-13_llmc)"
BATCH_TOKENS, STEPS = 524_288, 19_560
FINAL = (3.27, 3.29)
"""Range of the final validation loss of reproductions on FineWeb 10B."""

HELLASWAG = 0.30
"""Their final normalised accuracy by build-nanogpt's rules: 0.299; OpenAI's weights have 0.2955."""

# step -> validation loss in nats on FineWeb
CURVE = {
    0: 11.009, 250: 6.171, 500: 5.374, 750: 4.710, 1000: 4.317, 1500: 4.006, 2000: 3.859, 3000: 3.697, 4000: 3.618,
    6000: 3.507, 8000: 3.443, 10000: 3.392, 12000: 3.351, 14000: 3.315, 16000: 3.288, 18000: 3.275, 19500: 3.272,
}  # fmt: skip

CAUSES = {
    "above": "a batch, rate or warm-up other than the recipe's; batches that repeat or are not shuffled; weights not "
    "scaled at the start; weight decay on norms; dropout; documents that were cut",
    "below": "validation text that is also in training; a mask that lets tokens look ahead; other validation text",
}


def tolerance(step: int) -> float:
    """Difference in nats at `step` between correct reproductions with other seeds and builds."""
    return 0.10 if step < 500 else 0.05 if step <= 2000 else 0.02


def departures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each validation loss of a journal that is outside the tolerance at a published step."""
    sentences = []
    for row in rows:
        step, loss = row["step"], row["metrics"].get("val/loss")
        if loss is None or step not in CURVE or abs(off := loss - CURVE[step]) <= tolerance(step):
            continue
        expected, causes = f"{CURVE[step]:.3f} +- {tolerance(step):.2f}", CAUSES["above" if off > 0 else "below"]
        sentences.append(
            f"step {step}: validation loss {loss:.3f}, published {expected} ({off:+.3f}). Usual causes: {causes}"
        )
    return sentences


PRESET = "gpt2-124m"
PUBLISHED_CORPUS = "fineweb-10b"
SMALL_CORPORA = {"shakespeare": 16_384}
"""Evaluation tokens of corpora that are too small for the recipe's."""
EVALUATION_TOKENS = 10_485_760
CORPUS_TOKENS = {"fineweb-10b": 10_000_000_000, "fineweb-edu-10b": 10_000_000_000, "openwebtext": 9_000_000_000}
"""Approximate tokens of large corpora; two bytes each when prepared."""
TASK, TASK_DOCUMENTS = "hellaswag_nanogpt", {"cuda": 1000, "cpu": 40, "mps": 40}
"""Task at every evaluation, and its documents (of 10,042) by type of device."""
WARMUP_SHARE = 10
"""Short trainings warm up for one in so many steps."""
MICRO = "training.micro_batch_sequences"


@dataclass(frozen=True)
class Baseline:
    """The reproduction, as this machine would train it.

    overrides: of the preset, the micro-batch included.
    """

    config: Config
    overrides: tuple[str, ...]
    machine: Machine
    costs: Costs
    micro: MicroBatch

    @classmethod
    def prepare(
        cls,
        store: Store,
        *,
        ranks: int,
        corpus: str = PUBLISHED_CORPUS,
        steps: int | None = None,
        batch_tokens: int | None = None,
        overrides: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> Baseline:
        """The plan, with the micro-batch that fits on this machine; prepares no data. Raises ConfigError for invalid
        settings, EnvironmentFault where the model does not fit into memory."""
        written = [*recipe_overrides(corpus, steps, batch_tokens), *overrides]
        fixed = any(item.startswith(f"{MICRO}=") for item in overrides)
        config = load_config(PRESET, written if fixed else [*written, f"{MICRO}=1"])  # 1 divides every batch
        check_ranks(config, ranks)
        cost = costs(config.model)
        machine = probe(store, config.training, cost.flops_per_token, 1, ranks)
        micro = micro_batch_of(config, machine) if fixed else micro_batch(config, machine, store.root, say)
        written += [] if fixed else [f"{MICRO}={micro.sequences}"]
        return cls(load_config(PRESET, written), tuple(written), machine, cost, micro)

    @property
    def seconds(self) -> float:
        """Of training, without evaluations and communication between ranks."""
        return self.config.training.steps * self.micro.step_seconds(self.share)

    @property
    def share(self) -> int:
        """Sequences of one rank in a step."""
        return self.config.training.batch_tokens // self.config.model.block_size // self.machine.ranks

    @property
    def disk_bytes(self) -> int:
        """Of checkpoints: weights and AdamW's averages in float32, of the kept ones and one being written."""
        return 12 * self.costs.parameters * (self.config.training.keep_checkpoints + 1)

    @property
    def differs(self) -> list[str]:
        """Why the published curve does not apply; empty where it does."""
        training, corpus, recipe = self.config.training, self.config.data.corpus, load_config(PRESET)
        reasons = []
        if not is_published(corpus):
            reasons.append(f"the text is {corpus.name}, not {PUBLISHED_CORPUS}")
        if training.batch_tokens != BATCH_TOKENS:
            reasons.append(f"a batch has {training.batch_tokens:,} tokens, not the recipe's {BATCH_TOKENS:,}")
        if training.steps != STEPS:
            reasons.append(f"it has {training.steps:,} steps, not {STEPS:,}, and the rate follows its own schedule")
        for section in ("model", "optim"):  # another warm-up goes with another number of steps
            own_settings, published = (
                {k: v for k, v in getattr(config, section).model_dump().items() if k != "warmup_steps"}
                for config in (self.config, recipe)
            )
            reasons += [f"{section} is not the recipe's"] if own_settings != published else []
        return reasons

    def as_record(self) -> dict[str, Any]:
        """The plan as plain data."""
        training = self.config.training
        return {
            "overrides": self.overrides, "ranks": self.machine.ranks, "device": self.machine.device_name,
            "parameters": self.costs.parameters, "flops_per_token": self.costs.flops_per_token,
            "steps": training.steps, "batch_tokens": training.batch_tokens,
            "micro_batch_sequences": self.micro.sequences, "seconds": self.seconds,
            "memory_bytes": self.micro.memory_bytes, "disk_bytes": self.disk_bytes, "differs": self.differs,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Recipe, cost on this machine and expected result, as sentences."""
        config, training, corpus = self.config, self.config.training, self.config.data.corpus.name
        tokens = training.steps * training.batch_tokens
        size = memory(2 * CORPUS_TOKENS[corpus]) if corpus in CORPUS_TOKENS else None
        text = f", and about {size} for the tokens of {corpus}, once they are prepared" if size else ""
        shared = f" on each of {self.machine.ranks} ranks" if self.machine.ranks > 1 else ""
        micro = -(-self.share // self.micro.sequences)
        speed = training.batch_tokens / self.micro.step_seconds(self.share)
        return [
            f"GPT-2 124M: {self.costs.parameters:,} parameters, {quantity(tokens)} tokens of {corpus} in "
            f"{training.steps:,} steps of {training.batch_tokens:,}",
            f"work: {self.costs.flops_per_token / 1e6:,.1f} MFLOP a token, "
            f"{self.costs.flops_per_token * tokens:.3g} FLOP in all",
            f"batch: {self.share:,} sequences of {config.model.block_size:,}{shared}, {self.micro.sequences} at a time "
            f"({micro:,} micro-batch{'es' * (micro > 1)} a step)",
            f"time: about {duration(self.seconds)} at {speed:,.0f} tokens/s, measured on {self.machine.device_name} "
            f"({self.machine.device}), evaluations not counted",
            f"memory: {memory(self.micro.memory_bytes)} a rank, of {memory(self.micro.available_bytes)} that it may "
            "use",
            f"disk: {memory(self.disk_bytes)} for checkpoints{text}",
            *self.expectation(),
            *([f"the same by torchrun: {self.by_torchrun()}"] if self.machine.device == "cuda" else []),
        ]

    def expectation(self) -> list[str]:
        """The published curve, or why it does not apply."""
        if self.differs:
            return [f"not the published recipe, so its loss curve does not apply: {'; '.join(self.differs)}"]
        points = [
            f"{CURVE[step]:.2f} +- {tolerance(step):.2f} at {step:,}" for step in (0, 250, 500, 1000, 2000, 4000, 10000)
        ]
        return [
            f"expected validation loss by step: {', '.join(points)}, {FINAL[0]} to {FINAL[1]} in the end; HellaSwag "
            f"about {HELLASWAG:.0%} then ({TASK}, acc_norm)",
            f"from {SOURCE}",
        ]

    def by_torchrun(self) -> str:
        """The command for torchrun, which also starts ranks on several machines."""
        words = ["torchrun", "--nproc-per-node", str(self.machine.ranks), "-m", "gpt2lab", "train", PRESET]
        return shlex.join([*words, *(word for item in self.overrides for word in ("--set", item))])

    def refuse_hopeless(self, store: Store, max_days: float) -> None:
        """Raises EnvironmentFault when it would take longer than `max_days` days here, or checkpoints would not fit."""
        days = self.seconds / 86_400
        if days > max_days:
            raise EnvironmentFault(
                f"it would take {days:,.0f} days here, more than {max_days:g}",
                where="baseline",
                hint="a machine with GPUs (8 H100 take about an hour at 40 % MFU); or a piece of it, as "
                "make baseline STEPS=20 BATCH_TOKENS=4096 CORPUS=shakespeare; or MAX_DAYS=N to start all the same",
            )
        store.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store.root).free
        if free < self.disk_bytes:
            raise EnvironmentFault(
                f"checkpoints need {memory(self.disk_bytes)}, {memory(free)} are free",
                where=str(store.root),
                hint="free some space, or --runs FOLDER on a larger disk",
            )

    def watch(self) -> Watch:
        """Reports departures of the validation loss from the published curve, where that applies."""
        applies = not self.differs
        return lambda rows: (
            [f"off the published curve: {departure}" for departure in departures(rows)] if applies else []
        )


def is_published(corpus: Choice) -> bool:
    """Whether this is FineWeb's sample of 10B tokens: ours, or the token files that llm.c makes of it."""
    written = str(corpus.full()).lower()
    return corpus.name == PUBLISHED_CORPUS or (corpus.name == "tokens" and "fineweb10b" in written.replace("_", ""))


def recipe_overrides(corpus: str, steps: int | None, batch_tokens: int | None) -> list[str]:
    """The overrides of the preset behind the short options."""
    written = [
        f"data.corpus={corpus}",
        f"evaluation.tokens={SMALL_CORPORA.get(corpus, EVALUATION_TOKENS)}",
        f"evaluation.tasks=[{TASK}]",
        f"evaluation.task_documents={TASK_DOCUMENTS[choose_device().type]}",
    ]
    if steps is not None:
        recipe = load_config(PRESET).optim.warmup_steps
        written += [f"training.steps={steps}", f"optim.warmup_steps={min(recipe, max(1, steps // WARMUP_SHARE))}"]
    if batch_tokens is not None:
        written.append(f"training.batch_tokens={batch_tokens}")
    return written


def refuse_torchrun(size: int) -> None:
    """Raises ConfigError under torchrun: every rank would probe the micro-batch on the same devices."""
    if size > 1:
        raise ConfigError(
            "torchrun's ranks cannot each look for the micro-batch",
            where="baseline",
            hint="gpt2lab baseline --dry-run on one machine, which says the command for torchrun",
        )
