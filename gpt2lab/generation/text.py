"""Incremental text of a sample: complete characters only, and without stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.errors import ConfigError, Gpt2labError

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Continuation:
    """The text of one sample so far.

    >>> text = Continuation(tokenizer, stop=["\\n\\n"])
    >>> text.add(token)   # the text that is now final, possibly empty
    >>> text.finish()     # the text held back until now

    A character may span several tokens; until the last of them, its bytes decode to one U+FFFD at the end, which is
    held back. A prefix of a stop string is also held back, until it cannot become one.

    tokens:  all added tokens.
    text:    all released text.
    stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._pending: list[int] = []  # tokens since the last end of a character
        self._taken = 0  # characters of them that are in _held or released
        self._held = ""

    def add(self, token: int) -> str:
        """-> the text that is now final."""
        self.tokens.append(token)
        self._pending.append(token)
        text = self.tokenizer.decode(self._pending)
        whole = text.removesuffix(BROKEN)
        fresh, self._taken = whole[self._taken :], len(whole)
        if len(whole) == len(text):
            self._pending, self._taken = [], 0
        return self._show(fresh)

    def finish(self) -> str:
        """-> the text held back, at the end of the sample; incomplete characters become U+FFFD."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self._pending)[self._taken :] if self._pending else ""
        self._pending, self._taken = [], 0
        return self._show(rest) + self._release(0)

    def _show(self, fresh: str) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        ends = [at for at in map(self._held.find, self.stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]
            return self._release(0)
        return self._release(max((beginning(self._held, stop) for stop in self.stop), default=0))

    def _release(self, keep: int) -> str:
        """Release the held text except its last `keep` characters."""
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        self.text += released
        return released


def beginning(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt, at least one: an empty one becomes the separator, or a line break without one.

    Raises ConfigError for characters that the tokenizer cannot encode.
    """
    if not prompt and tokenizer.separator is not None:
        return [tokenizer.separator]
    text = prompt or "\n"
    try:
        ids = [int(token) for token in tokenizer.encode(text)]
        is_lossy = not ids or tokenizer.decode(ids) != text
    except (KeyError, ValueError, Gpt2labError):
        is_lossy = True
    if is_lossy:
        unsupported = [c for c in dict.fromkeys(text) if not writes(tokenizer, c)]
        listed = ", ".join(repr(c) for c in unsupported[:10]) + (", ..." if len(unsupported) > 10 else "")
        raise ConfigError(
            f"the model's tokenizer cannot write {listed or 'it'}",
            where="prompt",
            hint="a prompt without these characters",
        )
    return ids


def writes(tokenizer: Tokenizer, character: str) -> bool:
    """Whether the tokenizer can encode and decode the character."""
    try:
        return tokenizer.decode(tokenizer.encode(character)) == character
    except (KeyError, ValueError, Gpt2labError):
        return False
