"""Text goes on, a token at a time for several samples at once.

Shapes: n samples of one group, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpt2lab.components.step import Cache
from gpt2lab.errors import ConfigError
from gpt2lab.generation.reader import Reader
from gpt2lab.generation.sampling import NEVER, Dice, Sampling, choose
from gpt2lab.model import GPT

Ended = Callable[[int, int], bool]


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

    slide:      where text grows past the context, forget its older half (see `Group`); otherwise that is refused.
    vocab_size: of the tokenizer, if smaller than the model's: ids beyond it are never drawn.
    ended:      asked after each token, with its sample's number; true ends the sample, as a stop token does.

    Prompts of different length are computed in groups of equal length. A sample's random numbers do not depend on the
    others. Raises ConfigError, before the first token, for a prompt that is empty, has an id that the model does not
    know, or will not fit (`refuse_unless_it_fits`).
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
    """Raises ConfigError when the model's positions end before the text does. The last token is not read again."""
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


def context_of(model: GPT) -> int:
    """The context in tokens that the model was trained at, which its positions may exceed but not fall short of."""
    return min(model.config.block_size, model.max_context or model.config.block_size)


@torch.inference_mode()
def _continue(
    reader: Reader, prompts: Sequence[Sequence[int]], settings: Sampling, slide: bool, vocab_size: int | None,
    ended: Ended,
) -> Iterator[dict[int, int]]:  # fmt: skip
    """See `generate`."""
    by_length: dict[int, list[int]] = {}
    for sample, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(sample)
    window = context_of(reader.model) if slide else None
    groups = [
        Group(reader, samples, [prompts[sample] for sample in samples], settings, window, vocab_size)
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


class Group:
    """Samples whose texts are equally long, and what the model remembers of them.

    samples: their numbers.
    window:  longest context in tokens, or None. When it is full, the newest half of it is read again, and what was
             before is forgotten; so text can grow without end, and reading again costs little per token. A model that
             crops its context at each token, as nanoGPT does, must read all of it again each time.
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
        self.dice = [Dice(settings.seed, sample) for sample in samples]

    def advance(self) -> dict[int, int]:
        """The next token of every sample."""
        if self.window is not None and self.cache.seen + self.unread.shape[1] > self.window:
            self.cache, self.unread = Cache(), self.tokens[:, -max(1, self.window // 2) :]
        scores = self.scores(self.unread)
        new = choose(scores, self.tokens, self.settings, self.dice)
        self.unread = new[:, None].to(self.tokens.device)
        self.tokens = torch.cat([self.tokens, self.unread], 1)
        return dict(zip(self.samples, new.tolist(), strict=True))

    def scores(self, tokens: Tensor) -> Tensor:
        """(n, T) -> (n, V)"""
        scores = self.reader.scores(tokens, self.cache)
        if self.vocab_size is not None and self.vocab_size < scores.shape[1]:
            scores[:, self.vocab_size :] = NEVER
        return scores
