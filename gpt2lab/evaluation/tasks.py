"""Tasks: questions as text, their tokens, the likelihood of each continuation under a model, and the scores.

    @task.register("capitals", source="my own")
    def capitals() -> Task:
        "Which city is the capital?"
        rows = [{"land": "France", "cities": ["Lyon", "Paris"], "right": 1}]
        return Task(
            protocol="capitals, no examples",
            documents=lambda: written(rows),
            ask=lambda row: choose(f"The capital of {row['land']} is", row["cities"], row["right"]),
        )

A task is one function with keyword-only options. It is no part of a run's identity, since it changes no weight.
Rows of a batch are padded on the right, which a causal model ignores. Only continuations pass through the head.
Shapes: B rows of a batch, T tokens, C channels, V vocabulary, r targets.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2lab.data.files import canonical_sha256
from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.evaluation.windows import evaluating
from gpt2lab.model import GPT
from gpt2lab.registry import Choice, Misfit, Slot
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import Precision, autocast, memory_guard

task = Slot("task", "questions put to trained models (gpt2lab eval --tasks)", default=(), in_config=False)

Row = Mapping[str, Any]
"""One document, as a row of its data set."""
Tell = Callable[[int, int], None]
"""Progress callback: requests done so far, and in all."""

TOKENS_AT_ONCE = {"cpu": 4_096}
GPU_TOKENS_AT_ONCE = 32_768
TARGETS_AT_ONCE = 1024  # rows of logits in float32 together: 200 MB with GPT-2's vocabulary


class Request(NamedTuple):
    """Asks for the likelihood of `continuation` after `context`. Spaces between them belong to the continuation."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """One document as requests. gold: index of the right one. characters: length of each choice without the space
    before it, for normalisation."""

    requests: tuple[Request, ...]
    gold: int
    characters: tuple[int, ...]


class Answer(NamedTuple):
    """Result of one request: sum of the log-likelihoods of the continuation's tokens in nats, whether each of them was
    the most likely one, and their number."""

    log_likelihood: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Measure:
    """A score per question, and its aggregation: the mean, or exp(-mean).

    how: the definition, shown with the figure.
    """

    name: str
    how: str
    of: Callable[[Question, Sequence[Answer]], float]
    joined: Literal["mean", "perplexity"] = "mean"


def _right(length: Callable[[Question, int, Answer], int]) -> Callable[[Question, Sequence[Answer]], float]:
    """1 where the right choice has the highest log-likelihood per `length` (of a question, the index of a choice and
    its answer), else 0; of equal ones the first counts."""

    def score(question: Question, answers: Sequence[Answer]) -> float:
        scores = [answer.log_likelihood / length(question, i, answer) for i, answer in enumerate(answers)]
        return float(scores.index(max(scores)) == question.gold)

    return score


ACC = Measure("acc", "highest sum of log-likelihoods", _right(lambda *_: 1))
ACC_NORM = Measure(
    "acc_norm", "highest sum of log-likelihoods per character of the choice",
    _right(lambda question, i, _: max(1, question.characters[i])),
)  # fmt: skip
ACC_NORM_TOKENS = Measure(
    "acc_norm", "lowest mean loss per token of the choice", _right(lambda _, i, answer: answer.tokens)
)
GREEDY = Measure("acc", "every token of the continuation is the likeliest", lambda _, found: float(found[0].greedy))
PERPLEXITY = Measure(
    "perplexity", "per continuation, exp(-mean log-likelihood)", lambda _, found: found[0].log_likelihood, "perplexity"
)


@dataclass(frozen=True)
class Documents:
    """A task's documents. identity: a hash of them. source: a description of their origin."""

    rows: Sequence[Row]
    identity: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Documents of a task, how each becomes a question, and its measures.

    protocol: whose rules are followed; shown with every figure. documents: fetches them when called.
    """

    protocol: str
    documents: Callable[[], Documents]
    ask: Callable[[Row], Question]
    measures: tuple[Measure, ...] = (ACC, ACC_NORM)


def written(rows: Sequence[Row], source: str = "given in the task") -> Documents:
    """Documents from rows of plain values."""
    return Documents(rows, canonical_sha256(list(rows)), source)


def choose(context: str, choices: Sequence[str], gold: int, *, between: str = " ") -> Question:
    """A question: which of `choices` follows? `between` precedes each."""
    requests = tuple(Request(context, between + choice) for choice in choices)
    return Question(requests, gold, tuple(map(len, choices)))


def fill(contexts: Sequence[str], continuation: str, gold: int, *, between: str = " ") -> Question:
    """A question: after which of `contexts` is the rest of the sentence most likely?  Source: arXiv:1806.02847, partial
    scoring."""
    requests = tuple(Request(context, between + continuation) for context in contexts)
    return Question(requests, gold, (len(continuation),) * len(contexts))


def complete(context: str, continuation: str) -> Question:
    """A question: is `continuation`, which begins with its space, predicted?"""
    return Question((Request(context, continuation),), 0, (len(continuation),))


def read_tasks(words: Sequence[str], where: str) -> list[Choice]:
    """`name` or `name:option=value:...` as choices, each once. Raises ConfigError, naming `where`."""
    choices = []
    for text in words:
        name, *options = text.strip().split(":")
        given = dict(option.partition("=")[::2] for option in options)
        try:
            choices.append(task.read({**given, "name": name}))
        except Misfit as misfit:
            raise ConfigError(str(misfit), where=where, hint="gpt2lab components task") from None
    return list(dict.fromkeys(choices))


# --- questions as tokens, answers and results ---


class Encoded(NamedTuple):
    """A request as token ids; neither part is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """One number of a task. stderr: its standard error; None with a single question. how: its definition."""

    name: str
    value: float
    stderr: float | None
    how: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Results of a model in a task. cut: questions longer than the model's context."""

    task: str
    protocol: str
    questions: int
    cut: int
    figures: tuple[Figure, ...]

    def values(self) -> dict[str, float]:
        """By `task/measure`."""
        return {f"{self.task}/{figure.name}": figure.value for figure in self.figures}


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task's questions as tokens, for any model with that tokenizer."""

    name: str
    task: Task
    documents: Documents
    questions: Sequence[Question]
    requests: Sequence[Sequence[Encoded]]


