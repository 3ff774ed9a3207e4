"""Windows of validation text: passes over them; the loss of each window with its document, for the noise of the text;
and the loss by position in the context, by frequency of the token, and by document.

One pass over the validation tokens fills the sums of all three divisions; the final evaluation and metrics of finished
runs use the same code.

Shapes: n windows, L tokens in a window, r targets, G groups, V vocabulary, D documents.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt2lab.basics.text import clean
from gpt2lab.data.batches import Ids, TokenSequence
from gpt2lab.data.prepared import Prepared
from gpt2lab.model import GPT
from gpt2lab.training.precision import Precision, autocast, memory_guard

READ_TOKENS = 1 << 22
DIGITS = 7  # losses are float32 per target
BANDS, GROUPS, MOST_DOCUMENTS = 10, 10, 8
COUNTED_TOKENS, STRETCH = 1 << 24, 1 << 18
"""Most training tokens that are counted, and the size of stretches; enough for frequency ranks."""

EXAMPLES = 3


class Window(NamedTuple):
    """Input tokens [start, start + length); of the tokens that follow each of them, the last `scored` are targets."""

    start: int
    length: int
    scored: int


class Targets(NamedTuple):
    """Some targets. ids: (r,) the tokens. seen: (r,) number of tokens visible to each prediction. places: (r,) indices
    of the targets in the validation split."""

    ids: Ids
    seen: Ids
    places: Ids


@dataclass(frozen=True, kw_only=True)
class WindowLosses:
    """Of each plain validation window, in order: mean loss in nats, number of targets, and index of its unit. `unit`: a
    document, or the window itself where all windows are in one document."""

    unit: Literal["document", "window"]
    losses: tuple[float, ...]
    targets: tuple[int, ...]
    units: tuple[int, ...]

    def record(self, key: str) -> dict[str, Any]:
        """The record stored with the evaluation `key`."""
        return {"key": key, **asdict(self), "losses": [round(loss, DIGITS) for loss in self.losses]}


def batches_of(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """At most `size` neighbouring windows of one length at a time."""
    for _, group in itertools.groupby(windows, key=lambda window: window.length):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def targets_of(batch: Sequence[Window], wanted: NDArray[np.int64]) -> Targets:
    """The targets (n, scored) of windows of one length, one after another."""
    length, scored = batch[0].length, batch[0].scored
    seen = np.arange(length - scored + 1, length + 1)  # (scored,)
    places = np.array([window.start for window in batch])[:, None] + seen  # (n, scored)
    return Targets(ids=wanted.flatten(), seen=np.tile(seen, len(batch)), places=places.flatten())


def forward(
    model: GPT, tokens: TokenSequence, batch: Sequence[Window], precision: Precision
) -> tuple[Tensor, NDArray[np.int64]]:
    """Logits (n, scored, V) on the model's device and targets (n, scored) of windows of one length."""
    device = next(model.parameters()).device
    length, scored = batch[0].length, batch[0].scored
    ids = np.stack([tokens[w.start : w.start + length + 1] for w in batch])  # (n, L + 1)
    with autocast(precision, device):
        logits: Tensor = model(torch.from_numpy(ids[:, :-1].copy()).to(device))[:, -scored:]
    return logits, ids[:, -scored:]


def out_of_memory(windows: Sequence[Window], batch_sequences: int) -> AbstractContextManager[None]:
    """Raises EnvironmentFault with a hint when scoring `windows` runs out of memory."""
    return memory_guard(
        "evaluation",
        f"{min(batch_sequences, len(windows))} sequences of {windows[0].length} tokens in one pass",
        "--set training.micro_batch_sequences=N, with a smaller N",
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; restores every module's mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def windows_by_document(
    losses: Sequence[float], targets: Sequence[int], starts: Sequence[int], documents: NDArray[np.int64] | None
) -> WindowLosses:
    """Windows with the document that each starts in.

    starts: (n,) first token of each window. documents: first token of each document, rising from 0; None for one.
    """
    indices = range(len(starts)) if documents is None else np.searchsorted(documents, starts, side="right") - 1
    units = tuple(map(int, indices))
    unit: Literal["document", "window"] = "document"
    if documents is None or len(set(units)) < 2:
        unit, units = "window", tuple(range(len(starts)))
    return WindowLosses(unit=unit, losses=tuple(losses), targets=tuple(targets), units=units)


