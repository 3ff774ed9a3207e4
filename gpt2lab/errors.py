"""Errors for users: where, what, and what to do next.

Every error that a user can cause or encounter is a `Gpt2labError`; the command line prints it in one format and exits
with its code. Any other exception is a bug in gpt2lab.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.basics.redaction import masked


def printable(text: str) -> str:
    """`text` as one printable line: line breaks and control characters in user input are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def command(*words: object) -> str:
    """A command line for a hint; paths may hold blanks and brackets."""
    return shlex.join(map(str, words))


def causes(error: BaseException | None, *, implicit: bool = False) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on; implicit: where nothing is named, what was being handled. Each once,
    also where a library has made a circle of them."""
    passed: set[int] = set()
    while error is not None and id(error) not in passed:
        passed.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if implicit else None)


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

    def as_record(self) -> dict[str, Any]:
        """The same as plain data."""
        problems = [{"where": problem.where, "what": problem.what} for problem in self.problems]
        return {"code": self.code, "exit_code": self.exit_code, "problems": problems, "try": self.hint}


class ConfigError(Gpt2labError):
    """An invalid configuration, option or argument; raised before any work starts."""

    code = "CONFIG"


class EnvironmentFault(Gpt2labError):
    """A problem of the machine: disk, permission, port, missing optional package."""

    code = "ENVIRONMENT"
    exit_code = 3


class DataFault(Gpt2labError):
    """Stored data does not match its manifest: damaged, truncated, changed."""

    code = "DATA"
    exit_code = 4


class Unreadable(DataFault):
    """A stored file that the machine does not let us read: a permission, a failing disk."""

    code = EnvironmentFault.code
    exit_code = EnvironmentFault.exit_code


class NumericsFault(Gpt2labError):
    """Training produced numbers that are not finite, or results that should agree do not."""

    code = "NUMERICS"
    exit_code = 5


class LockHeld(Gpt2labError):
    """Another process holds the lock."""

    code = "LOCK"
    exit_code = 6


class RankLost(Gpt2labError):
    """One of the ranks of a training has ended, or does not respond."""

    code = "RANK"
    exit_code = 7


class Interrupted(Gpt2labError):
    """Ctrl-C while nothing trains, also at a question."""

    code = "INTERRUPTED"
    exit_code = 130

    def __init__(self, what: str) -> None:
        super().__init__(what, hint="the same command continues")


class Preempted(Gpt2labError):
    """Stopped by a signal after saving; the same command continues."""

    code = "PREEMPTED"
    exit_code = 75


SYNONYMS = {
    "learning_rate": "lr", "batch_size": "batch_tokens", "n_layers": "n_layer", "num_layers": "n_layer",
    "depth": "n_layer", "n_heads": "n_head", "num_heads": "n_head", "d_model": "n_embd",
    "hidden_size": "n_embd", "width": "n_embd", "seq_len": "block_size", "context_length": "block_size",
    "max_seq_len": "block_size", "n_ctx": "block_size", "rope": "rotary", "rms_norm": "rmsnorm",
    "layer_norm": "layernorm", "max_steps": "steps", "num_steps": "steps", "iterations": "steps",
    "warmup": "warmup_steps", "max_grad_norm": "grad_clip", "adam": "adamw", "lr_scheduler": "schedule",
    "scheduler": "schedule", "activation": "mlp", "ffn": "mlp", "dataset": "corpus",
    "dtype": "precision", "nope": "none",
}  # fmt: skip
"""What others call our keys and components -> our name."""
LONGEST_NAME = 64  # longer ones are no typos, and comparing them is slow
MOST_NAMES = 60  # runs, of which there may be thousands


def synonym(name: str, names: Collection[str]) -> str | None:
    """Our name for what others call `name`, if it is among `names`."""
    meant = SYNONYMS.get(name.casefold().rpartition(".")[2])
    return meant if meant in names else None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name to `name`, or None when none is close.

    By number of edits; where there are many, by the share of common parts (`warmup` matches `warmup_steps`).
    """
    if len(name) > LONGEST_NAME:
        return None
    written, names = name.casefold(), list(names)
    if meant := synonym(name, names):
        return meant
    by_folded = {k.casefold(): k for k in names}
    allowed = max(1, len(written) // 4)
    close = {k: edits(written, k) for k in by_folded if abs(len(k) - len(written)) <= allowed}
    few = [k for k, count in close.items() if count <= allowed and count < len(k)]
    if few:
        likeness = difflib.SequenceMatcher(b=written)

        def order(folded: str) -> tuple[int, float]:
            likeness.set_seq1(folded)
            return close[folded], -likeness.ratio()

        return by_folded[min(few, key=order)]
    matches = difflib.get_close_matches(written, by_folded, n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def edits(a: str, b: str) -> int:
    """How many insertions, deletions, replacements and swaps of neighbours turn `a` into `b`; no part is edited twice.

    Optimal string alignment: Damerau, Communications of the ACM 7 (1964), computed row by row.
    """
    before, row = list(range(len(b) + 1)), list(range(len(b) + 1))
    for i, a_character in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, b_character in enumerate(b, 1):
            cheapest = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a_character != b_character))
            if i > 1 and j > 1 and a_character == b[j - 2] and a[i - 2] == b_character:
                cheapest = min(cheapest, earlier[j - 2] + 1)
            row.append(cheapest)
    return row[-1]


def unknown(kind: str, name: object, names: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest one and the list, of which a long one is cut."""
    names, written = sorted(names), str(name)
    guess = nearest(written, names)
    suggestion = f"; did you mean '{guess}'?" if guess else ""
    written = written if len(written) <= LONGEST_NAME else written[:LONGEST_NAME] + "..."
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return f"unknown {kind} '{written}'{suggestion} (known: {', '.join(names[:MOST_NAMES]) or 'none'}{more})"
