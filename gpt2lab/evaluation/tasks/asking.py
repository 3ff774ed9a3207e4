"""What a task is: questions put to a model as pieces of text, and what is counted of its answers.

    @task.register("capitals", source="my own")
    def capitals() -> Task:
        "Which city is the capital?"
        rows = [{"land": "France", "cities": ["Lyon", "Paris"], "right": 1}]
        return Task(
            protocol="capitals, no examples",
            documents=lambda: written(rows),
            ask=lambda row: choose(f"The capital of {row['land']} is", row["cities"], row["right"]),
        )

A task is one function with keyword-only options. It belongs to no run's identity: it changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gpt2lab.data.files import canonical_sha256
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Choice, Misfit, Slot

task = Slot("task", "questions put to trained models (gpt2lab eval --tasks)", default=(), in_config=False)

Row = Mapping[str, Any]
"""One document, as its data set has it."""


class Request(NamedTuple):
    """How likely is `continuation` after `context`? Spaces between them belong to the continuation."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """One document as requests, of which `gold` is the right one. characters: of each choice, without the space before
    it, by which lengths are made equal."""

    requests: tuple[Request, ...]
    gold: int
    characters: tuple[int, ...]


class Answer(NamedTuple):
    """What a model says to one request: the sum of the log-likelihoods of the continuation's tokens in nats, whether
    each of these was the likeliest, and how many they are."""

    log_likelihood: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Measure:
    """A number for each question, and how these become one figure: their mean, or e to minus their mean.

    how: the definition in words, as it is shown with the figure.
    """

    name: str
    how: str
    of: Callable[[Question, Sequence[Answer]], float]
    joined: Literal["mean", "perplexity"] = "mean"


def highest(scores: Sequence[float]) -> int:
    """Place of the highest score; of equal ones the first counts, as everywhere."""
    return max(range(len(scores)), key=scores.__getitem__)


def _acc(question: Question, answers: Sequence[Answer]) -> float:
    return float(highest([one.log_likelihood for one in answers]) == question.gold)


def _acc_norm(question: Question, answers: Sequence[Answer]) -> float:
    lengths = zip(answers, question.characters, strict=True)
    return float(highest([one.log_likelihood / max(1, length) for one, length in lengths]) == question.gold)


def _acc_token(question: Question, answers: Sequence[Answer]) -> float:
    return float(highest([one.log_likelihood / one.tokens for one in answers]) == question.gold)


ACC = Measure("acc", "highest sum of log-likelihoods", _acc)
ACC_NORM = Measure("acc_norm", "highest sum of log-likelihoods per character of the choice", _acc_norm)
ACC_NORM_TOKENS = Measure("acc_norm", "lowest mean loss per token of the choice", _acc_token)
GREEDY = Measure("acc", "every token of the continuation is the likeliest", lambda _, found: float(found[0].greedy))
PERPLEXITY = Measure(
    "perplexity", "per continuation, exp(-mean log-likelihood)", lambda _, found: found[0].log_likelihood, "perplexity"
)


@dataclass(frozen=True)
class Documents:
    """A task's documents. identity: changes whenever they do. source: where they come from, in words."""

    rows: Sequence[Row]
    identity: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where documents come from, how each is asked, and what is counted.

    protocol: in words, whose rules these are; shown with every figure. documents: fetches them when it is called.
    """

    protocol: str
    documents: Callable[[], Documents]
    ask: Callable[[Row], Question]
    measures: tuple[Measure, ...] = (ACC, ACC_NORM)


def written(rows: Sequence[Row], source: str = "given in the task") -> Documents:
    """Documents that are plain values."""
    return Documents(rows, canonical_sha256(list(rows)), source)


def choose(context: str, choices: Sequence[str], gold: int, *, between: str = " ") -> Question:
    """Which of `choices` follows? `between` stands before each."""
    requests = tuple(Request(context, between + choice) for choice in choices)
    return Question(requests, gold, tuple(map(len, choices)))


def fill(contexts: Sequence[str], continuation: str, gold: int, *, between: str = " ") -> Question:
    """After which of `contexts` is the rest of the sentence likeliest?  Source: arXiv:1806.02847, partial scoring."""
    requests = tuple(Request(context, between + continuation) for context in contexts)
    return Question(requests, gold, (len(continuation),) * len(contexts))


def complete(context: str, continuation: str) -> Question:
    """How does it go on? `continuation` begins with its space."""
    return Question((Request(context, continuation),), 0, (len(continuation),))


def read_tasks(words: Sequence[str], where: str) -> list[Choice]:
    """`name` or `name:option=value:...` as choices, each once. Raises ConfigError, naming `where`."""
    found = []
    for text in words:
        name, *options = text.strip().split(":")
        given = dict(option.partition("=")[::2] for option in options)
        try:
            found.append(task.read({**given, "name": name}))
        except Misfit as misfit:
            raise ConfigError(str(misfit), where=where, hint="gpt2lab components task") from None
    return list(dict.fromkeys(found))
