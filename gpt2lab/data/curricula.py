"""Batches that change over the training: the slot `data.batches`, a list of parts.

A part changes the number of sequences in a step, their place in the text, or their length. Parts form a chain over
`TrainingBatches`, and what a part does not change is that of the part before it. All are pure functions of the step,
so that resuming needs no state and any number of ranks has the same batches. A training has the same number of steps
and of tokens with any parts: `training.batch_tokens` is the mean over its steps.

A component receives (text: TrainingText, before: TrainingBatches), where `before` has the parts before it.

T block size, n sequences in a mean step, S steps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gpt2lab.data.batches import Batches, Ids, TokenSequence, epoch_order
from gpt2lab.errors import ConfigError
from gpt2lab.registry import SLOTS, Choice, Slot

batches = Slot(
    "data.batches", "what changes from step to step: size, order and length of sequences", default=(), arity="list"
)

Share = Annotated[float, Field(gt=0.0, le=1.0)]
STRETCH = 1 << 22
"""Tokens read at a time where the whole text is read."""
GOLDEN = (5**0.5 - 1) / 2
SIZE, ORDER, LENGTH = "size", "order", "length"
"""Capabilities: what a part determines; two parts of a list must not determine the same."""


@dataclass(frozen=True)
class TrainingText:
    """The text that a training reads, and the length of the training.

    tokens:          the training tokens.
    block_size:      T.
    batch_sequences: n, over all ranks.
    steps:           S.
    seed:            the data seed.
    separator:       the id that ends documents, or None.
    corpora:         of the corpus `several`: name -> its span in `tokens`.
    """

    tokens: TokenSequence
    block_size: int
    batch_sequences: int
    steps: int
    seed: int
    separator: int | None = None
    corpora: Mapping[str, range] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """In the whole training: n S."""
        return self.batch_sequences * self.steps


class TrainingBatches:
    """Batches of a training: a step has the sequences [sequences_before(step), sequences_before(step + 1)), counted
    since the start of the training, and sequence i begins at token start(i).

    Subclasses override one or more of the three functions. Without parts they are those of `Batches`.
    """

    def __init__(self, text: TrainingText, before: TrainingBatches | None = None) -> None:
        self.text, self.before = text, before
        self.plain = Batches(text.tokens, text.block_size, text.batch_sequences, text.seed)

    def sequences_before(self, step: int) -> int:
        """Number of sequences in the steps before `step`, from 0 to `text.sequences`."""
        return self.before.sequences_before(step) if self.before else step * self.text.batch_sequences

    def start(self, index: int) -> int:
        """The first token of a sequence, at most len(tokens) - T - 1."""
        return self.before.start(index) if self.before else self.plain._start(index)

    def length(self, step: int) -> int:
        """Tokens of a row, which must divide T: blocks of T tokens are cut into shorter rows."""
        return self.before.length(step) if self.before else self.text.block_size

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[Ids, Ids]:
        """Inputs and targets of one rank at `step`, counted from 0: see `Batches.at`.  -> (n T / L, L), twice"""
        first, end = self.sequences_before(step), self.sequences_before(step + 1)
        n, remainder = divmod(end - first, world)
        if remainder:
            raise uneven(end - first, world, step)
        size, length = self.text.block_size, self.length(step)
        starts = map(self.start, range(first + rank * n, first + rank * n + n))
        rows = np.stack([self.text.tokens[start : start + size + 1] for start in starts])  # (n, T + 1)
        inputs, targets = (np.ascontiguousarray(half).reshape(-1, length) for half in (rows[:, :-1], rows[:, 1:]))
        return inputs, targets

    def where(self, step: int) -> dict[str, Any]:
        """The text of a step: see `Batches.where`; the epoch is that of batches without parts."""
        first, end = self.sequences_before(step), self.sequences_before(step + 1)
        starts = [self.start(index) for index in range(first, end)]
        return {"seed": self.text.seed, "epoch": first // self.plain.epoch_blocks, "first_tokens": starts}

    def paced(self, optim: Any) -> Any:
        """The optim section with rates as functions of the tokens trained on: the rate of a step is that of the step at
        which batches of constant size would have had as many."""
        return TokenPaced(optim, lambda step: self.sequences_before(step) // self.text.batch_sequences)


@dataclass(frozen=True)
class TokenPaced:
    """An optim section whose rates follow `position(step)`, in steps of mean size."""

    optim: Any
    position: Callable[[int], int]

    @property
    def lr(self) -> float:
        """The peak rate."""
        return float(self.optim.lr)

    @property
    def grad_clip(self) -> float | None:
        """Largest norm of the gradient."""
        clip: float | None = self.optim.grad_clip
        return clip

    def multiplier(self, steps: int) -> Callable[[int], float]:
        """The factor on all rates at a step."""
        of_step: Callable[[int], float] = self.optim.multiplier(steps)
        return lambda step: of_step(self.position(step))


def uneven(sequences: int, world: int, step: int) -> ConfigError:
    """The error for a step that ranks cannot share evenly."""
    return ConfigError(
        f"step {step + 1} has {sequences} sequences, which cannot be divided evenly among {world} ranks",
        where="data.batches",
        hint=f"batch_ramp with `multiple: {world}`",
    )


def build_batches(choices: tuple[Choice, ...], text: TrainingText, *, world: int = 1) -> Batches | TrainingBatches:
    """The batches of a training; without parts those of `Batches`.

    Raises ConfigError where a part does not fit the text, or ranks could not share every step evenly.
    """
    plain = Batches(text.tokens, text.block_size, text.batch_sequences, text.seed)
    if not choices:
        return plain
    made = TrainingBatches(text)
    for choice in choices:
        made = SLOTS["batches"].build(choice, text, made)
    counts = np.diff([made.sequences_before(step) for step in range(text.steps + 1)])
    if counts.min() < 1:
        problem = f"step {int(counts.argmin()) + 1} would have no sequence"
        raise ConfigError(problem, where="data.batches", hint="a smaller `multiple`, or a larger `start`")
    for step in np.flatnonzero(counts % world)[:1].tolist():
        raise uneven(int(counts[step]), world, step)
    return made


def needs_a_separator(data: Any, options: Mapping[str, Any]) -> list[str]:
    """Without a separator, documents have no beginning."""
    return ["the tokenizer bytes puts no separator between documents"] if data.tokenizer.name == "bytes" else []


@batches.register("batch_ramp", source="arXiv:2005.14165, section 2.3", can=(SIZE,), examples=({"start": 0.5},))
class BatchRamp(TrainingBatches):
    """Steps grow linearly from a fraction of the final batch to the final batch, then keep it.

    b(u) = a + (1 - a) min(1, u / r)   with u the share of the steps; scaled so that its mean is `training.batch_tokens`

    The number of steps and of tokens is that of constant batches. Rates follow the tokens, as in the source.

    start:    a, the first batch as a share of the last.
    over:     r, the share of the steps over which batches grow.
    multiple: every step has a multiple of so many sequences; it must divide the mean batch.
    """

    def __init__(
        self, text: TrainingText, before: TrainingBatches, *, start: Share = 0.25, over: Share = 0.3,
        multiple: Annotated[int, Field(ge=1)] = 1,
    ) -> None:  # fmt: skip
        super().__init__(text, before)
        self.first, self.over, self.multiple = start, over, multiple
        if text.batch_sequences % multiple:
            problem = f"a mean batch of {text.batch_sequences} sequences is no multiple of {multiple}"
            raise ConfigError(problem, where="data.batches.multiple")

    def _area(self, share: float) -> float:
        """The integral of b from 0 to a share of the steps."""
        growing = min(share, self.over)
        return self.first * growing + (1 - self.first) * growing**2 / (2 * self.over) + share - growing

    def sequences_before(self, step: int) -> int:
        """The rounded integral of b."""
        units = self.text.sequences // self.multiple
        return round(units * self._area(step / self.text.steps) / self._area(1.0)) * self.multiple


@batches.register("short_to_long", source="arXiv:2108.06084; arXiv:2310.00576", can=(LENGTH,))
class ShortToLong(TrainingBatches):
    """Rows get longer, doubling in equal numbers of steps: a block of T tokens is cut into rows of T / 2^k tokens.

    L = T / 2^(k - i) in the i-th of k equal spans, then T

    Steps have the same text and number of tokens as without it, in more and shorter rows, as in the second source (the
    first one drops what is cut off). `training.micro_batch_sequences` counts rows.

    halvings: k, so that the first rows have T / 2^k tokens.
    over:     the share of the steps with shorter rows.
    """

    def __init__(
        self, text: TrainingText, before: TrainingBatches, *, halvings: Annotated[int, Field(ge=1, le=10)] = 3,
        over: Share = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(text, before)
        self.halvings, self.over = halvings, over
        if text.block_size % 2**halvings:
            problem = f"block_size {text.block_size} cannot be halved {halvings} times"
            raise ConfigError(problem, where="data.batches.halvings")

    def length(self, step: int) -> int:
        """T / 2^k at first."""
        span = int(step / (self.over * self.text.steps) * self.halvings)
        return self.text.block_size >> max(0, self.halvings - span)


@batches.register("document_starts", source="KellerJordan/modded-nanogpt", can=(ORDER,), check=needs_a_separator)
class DocumentStarts(TrainingBatches):
    """Sequences begin with a document where that is possible, and else continue the one before.

    After each sequence, the next begins at the last separator in it, so that a document that was cut off is read from
    its start, or behind it, if it has none: no token is left out, and some are read twice. Each epoch has all sequences
    once, in a new order. The source reads no more than the beginning of a long document.
    """

    @cached_property
    def starts(self) -> Ids:
        """The first token of each sequence of an epoch."""
        tokens, size = self.text.tokens, self.text.block_size
        found = [
            start + np.flatnonzero(tokens[start : start + STRETCH] == self.text.separator)
            for start in range(0, len(tokens), STRETCH)
        ]
        separators, last = np.concatenate(found), len(tokens) - size - 1
        starts, start = [0], 0
        while True:
            at = int(np.searchsorted(separators, start + size, side="right")) - 1
            start = int(separators[at]) if at >= 0 and separators[at] > start else start + size
            if start > last:
                return np.array(starts)
            starts.append(start)

    def start(self, index: int) -> int:
        """The order of an epoch is random."""
        epoch, position = divmod(index, len(self.starts))
        order = _order(self.text.seed, epoch, len(self.starts), 0)[1]
        return int(self.starts[order[position]])


def by_surprise(text: TrainingText) -> Ids:
    """All blocks of T tokens, those of the most frequent tokens first: by the mean of -log(frequency)."""
    tokens, size = text.tokens, text.block_size
    count = (len(tokens) - 1) // size
    stretch = max(1, STRETCH // size)
    stretches = [slice(at * size, min(count, at + stretch) * size) for at in range(0, count, stretch)]
    frequencies = np.zeros(1, np.int64)
    for part in stretches:
        some = np.bincount(tokens[part], minlength=len(frequencies))
        some[: len(frequencies)] += frequencies
        frequencies = some
    surprise = -np.log(np.maximum(frequencies, 1) / frequencies.sum())
    return np.argsort(np.concatenate([surprise[tokens[p]].reshape(-1, size).mean(1) for p in stretches]), kind="stable")


@batches.register("easy_first", source="arXiv:1903.09848", can=(ORDER,), examples=({"start": 0.01, "over": 1.0},))
class EasyFirst(TrainingBatches):
    """Blocks of frequent tokens first: sequences are drawn from the easiest share of all blocks, which grows.

    share = sqrt((1 - c^2) u / r + c^2)   with u the share of the training; from u = r on, the order is as without it

    A block is the easier, the smaller its mean -log(frequency of a token). Blocks are drawn with replacement.

    start: c, the share at the start.
    over:  r, the share of the training over which it grows to 1.
    """

    def __init__(self, text: TrainingText, before: TrainingBatches, *, start: Share = 0.1, over: Share = 0.5) -> None:
        super().__init__(text, before)
        self.first, self.over = start, over

    @cached_property
    def easiest(self) -> Ids:
        """All blocks, by the mean surprise of their tokens."""
        return by_surprise(self.text)

    def start(self, index: int) -> int:
        """A block among the easiest, by a draw of its own for each index."""
        share = index / self.text.sequences / self.over
        if share >= 1:
            return super().start(index)
        count = len(self.easiest)
        among = max(1, round(count * ((1 - self.first**2) * share + self.first**2) ** 0.5))
        draw = np.random.PCG64(np.random.SeedSequence([self.text.seed, index])).random_raw()
        return int(self.easiest[int(draw) % among]) * self.text.block_size


@batches.register("pruned", source="arXiv:2309.04564", can=(ORDER,), examples=({"side": "common"},))
class Pruned(TrainingBatches):
    """Only a share of all blocks, chosen by how frequent their tokens are; they are repeated more often.

    Blocks are ranked by the mean -log(frequency) of their tokens, a unigram model in the place of the source's.

    keep: the share of blocks that is kept.
    side: the middle of the ranks, as was best in the source, or the end with common or with rare tokens.
    """

    def __init__(
        self, text: TrainingText, before: TrainingBatches, *, keep: Share = 0.7,
        side: Literal["middle", "common", "rare"] = "middle",
    ) -> None:  # fmt: skip
        super().__init__(text, before)
        self.keep, self.side = keep, side

    @cached_property
    def kept(self) -> Ids:
        """The blocks that are left."""
        ranked = by_surprise(self.text)
        count = max(1, round(self.keep * len(ranked)))
        first = {"middle": (len(ranked) - count) // 2, "common": 0, "rare": len(ranked) - count}[self.side]
        return np.sort(ranked[first : first + count])

    def start(self, index: int) -> int:
        """Each epoch has all blocks that are left once, in a new order."""
        epoch, position = divmod(index, len(self.kept))
        order = _order(self.text.seed, epoch, len(self.kept), 0)[1]
        return int(self.kept[order[position]]) * self.text.block_size


def _known_corpora(data: Any, options: Mapping[str, Any]) -> list[str]:
    """Weights by the names of the corpora."""
    if data.corpus.name != "several":
        return [f"corpus {data.corpus.name} has no parts to weigh (write corpus: {{name: several, corpora: ...}})"]
    names = set(data.corpus.options["corpora"])
    weights = [weight for weight in (options["weights"], options["end"]) if weight]
    wrong = [set(weight) ^ names for weight in weights if set(weight) != names]
    problems = [f"weights of all of {', '.join(sorted(names))} are expected ({', '.join(sorted(w))})" for w in wrong]
    bad = [weight for weight in weights if min(weight.values()) < 0 or not sum(weight.values())]
    return problems + ["weights are at least 0, and not all 0"] * bool(bad)


@batches.register("mixture", source="arXiv:2005.14165, section 2.2", can=(ORDER,), check=_known_corpora)
class Mixture(TrainingBatches):
    """Sequences of several corpora, in proportion to weights, whatever the sizes of the corpora.

    share of corpus k = w_k / sum(w), or on the line from there to its share by `end`

    Each corpus has epochs of its own: one that is small for its weight is repeated. Sequences of the corpora alternate
    evenly (a Weyl sequence), so that every stretch of the training has its shares.

    weights: corpus -> weight, by the names in `data.corpus.corpora`; null: all equal.
    end:     the weights at the end of training; null: the same.
    """

    def __init__(
        self, text: TrainingText, before: TrainingBatches, *, weights: dict[str, float] | None = None,
        end: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(text, before)
        weights = weights or dict.fromkeys(text.corpora, 1.0)
        self.names = sorted(weights)
        self.shares = np.array([[w[name] / sum(w.values()) for name in self.names] for w in (weights, end or weights)])
        self.views = [_View(text.tokens, text.corpora[name]) for name in self.names]
        for name, view, share in zip(self.names, self.views, self.shares.T, strict=True):
            if share.any() and len(view) < text.block_size + 1:
                problem = f"corpus {name} has {len(view)} training tokens, fewer than {text.block_size + 1}"
                raise ConfigError(problem, where="data.corpus", hint="more text, or a smaller block_size")

    @cached_property
    def draws(self) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Of every sequence of the training, which corpus it is from, and how many of that corpus came before."""
        index = np.arange(self.text.sequences)
        points = ((index + _first(self.text.seed)) * GOLDEN) % 1.0
        progress = (index / max(1, len(index)))[:, None]
        borders = np.cumsum((1 - progress) * self.shares[0] + progress * self.shares[1], axis=1)[:, :-1]
        corpus = (points[:, None] >= borders).sum(1).astype(np.uint8)
        counts = np.zeros(len(index), np.int32)
        for k in range(len(self.names)):
            counts[corpus == k] = np.arange((corpus == k).sum())
        return corpus, counts

    def start(self, index: int) -> int:
        """The next sequence of its corpus."""
        corpus, number = (int(values[index]) for values in self.draws)
        view, size = self.views[corpus], self.text.block_size
        blocks = max(1, (len(view) - size) // size)
        epoch, position = divmod(number, blocks)
        offset, order = _order(self.text.seed, epoch, blocks, len(view) - 1 - blocks * size)
        return view.span.start + offset + int(order[position]) * size


@dataclass(frozen=True)
class _View:
    """A span of tokens."""

    tokens: TokenSequence
    span: range

    def __len__(self) -> int:
        return len(self.span)


def _first(seed: int) -> int:
    """Where the Weyl sequence of a seed begins."""
    return int(np.random.PCG64(np.random.SeedSequence([seed])).random_raw()) % (1 << 20)


_order = lru_cache(maxsize=16)(epoch_order.__wrapped__)
"""`epoch_order`, with room for the epochs of several corpora."""


def batches_of(config: Any, data: Any, *, world: int = 1) -> Batches | TrainingBatches:
    """Those of a run. config: Config. data: Prepared. See `build_batches`."""
    block, training = config.model.block_size, config.training
    text = TrainingText(
        data.train, block, training.batch_tokens // block, training.steps, config.seed,
        separator=data.manifest["separator"], corpora=data.corpora,
    )  # fmt: skip
    return build_batches(config.data.batches, text, world=world)


def optim_of(config: Any, batches: Batches | TrainingBatches) -> Any:
    """A run's optim section, with rates by the tokens that its batches have had."""
    return batches.paced(config.optim) if isinstance(batches, TrainingBatches) else config.optim
