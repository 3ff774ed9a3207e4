"""The sides of generation: the same weights go on from the same prompts, always by the best token.

Shapes: B batch, P tokens of prompt, N new ones.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides import OTHERS, NanoGPT, Side, Transformers, Work, plain_model, work_named
from gpt2lab.errors import ConfigError, unknown
from gpt2lab.generation import Reader, Sampling, generate
from gpt2lab.model import build_model
from gpt2lab.training.precision import AUTOCAST, Precision


@dataclass(frozen=True)
class Passage:
    """What is generated. config: whose sizes the model has.  sequences: in a batch."""

    config: str = "c"
    sequences: int = 1
    prompt_tokens: int = 24
    new_tokens: int = 128

    @property
    def work(self) -> Work:
        """The model's sizes, with biases, as GPT-2 has them. Raises ConfigError for an unknown one."""
        return replace(work_named(self.config), sequences=self.sequences, bias=True)

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


class Generating(ABC):
    """A side that generates all of a passage at each step.

    name, precision: see Side.  prompts: (B, P).
    """

    name: str

    def __init__(self, passage: Passage, precision: Precision, device: torch.device) -> None:
        passage.check()
        self.passage, self.precision, self.device = passage, precision, device
        self.prompts = passage.prompts().to(device)

    @abstractmethod
    def continued(self) -> Tensor:
        """-> (B, N) int64"""

    def step(self) -> float:
        """Generate; -> a check sum of the new tokens."""
        return float(zlib.crc32(self.continued().cpu().contiguous().numpy().tobytes()))


class Ours(Generating):
    """`gpt2lab.generation`. cold: lay out matrices anew each time, as a single `gpt2lab sample` must."""

    def __init__(self, passage: Passage, precision: Precision, device: torch.device, *, cold: bool) -> None:
        super().__init__(passage, precision, device)
        self.name = "gpt2lab" + (", cold" if cold else "")
        self.cold, self.model = cold, build_model(passage.work.model(), seed=0, device=device).eval()
        self.reader = self._reader()

    def _reader(self) -> Reader:
        return Reader(self.model, rows=self.passage.sequences, precision=self.precision)

    def continued(self) -> Tensor:
        reader = self._reader() if self.cold else self.reader
        settings = Sampling(temperature=0, max_new_tokens=self.passage.new_tokens)
        steps = [list(new.values()) for new in generate(reader, self.prompts.tolist(), settings)]
        return torch.tensor(steps).T


class OfTransformers(Generating):
    """Hugging Face's `generate` with its own cache; in half precision its weights are converted, as users do."""

    def __init__(self, passage: Passage, precision: Precision, device: torch.device) -> None:
        super().__init__(passage, precision, device)
        self.name = "transformers"
        model: Any = Transformers(passage.work, device).model
        model.generation_config.eos_token_id = None  # all are to have equal length
        self.model = model.eval().to(AUTOCAST.get(precision, torch.float32))

    def continued(self) -> Tensor:
        out: Tensor = self.model.generate(
            self.prompts, attention_mask=torch.ones_like(self.prompts), max_new_tokens=self.passage.new_tokens,
            do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return out[:, self.passage.prompt_tokens :]


class OfNanoGPT(Generating):
    """nanoGPT's `generate`, which has no cache; the best of one is the best."""

    def __init__(self, passage: Passage, precision: Precision, device: torch.device, folder: str) -> None:
        super().__init__(passage, precision, device)
        self.name = "nanoGPT"
        model: Any = NanoGPT(passage.work, device, folder).model
        self.model = model.eval().to(AUTOCAST.get(precision, torch.float32))

    def continued(self) -> Tensor:
        out: Tensor = self.model.generate(self.prompts, self.passage.new_tokens, top_k=1)
        return out[:, self.passage.prompt_tokens :]


class OfPlain(Generating):
    """The model on the blackboard, which reads all of the text again for each token."""

    def __init__(self, passage: Passage, precision: Precision, device: torch.device) -> None:
        super().__init__(passage, precision, device)
        self.name = "plain"
        self.model = plain_model(passage.work).eval().to(device, AUTOCAST.get(precision, torch.float32))

    @torch.inference_mode()
    def continued(self) -> Tensor:
        tokens = self.prompts
        for _ in range(self.passage.new_tokens):
            tokens = torch.cat([tokens, self.model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens[:, self.passage.prompt_tokens :]


@dataclass(frozen=True)
class Writer:
    """Which side, as plain data that another process can be given. name: gpt2lab, or what `--vs` names."""

    name: str
    precision: Precision = "fp32"
    cold: bool = False

    def make(self, passage: Passage, device: torch.device) -> Side:
        """The side, ready to generate. Raises ConfigError, or EnvironmentFault where a package is missing."""
        if self.name == "gpt2lab":
            return Ours(passage, self.precision, device, cold=self.cold)
        kind, _, path = self.name.partition("=")
        if kind == "plain" and not path:
            return OfPlain(passage, self.precision, device)
        if kind == "transformers" and not path:
            return OfTransformers(passage, self.precision, device)
        if kind == "nanogpt":
            return OfNanoGPT(passage, self.precision, device, path or ".")
        raise ConfigError(unknown("side", self.name, OTHERS), where="--vs")
