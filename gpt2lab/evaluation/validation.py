"""Validation on one fixed set of tokens, the same for every arm, every evaluation and every number of ranks.

Always plain next-token cross entropy. Shapes: n windows, L tokens in a window, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from gpt2lab.data.batches import TokenSequence
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.evaluation.tasks import read_tasks
from gpt2lab.evaluation.windows import (
    Parts,
    Window,
    WindowLosses,
    batches_of,
    evaluating,
    forward,
    out_of_memory,
    targets_of,
    windows_by_document,
)
from gpt2lab.model import GPT
from gpt2lab.registry import Choice, read_field
from gpt2lab.schema import Settings
from gpt2lab.training.diagnostics import DEFAULT, diagnostic
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import Precision

ROWS_AT_ONCE = 4096  # rows of logits brought to float32 together: bounds memory where the vocabulary is large


WholeOrCount = Annotated[int, Field(ge=1)] | Literal["all"]


class EvaluationConfig(Settings):
    """When and on how much a model is evaluated; none of it affects training."""

    every_steps: int = Field(250, ge=1)
    """Steps between validations."""
    tokens: WholeOrCount = 10_485_760
    """Validation tokens that are predicted, in blocks spread evenly over the validation split; or all."""
    curve_tokens: int | None = Field(None, ge=1)
    """Validation tokens before the end of training where these are fewer; null: as many as at the end."""
    contexts: tuple[float, ...] = ()
    """Other context lengths to score at the end, as multiples of block_size; empty for none."""
    context_tokens: int = Field(16_384, ge=1)
    """Validation tokens that are predicted at every one of those lengths; they cost more than the others, because each
    segment needs a separate pass at each length."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate at each validation, such as hellaswag or arc_easy:split=validation; empty for none."""
    task_documents: int = Field(100, ge=1)
    """Documents of each task, the same at each validation, spread evenly over all."""

    diagnostics: tuple[Choice, ...] = Field(default_factory=lambda: diagnostic.read_all(DEFAULT))
    """Diagnostics measured at each validation."""

    @field_validator("diagnostics", mode="before")
    @classmethod
    def _diagnostics(cls, raw: object) -> Choice | tuple[Choice, ...]:
        return read_field("diagnostic", raw)

    @field_validator("contexts")
    @classmethod
    def _sensible(cls, contexts: tuple[float, ...]) -> tuple[float, ...]:
        if any(c <= 0 for c in contexts) or len(set(contexts)) != len(contexts):
            raise ValueError("contexts are positive multiples of block_size, each once")
        return contexts

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        try:
            read_tasks(tasks, "evaluation.tasks")
        except ConfigError as error:
            raise ValueError(error.problems[0].what) from error
        return tasks

    def total(self, tokens: TokenSequence) -> int:
        """How many of a validation split's tokens are predicted; the first one never is."""
        return len(tokens) - 1 if self.tokens == "all" else self.tokens

    def loss_only(self, *, is_last: bool) -> EvaluationConfig:
        """Without other contexts, and before the end of training with the tokens of the curve."""
        counts = [n for n in (self.tokens, None if is_last else self.curve_tokens) if isinstance(n, int)]
        return self.model_copy(update={"contexts": (), "tokens": min(counts, default=self.tokens)})

    def spec(self, block_size: int) -> dict[str, Any]:
        """Everything that an evaluation's result depends on, apart from the run."""
        spec = {"tokens": self.tokens, "contexts": list(self.contexts), "block_size": block_size}
        return spec | ({"context_tokens": self.context_tokens} if self.contexts else {})

    def problems(self, block_size: int) -> list[Problem]:
        """Settings that are invalid with a context of `block_size` tokens."""
        where = "evaluation.contexts"
        uneven = [c for c in self.contexts if not (c * block_size).is_integer()]
        if uneven:
            return [Problem(where, f"{c:g} x block_size {block_size} is no whole number of tokens") for c in uneven]
        shortest = _extremes(self.contexts, block_size)[0] if self.contexts else 0
        if self.context_tokens < shortest:
            few = f"{self.context_tokens} are too few: the shortest context has {shortest}"
            return [Problem("evaluation.context_tokens", few)]
        return []


