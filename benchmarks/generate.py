"""`generate`: our generation and another's timed in turns. The same weights continue the same prompts, always by the
best token.

Shapes: B batch, P tokens of prompt, N new ones.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import options as o
from benchmarks.sides import Side, Work, nanogpt_gpt, other_side, plain_model, transformers_gpt2, work_against
from benchmarks.turns import time_sides
from gpt2lab import generation
from gpt2lab.errors import ConfigError
from gpt2lab.model import build_model
from gpt2lab.training.precision import AUTOCAST, Precision


@dataclass(frozen=True)
class Passage:
    """What is generated. config: whose sizes the model has.  sequences: in a batch.  vs: see `work_against`."""

    config: str = "c"
    sequences: int = 1
    prompt_tokens: int = 24
    new_tokens: int = 128
    vs: str = "plain"

    @property
    def work(self) -> Work:
        """The model's sizes, with biases, as GPT-2 has them. Raises ConfigError for an unknown one."""
        return replace(work_against(self.vs, self.config), sequences=self.sequences, bias=True)

    def prompts(self) -> Tensor:
        """Random tokens.  -> (B, P) int64"""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.work.vocab_size, (self.sequences, self.prompt_tokens), generator=generator)

    def check(self) -> None:
        """Raises ConfigError where the context is too short."""
        if self.prompt_tokens + self.new_tokens > self.work.block_size:
            raise ConfigError(
                f"{self.prompt_tokens} tokens of prompt and {self.new_tokens} new ones exceed the context of "
                f"{self.work.block_size}",
                where="benchmarks generate",
            )


Continued = Callable[[Tensor], Tensor]
"""Generates: prompts (B, P) -> new tokens (B, N) int64"""


class GenerationSide:
    """A side that generates all of a passage at each step."""

    def __init__(
        self, name: str, passage: Passage, precision: Precision, device: torch.device, continued: Continued
    ) -> None:
        self.name, self.precision, self.continued = name, precision, continued
        self.prompts = passage.prompts().to(device)

    def step(self) -> float:
        """Generate; -> a check sum of the new tokens."""
        return float(zlib.crc32(self.continued(self.prompts).cpu().contiguous().numpy().tobytes()))


def by_gpt2lab(passage: Passage, precision: Precision, device: torch.device, *, cold: bool) -> Continued:
    """`gpt2lab.generation`. cold: lay out matrices anew each time, as a single `gpt2lab sample` must."""
    model = build_model(passage.work.model(), seed=0, device=device).eval()
    settings = generation.Sampling(temperature=0, max_new_tokens=passage.new_tokens)

    def laid_out() -> generation.Reader:
        return generation.Reader(model, rows=passage.sequences, precision=precision)

    kept = laid_out()

    def continued(prompts: Tensor) -> Tensor:
        reader = laid_out() if cold else kept
        return torch.tensor([list(new.values()) for new in generation.generate(reader, prompts.tolist(), settings)]).T

    return continued


def by_transformers(passage: Passage, precision: Precision, device: torch.device) -> Continued:
    """Hugging Face's `generate` with its own cache; in half precision its weights are converted, as users do."""
    model: Any = transformers_gpt2(passage.work).eval().to(device, AUTOCAST.get(precision, torch.float32))
    model.generation_config.eos_token_id = None  # all are to have equal length

    def continued(prompts: Tensor) -> Tensor:
        out: Tensor = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=passage.new_tokens, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return out[:, passage.prompt_tokens :]

    return continued


def by_nanogpt(passage: Passage, precision: Precision, device: torch.device, folder: str) -> Continued:
    """nanoGPT's `generate`, which has no cache; the best of one is the best."""
    model: Any = nanogpt_gpt(passage.work, folder).eval().to(device, AUTOCAST.get(precision, torch.float32))
    return lambda prompts: model.generate(prompts, passage.new_tokens, top_k=1)[:, passage.prompt_tokens :]


def by_plain(passage: Passage, precision: Precision, device: torch.device) -> Continued:
    """The plain model, which reads the whole text again for each token."""
    model = plain_model(passage.work).eval().to(device, AUTOCAST.get(precision, torch.float32))

    @torch.inference_mode()
    def continued(tokens: Tensor) -> Tensor:
        for _ in range(passage.new_tokens):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens[:, passage.prompt_tokens :]

    return continued


