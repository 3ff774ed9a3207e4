"""What is recorded about studies and sweeps: typed and frozen; gpt2lab.store reads and writes the files.

    runs/studies/<ablation>@<scale>.json    StudyRecord
    runs/sweeps/<sweep>@<scale>.json        SweepRecord

Records are read by reports, trackers and later plans, so their fields are the contract between them. Fields that older
records lack have defaults here; fields that a newer version added are kept. A field with an alias has that name in the
file, and by key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2lab.errors import DataFault

FORMAT = 2
"""Of study records. 1: before arms had settings and records a history."""
SWEEP_FORMAT = 1
"""Of sweep records."""
NUMBERED = "#"
"""Between the name of a record that was replaced and its number."""
SINGLE = "one run"
"""Design of the records of single runs."""

Outcome = Literal["waiting", "running", "finished", "pruned", "diverged", "failed"]
"""Of a trial. Those after the first two are final."""

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Plain data with named fields. Reading checks types, so that a damaged file is found where it is read."""

    model_config = ConfigDict(
        frozen=True, extra="allow", protected_namespaces=(), validate_by_name=True, validate_by_alias=True,
        ser_json_inf_nan="constants",
    )  # fmt: skip

    @classmethod
    def read(cls: type[R], data: Mapping[str, Any], where: str) -> R:
        """From JSON's data. Raises DataFault, naming the first field that is missing or of another type."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _damaged(error, where) from None

    @classmethod
    def check(cls, data: Mapping[str, Any], where: str) -> None:
        """Whether JSON's data can be used as it is. Raises DataFault as `read`, also for types that `read` converts."""
        try:
            cls.model_validate(data, strict=True)
        except ValidationError as error:
            raise _damaged(error, where) from None

    def plain(self) -> dict[str, Any]:
        """As JSON's data."""
        return self.model_dump(mode="json", by_alias=True)

    def with_(self: R, **fields: Any) -> R:
        """A copy with other values in some fields."""
        return self.model_copy(update=fields)

    if not TYPE_CHECKING:  # reading by key, for notebooks; the package itself uses fields, which mypy checks

        @classmethod
        def _fields(cls) -> dict[str, str]:
            """Key -> attribute."""
            return {field.alias or name: name for name, field in cls.model_fields.items()}

        def __getitem__(self, key: str) -> Any:
            try:
                return getattr(self, self._fields().get(key, key))
            except AttributeError:
                raise KeyError(key) from None

        def get(self, key: str, default: Any = None) -> Any:
            try:
                return self[key]
            except KeyError:
                return default

        def __contains__(self, key: object) -> bool:
            return key in self._fields() or key in (self.model_extra or {})

        def keys(self) -> Iterator[str]:
            yield from self._fields()
            yield from self.model_extra or {}


def _damaged(error: ValidationError, where: str) -> DataFault:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return DataFault(f"the record is damaged: {field}: {first['msg'].lower()}", where=where)


Numbers = dict[str, float | None]


class IdentityRecord(Record):
    """A run's run.json, as far as it is read."""

    id: str | None = None
    seed: int | None = None
    repeat: int | None = None
    identity: dict[str, Any] = Field(default_factory=dict)
    created: str | None = None
    adopted_from: str | None = None


class ResultRecord(Record):
    """A run's result.json, as far as it is read."""

    status: Literal["finished", "diverged"]
    reason: str | None = None
    evaluation: str | None = None
    """key of the evaluation that its last values are from"""
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    time: Numbers = Field(default_factory=dict)
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    mfu: float | None = None
    peak_memory_bytes: float | None = None
    skipped_steps: int | None = None
    spikes: list[Any] = Field(default_factory=list)
    stack: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    metrics: Numbers = Field(default_factory=dict)
    divergence: dict[str, Any] | None = None
    finished_at: str | None = None


class EvaluationRecord(Record):
    """One file of a run's evaluations, as far as it is read."""

    key: str | None = None
    spec: dict[str, Any] = Field(default_factory=dict)
    metrics: Numbers = Field(default_factory=dict)
    contexts: Numbers = Field(default_factory=dict)
    values: Numbers = Field(default_factory=dict)
    measured_at: str | None = None


class RateTrial(Record):
    """One learning rate that was tried for an arm: `factor` times its own."""

    factor: float
    lr: float
    run: str
    seed: int


class Bracket(Record):
    """The search for an arm's learning rate. `best`: the factor with the lowest loss, once all trials are done."""

    trials: list[RateTrial]
    best: float | None = None
    at_edge: bool = False


