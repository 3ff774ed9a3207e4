"""The Python interface: the commands as functions that return typed results and print nothing.

    import gpt2lab as g
    study = g.run_ablation("ablations/posenc.yaml", scale="nano", seeds=3)
    for contrast in study.verdicts.contrasts:
        print(contrast.verdict)
    study.losses            # a data frame: arm, seed, value
    study.plot("training")  # a figure, in notebooks
    study.report()          # reports/posenc@nano/index.html

Progress is a stream of events (basics/progress.py): pass `on_event=` a function, or `g.show_progress()` for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from gpt2lab.analysis.campaigns import Campaign, campaigns_of, registration
from gpt2lab.analysis.results import collect, final_values, first_runs, load_results, missing_runs
from gpt2lab.analysis.studies import judge
from gpt2lab.basics.progress import Listener, ignore
from gpt2lab.basics.text import clean, damage_text, html_table, plural
from gpt2lab.config import Config, load_config
from gpt2lab.errors import DataFault
from gpt2lab.executors import Executor
from gpt2lab.executors.driver import TrackerFactory
from gpt2lab.experiments import budget_seconds, call, command, only_scale
from gpt2lab.experiments.ablation import Study, TrainedStudy
from gpt2lab.experiments.single import STUDY, Single, error_of
from gpt2lab.planning.ablation import load_ablation, scales_of
from gpt2lab.planning.machine import Machine, probe
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import known_costs
from gpt2lab.records import SweepRecord, best_trial
from gpt2lab.schema import flatten
from gpt2lab.store import Row, RunFolder, Store
from gpt2lab.tracking import open_tracker

if TYPE_CHECKING:
    import pandas as pd

    from gpt2lab.analysis import Verdicts
    from gpt2lab.analysis.results import StudyRun
    from gpt2lab.data.files import Progress as DataProgress
    from gpt2lab.model import GPT
    from gpt2lab.reports.style import Picture
    from gpt2lab.reuse.load import Trained

PROMPTS = ("The king ", "In the morning, ", "What is ")
"""Beginnings that every arm continues for a study's page."""

Source = str | Path | Mapping[str, Any]
"""A YAML file, or a mapping with its content."""


class StudyOptions(TypedDict, total=False):
    """Options of `run_ablation`, `plan` and `open_study`."""

    name: str | None
    """in place of the source's own, for a variant with a record and page of its own"""
    scale: str | None
    """a preset, or the file of one, in place of the source's `base`"""
    seeds: int | Sequence[int] | Literal["auto"] | None
    """how many, or which ones; "auto" takes as many as the noise floor requires"""
    until: Literal["decided"] | None
    """"decided": seeds are added one by one until every contrast is, up to `seeds` (12 unless given) or as many as fit
    into `budget`"""
    arms: Sequence[str] | None
    """only these, the baseline among them"""
    overrides: Sequence[str]
    """`key=value` on top of the preset, for every arm"""
    plugins: Sequence[str | Path]
    """Python files that register components"""
    untuned: bool
    """skip the source's `tune`: every arm trains with its settings as written"""
    campaign: str | None
    """line of research that a source which names none counts in; see analysis/campaigns.py"""
    budget: str | None
    """time to spend, as "6h" or "45m": arms and seeds are chosen to fit"""
    jobs: int | None
    """parallel runs; by default as many as fit on the machine"""
    ranks: int
    """processes that share every run, one per GPU or on CPU cores; runs then train one at a time"""
    machine: Machine | None
    """where runs will execute, if not here"""
    runs: str | Path
    """folder of the run store"""