@dataclass(frozen=True)
class GenerationSpec:
    """Which side, as plain data that another process can be given. name: gpt2lab, or what `--vs` names."""

    name: str
    precision: Precision = "fp32"
    cold: bool = False

    def make(self, passage: Passage, device: torch.device) -> Side:
        """The side, ready to generate. Raises ConfigError, or EnvironmentFault where a package is missing."""
        passage.check()
        how = passage, self.precision, device
        if self.name == "gpt2lab":
            name = "gpt2lab" + (", cold" if self.cold else "")
            return GenerationSide(name, *how, by_gpt2lab(*how, cold=self.cold))
        kind, path = other_side(self.name)
        if kind == "nanogpt":
            return GenerationSide("nanoGPT", *how, by_nanogpt(*how, path))
        if kind == "engine":
            raise ConfigError("our training loop generates nothing", where="--vs", hint="--vs plain")
        return GenerationSide(kind, *how, (by_plain if kind == "plain" else by_transformers)(*how))


@dataclass(frozen=True)
class GenerationResult:
    """One side. milliseconds: a token of each sequence, the median; low and high: the fastest and slowest block's.
    tokens_per_second: of all sequences together."""

    name: str
    precision: str
    milliseconds: float
    low: float
    high: float
    tokens_per_second: float


@dataclass(frozen=True)
class GenerationComparison:
    """Ours, the other, and how many times as fast ours is, with a 95 % interval over blocks (None with one block).
    same_tokens: whether both wrote the same."""

    passage: Passage
    device: str
    threads: int
    blocks: int
    sides: tuple[GenerationResult, GenerationResult]
    same_tokens: bool
    ratio: float
    interval: tuple[float, float] | None


def compare_generation(
    passage: Passage, specs: tuple[GenerationSpec, GenerationSpec], device: torch.device, *, blocks: int
) -> GenerationComparison:
    """Time both sides over `blocks` blocks each, in turns and in processes of their own."""
    passage.check()
    timing = time_sides(specs, passage, device, blocks=blocks, first_steps=1)
    per_token = 1000 / passage.new_tokens
    results = [
        GenerationResult(
            name, precision, per_token * median(taken), per_token * min(taken), per_token * max(taken),
            passage.sequences * passage.new_tokens / median(taken),
        )
        for name, precision, taken in zip(timing.names, timing.precisions, timing.seconds, strict=True)
    ]  # fmt: skip
    return GenerationComparison(
        passage, device.type, torch.get_num_threads(), blocks, (results[0], results[1]),
        timing.values[0] == timing.values[1], timing.ratio, timing.interval,
    )  # fmt: skip


def generate(
    vs: o.Versus = "transformers",
    config: o.Size = "c",
    batch: Annotated[int, typer.Option("--batch", help="Texts at once.", min=1)] = 1,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each prompt.", min=1)] = 24,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each text.", min=1)] = 128,
    precision: Annotated[str, typer.Option("--precision", help="Of our matrix products: fp32 or bf16.")] = "fp32",
    vs_precision: o.OtherPrecision = "fp32",
    cold: Annotated[
        bool, typer.Option("--cold", help="Count what ours does before the first token, as in one `gpt2lab sample`.")
    ] = False,
    blocks: o.Blocks = 7,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Time our generation and another's in turns: same weights, same prompts, the best token each time."""
    place = o.chosen_device(device, threads, *o.precisions(precision, vs_precision, o.PRECISIONS[:2]))
    specs = (GenerationSpec("gpt2lab", precision, cold), GenerationSpec(vs, vs_precision))  # type: ignore[arg-type]
    found = compare_generation(Passage(config, batch, prompt, tokens, vs), specs, place, blocks=blocks)
    if json_:
        print(json.dumps(asdict(found)))
        return
    table = o.table_of("", "precision", "ms per token", "blocks", "tokens/s")
    for side in found.sides:
        spread = f"{side.low:.1f} to {side.high:.1f}"
        table.add_row(
            side.name, side.precision, f"{side.milliseconds:.1f}", spread, f"{side.tokens_per_second:.1f}"
        )  # fmt: skip
    words = o.verdict(*o.names_of(*found.sides), found.ratio, found.interval)
    said = (
        f"configuration {config}, batch {batch}, {prompt} tokens of prompt and {tokens} new: {words} "
        f"({found.blocks} blocks each, {found.device}, {found.threads} threads); "
        f"{'both wrote the same tokens' if found.same_tokens else 'they wrote different tokens'}"
    )
    o.show(table, said)
