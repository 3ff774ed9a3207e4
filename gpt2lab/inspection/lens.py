"""What happens inside a trained model while it reads one text: the attention of every head, what each depth would
predict, and the probabilities of the next token.

    reading = read(model, tokens, tokenizer.decode)
    reading.heads[0].weights   # (T, T)
    reading.guesses[-1][-1]    # the likeliest tokens after the text

Shapes: T tokens, H heads, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2lab.components.attend import score_map
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.scores import Scores
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT

TOP = 5
"""Guesses that are kept for each token and depth."""
MOST_TOKENS = 256


@dataclass(frozen=True)
class Guess:
    """A token that may come next, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class HeadMap:
    """One map of attention weights (T, T), a row for each query; block and head count from 0."""

    block: int
    head: int
    weights: Tensor

    def means(self) -> dict[str, float]:
        """Mean weight on the token itself, on the one before it and on the first one, and the mean number of tokens
        that it looks back; over all tokens but the first, NaN where there is no other."""
        w, place = self.weights, torch.arange(len(self.weights))
        back = (w * (place[:, None] - place)).sum(-1) / w.sum(-1)
        rows = {"itself": w.diagonal()[1:], "previous": w.diagonal(-1), "first": w[1:, 0], "distance": back[1:]}
        return {name: float(row.mean()) for name, row in rows.items()}

    def looks(self, token: int, count: int) -> list[tuple[int, float]]:
        """The tokens that `token` attends to most: (place, weight)."""
        top = self.weights[token, : token + 1].topk(min(count, token + 1))
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


@dataclass(frozen=True)
class Reading:
    """One text, read by one model.

    tokens: their text.  heads: of every block with attention.  guesses: the likeliest next tokens by depth (0 is the
    embedding, then after every block) and token.  actual: the probability of the token that does come next, by depth
    and token but the last.
    """

    tokens: tuple[str, ...]
    heads: tuple[HeadMap, ...]
    guesses: tuple[tuple[tuple[Guess, ...], ...], ...]
    actual: tuple[tuple[float, ...], ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of the text in nats, as it would be at each depth; NaN for one token."""
        return tuple(-sum(map(math.log, p)) / len(p) if p and min(p) > 0 else math.nan for p in self.actual)

    def depth(self, number: int) -> str:
        """What a depth is called."""
        return f"block {number - 1}" if number else "embedding"

    def as_record(self) -> dict[str, Any]:
        """Plain data."""
        heads = [
            {"block": head.block, "head": head.head, **head.means(), "weights": head.weights.tolist()}
            for head in self.heads
        ]
        lens = [[[vars(guess) for guess in guesses] for guesses in depth] for depth in self.guesses]
        actual = [list(probabilities) for probabilities in self.actual]
        return {"tokens": list(self.tokens), "attention": heads, "lens": lens, "actual": actual, "losses": self.losses}


class PassRecorder:
    """The streams and attention weights of one forward pass."""

    def __init__(self, ctx: ForwardContext) -> None:
        self.ctx, self.streams, self.heads = ctx, list[Tensor](), list[HeadMap]()

    def stream(self, depth: int, x: Tensor) -> None:
        """See `Observer`."""
        self.streams.append(x)

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """See `Observer`."""
        carried = dict(self.ctx.carry)
        weights = scores.weights(score_map(q, k, bias, scores, scale), self.ctx)[0].cpu()
        self.ctx.carry = carried  # the layer computes them itself, and what it passes on as well
        earlier = sum(head.block == depth for head in self.heads)
        self.heads += [HeadMap(depth, earlier + number, each) for number, each in enumerate(weights)]


@torch.no_grad()
def read(model: GPT, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Reading:
    """Read `tokens` once. Raises ConfigError for more than MOST_TOKENS, or than the positions can express.

    The logit lens (nostalgebraist 2020) gives the stream after each block to the final norm and the head, as if no
    block followed; after the last block that is the model's own prediction.
    """
    if len(tokens) > MOST_TOKENS:
        raise ConfigError(f"{len(tokens)} tokens: a page shows at most {MOST_TOKENS}", where="--text")
    ctx = model.context(torch.tensor([tokens], device=next(model.parameters()).device))
    ctx.observer = recorder = PassRecorder(ctx)
    hook = model.drop.register_forward_hook(lambda module, inputs, x: recorder.streams.append(x))
    try:
        model.hidden(ctx)
    finally:
        hook.remove()
    first: Any = model.h[0]
    streams = [first.open(recorder.streams[0]), *recorder.streams[1:]]
    guesses, actual, following = [], [], ctx.tokens[0, 1:, None]
    for stream in streams:
        probabilities = logits_at(model, stream).softmax(-1)
        top = probabilities.topk(min(TOP, probabilities.shape[-1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        guesses.append(tuple(tuple(Guess(decode([i]), p) for i, p in zip(*pair, strict=True)) for pair in pairs))
        actual.append(tuple(probabilities[:-1].gather(-1, following)[:, 0].tolist()))
    return Reading(tuple(decode([token]) for token in tokens), tuple(recorder.heads), tuple(guesses), tuple(actual))


def logits_at(model: GPT, stream: Tensor) -> Tensor:
    """What the model would predict if `stream`, behind some block, were its last.  (1, T, C) -> (T, V)"""
    last: Any = model.h[-1]
    x = model.ln_f(last.close(stream)) * model.scaling.output
    logits: Tensor = model.lm_head(x[0], model.wte)
    return logits.float()
