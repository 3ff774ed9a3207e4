"""What people see when something is wrong: where, what, and what to do next.

Every error that a user can cause or meet is a `Gpt2labError`; the command line prints it in one shape and exits with
its code. Anything else that reaches the top is our own bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpt2lab.redaction import masked


def printable(text: str) -> str:
    """`text` as one line that a terminal shows as it is: what a user wrote may hold line breaks or control codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (file, line and key, as far as known) and `what`; without secrets of URIs."""

    where: str
    what: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", masked(self.where))
        object.__setattr__(self, "what", masked(self.what))

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}" if self.where else self.what)


class Gpt2labError(Exception):
    """Something a user can act on. `problems` lists everything found; `hint` is one command or step to try."""

    code = "ERROR"
    exit_code = 2

    def __init__(self, what: str | Sequence[Problem], *, where: str = "", hint: str | None = None) -> None:
        self.problems = (Problem(where, what),) if isinstance(what, str) else tuple(what)
        self.hint = None if hint is None else masked(hint)
        super().__init__("\n".join(map(str, self.problems)))

    def render(self) -> str:
        """The text for a terminal: one line per problem, then the hint."""
        lines = [f"gpt2lab: error [{self.code}] {problem}" for problem in self.problems]
        return "\n".join([*lines, f"try: {printable(self.hint)}"] if self.hint else lines)


class ConfigError(Gpt2labError):
    """A configuration, option or argument that cannot mean anything; found before any work starts."""

    code = "CONFIG"


class EnvironmentFault(Gpt2labError):
    """The machine does not allow it: disk, permission, port, missing optional package."""

    code = "ENVIRONMENT"
    exit_code = 3


class DataFault(Gpt2labError):
    """Stored data is not what its manifest says: damaged, truncated, changed."""

    code = "DATA"
    exit_code = 4


class NumericsFault(Gpt2labError):
    """Training produced numbers that are not finite, or results that should agree do not."""

    code = "NUMERICS"
    exit_code = 5


class LockHeld(Gpt2labError):
    """Another process is at work on the same thing."""

    code = "LOCK"
    exit_code = 6


class RankLost(Gpt2labError):
    """One of the processes that train one model together is gone, silent or stuck."""

    code = "RANK"
    exit_code = 7


class Preempted(Gpt2labError):
    """Stopped by a signal after saving; the same command continues."""

    code = "PREEMPTED"
    exit_code = 75


LONGEST_NAME = 64  # longer ones are no typos, and comparing them would take long


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, or None when nothing is close.

    Few edits decide; where there are many, the share of common parts does (`warmup` means `warmup_steps`).
    """
    if len(name) > LONGEST_NAME:
        return None
    written = name.casefold()
    by_folded = {k.casefold(): k for k in known}
    allowed = max(1, len(written) // 4)
    close = {k: edits(written, k) for k in by_folded if abs(len(k) - len(written)) <= allowed}
    few = [k for k, count in close.items() if count <= allowed and count < len(k)]
    if few:
        likeness = difflib.SequenceMatcher(b=written)

        def order(folded: str) -> tuple[int, float]:
            likeness.set_seq1(folded)
            return close[folded], -likeness.ratio()

        return by_folded[min(few, key=order)]
    found = difflib.get_close_matches(written, by_folded, n=1, cutoff=0.5)
    return by_folded[found[0]] if found else None


def edits(a: str, b: str) -> int:
    """How many insertions, deletions, replacements and swaps of neighbours turn `a` into `b`; no part is edited twice.

    Optimal string alignment: Damerau, Communications of the ACM 7 (1964), computed row by row.
    """
    before, row = list(range(len(b) + 1)), list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            cheapest = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cheapest = min(cheapest, earlier[j - 2] + 1)
            row.append(cheapest)
    return row[-1]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest one and the whole list."""
    known, written = sorted(known), str(name)
    guess = nearest(written, known)
    meant = f"; did you mean '{guess}'?" if guess else ""
    written = written if len(written) <= LONGEST_NAME else written[:LONGEST_NAME] + "..."
    return f"unknown {kind} '{written}'{meant} (known: {', '.join(known) or 'none'})"
