"""Tasks and metrics of any model that `open_trained` opens. Results of finished runs are stored with the run and
computed once, under a key of task, options, documents, limit and code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab.analysis.items import Scores, TaskContrast, judge_items
from gpt2lab.config import Config
from gpt2lab.data.corpora import corpus
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.metrics import apply
from gpt2lab.evaluation.tasks import (
    TaskResult,
    answer_task,
    documents_of,
    encode_task,
    from_record,
    open_task,
    record,
    task,
    task_result,
)
from gpt2lab.identity import digest
from gpt2lab.registry import Choice
from gpt2lab.reuse.load import Trained, open_trained, run_of
from gpt2lab.reuse.measure import (
    Measured,
    Progress,
    StudyMeasured,
    code_behind,
    ended,
    measured_with,
    over_study,
    reporter,
    subject_on,
    threads,
)
from gpt2lab.store import RunFolder, Store
from gpt2lab.training.settings import TrainingConfig

SCORING = tuple(("gpt2lab.evaluation.tasks", name) for name in ("encode_task", "answer_task", "task_result"))


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Results of a model in tasks. name: for display. run: id of a finished run, else None. reused: number of tasks
    read from the store."""

    name: str
    run: str | None
    results: tuple[TaskResult, ...]
    reused: int
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """`task/measure` -> the score of every question, of measures that are a mean"""
    declared: frozenset[float | None] = frozenset()
    """the smallest effects that were declared when these tasks were first put to it"""

    def values(self) -> dict[str, float]:
        """By `task/measure`."""
        return {name: value for result in self.results for name, value in result.values().items()}

    def as_record(self, limit: int | None) -> dict[str, Any]:
        """Plain data. limit: of documents, as given."""
        tasks = [record(result) for result in self.results]
        return {"source": self.name, "run": self.run, "limit": limit, "tasks": tasks, "reused": self.reused}


def evaluate_tasks(
    source: str, store: Store, tasks: Sequence[Choice], *, limit: int | None = None, progress: Progress | None = None
) -> TaskScores:
    """Evaluate the model that `source` names in tasks, on the first `limit` documents of each.

    Raises what `open_trained` and fetching documents raise, and ConfigError for a model whose tokenizer is not known.
    """
    run = run_of(source, store)
    if run is not None and run.result() is not None:
        return evaluate_run_tasks(run, tasks, limit=limit, progress=progress)
    trained = open_trained(source, store)
    results, items = zip(*(_evaluated(trained, choice, limit, progress) for choice in tasks), strict=True)
    each = {name: scores for of_task in items for name, scores in of_task.items()}
    return TaskScores(name=trained.name, run=None, results=results, reused=0, items=each)


def evaluate_run_tasks(
    run: RunFolder, tasks: Sequence[Choice], *, limit: int | None = None, progress: Progress | None = None,
    smallest_effect: float | None = None,
) -> TaskScores:  # fmt: skip
    """The same for a finished run; stored results are reused. smallest_effect: declared before the tasks are put to it.
    Also raises what `ended` raises."""
    config, ending = ended(run)
    keys = {choice: task_key(choice, config, limit) for choice in tasks}
    records = {choice: run.evaluation(key) for choice, key in keys.items()}
    new = [choice for choice, stored in records.items() if stored is None or "items" not in stored]
    if new:
        with threads(ending["stack"]["threads"]):
            trained = open_trained(str(run.path), Store(run.path.parent))
            for choice in new:
                result, items = _evaluated(trained, choice, limit, progress)
                before = records[choice]  # of a version that did not keep the score of every question
                declared = smallest_effect if before is None else before.get("smallest_effect")
                more = {"items": items, "smallest_effect": declared}
                records[choice] = _record(keys[choice], choice, result, limit, trained) | more
                run.write_evaluation(records[choice] or {})
    results = [stored for stored in records.values() if stored]
    return TaskScores(
        name=run.id,
        run=run.id,
        results=tuple(from_record(stored["result"]) for stored in results),
        reused=len(tasks) - len(new),
        items={name: scores for stored in results for name, scores in stored["items"].items()},
        declared=frozenset(stored["smallest_effect"] for stored in results),
    )


def evaluate_study_tasks(
    name: str, store: Store, tasks: Sequence[Choice], *, limit: int | None = None, progress: Progress | None = None,
    smallest_effect: float | None = None,
) -> StudyMeasured:  # fmt: skip
    """Tasks of every finished run of a study, compared by arm; see `over_study`.

    smallest_effect: X of the tasks' scores. Contrasts get verdict words if it was declared, by this call or an equal
    one, before any run had a result.
    """
    scores: dict[str, TaskScores] = {}

    def evaluate_run(run: RunFolder) -> Measured:
        task_scores = evaluate_run_tasks(run, tasks, limit=limit, progress=progress, smallest_effect=smallest_effect)
        scores[run.id] = task_scores
        return Measured(id=run.id, values=task_scores.values(), reused=task_scores.reused)

    measured = over_study(name, store, evaluate_run, count=len(tasks))
    return replace(measured, contrasts=_judged(measured, store, scores, smallest_effect))


