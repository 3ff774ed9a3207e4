"""From a task to figures: questions as tokens, a model's answers, what they come to and how sure that is."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.evaluation.tasks.asking import Answer, Documents, Measure, Question, Task, read_tasks, task
from gpt2lab.evaluation.tasks.scoring import Encoded, Tell, encode, is_cut, log_likelihoods
from gpt2lab.model import GPT
from gpt2lab.registry import Choice
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import Precision


@dataclass(frozen=True)
class Figure:
    """One number of a task. stderr: its standard error; None with a single question. how: its definition."""

    name: str
    value: float
    stderr: float | None
    how: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model reaches in a task. cut: questions longer than the model's context."""

    task: str
    protocol: str
    questions: int
    cut: int
    figures: tuple[Figure, ...]

    def values(self) -> dict[str, float]:
        """By `task/measure`."""
        return {f"{self.task}/{one.name}": one.value for one in self.figures}


@dataclass(frozen=True, eq=False)
class Posed:
    """A task's questions as tokens, ready for any model with that tokenizer."""

    name: str
    task: Task
    documents: Documents
    questions: Sequence[Question]
    requests: Sequence[Sequence[Encoded]]


def open_task(choice: Choice) -> Task:
    """The task as it is chosen. Raises ConfigError, naming it, when its function fails or returns something else."""
    with _own_code(choice):
        found: Any = task.build(choice)
        if not isinstance(found, Task):
            raise TypeError(f"a Task is expected, not {found!r:.60}")
    return found


def documents_of(choice: Choice, opened: Task) -> Documents:
    """Fetch them. Raises ConfigError, naming the task, when its own code fails, or when there are none."""
    with _own_code(choice):
        found = opened.documents()
        if not found.rows:
            raise ValueError("it has no documents")
    return found


def fetch(written: Iterable[str]) -> None:
    """Bring the documents of these tasks into the cache, before anything is trained. Raises as `documents_of`."""
    for choice in read_tasks(sorted(written), "evaluation.tasks"):
        documents_of(choice, open_task(choice))


def pose(choice: Choice, tokenizer: Tokenizer, *, limit: int | None = None, spread: bool = False) -> Posed:
    """Ask what is chosen, of the first `limit` documents, or with `spread` of that many that lie evenly over all.

    Raises ConfigError for a task that fails, and what fetching documents raises.
    """
    opened = open_task(choice)
    documents = documents_of(choice, opened)
    total = len(documents.rows)
    wanted = min(limit or total, total)
    places = [number * total // wanted for number in range(wanted)] if spread else range(wanted)
    with _own_code(choice):
        questions = [opened.ask(documents.rows[place]) for place in places]
        requests = [[encode(request, tokenizer) for request in question.requests] for question in questions]
    return Posed(str(choice), opened, documents, questions, requests)


def answers(
    posed: Posed,
    model: GPT,
    *,
    precision: Precision = "fp32",
    tell: Tell = lambda done, total: None,
    world: World = ALONE,
) -> list[list[Answer]]:
    """The model's answers, question by question. Every rank of `world` must call it; each gets all."""
    flat = [request for requests in posed.requests for request in requests]
    found = iter(log_likelihoods(model, flat, precision=precision, tell=tell, world=world))
    return [[next(found) for _ in requests] for requests in posed.requests]


def result(posed: Posed, found: Sequence[Sequence[Answer]], block_size: int) -> TaskResult:
    """What the answers come to. block_size: the context of the model that gave them."""
    cut = sum(any(is_cut(request, block_size) for request in requests) for requests in posed.requests)
    figures = tuple(figure(measure, posed.questions, found) for measure in posed.task.measures)
    return TaskResult(
        task=posed.name, protocol=posed.task.protocol, questions=len(posed.questions), cut=cut, figures=figures
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
    value = math.exp(min(-mean, 700.0))  # beyond that a float has no room
    return Figure(measure.name, value, None if error is None else value * error, measure.how)


def record(found: TaskResult) -> dict[str, Any]:
    """A result for programs."""
    figures = {one.name: {"value": one.value, "stderr": one.stderr, "how": one.how} for one in found.figures}
    return {
        "task": found.task,
        "protocol": found.protocol,
        "questions": found.questions,
        "cut": found.cut,
        "figures": figures,
    }


def from_record(kept: Mapping[str, Any]) -> TaskResult:
    """What `record` made."""
    figures = tuple(Figure(name=name, **one) for name, one in kept["figures"].items())
    return TaskResult(**{**kept, "figures": figures})


class _own_code:
    """Tells what somebody's task raised in a sentence that names the task."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Gpt2labError):
            where = inspect.getsourcefile(task[self.choice.name].factory)
            raise ConfigError(
                f"{type(error).__name__}: {error}", where=f"task {self.choice}", hint=f"see its code in {where}"
            ) from error
