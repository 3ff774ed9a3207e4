"""Decoding: continues several samples token by token, by filters on the scores and sampling from the rest.

Each filter is a pure function that equals the transformers class named in its docstring; `filtered` applies them in the
order of transformers' `generate`.

Shapes: n samples of one group, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gpt2lab.components.context import Cache
from gpt2lab.errors import ConfigError
from gpt2lab.generation.reader import Reader
from gpt2lab.model import GPT
from gpt2lab.schema import Settings

Ended = Callable[[int, int], bool]
NEVER = float("-inf")


class Sampling(Settings):
    """Settings of sampling."""

    max_new_tokens: int = Field(100, ge=1)
    """Most tokens of a sample."""
    temperature: float = Field(1.0, ge=0)
    """Divisor of the scores; 0: always take the best token."""
    top_k: int | None = Field(None, ge=1)
    """Sample from the k best tokens only; null for all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the smallest set of best tokens with this total probability; null for all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Sample from tokens with at least this share of the best one's probability; null for all."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that occurred in the text become less likely; 1 for none."""
    seed: int = Field(0, ge=0)
    """Seed; each sample has a separate random generator, from this and its number."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a sample; the id itself is its last token."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample; its text ends before them."""


def generate(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    settings: Sampling | None = None,
    *,
    slide: bool = False,
    vocab_size: int | None = None,
    ended: Ended = lambda sample, token: False,
) -> Iterator[dict[int, int]]:
    """One continuation of every prompt. Yields the next token of each sample that has not ended, by its number.

    >>> reader = Reader(model, rows=3)
    >>> for new in generate(reader, [tokenizer.encode("To be")] * 3, Sampling(temperature=0.8, seed=1)): ...

    slide:      beyond the context, drop the older half of the text (see `SampleBatch`); otherwise that is an error.
    vocab_size: of the tokenizer, if smaller than the model's: ids beyond it are never sampled.
    ended:      called with sample number and token; true ends the sample, as a stop token does.

    Prompts of different length are computed in groups of equal length. A sample's random numbers do not depend on the
    others. Raises ConfigError, before the first token, for a prompt that is empty, has an id outside
    the vocabulary, or does not fit (`refuse_unless_it_fits`).
    """
    settings, model = settings or Sampling(), reader.model
    for number, prompt in enumerate(prompts):
        where = f"prompt {number}" if len(prompts) > 1 else "prompt"
        if not len(prompt):
            raise ConfigError("it has no token; a model needs one to go on from", where=where)
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ConfigError(f"it has an id outside the model's vocabulary of {model.config.vocab_size}", where=where)
        if not slide:
            refuse_unless_it_fits(model, len(prompt), settings.max_new_tokens)
    return _continue(reader, prompts, settings, slide, vocab_size, ended)