class Tuned(Record):
    """The search for an arm's settings: where it is recorded, what it found, and how its trials ended."""

    sweep: str
    label: str
    study: str
    over: bool
    settings: dict[str, Any] | None = None
    value: float | None = None
    edge: dict[str, Any] = Field(default_factory=dict)
    trials: int = 0
    finished: int = 0
    pruned: int = 0
    diverged: int = 0
    failed: int = 0


class Shared(Record):
    """An arm's settings as written, where a search may have found others, with its runs by seed at them."""

    settings: dict[str, Any]
    lr: float
    runs: dict[str, str] = Field(default_factory=dict)


class BudgetPoint(Record):
    """Runs of an arm at another budget: `budget` times its tokens."""

    budget: float
    tokens: int
    runs: dict[str, str]


class ArmRecord(Record):
    """One arm: what it changes, its runs by seed, and what they cost."""

    changes: dict[str, Any] = Field(default_factory=dict)
    """as the file declares them, by dotted key"""
    control: bool = False
    expected: str | None = None
    settings: str | None = None
    """hash of all that the arm trains with, whatever the code"""
    components: dict[str, str] = Field(default_factory=dict)
    """slot -> component"""
    runs: dict[str, str] = Field(default_factory=dict)
    """seed -> run id; empty while settings are being searched for"""
    bracket: Bracket | None = None
    tuned: Tuned | None = None
    shared: Shared | None = None
    curve: list[BudgetPoint] = Field(default_factory=list)
    lr: float | None = None
    tokens: int = 0
    """of one run"""
    adjustment: str | None = None
    """how the arm was made equal to the others, in words"""
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    active_parameters: int | None = None
    flops_per_token: float = 0.0
    exploratory: str | None = None
    """why its contrasts may claim nothing"""
    moves_rate: dict[str, str] = Field(default_factory=dict)
    """settings that move the best learning rate, as JSON, where they are not the baseline's; none where every arm has a
    rate of its own"""
    not_comparable: str | None = None
    """why it cannot be compared"""


class Effect(Record):
    """A contrast of more than two arms: the weights of an effect, by name."""

    arm: str
    against: str
    weights: dict[str, float]


class Evaluation(Record):
    """How final values are measured; `key` names the measurement in each run's evaluations."""

    key: str
    tokens: int | Literal["all"] | None = None
    contexts: list[float] = Field(default_factory=list)
    block_size: int | None = None
    context_tokens: int | None = None


class NoiseFloor(Record):
    """The measured noise of the scale that a study was planned with; sd in nats."""

    scale: str
    sd: float
    low: float
    high: float
    df: float
    failed: int = 0
    created: str = ""
    tokens: int | None = None
    runs: int
    stack: dict[str, Any] = Field(default_factory=dict)


class ScopeRecord(Record):
    """What results hold for."""

    preset: str | None = None
    parameters: int | None = None
    tokens: int | None = None
    data: str | None = None
    optimizer: str | None = None


class Earlier(Record):
    """A declaration under the same name that was in force before, and the seeds that had results when it was replaced.
    Fields are None in records from before they were remembered."""

    hash: str | None = None
    created: str | None = None
    reproduce: str | None = None
    seeds: list[int] | None = None
    baseline_seeds: int | None = None
    looks: list[int] | None = None
    contrasts: list[list[str] | Effect] | None = None
    smallest_effect: float | None = None
    alpha: float | None = None
    judged_contexts: list[float] | None = None
    arms: dict[str, str | None] | list[str] = Field(default_factory=dict)
    """name -> hash of its settings; names alone in records from before those were remembered"""
    finished: list[int] = Field(default_factory=list)


class History(Record):
    """What earlier declarations with results mean for this one (planning/history.py)."""

    looks: list[int]
    first_seeds: int
    first_baseline: int | None = None
    undeclared: str | None = None
    """why nothing can be claimed"""
    late: list[list[str]] = Field(default_factory=list)
    """contrasts of which alone nothing can be claimed"""
    late_contexts: list[float] = Field(default_factory=list)
    """judged contexts of which nothing can be claimed, for the same reason"""
    dropped: list[list[str]] = Field(default_factory=list)
    """contrasts that were left out and still count in the family"""
    smallest_effect: float
    alpha: float
    changed: list[str] = Field(default_factory=list)
    """what is to be said of all that, in sentences"""


class Screened(Record):
    """The screen that a study confirms, by its record's name and hash, with all of its arms and seeds."""

    study: str
    declaration: str
    arms: list[str]
    seeds: list[int]


