"""Metrics of a trained model on its validation tokens.

    @metric.register("entropy", source="arXiv:...")
    def entropy(subject: Subject) -> float:
        "Mean entropy of the predictions, in nats."
        total = 0.0
        for rows in subject.rows():
            total += Categorical(logits=rows.logits).entropy().double().sum().item()
        return total / subject.total

A metric is one function of a `Subject`, with keyword-only options, that returns a number or several by name. It is
no part of a config or of a run's identity: it is applied to finished runs.
Shapes: n windows, L tokens in a window, r rows, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batches import TokenSequence
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.evaluation.validation import ROWS_AT_ONCE, nats_of, plain_windows
from gpt2lab.evaluation.windows import (
    Window,
    batches_of,
    evaluating,
    forward,
    out_of_memory,
    targets_of,
)
from gpt2lab.model import GPT
from gpt2lab.registry import Choice, Slot
from gpt2lab.training.precision import Precision

metric = Slot("metric", "what is measured of finished runs (gpt2lab eval)", default=(), in_config=False)


class Predictions(NamedTuple):
    """Some predictions. logits: (r, V) float32. targets: (r,) the actual next tokens. positions: (r,) index in its
    window of the token from which each is predicted, from 0. places: (r,) indices of the targets in the validation
    split. All on the model's device."""

    logits: Tensor
    targets: Tensor
    positions: Tensor
    places: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The input of a metric. The model is in evaluation mode and no gradients are recorded.

    tokens:          the validation split; `rows` iterates over the run's fixed part of it.
    total:           targets in that part.
    batch_sequences: windows in one pass.
    byte_lengths:    (V,) bytes of text of each token; None if not known.
    data:            the prepared data of the tokens, with training split and names of documents; None if not known.
    tell:            progress callback: targets done so far, and in all.
    """

    model: GPT
    tokens: TokenSequence
    block_size: int
    total: int
    batch_sequences: int
    byte_lengths: NDArray[np.int64] | None = None
    data: Prepared | None = None
    precision: Precision = "fp32"
    tell: Callable[[int, int], None] = field(default=lambda done, total: None)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def windows(self) -> list[Window]:
        """The windows of the validation loss, in order; the last may be shorter."""
        return plain_windows(self.tokens, block_size=self.block_size, total=self.total)

    def rows(self) -> Iterator[Predictions]:
        """Every prediction of every window once, a bounded number at a time; each call repeats the passes."""
        done = 0
        for batch in batches_of(self.windows(), self.batch_sequences):
            logits, wanted = forward(self.model, self.tokens, batch, self.precision)  # (n, L, V), (n, L)
            ids, seen, places = (torch.from_numpy(x).to(self.device) for x in targets_of(batch, wanted))
            parts = (x.split(ROWS_AT_ONCE) for x in (logits.flatten(0, 1), ids, seen - 1, places))
            for some, *others in zip(*parts, strict=True):
                yield Predictions(some.float(), *others)
            done += wanted.size
            self.tell(done, self.total)


def apply(choice: Choice, subject: Subject) -> dict[str, float]:
    """Measure; -> values by name: the name of the metric, with `/` and a suffix where it has several values.

    Raises ConfigError, naming the metric, when it fails or returns something else; EnvironmentFault without memory.
    """
    component = metric[choice.name]
    hint = f"see its code in {inspect.getsourcefile(component.factory)}"
    try:
        with out_of_memory(subject.windows(), subject.batch_sequences), evaluating(subject.model), torch.no_grad():
            found: Any = metric.build(choice, subject)
    except Gpt2labError:
        raise
    except Exception as error:
        raise ConfigError(f"{type(error).__name__}: {error}", where=f"metric {choice}", hint=hint) from error
    named = {f"{choice}/{name}": value for name, value in found.items()} if isinstance(found, dict) else {}
    values = named if isinstance(found, dict) else {str(choice): found}
    if not values or not all(isinstance(value, Real) for value in values.values()):
        raise ConfigError(
            f"a number, or numbers by name, are expected, not {found!r:.60}", where=f"metric {choice}", hint=hint
        )
    return {name: float(value) for name, value in values.items()}


@metric.register("loss", source="textbook")
def loss(subject: Subject) -> float:
    """Mean cross entropy of the next token, in nats."""
    return sum(nats_of(rows.logits, rows.targets).sum().item() for rows in subject.rows()) / subject.total


@metric.register("perplexity", source="textbook")
def perplexity(subject: Subject) -> float:
    """exp(loss): the number of equally likely tokens with the same uncertainty."""
    return math.exp(loss(subject))


@metric.register("bits_per_byte", source="arXiv:2101.00027, section 3.1")
def bits_per_byte(subject: Subject) -> float:
    """Cross entropy per byte of the predicted text, in bits: comparable between tokenizers."""
    if subject.byte_lengths is None:
        raise ConfigError("needs the bytes of each token, which are not known here", where="metric bits_per_byte")
    nats, text_bytes = 0.0, 0
    for rows in subject.rows():
        nats += nats_of(rows.logits, rows.targets).sum().item()
        text_bytes += int(subject.byte_lengths[rows.targets.cpu().numpy()].sum())
    return nats / math.log(2) / text_bytes


@metric.register("top1", source="textbook")
def top1(subject: Subject) -> float:
    """Share of tokens to which the model gives the highest probability, from 0 to 1."""
    right = sum(int((rows.logits.argmax(-1) == rows.targets).sum()) for rows in subject.rows())
    return right / subject.total


@metric.register("calibration", source="arXiv:1706.04599")
def calibration(subject: Subject, *, bins: int = 15) -> float:
    """Expected calibration error of the most likely token: |accuracy - confidence|, averaged over bins.

    sum over bins of (rows in it / rows) |share of right guesses - mean probability|, bins (i/M, (i+1)/M]
    bins: M, intervals of equal width between 0 and 1.
    """
    if bins < 1:
        raise ConfigError(f"at least 1 bin is needed, not {bins}", where="metric calibration")
    gaps = torch.zeros(bins, dtype=torch.float64)  # by bin: sum of (right - probability)
    for rows in subject.rows():
        probability, guess = (x.cpu() for x in rows.logits.softmax(-1).max(-1))
        gap = (guess == rows.targets.cpu()).double() - probability.double()
        index = (probability.double() * bins).ceil().long().clamp(1, bins) - 1
        gaps += torch.bincount(index, gap, minlength=bins)
    return gaps.abs().sum().item() / subject.total