def open_task(choice: Choice) -> Task:
    """The chosen task. Raises ConfigError that names it when its function fails or does not return a Task."""
    with _task_code(choice):
        found: Any = task.build(choice)
        if not isinstance(found, Task):
            raise TypeError(f"a Task is expected, not {found!r:.60}")
    return found


def documents_of(choice: Choice, opened: Task) -> Documents:
    """Fetch the documents. Raises ConfigError that names the task when its code fails or there are none."""
    with _task_code(choice):
        documents = opened.documents()
        if not documents.rows:
            raise ValueError("it has no documents")
    return documents


def fetch_documents(tasks: Iterable[str]) -> None:
    """Fetch the documents of these tasks into the cache, before training. Raises as `documents_of`."""
    for choice in read_tasks(sorted(tasks), "evaluation.tasks"):
        documents_of(choice, open_task(choice))


def encode_task(choice: Choice, tokenizer: Tokenizer, *, limit: int | None = None, spread: bool = False) -> EncodedTask:
    """The questions of a task: of the first `limit` documents, or with `spread` of that many at even distances.

    Raises ConfigError for a task that fails, and what fetching documents raises.
    """
    opened = open_task(choice)
    documents = documents_of(choice, opened)
    total = len(documents.rows)
    wanted = min(limit or total, total)
    places = [number * total // wanted for number in range(wanted)] if spread else range(wanted)
    with _task_code(choice):
        questions = [opened.ask(documents.rows[place]) for place in places]
        requests = [[encode(request, tokenizer) for request in question.requests] for question in questions]
    return EncodedTask(str(choice), opened, documents, questions, requests)


def answer_task(
    encoded: EncodedTask,
    model: GPT,
    *,
    precision: Precision = "fp32",
    tell: Tell = lambda done, total: None,
    world: World = ALONE,
) -> list[list[Answer]]:
    """The model's answers, question by question. Every rank of `world` must call it; each gets all."""
    flat = [request for requests in encoded.requests for request in requests]
    scored = iter(log_likelihoods(model, flat, precision=precision, tell=tell, world=world))
    return [[next(scored) for _ in requests] for requests in encoded.requests]


def task_result(encoded: EncodedTask, answers: Sequence[Sequence[Answer]], block_size: int) -> TaskResult:
    """The task's result from all answers. block_size: the context of the model."""
    cut = sum(any(is_cut(request, block_size) for request in requests) for requests in encoded.requests)
    figures = tuple(figure(measure, encoded.questions, answers) for measure in encoded.task.measures)
    return TaskResult(
        task=encoded.name, protocol=encoded.task.protocol, questions=len(encoded.questions), cut=cut, figures=figures
    )


def figure(measure: Measure, questions: Sequence[Question], found: Sequence[Sequence[Answer]]) -> Figure:
    """One measure over all questions.

    The standard error of a mean is that of independent questions, sd / sqrt(n) with n - 1 in the sd, as
    lm-evaluation-harness has it; that of a perplexity follows to first order, perplexity x sd / sqrt(n).
    """
    each = [measure.of(question, answers) for question, answers in zip(questions, found, strict=True)]
    mean = statistics.fmean(each)
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    if measure.joined == "mean":
        return Figure(measure.name, mean, error, measure.how)
    value = math.exp(min(-mean, 700.0))  # avoid overflow
    return Figure(measure.name, value, None if error is None else value * error, measure.how)


def record(result: TaskResult) -> dict[str, Any]:
    """A result as plain data."""
    plain = asdict(result)
    return {**plain, "figures": {figure.pop("name"): figure for figure in plain["figures"]}}


def from_record(kept: Mapping[str, Any]) -> TaskResult:
    """The result from `record`'s plain data."""
    figures = tuple(Figure(name=name, **figure) for name, figure in kept["figures"].items())
    return TaskResult(**{**kept, "figures": figures})


@contextlib.contextmanager
def _task_code(choice: Choice) -> Iterator[None]:
    """Convert exceptions of a task's code to ConfigError that names the task."""
    try:
        yield
    except Gpt2labError:
        raise
    except Exception as error:
        hint = f"see its code in {inspect.getsourcefile(task[choice.name].factory)}"
        raise ConfigError(f"{type(error).__name__}: {error}", where=f"task {choice}", hint=hint) from error


# --- likelihoods ---


class Line(NamedTuple):
    """One input row, and its targets by request: those of a request follow the last tokens of the row."""

    tokens: tuple[int, ...]
    targets: tuple[tuple[int, tuple[int, ...]], ...]


def encode(request: Request, tokenizer: Tokenizer) -> Encoded:
    """Tokens of both parts, split where the context alone would end; spaces at its end go to the continuation. An empty
    context becomes the separator of documents.  Source: lm-evaluation-harness, `TemplateLM._encode_pair`.

    Raises ConfigError when there is no token to predict.
    """
    context = request.context.rstrip()
    rest = request.context[len(context) :] + request.continuation
    if context:
        before = tokenizer.encode(context).tolist()
        after = tokenizer.encode(context + rest).tolist()[len(before) :]
    else:
        after = tokenizer.encode(rest).tolist()
        before = [tokenizer.separator] if tokenizer.separator is not None else after[:1]
        after = after if tokenizer.separator is not None else after[1:]
    if not after:
        raise ConfigError(f"nothing to predict in {request.continuation!r}", where="a task's question")
    return Encoded(tuple(before), tuple(after))


def is_cut(request: Encoded, block_size: int) -> bool:
    """Whether it is longer than the context."""
    return len(request.context) + len(request.continuation) > block_size + 1


def log_likelihoods(
    model: GPT,
    requests: Sequence[Encoded],
    *,
    precision: Precision = "fp32",
    tokens_at_once: int | None = None,
    tell: Tell = lambda done, total: None,
    world: World = ALONE,
) -> list[Answer]:
    """The answer to each request, in their order, the same on every rank; ranks share the batches.

    Requests longer than the model's context are truncated at the beginning. The model's mode is restored, and no random
    number is drawn. Raises EnvironmentFault when memory runs out.
    """
    device = next(model.parameters()).device
    budget = tokens_at_once or TOKENS_AT_ONCE.get(device.type, GPU_TOKENS_AT_ONCE)
    batches = list(_batches(_lines(requests, model.config.block_size), budget))
    scores = torch.zeros(len(requests), 3, dtype=torch.float64)  # log-likelihood, greedy, tokens
    done = 0
    with memory_guard("tasks", f"{budget:,} tokens in one pass", "a smaller model"), evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            if index % world.size == world.rank:
                for request, answer in _score(model, batch, precision, device):
                    scores[request] = torch.tensor(answer, dtype=torch.float64)
            done += sum(len(line.targets) for line in batch)
            tell(done, len(requests))
    joined = world.sum(scores.to(device) if world.size > 1 and device.type == "cuda" else scores).tolist()
    return [Answer(likelihood, bool(greedy), int(tokens)) for likelihood, greedy, tokens in joined]


def _lines(requests: Sequence[Encoded], block_size: int) -> list[Line]:
    """Longest first, so that memory errors occur early; requests with the same input share a line."""
    sharing: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, request in enumerate(requests):
        whole = (request.context + request.continuation)[-(block_size + 1) :]
        targets = whole[-min(len(request.continuation), len(whole) - 1) :]
        sharing.setdefault(whole[:-1], []).append((index, targets))
    ordered = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
    return [Line(tokens, tuple(sharing[tokens])) for tokens in ordered]


def _batches(lines: Sequence[Line], budget: int) -> Iterator[list[Line]]:
    """Neighbours, as many as fit into `budget` tokens with their padding; at least one."""
    rest = list(lines)
    while rest:
        size = max(1, budget // len(rest[0].tokens))
        yield rest[:size]
        rest = rest[size:]


def _score(
    model: GPT, batch: Sequence[Line], precision: Precision, device: torch.device
) -> list[tuple[int, tuple[float, float, int]]]:
    """(request, (log-likelihood, greedy, tokens)) of every request of a batch."""
    longest = len(batch[0].tokens)
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    rows: list[int] = []
    places: list[int] = []
    wanted: list[int] = []
    counts: list[tuple[int, int]] = []  # request, its targets
    for row, line in enumerate(batch):
        ids[row, : len(line.tokens)] = line.tokens
        for request, targets in line.targets:
            rows += [row] * len(targets)
            places += range(len(line.tokens) - len(targets), len(line.tokens))
            wanted += targets
            counts.append((request, len(targets)))
    with autocast(precision, device):
        hidden = model.hidden(model.context(torch.from_numpy(ids).to(device)))[rows, places]  # (r, C)
        logs, greedy = _targets(model, hidden, torch.tensor(wanted, device=device))
    ends = itertools.accumulate((count for _, count in counts), initial=0)
    parts = [(request, slice(start, start + n), n) for (request, n), start in zip(counts, ends, strict=False)]
    return [(request, (logs[part].sum().item(), float(greedy[part].all()), n)) for request, part, n in parts]


def _targets(model: GPT, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each target, and whether it is the most likely token.  (r, C), (r,) -> (r,) float64, (r,)
    bool"""
    logs, greedy = [], []
    for some, targets in zip(hidden.split(TARGETS_AT_ONCE), wanted.split(TARGETS_AT_ONCE), strict=True):
        scores = model.lm_head(some, model.wte).float()  # (r, V)
        logs.append(scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu().double())
        greedy.append((scores.argmax(-1) == targets).cpu())
    return torch.cat(logs), torch.cat(greedy)