class StudyRecord(Record):
    """A study: what an ablation at one scale declared before its first run, the runs that this means on its code and
    machine, and what searches and looks found so far. `hash` is that of what was declared."""

    format: int = 1
    name: str
    """`<ablation>@<scale>`"""
    ablation: str
    scale: str
    question: str
    design: str = "one factor"
    factors: dict[str, list[str]] = Field(default_factory=dict)
    expected: dict[str, str] = Field(default_factory=dict)
    baseline: str
    arms: dict[str, ArmRecord]
    contrasts: list[list[str] | Effect]
    """pairs (arm, against), or effects of several arms"""
    seeds: list[int]
    baseline_seeds: int | None = None
    looks: list[int] = Field(default_factory=list)
    lr_bracket: list[float] = Field(default_factory=list)
    budgets: list[float] = Field(default_factory=list)
    tune: dict[str, Any] | None = None
    metric: str = "val/loss"
    smallest_effect: float
    alpha: float
    equalise: str = "tokens"
    equalise_by: str | None = None
    tokens_per_parameter: float | None = None
    screen: bool = False
    confirm: dict[str, int] | None = None
    """of a screen: how many of its best arms are judged on how many fresh seeds, in a study of their own"""
    screened: Screened | None = None
    """the screen whose best arms these are"""
    evaluation: Evaluation
    validation_text: str | None = None
    """sha256 of the validation text, where arms have data of their own and this text in common"""
    judged_contexts: list[float] = Field(default_factory=list)
    """multiples of the training context at which every arm is judged against itself at that context"""
    bracketed: bool = False
    floors: dict[str, float] | None = None
    """losses of counting single tokens (`unigram`) and pairs (`bigram`) on this text"""
    noise: NoiseFloor | None = None
    noise_command: str = ""
    """measures the noise floor of its baseline's recipe"""
    left_out: list[str] = Field(default_factory=list)
    """what a time budget had no room for"""
    scope: ScopeRecord = Field(default_factory=ScopeRecord)
    caveat: str | None = None
    mistakes: dict[str, list[str]] = Field(default_factory=dict)
    """arm -> its components that are mistakes made on purpose"""
    reproduce: str = ""
    stack: dict[str, Any] = Field(default_factory=dict)
    created: str = ""
    hash: str = ""
    campaign: str = ""
    """the line of research that its hypotheses count in; "" for all studies of the store that name none"""
    ledger: str = ""
    """hash of the line of its declaration in the ledger; "" in records from before there was one"""
    earlier: list[Earlier] = Field(default_factory=list)
    history: History | None = None
    undeclared_look: str | None = None

    def replaces(self, before: StudyRecord) -> bool:
        """Whether what `before` says would be lost with it: it was declared otherwise, or another run has the place of
        one of its runs, because code or machine have changed. Single runs of a scale share a record that only grows."""
        both = [(self.arms[name].runs, arm.runs) for name, arm in before.arms.items() if name in self.arms]
        other_runs = any(now.get(seed, run) != run for now, then in both for seed, run in then.items())
        return other_runs or (self.design != SINGLE and self.hash != before.hash)


def replacing(name: str, kept: str) -> str:
    """What the user must know before a record takes the place of another one."""
    return (
        f"{name} was declared otherwise before, or its code has changed: what was there stays as {kept}; "
        "--name NAME would give this one a record and page of its own"
    )


class DimensionRecord(Record):
    """One setting that is searched for. Numbers from `low` to `high`, or one of `choices`; `when`: the values of other
    settings without which it means nothing."""

    name: str
    kind: Literal["float", "int", "categorical"]
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: list[Any] | None = None
    when: dict[str, Any] | None = None


class TrialRecord(Record):
    """One trial of a search, as its latest attempt left it."""

    index: int = Field(alias="slot")
    number: int | None = None
    """of the attempt, in Optuna's storage"""
    outcome: Outcome
    reason: str | None = None
    """why it diverged, failed or was lost"""
    settings: dict[str, Any]
    value: float | None = None
    """mean over its seeds, once it is finished"""
    values: dict[str, float] = Field(default_factory=dict)
    """seed -> value"""
    runs: dict[str, str] = Field(default_factory=dict)
    """seed -> run id"""
    tokens: int = 0
    found: bool = False
    """whether all its runs were finished before"""
    curve: list[tuple[int, int, float | None]] = Field(default_factory=list)
    """(step, tokens, value) of the first run, as the pruner saw them"""
    stopped_at: int | None = None
    """step at which it was pruned"""
    enqueued: bool = False
    """whether its settings were given by the file"""
    retries: int = 0
    worker: str | None = None
    started: str | None = None
    ended: str | None = None

    @property
    def result(self) -> float:
        """Its value if it is finished, else NaN."""
        return self.value if self.outcome == "finished" and self.value is not None else math.nan