def validation_documents(data: Prepared) -> NDArray[np.int64] | None:
    """First token of each document in the validation split; None when it is all one document.

    Documents are those of the prepared data's manifest, or, if it lists only one, those between separators.
    """
    lengths = [int(entry["tokens"]) for entry in data.manifest["splits"]["validation"]["documents"] if entry["tokens"]]
    if len(lengths) > 1:
        return np.cumsum([0, *lengths[:-1]])
    separator = data.manifest["separator"]
    return None if separator is None else divided(data.validation, int(separator))


def divided(tokens: TokenSequence, separator: int) -> NDArray[np.int64] | None:
    """First token of each document in `tokens`, each but the last ending in `separator`; None when there is one."""
    ends = [
        np.flatnonzero(tokens[start : start + READ_TOKENS] == separator) + start
        for start in range(0, len(tokens), READ_TOKENS)
    ]
    starts = np.concatenate([np.zeros(1, np.int64), *(end + 1 for end in ends)])
    starts = starts[starts < len(tokens)]
    return starts if len(starts) > 1 else None


def shown(token: str) -> str:
    """The text of a token with its white space visible."""
    return clean(token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")) or "·"


# --- loss by parts ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """One way to divide targets. groups: their names, each once. index: the group of each target, (r,) -> (r,).
    examples: of each group's content; empty where the names say it."""

    name: str
    groups: Sequence[str]
    index: Callable[[Targets], Ids]
    examples: Sequence[str] = ()


class Parts:
    """Sums over the groups of several divisions, accumulated batch by batch."""

    def __init__(self, divisions: Sequence[Division]) -> None:
        self.divisions = {division.name: division for division in divisions}
        self._ends = np.cumsum([0, *(len(division.groups) for division in divisions)]).tolist()
        self._sums = torch.zeros(2, self._ends[-1], dtype=torch.float64)  # nats and targets of every group

    def add(self, targets: Targets, nats: Tensor) -> None:
        """nats: (r,) float64 on the CPU, the loss of each target."""
        for (begin, end), division in zip(itertools.pairwise(self._ends), self.divisions.values(), strict=True):
            index = torch.from_numpy(division.index(targets))
            self._sums[0, begin:end] += torch.bincount(index, nats, minlength=end - begin)
            self._sums[1, begin:end] += torch.bincount(index, minlength=end - begin)

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace this rank's sums by those over all ranks; `total` sums a tensor over the ranks."""
        self._sums = total(self._sums).cpu()

    def means(self, name: str) -> dict[str, tuple[float, int]]:
        """Group of one division -> its mean loss in nats, and its targets; groups without any are left out."""
        at = list(self.divisions).index(name)
        nats, counts = self._sums[:, self._ends[at] : self._ends[at + 1]].tolist()
        both = zip(self.divisions[name].groups, nats, counts, strict=True)
        return {group: (nat / count, int(count)) for group, nat, count in both if count}

    def record(self, key: str) -> dict[str, Any]:
        """The record stored with the evaluation `key`."""
        parts: dict[str, Any] = {}
        for name, division in self.divisions.items():
            means = self.means(name)
            parts[name] = {
                "groups": list(means),
                "losses": [round(loss, DIGITS) for loss, _ in means.values()],
                "targets": [count for _, count in means.values()],
            }
            if division.examples:
                examples = dict(zip(division.groups, division.examples, strict=True))
                parts[name]["examples"] = [examples[group] for group in means]
        return {"key": key, "parts": parts}


def divisions(data: Prepared, longest: int) -> list[Division]:
    """The divisions of a final evaluation: by position within `longest` tokens, by frequency, and, for more than one,
    by document."""
    starts, names = named_documents(data)
    counts = token_counts(data.train, data.vocab_size)
    divisions = [by_position(longest), by_frequency(counts, text=lambda token: shown(data.tokenizer.decode([token])))]
    return [*divisions, by_document(starts, names, len(data.validation))] if len(starts) > 1 else divisions


def by_position(longest: int, bands: int = BANDS) -> Division:
    """Bands of visible tokens, from 1 to `longest`, of geometrically growing lengths; fewer for short contexts."""
    borders = np.unique(np.geomspace(1, longest + 1, bands + 1).round().astype(np.int64))  # first of each, and the end
    names = [f"{first}-{end - 1}" for first, end in itertools.pairwise(borders)]
    return Division(
        name="position", groups=names, index=lambda targets: np.searchsorted(borders, targets.seen, side="right") - 1
    )


def by_frequency(counts: Ids, groups: int = GROUPS, text: Callable[[int], str] | None = None) -> Division:
    """Tokens from the most to the least frequent, in groups that each hold about an equal share of the training text.

    counts: (V,) occurrences. Names are ranks, first and last. Tokens of equal counts stay together, and those that
    never occur join the rarest, so there are fewer groups where few tokens make up most of the text. text: a token as
    text, for examples.
    """
    order = np.argsort(-counts, kind="stable")  # (V,) token of each rank
    ranked = counts[order]
    firsts = np.flatnonzero(np.concatenate([[True], (ranked[1:] != ranked[:-1]) & (ranked[1:] > 0)]))  # of each tie
    ties = equal_shares(np.add.reduceat(ranked, firsts).tolist(), groups)
    begins = firsts[ties]
    ends = np.append(begins[1:], len(counts))
    group_of = np.empty(len(counts), np.int64)  # (V,)
    group_of[order] = np.repeat(np.arange(len(begins)), ends - begins)
    examples = []
    if text is not None:
        tops = (order[begin : min(end, begin + EXAMPLES)].tolist() for begin, end in zip(begins, ends, strict=True))
        examples = [" ".join(map(text, top)) for top in tops]
    return Division(
        name="frequency",
        groups=[f"{begin + 1}-{end}" for begin, end in zip(begins, ends, strict=True)],
        index=lambda targets: group_of[targets.ids],
        examples=examples,
    )


def by_document(starts: Ids, names: Sequence[str], tokens: int, most: int = MOST_DOCUMENTS) -> Division:
    """The longest documents, in their order, and the others together if there is more than one of them.

    starts: (D,) first token of each document, rising from 0. names: theirs, each once. tokens: in all documents.
    """
    kept = np.arange(len(starts))
    if len(starts) > most + 1:
        kept = np.sort(np.argsort(-np.diff(np.append(starts, tokens)), kind="stable")[:most])
    others = len(starts) - len(kept)
    slots = np.full(len(starts), len(kept))  # (D,)
    slots[kept] = np.arange(len(kept))
    return Division(
        name="document",
        groups=[*(names[index] for index in kept.tolist()), *([f"{others} others"] if others else [])],
        index=lambda targets: slots[np.searchsorted(starts, targets.places, side="right") - 1],
    )


def equal_shares(masses: Sequence[int], groups: int) -> list[int]:
    """Cuts a sequence of masses into at most `groups` parts of about equal mass; -> the first index of each.

    Each part is the nearest to an equal share of the remaining mass, with at least one element; the last takes the
    rest.
    """
    begins, left, at = [], sum(masses), 0
    for parts in range(groups, 0, -1):
        if at == len(masses):
            break
        begins.append(at)
        share, held, at = left / parts, masses[at], at + 1
        while at < len(masses) and (parts == 1 or abs(held + masses[at] - share) < abs(held - share)):
            held, at = held + masses[at], at + 1
        left -= held
    return begins


def token_counts(tokens: TokenSequence, vocab_size: int, limit: int = COUNTED_TOKENS) -> Ids:
    """Occurrences of each token in `tokens`; beyond `limit` tokens, in stretches spread evenly over them.

    -> (V,)
    """
    pieces = -(-len(tokens) // STRETCH)
    read = min(pieces, max(1, limit // STRETCH))
    counts = np.zeros(vocab_size, np.int64)
    for index in range(read):
        start = index * pieces // read * STRETCH
        counts += np.bincount(tokens[start : min(start + STRETCH, len(tokens))], minlength=vocab_size)
    return counts


def named_documents(data: Prepared) -> tuple[Ids, list[str]]:
    """First token of each document of the validation split (D,), and its name: that in the manifest, else a number (for
    streams). Repeated names get their position appended."""
    listed = [clean(entry["name"]) for entry in data.manifest["splits"]["validation"]["documents"] if entry["tokens"]]
    starts = validation_documents(data)
    if starts is None:
        return np.zeros(1, np.int64), listed[:1] or ["all documents"]
    if len(listed) != len(starts):
        return starts, [f"document {number}" for number in range(1, len(starts) + 1)]
    times = Counter(listed)
    return starts, [name if times[name] == 1 else f"{name} ({place})" for place, name in enumerate(listed, start=1)]