@dataclass(frozen=True, kw_only=True)
class StudyResult(TrainedStudy):
    """A study that was trained: its record, its runs and its verdicts, which are read and judged at first use."""

    store: Store

    @cached_property
    def verdicts(self) -> Verdicts:
        """Every declared contrast, judged."""
        return judge(self.record, self.store)

    @cached_property
    def runs(self) -> list[StudyRun]:
        """Of every arm and seed, with status and value."""
        return collect(self.record, self.store)

    def __repr__(self) -> str:
        record = self.record
        return f"<Study {record.name}: {plural(len(record.arms), 'arm')}, {plural(len(record.seeds), 'seed')}>"

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(self.name)}</b>: {escape(clean(self.record.question))}</p>{self.verdicts._repr_html_()}"

    @property
    def name(self) -> str:
        """`<ablation>@<scale>`"""
        return self.record.name

    @property
    def losses(self) -> pd.DataFrame:
        """Columns arm, seed, value: the final value of every run, NaN where it diverged."""
        return final_values(self.record, self.store)

    @property
    def missing(self) -> pd.DataFrame:
        """Columns arm, seed, run, status, reason: runs without a final value, and why."""
        return missing_runs(self.record, self.store)

    @property
    def damaged(self) -> dict[str, str]:
        """Run id -> which of its files is damaged, or which data, and what to do: the same call does not mend it."""
        damaged = {run.id: run.reason or "" for run in self.runs if run.status == "damaged"}
        for folder in map(self.store.run, self.failed):
            if folder.id not in damaged and (failure := folder.failure() or {}).get("code") == DataFault.code:
                damaged[folder.id] = damage_text(error_of(failure, folder))
        return damaged

    def frame(self) -> pd.DataFrame:
        """Columns arm, seed, step, metric, value: all that was measured, see `load_results`."""
        return load_results(self.name, self.store.root)

    def plot(self, figure: str = "differences") -> Picture:
        """A figure of the study's page, which notebooks show: such as differences, training, seeds or contexts.

        Raises ConfigError for another name, or where the runs have nothing to draw.
        """
        from gpt2lab.reports.page import figure_of
        from gpt2lab.reports.read import read_study

        return figure_of(read_study(self.name, self.store.root), figure)

    def report(self, out: str | Path = "reports") -> Path:
        """Write the study's page below `out`; -> its index.html."""
        return report(self.name, out=out, runs=self.store.root)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep. `record`: its stored record, with every trial of every search."""

    name: str
    record: SweepRecord
    store: Store

    def __repr__(self) -> str:
        return f"<Sweep {self.name}: {'; '.join(f'{label} {best}' for label, best in self.best.items())}>"

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """Search -> the settings of its best finished trial, by dotted key; without searches in which none finished."""
        best = {
            label: best_trial(search.trials, self.record.direction) for label, search in self.record.searches.items()
        }
        return {label: trial.settings for label, trial in best.items() if trial}

    @property
    def trials(self) -> pd.DataFrame:
        """Columns search, trial, outcome, value, and one for each setting; a row for every trial."""
        import pandas as pd

        return pd.DataFrame(
            {"search": label, "trial": trial.index, "outcome": trial.outcome, "value": trial.value} | trial.settings
            for label, search in self.record.searches.items()
            for trial in search.trials
        )

    def report(self, out: str | Path = "reports") -> Path:
        """Write the sweep's page below `out`; -> its index.html."""
        return report(self.name, out=out, runs=self.store.root)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run."""

    id: str
    seed: int
    folder: RunFolder
    result: Mapping[str, Any]
    """steps, tokens, seconds, tokens_per_second, mfu, peak_memory_bytes, ..."""
    metrics: Mapping[str, float]
    """of its final evaluation: val/loss in nats, val/bits_per_byte, ..."""
    found: bool
    """whether it was already finished, so that nothing was trained"""

    def __repr__(self) -> str:
        return f"<Run {self.id}, seed {self.seed}: {', '.join(f'{k} {v:.4f}' for k, v in self.metrics.items())}>"

    def _repr_html_(self) -> str:
        rows = [*self.metrics.items(), *((k, v) for k, v in self.result.items() if isinstance(v, (int, float, str)))]
        return html_table(("", f"run {self.id}, seed {self.seed}"), rows)

    @property
    def path(self) -> Path:
        return self.folder.path

    def rows(self) -> list[Row]:
        """The journal: {"step", "tokens", "seconds", "metrics"} of every step."""
        return self.folder.rows()

    def load(self) -> Trained:
        """The trained model, in evaluation mode, with its tokenizer."""
        from gpt2lab.reuse.load import open_trained

        return open_trained(str(self.path), Store(self.path.parent))


def open_study(source: Source, *, progress: DataProgress | None = None, **options: Unpack[StudyOptions]) -> Study:
    """Load an ablation, prepare its data and describe the machine, as `plan` and `run_ablation` do first.

    source: a YAML file, or a mapping with its content. progress: callback for the progress of preparing data.
    Raises ConfigError with everything that is wrong.
    """
    scale, overrides, plugins = options.get("scale"), options.get("overrides", ()), options.get("plugins", ())
    seeds, arms, budget, name = options.get("seeds"), options.get("arms"), options.get("budget"), options.get("name")
    campaign, until, untuned = options.get("campaign"), options.get("until"), options.get("untuned", False)
    ablation = load_ablation(
        source, name=name, scale=scale or only_scale(scales_of(source)), overrides=overrides, arms=arms, seeds=seeds,
        until_decided=until == "decided", plugins=plugins, campaign=campaign,
        untuned=untuned,
    )  # fmt: skip
    if isinstance(source, Mapping) or not (seeds is None or isinstance(seeds, (int, str))):
        reproduce = call(
            "run_ablation", source, name=name, scale=scale, seeds=seeds, until=until, arms=arms, budget=budget,
            overrides=overrides, plugins=plugins, untuned=untuned, campaign=campaign,
        )  # fmt: skip
    else:
        reproduce = command(
            "run", source, name=name, scale=scale, seeds=seeds, until=until, arms=",".join(arms) if arms else None,
            budget=budget, set=overrides, untuned=untuned, plugin=plugins, campaign=campaign,
        )  # fmt: skip
    return Study.prepare(
        ablation, Store(options.get("runs", "runs")), jobs=options.get("jobs"), ranks=options.get("ranks", 1),
        machine=options.get("machine"),
        seconds=budget_seconds(budget), progress=progress, reproduce=reproduce,
    )  # fmt: skip


def describe_machine(preset: str | Path = "nano", *, jobs: int | None = None, runs: str | Path = "runs") -> Machine:
    """The description of this machine for plans, with its speed for models like the preset's, for `plan(...,
    machine=...)` on another machine. Raises ConfigError when so many jobs do not fit."""
    config = load_config(preset)
    return probe(Store(runs), config.training, known_costs(config).flops_per_token, jobs)


def plan(source: Source, **options: Unpack[StudyOptions]) -> Plan:
    """The plan of an ablation with its costs, given the finished runs. Raises ConfigError."""
    return open_study(source, **options).plan()


def run_ablation(
    source: Source,
    *,
    tracking: bool = True,
    on_event: Listener = ignore,
    executor: Executor | None = None,
    **options: Unpack[StudyOptions],
) -> StudyResult:
    """Train the unfinished runs of an ablation at one scale, and judge it; of a screen with `confirm`, then the study
    that confirms it, whose result is returned. Options: those of `StudyOptions`, and

    tracking: whether runs are logged to MLflow, at MLFLOW_TRACKING_URI or in the store's folder.
    on_event: callback for messages and progress while runs train.
    executor: where runs execute; processes of this machine by default.

    A failed run does not affect the others (see `failed`). Raises ConfigError, DataFault, EnvironmentFault; Preempted
    when stopped by a signal, with everything saved: the same call continues.
    """
    study = open_study(source, **options)
    result = train_study(study, tracking=tracking, on_event=on_event, executor=executor)
    following = study.confirmation()
    return train_study(following, tracking=tracking, on_event=on_event, executor=executor) if following else result


def train_study(
    study: Study, *, tracking: bool = True, on_event: Listener = ignore, executor: Executor | None = None
) -> StudyResult:
    """Train an opened study to its end, and judge it. Raises what `run_ablation` does."""
    tracker = tracker_of(study.store, study.ablation.name) if tracking else None
    outcome = study.train(on_event=on_event, tracker=tracker, executor=executor)
    return StudyResult(**vars(outcome), store=study.store)


def load_study(name: str, runs: str | Path = "runs") -> StudyResult:
    """A recorded study, as `posenc` or `posenc@nano`, without training anything. Raises ConfigError, DataFault."""
    store = Store(runs)
    record = store.study(name)
    return StudyResult(record=record, endings={}, found=sum(len(arm.runs) for arm in record.arms.values()), store=store)


def studies(runs: str | Path = "runs") -> list[StudyResult]:
    """Every study in the store, by name."""
    return [load_study(name, runs) for name in Store(runs).studies()]


def campaigns(runs: str | Path = "runs") -> dict[str, Campaign]:
    """Every campaign of the store by name, with all of its hypotheses; "" for studies that name none."""
    return campaigns_of(Store(runs))


def register(name: str, runs: str | Path = "runs") -> dict[str, str]:
    """A line for a public place, as `line`, that shows when a study was declared; and its parts: study, declaration,
    at, head. Raises ConfigError, DataFault."""
    store = Store(runs)
    return registration(store.study(name), store)


def load_model(path: str | Path) -> GPT:
    """The model of a run's folder, such as runs/ID, or of one that `save_model` wrote, in evaluation mode. Plug-ins
    that it needs must be loaded before. Raises ConfigError, DataFault."""
    if (Path(path) / "run.json").is_file():
        from gpt2lab.reuse.load import open_trained

        return open_trained(str(path), Store(Path(path).parent)).model
    from gpt2lab.pretrained.native import load_model as load_saved

    return load_saved(path)


class Difference(dict[str, tuple[Any, Any]]):
    """Dotted key -> its value in either config, of the keys in which they differ."""

    def __repr__(self) -> str:
        return "; ".join(f"{key}: {one} -> {other}" for key, (one, other) in self.items()) or "no difference"

    def _repr_html_(self) -> str:
        return html_table(("setting", "first", "second"), [(key, *values) for key, values in self.items()])


def difference(one: Config, other: Config) -> Difference:
    """The settings in which two configs differ."""
    first, second = (flatten(config.tree()) for config in (one, other))
    keys = dict.fromkeys([*first, *second])
    return Difference({k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)})


def train(
    config: str | Path | Config,
    *,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    ranks: int = 1,
    runs: str | Path = "runs",
    tracking: bool = True,
    on_event: Listener = ignore,
    executor: Executor | None = None,
) -> RunResult:
    """Train one run, unless it is finished.

    config: a preset's name, a YAML file, or a config made in Python. seed: in place of the config's. ranks: processes
    that share every batch. The others as for `run_ablation`.
    Raises ConfigError; LockHeld; NumericsFault when it diverged; RankLost; Preempted when stopped, with everything
    saved.
    """
    single = Single.prepare(config, Store(runs), seed=seed, overrides=overrides, plugins=plugins, ranks=ranks)
    was_finished = single.is_finished
    if was_finished:
        single.refuse_divergence()
    else:
        single.train(
            on_event=on_event, tracker=tracker_of(single.store, STUDY) if tracking else None, executor=executor
        )
    return RunResult(
        id=single.run.id,
        seed=single.run.seed,
        folder=single.folder,
        result=single.folder.result() or {},
        metrics=single.metrics,
        found=was_finished,
    )


def run_sweep(
    source: Source,
    *,
    name: str | None = None,
    scale: str | None = None,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    budget: str | None = None,
    jobs: int | None = None,
    ranks: int = 1,
    storage: str | None = None,
    runs: str | Path = "runs",
    tracking: bool = True,
    on_event: Listener = ignore,
    executor: Executor | None = None,
) -> SweepResult:
    """Search for the best settings at one scale, until every trial has ended.

    source: a YAML file, or a mapping with its content. trials: total number, in place of the source's. budget: start no
    trial after that time, as "6h". ranks: per run. storage: of Optuna, as sqlite:////abs/optuna.db,
    journal:/shared/optuna.log or postgresql://user@host/db; by default in the folder of the runs. With an `executor`,
    `jobs` trials are at work at a time. Other arguments and errors as for `run_ablation`.
    """
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.sweep.drive import run_searches

    sweep = SweepPlan.prepare(
        source, Store(runs), name=name, scale=scale, trials=trials, overrides=overrides, plugins=plugins,
        budget=budget, jobs=None if executor else jobs, ranks=ranks,
        machine_like=lambda machine: replace(machine, jobs=jobs or machine.jobs) if executor else machine,
    )  # fmt: skip
    tracker = tracker_of(sweep.store, sweep.loaded.declared.sweep) if tracking else None
    record = run_searches(
        sweep.searches, sweep.record, sweep.store, on_event=on_event, tracker=tracker, storage=storage,
        executor=executor,
    )  # fmt: skip
    return SweepResult(name=record.name, record=record, store=sweep.store)


def report(
    name: str, *, out: str | Path = "reports", runs: str | Path = "runs", force_exploratory: bool = False,
    images: bool = False,
) -> Path:  # fmt: skip
    """Write the page of a study or sweep below `out`, from the store only; -> its index.html.

    name: as `posenc`, or `posenc@nano` where it was run at several scales. force_exploratory: report numbers of arms
    that are not comparable, as exploratory. images: write figures as PNG and PDF too. Raises ConfigError for an
    unknown name, DataFault.
    """
    from gpt2lab.reports.write import write_page_of

    return write_page_of(name, Store(runs), out, force_exploratory=force_exploratory, images=images)


def write_samples(name: str, *, runs: str | Path = "runs", tokens: int = 100) -> None:
    """Let the first finished run of every arm continue the same prompts, with the same random numbers, and keep the
    texts with the run, for the study's page. Raises ConfigError for an unknown study, DataFault."""
    from gpt2lab.generation import Sampling
    from gpt2lab.reuse.load import open_trained

    store = Store(runs)
    for run in first_runs(collect(store.study(name), store)).values():
        texts = open_trained(run.id, store).continued(PROMPTS, Sampling(max_new_tokens=tokens, temperature=0.8))
        store.run(run.id).write_samples(dict(zip(PROMPTS, texts, strict=True)))


def tracker_of(store: Store, experiment: str) -> TrackerFactory:
    """A factory of the tracker of a study or sweep: the one that GPT2LAB_TRACKER names, else MLflow at
    MLFLOW_TRACKING_URI or in the store's folder."""
    return lambda: open_tracker(store.root, experiment)