def ranked_trials(trials: Iterable[TrialRecord], direction: str = "minimize") -> list[TrialRecord]:
    """The finished trials with a value, the best first; of equal ones, that with the lowest index."""
    sign = -1.0 if direction == "maximize" else 1.0
    finished = [trial for trial in trials if math.isfinite(trial.result)]
    return sorted(finished, key=lambda trial: (sign * trial.result, trial.index))


def best_trial(trials: Iterable[TrialRecord], direction: str = "minimize") -> TrialRecord | None:
    """The first of `ranked_trials`; None where none is finished."""
    return next(iter(ranked_trials(trials, direction)), None)


class Importance(Record):
    """How much each setting decided; shares of one."""

    method: str
    values: dict[str, float | None]


class SearchRecord(Record):
    """One search of a sweep. `study`: its name in Optuna's storage; `count`: the number of trials in all."""

    study: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    """what the config itself has where settings are searched"""
    seeds: list[int] = Field(default_factory=list)
    count: int | None = Field(default=None, alias="slots")
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    flops_per_token: float | None = None
    tokens: int = 0
    """of one run"""
    steps: int = 0
    components: dict[str, str] = Field(default_factory=dict)
    optimizer: str | None = None
    space: list[DimensionRecord] = Field(default_factory=list)
    importance: Importance | None = None
    best_config: dict[str, Any] | None = None
    """the best trial's config, over the preset"""
    trials: list[TrialRecord]


class SweepRecord(Record):
    """A sweep at one scale: what was declared, and every trial as far as it has come. `hash` is that of what was
    declared, whatever the number of trials."""

    format: int = 1
    name: str
    """`<sweep>@<scale>`"""
    sweep: str
    scale: str
    question: str = ""
    part_of: str | None = None
    """the study whose arms are tuned"""
    metric: str = "val/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int
    """of each search, at most"""
    seeds: list[int] = Field(default_factory=list)
    sampler: dict[str, Any] = Field(default_factory=dict)
    pruner: dict[str, Any] | None = None
    max_failures: int | None = None
    time_budget: float | None = None
    smallest_effect: float | None = None
    evaluation: Evaluation
    floors: dict[str, float] | None = None
    noise: NoiseFloor | None = None
    scope: ScopeRecord = Field(default_factory=ScopeRecord)
    caveat: str | None = None
    reproduce: str = ""
    stack: dict[str, Any] = Field(default_factory=dict)
    stopped: str | None = None
    """why no more trials are started"""
    storage: str | None = None
    """address of Optuna's storage, without a password"""
    searches: dict[str, SearchRecord]
    created: str = ""
    updated: str = ""
    hash: str = ""

    def replaces(self, before: SweepRecord) -> bool:
        """Whether results of `before` would be lost with it: it has trials of searches that are not in this record."""
        known = {search.study for search in self.searches.values()}
        return any(search.study not in known and search.trials for search in before.searches.values())


def page_folder(out: str | Path, name: str) -> Path:
    """Where the page of a study or sweep lies: `posenc@nano~1` for `posenc@nano#1`, since # ends an address."""
    return Path(out) / name.replace(NUMBERED, "~")


def labelled_runs(arms: Mapping[str, ArmRecord]) -> Iterator[tuple[str, str, str]]:
    """(arm, seed, run id) of every run of a study. The seed has, as text behind it, the learning rate's or budget's
    multiple for runs that are there to find a rate or a curve, and `shared` for those at the settings as written of an
    arm that was tuned."""
    for name, arm in arms.items():
        yield from ((name, seed, run) for seed, run in arm.runs.items())
        for trial in arm.bracket.trials if arm.bracket else ():
            yield name, f"{trial.seed} lr x{trial.factor:g}", trial.run
        shared = arm.shared.runs if arm.shared else {}
        yield from ((name, f"{seed} shared", run) for seed, run in shared.items() if run != arm.runs.get(seed))
        for point in arm.curve:
            yield from ((name, f"{seed} {point.budget:g}x", run) for seed, run in point.runs.items())


def run_ids(record: StudyRecord | SweepRecord) -> list[str]:
    """Every run that a record names, once: those that are judged, tried and measured on the way."""
    if isinstance(record, SweepRecord):
        trials = [trial for search in record.searches.values() for trial in search.trials]
        return list(dict.fromkeys(run for trial in trials for run in trial.runs.values()))
    return list(dict.fromkeys(run for _, _, run in labelled_runs(record.arms)))