DECLARE_FIRST = "no smallest effect was declared before the task was first measured: see --smallest-effect"


def _judged(
    measured: StudyMeasured, store: Store, scores: Mapping[str, TaskScores], smallest_effect: float | None
) -> list[TaskContrast]:
    """The contrasts of a study that are pairs, in every measure that is a mean over questions, as one family."""
    study = store.study(measured.study)
    declared = frozenset[float | None]().union(*(found.declared for found in scores.values()))
    reason = DECLARE_FIRST if declared != {smallest_effect} or smallest_effect is None else ""

    def of_arm(arm: str, task_name: str) -> list[Sequence[float]]:
        return [scores[run].items[task_name] for run in study.arms[arm].runs.values() if run in scores]

    family: list[Scores] = []
    reasons: list[str] = []
    for task_name in dict.fromkeys(name for found in scores.values() for name in found.items):
        for c in measured.verdicts[task_name].contrasts:
            if not {c.arm, c.against} <= study.arms.keys():
                continue  # an effect of a factorial design
            arm, against = of_arm(c.arm, task_name), of_arm(c.against, task_name)
            if arm and against:
                absent = sum(run.arm in (c.arm, c.against) for run in measured.missing)
                why = (c.reason or "") if c.word.startswith(("not comparable", "unstable")) else ""
                reasons.append(why or (f"{absent} runs without a value" if absent else reason))
                family.append((task_name, c.arm, c.against, arm, against))
    return judge_items(family, smallest_effect=smallest_effect, reasons=reasons)


def compare_models(
    first: TaskScores, second: TaskScores, *, smallest_effect: float | None = None
) -> list[TaskContrast]:
    """Two models on the same questions: about other questions only, since each was trained once."""
    family = [
        (name, first.name, second.name, [scores], [second.items[name]])
        for name, scores in first.items.items()
        if name in second.items
    ]
    return judge_items(family, smallest_effect=smallest_effect)


def task_key(choice: Choice, config: Config, limit: int | None) -> str:
    """The key of a task's result: changes with options, documents, limit, context, and all code that it depends on."""
    parts = {
        "task": choice.full(),
        "documents": documents_of(choice, open_task(choice)).identity,
        "limit": limit,
        "block_size": config.model.block_size,
        "code": code_behind(task, choice, SCORING, config),
    }
    return f"task-{choice.name}-{digest(parts)[:16]}"


def _evaluated(
    trained: Trained, choice: Choice, limit: int | None, progress: Progress | None
) -> tuple[TaskResult, dict[str, list[float]]]:
    """The result of a task, and the score of every question by `task/measure`."""
    if trained.tokenizer is None:
        raise ConfigError("its tokenizer is not known, so no text can be put to it", where=trained.name)
    tell = reporter(progress, f"{choice} of {trained.name}")
    tell(0, 0)
    encoded = encode_task(choice, trained.tokenizer, limit=limit)
    answers = answer_task(encoded, trained.model, precision=trained.precision, tell=tell)
    scored = {
        f"{encoded.name}/{measure.name}": [
            measure.of(question, found) for question, found in zip(encoded.questions, answers, strict=True)
        ]
        for measure in encoded.task.measures
        if measure.joined == "mean"
    }
    return task_result(encoded, answers, trained.model.config.block_size), scored


def _record(key: str, choice: Choice, result: TaskResult, limit: int | None, trained: Trained) -> dict[str, object]:
    """The record in the run store."""
    errors = {f"{result.task}/{f.name}_stderr": f.stderr for f in result.figures if f.stderr is not None}
    return {
        **measured_with(key, choice, next(trained.model.parameters()).device),
        "task": choice.name,
        "spec": {"limit": limit, "block_size": trained.model.config.block_size},
        "values": result.values() | errors,
        "result": record(result),
    }


def measure_on_text(
    source: str, store: Store, text: str, metrics: Sequence[Choice], *, progress: Progress | None = None
) -> dict[str, float]:
    """Metrics of the model that `source` names on the validation text of a corpus. text: a corpus by name, or files as
    a pattern.

    Raises ConfigError for a model whose tokenizer was trained on text.
    """
    trained = open_trained(source, store)
    if trained.kept is None or trained.kept.files:
        raise ConfigError(
            "only models with the tokenizer gpt2 or bytes can be measured on other text",
            where=trained.name,
            hint="gpt2lab eval RUN --metric loss, on the run's own text",
        )
    chosen = corpus.read(text if text in corpus else {"name": "text", "paths": [text]})
    config = Config(
        model=trained.model.config,
        data=DataConfig(corpus=chosen, tokenizer=trained.kept.choice),
        training=TrainingConfig(precision=trained.precision),
    )
    tell = reporter(progress, trained.name)
    subject = subject_on(prepare(config.data), trained.model, config, tell=tell)
    return {name: value for choice in metrics for name, value in apply(choice, subject).items()}