def evaluation_key(spec: Mapping[str, Any]) -> str:
    """The key of an evaluation: a hash of its spec, independent of how numbers are written."""
    contexts = sorted(float(c) for c in spec["contexts"])
    text = json.dumps({**spec, "contexts": contexts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spread(count: int, size: int, room: int) -> list[int]:
    """Starts of `count` segments of `size` tokens within `room` tokens: multiples of `size`, as even as these allow.

    When there is room for `count` - 1 whole ones only, the last start leaves what remains for a shorter segment.
    """
    places = max(count, room // size)
    return [index * places // count * size for index in range(count)]


def _extremes(contexts: Sequence[float], block_size: int) -> tuple[int, int]:
    """The shortest and the longest context in tokens."""
    lengths = [round(context * block_size) for context in contexts]
    return min(lengths), max(lengths)


def _require(tokens: TokenSequence, total: int) -> None:
    if len(tokens) < total + 1:
        raise ConfigError(
            f"the validation split needs {total + 1} tokens, has {len(tokens)}",
            where="evaluation.tokens",
            hint=f"--set evaluation.tokens={max(1, len(tokens) - 1)}",
        )


def plain_windows(tokens: TokenSequence, *, block_size: int, total: int) -> list[Window]:
    """Blocks that hold `total` targets, spread evenly over `tokens`. Raises ConfigError when there are too few."""
    _require(tokens, total)
    wanted = -(-total // block_size)
    sizes = [block_size] * (wanted - 1) + [total - (wanted - 1) * block_size]
    starts = spread(wanted, block_size, len(tokens) - 1)
    return [Window(start, size, size) for start, size in zip(starts, sizes, strict=True)]


def context_windows(tokens: TokenSequence, config: EvaluationConfig, block_size: int) -> dict[float, list[Window]]:
    """The windows at each of the config's context lengths, multiples of `block_size`, with the same targets at every
    length.

    The targets are segments as long as the shortest context, `context_tokens` of them, spread evenly over the text
    after the first longest context. At length c each segment is scored by one pass over the c tokens before its last
    target, so that its first target sees c - shortest + 1 of them. Raises ConfigError when there are not enough tokens.
    """
    if not config.contexts:
        return {}
    shortest, longest = _extremes(config.contexts, block_size)
    segments = max(1, config.context_tokens // shortest)
    _require(tokens, longest - shortest + segments * shortest)
    room = len(tokens) - 1 - (longest - shortest)
    ends = [longest + start for start in spread(segments, shortest, room)]
    lengths = {context: round(context * block_size) for context in config.contexts}
    return {context: [Window(end - length, length, shortest) for end in ends] for context, length in lengths.items()}


def _score(
    model: GPT,
    tokens: TokenSequence,
    windows: Sequence[Window],
    batch_sequences: int,
    *,
    precision: Precision,
    world: World,
    byte_lengths: NDArray[np.int64] | None = None,
    parts: Parts | None = None,
) -> list[float]:
    """Nats, targets and bytes over all windows, then the mean nats per target of each, summed in float64; every rank
    scores its share of the batches."""
    device = next(model.parameters()).device
    sums, each = torch.zeros(3, dtype=torch.float64), torch.zeros(len(windows), dtype=torch.float64)
    batches = list(batches_of(windows, batch_sequences))
    places = list(itertools.accumulate(map(len, batches), initial=0))
    with out_of_memory(windows, batch_sequences), evaluating(model), torch.no_grad():
        for index in range(world.rank, len(batches), world.size):
            logits, wanted = forward(model, tokens, batches[index], precision)
            nats = nats_of(logits.flatten(0, 1), torch.from_numpy(wanted.flatten()).to(device))
            sums[0] += nats.sum()
            sums[1] += wanted.size
            sums[2] += 0 if byte_lengths is None else int(byte_lengths[wanted].sum())
            each[places[index] : places[index + 1]] = nats.view(wanted.shape).mean(1)
            if parts is not None:
                parts.add(targets_of(batches[index], wanted), nats)
    if parts is not None:
        parts.join(lambda sums: world.sum(_reducible(sums, device)))
    joined: list[float] = world.sum(_reducible(torch.cat([sums, each]), device)).tolist()
    return joined


def nats_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of rows (r, V), taken in float32.  -> (r,) in float64 on the CPU"""
    chunks = zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    rows = [F.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in chunks]
    return torch.cat(rows).cpu().double()  # on the CPU because mps has no float64


def _reducible(sums: Tensor, device: torch.device) -> Tensor:
    """On the GPU, as NCCL requires."""
    return sums.to(device) if device.type == "cuda" else sums


def evaluate_by_window(
    model: GPT,
    tokens: TokenSequence,
    config: EvaluationConfig,
    *,
    block_size: int,
    batch_sequences: int,
    byte_lengths: NDArray[np.int64] | None = None,
    documents: NDArray[np.int64] | None = None,
    parts: Parts | None = None,
    precision: Precision = "fp32",
    world: World = ALONE,
) -> tuple[dict[str, Any], WindowLosses]:
    """The complete evaluation by `config`, as the record in the run store, and the loss of each plain window with the
    document that it starts in.

    Plain windows do not overlap and are spread evenly over all of `tokens`, so that they cover the documents
    independently of their order. Losses at contexts that the model's positions do not reach are None.

    byte_lengths: (V,) bytes of text of each token; without them there are no bits per byte. documents: first token of
    each document in `tokens` (`validation_documents`); None when there is one only. parts: sums to which the loss of
    every target of the plain windows is also added. The model's mode is restored, and no random number is drawn. Raises
    ConfigError when there are not enough tokens, EnvironmentFault when memory runs out.
    """
    score = functools.partial(_score, model, tokens, precision=precision, world=world)
    windows = plain_windows(tokens, block_size=block_size, total=config.total(tokens))
    nats, targets, text_bytes, *losses = score(windows, batch_sequences, byte_lengths=byte_lengths, parts=parts)
    metrics = {"val/loss": nats / targets}
    if byte_lengths is not None:
        metrics["val/bits_per_byte"] = nats / math.log(2) / text_bytes
    contexts: dict[str, float | None] = {}
    for context, segments in context_windows(tokens, config, block_size).items():
        length = segments[0].length
        contexts[f"{context:g}"] = None
        if model.max_context is None or length <= model.max_context:
            nats, scored, *_ = score(segments, max(1, batch_sequences * block_size // length))
            contexts[f"{context:g}"] = nats / scored
    spec = config.spec(block_size)
    record = {"key": evaluation_key(spec), "spec": spec, "metrics": metrics, "contexts": contexts}
    starts, counts = [w.start for w in windows], [w.scored for w in windows]
    return {**record, "targets": int(targets)}, windows_by_document(losses, counts, starts, documents)