def refuse_unless_it_fits(model: GPT, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ConfigError when the text exceeds the model's positions. The last token is not read again."""
    limit = model.max_context
    if limit is not None and prompt_tokens + new_tokens - 1 > limit:
        room = limit + 1 - prompt_tokens
        most = f"--max-new-tokens {room}" if room > 0 else f"a prompt of at most {limit:,} tokens"
        raise ConfigError(
            f"{prompt_tokens:,} tokens of prompt and {new_tokens:,} new ones do not fit: "
            f"the model's positions end at {limit:,}",
            where="model.position",
            hint=f"{most}, or --window, which forgets the older half of the text whenever it is full",
        )


@torch.inference_mode()
def _continue(
    reader: Reader, prompts: Sequence[Sequence[int]], settings: Sampling, slide: bool, vocab_size: int | None,
    ended: Ended,
) -> Iterator[dict[int, int]]:  # fmt: skip
    """See `generate`."""
    by_length: dict[int, list[int]] = {}
    for sample, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(sample)
    trained = reader.model.config.block_size
    window = min(trained, reader.model.max_context or trained) if slide else None
    groups = [
        SampleBatch(reader, samples, [prompts[sample] for sample in samples], settings, window, vocab_size)
        for samples in by_length.values()
    ]
    alive = set(range(len(prompts)))
    for _ in range(settings.max_new_tokens):
        new: dict[int, int] = {}
        for group in groups:
            if not alive.isdisjoint(group.samples):
                new |= {sample: token for sample, token in group.advance().items() if sample in alive}
        yield new
        alive -= {s for s, token in new.items() if token in settings.stop_tokens or ended(s, token)}
        if not alive:
            return


class SampleBatch:
    """Samples of equal length, with their key/value cache.

    samples: their numbers.
    window:  longest context in tokens, or None. When it is full, the newest half of it is read again and the rest is
             dropped, so that text can grow without limit at little cost per token. (nanoGPT crops the context at each
             token, and reads all of it again each time.)
    """

    def __init__(
        self, reader: Reader, samples: Sequence[int], prompts: Sequence[Sequence[int]], settings: Sampling,
        window: int | None, vocab_size: int | None,
    ) -> None:  # fmt: skip
        self.samples, self.reader, self.settings = samples, reader, settings
        self.window, self.vocab_size = window, vocab_size
        self.tokens = torch.tensor([list(prompt) for prompt in prompts], device=reader.device)  # (n, S)
        self.unread = self.tokens if window is None else self.tokens[:, -window:]
        self.cache = Cache()
        self.random = [RandomStream(settings.seed, sample) for sample in samples]

    def advance(self) -> dict[int, int]:
        """The next token of every sample."""
        if self.window is not None and self.cache.length + self.unread.shape[1] > self.window:
            self.cache, self.unread = Cache(), self.tokens[:, -max(1, self.window // 2) :]
        scores = self.reader.scores(self.unread, self.cache)  # (n, V)
        if self.vocab_size is not None:
            scores[:, self.vocab_size :] = NEVER
        new = choose(scores, self.tokens, self.settings, self.random)
        self.unread = new[:, None].to(self.tokens.device)
        self.tokens = torch.cat([self.tokens, self.unread], 1)
        return dict(zip(self.samples, new.tolist(), strict=True))


# --- from scores to the next token ---


def penalise_repetition(scores: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Scores of tokens that occurred made worse: divided by `penalty` above zero, multiplied below.

    (n, V), (n, S) int64 -> (n, V).  Source: CTRL, arXiv:1909.05858, section 4.1; RepetitionPenaltyLogitsProcessor.
    CTRL divides scores of either sign, which would make negative ones better.
    """
    repeated = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(repeated < 0, repeated * penalty, repeated / penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th best score; ties with it stay.  (n, V) -> (n, V)

    Source: arXiv:1805.04833, section 5.1; TopKLogitsWarper.
    """
    worst = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < worst, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest best tokens whose probabilities add up to p or more.  (n, V) -> (n, V)

    Source: nucleus sampling, arXiv:1904.09751, section 3.1; TopPLogitsWarper.
    """
    rising, order = scores.sort()
    out = rising.softmax(-1).cumsum(-1) <= 1 - p
    out[:, -1] = False  # keep at least one
    return scores.masked_fill(out.scatter(1, order, out), NEVER)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """-inf for tokens with less than p times the best one's probability.  (n, V) -> (n, V)

    Source: arXiv:2407.01082; MinPLogitsWarper.
    """
    odds = scores.softmax(-1)
    return scores.masked_fill(odds < p * odds.amax(-1, keepdim=True), NEVER)


def filtered(scores: Tensor, tokens: Tensor, settings: Sampling) -> Tensor:
    """Scores from which the next token is sampled.  (n, V) float32, (n, S) -> (n, V)

    At temperature 0 only the repetition penalty matters, as the best token passes every filter.
    """
    if settings.repetition_penalty != 1:
        scores = penalise_repetition(scores, tokens, settings.repetition_penalty)
    if settings.temperature == 0:
        return scores
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k is not None:
        scores = keep_top_k(scores, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1:
        scores = keep_top_p(scores, settings.top_p)
    if settings.min_p is not None:
        scores = keep_min_p(scores, settings.min_p)
    return scores


class RandomStream:
    """Random numbers of a sample: they depend on the seed and the sample's number, not on the number of samples or the
    device. numpy guarantees the stream (PCG64's raw output)."""

    def __init__(self, seed: int, sample: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, sample]))

    def uniform(self) -> float:
        """The next number, uniform in [0, 1)."""
        return float(int(self._bits.random_raw()) >> 11) * 2.0**-53


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Samples one token per row from softmax(scores): the first whose cumulative probability exceeds `uniform`.

    (n, V), (n,) float64 in [0, 1) -> (n,) int64, both on the CPU
    """
    reached = scores.softmax(-1).cpu().double().cumsum(-1)  # (n, V)
    total = reached[:, -1:]
    last = (reached < total).sum(-1)  # the last token with non-zero probability, in case of rounding
    return torch.searchsorted(reached, uniform[:, None] * total, right=True)[:, 0].minimum(last)


def choose(scores: Tensor, tokens: Tensor, settings: Sampling, random: Sequence[RandomStream]) -> Tensor:
    """The next token of every sample.  (n, V) float32, (n, S), n streams -> (n,) int64 on the CPU"""
    scores = filtered(scores, tokens, settings)
    if settings.temperature == 0:
        return scores.argmax(-1).cpu()
    return draw(scores, torch.tensor([stream.uniform() for stream in random], dtype=torch.float64))
