"""Text as it grows: characters once they are whole, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.errors import ConfigError, Gpt2labError

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Continuation:
    """The text of one sample so far.

    >>> text = Continuation(tokenizer, stop=["\\n\\n"])
    >>> text.add(token)   # the text that is certain now, maybe none
    >>> text.finish()     # the text held back until now

    A character may be spread over several tokens; until the last of them has come, its bytes decode to one U+FFFD at
    the very end, which is held back. So is a beginning of a stop string, until it is known not to become one.

    tokens:  all that were added.
    text:    all that was shown.
    stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._pending: list[int] = []  # tokens since the last end of a character
        self._taken = 0  # characters of them that are in _held or shown already
        self._held = ""

    def add(self, token: int) -> str:
        """-> the text that can be shown now."""
        self.tokens.append(token)
        self._pending.append(token)
        text = self.tokenizer.decode(self._pending)
        whole = text.removesuffix(BROKEN)
        fresh, self._taken = whole[self._taken :], len(whole)
        if len(whole) == len(text):
            self._pending, self._taken = [], 0
        return self._show(fresh)

    def finish(self) -> str:
        """-> what was held back, as no more tokens come; bytes that are no character are U+FFFD now."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self._pending)[self._taken :] if self._pending else ""
        self._pending, self._taken = [], 0
        return self._show(rest) + self._let_go(0)

    def _show(self, fresh: str) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        ends = [at for at in map(self._held.find, self.stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]
            return self._let_go(0)
        return self._let_go(max((beginning(self._held, stop) for stop in self.stop), default=0))

    def _let_go(self, keep: int) -> str:
        """Show what is held but for the last `keep` characters."""
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        self.text += shown
        return shown


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt, at least one: an empty one begins as a document does, after the separator, or where there is
    none after a line break.

    Raises ConfigError for characters that the tokenizer cannot write.
    """
    if not prompt and tokenizer.separator is not None:
        return [tokenizer.separator]
    text = prompt or "\n"
    try:
        ids = [int(token) for token in tokenizer.encode(text)]
        lost = not ids or tokenizer.decode(ids) != text
    except (KeyError, ValueError, Gpt2labError):
        lost = True
    if lost:
        strange = [c for c in dict.fromkeys(text) if not writes(tokenizer, c)]
        named = ", ".join(repr(c) for c in strange[:10]) + (", ..." if len(strange) > 10 else "")
        raise ConfigError(
            f"the model's tokenizer cannot write {named or 'it'}",
            where="prompt",
            hint="a prompt without these characters",
        )
    return ids


def writes(tokenizer: Tokenizer, character: str) -> bool:
    """Whether the character comes back from its ids."""
    try:
        return tokenizer.decode(tokenizer.encode(character)) == character
    except (KeyError, ValueError, Gpt2labError):
        return False
