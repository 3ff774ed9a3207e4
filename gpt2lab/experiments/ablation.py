"""One ablation at one scale: its plan at every stage, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from gpt2lab.analysis import campaigns
from gpt2lab.analysis.metric_names import reading
from gpt2lab.analysis.results import collect
from gpt2lab.analysis.studies import judge
from gpt2lab.basics.progress import Listener, Message, RunProgress, ignore
from gpt2lab.basics.text import plural
from gpt2lab.data.files import Progress as DataProgress
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import prepare
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.evaluation.tasks import fetch_documents
from gpt2lab.executors import Ending, Executor
from gpt2lab.executors.driver import Driver, TrackerFactory, executor_for
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.executors.submitted import with_copy
from gpt2lab.planning.ablation import Arm, LoadedAblation
from gpt2lab.planning.declaration import seed_list, variant_name
from gpt2lab.planning.machine import Machine, check_ranks, probe
from gpt2lab.planning.plan import Plan, make_plan
from gpt2lab.planning.record import study_record, with_history
from gpt2lab.planning.runs import Run, is_finished, known_costs, tokens_of
from gpt2lab.records import Screened, StudyRecord, replacing
from gpt2lab.reuse.adopt import Adoption, ReplayGroup, adopt, groups, without_old_runs
from gpt2lab.reuse.why import keep_sources
from gpt2lab.runner import Job
from gpt2lab.runner.job import job_for
from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class TrainedStudy:
    """The outcome of training a study."""

    record: StudyRecord
    endings: Mapping[str, Ending]
    """run id -> how it ended, of the runs trained by this call"""
    found: int
    """number of runs that were already finished"""

    @property
    def failed(self) -> list[str]:
        """Ids of runs that failed; the same call retries them."""
        return [run for run, ending in self.endings.items() if ending not in ("done", "found")]


@dataclass
class Study:
    """An ablation over prepared data, on one machine, in one store.

    A study is planned and trained in stages: the tuning of each arm, if any, then the runs at the tuned settings, then
    the seeds of the next look. Each stage's plan follows from the finished runs.

    seconds: a budget; the arms and seeds of the first plan are kept, however long runs take.
    reproduce: the command or call that repeats the study, for its record.
    """

    ablation: LoadedAblation
    store: Store
    machine: Machine
    data: Prepared
    seconds: float | None = None
    reproduce: str = ""
    _first: Plan | None = field(default=None, init=False)

    @classmethod
    def prepare(
        cls,
        ablation: LoadedAblation,
        store: Store,
        *,
        jobs: int | None = None,
        ranks: int = 1,
        machine: Machine | None = None,
        seconds: float | None = None,
        progress: DataProgress | None = None,
        reproduce: str = "",
    ) -> Study:
        """Prepare the data, once for all arms, and describe this machine unless another `machine` is given. Raises
        ConfigError when so many jobs or ranks do not fit on the machine, DataFault, EnvironmentFault."""
        baseline = ablation.arms[ablation.baseline].config
        for arm in ablation.arms.values():
            check_ranks(arm.config, ranks, 1 if machine else ranks)
        data = prepare(baseline.data, progress=progress)
        ablation = replace(ablation, arms=with_own_data(ablation, data, progress))
        fetch_documents({name for arm in ablation.arms.values() for name in arm.config.evaluation.tasks})
        flops = known_costs(baseline).flops_per_token
        machine = machine.with_ranks(ranks) if machine else probe(store, baseline.training, flops, jobs, ranks)
        return cls(ablation, store, machine, data, seconds, reproduce)

    @property
    def name(self) -> str:
        return f"{self.ablation.name}@{self.ablation.scale}"

    def confirmation(self) -> Study | None:
        """The study that this screen declares to follow it; None before its end, or where none is declared."""
        following = confirmation(self.ablation, self.store)
        return None if following is None else replace(self, ablation=following)

    def plan(self, due: Mapping[str, int] | None = None) -> Plan:
        """The plan given the finished runs. due: seeds of each arm, where looks are declared; those of the first look
        by default. Raises ConfigError."""
        if self._first is None:
            begun = self._begun_one_by_one()
            self._first = self._make(begun or self.ablation, due, None if begun else self.seconds)
            return self._first
        chosen = replace(
            self.ablation,
            arms={name: self.ablation.arms[name] for name in self._first.arms},
            seeds=self._first.seeds,
            contrasts=self._first.ablation.contrasts,
            baseline_seeds=self._first.ablation.baseline_seeds,
            looks=self._first.ablation.looks,
        )
        return replace(self._make(chosen, due, None), left_out=self._first.left_out)

    def _begun_one_by_one(self) -> LoadedAblation | None:
        """Where seeds are added until contrasts are decided and the study was declared so before: with the arms and the
        most seeds of that declaration, which a budget chose by what a run seemed to take then."""
        if not self.ablation.until_decided or self.name not in self.store.studies():
            return None
        before, fewest = self.store.study(self.name), self.ablation.looks[0]
        same = [seed for seed in before.seeds if seed in (self.ablation.seeds or ())] == list(before.seeds)
        if not same or list(before.looks or ()) != list(range(fewest, len(before.seeds) + 1)):
            return None
        arms = {name: arm for name, arm in self.ablation.arms.items() if name in before.arms}
        contrasts = tuple(c for c in self.ablation.contrasts if c.weights.keys() <= arms.keys())
        return replace(self.ablation, arms=arms, seeds=tuple(before.seeds), looks=tuple(before.looks or ()),
                       contrasts=contrasts)  # fmt: skip

    def replaces(self, plan: Plan) -> str | None:
        """The name under which the study's present record will stay when `plan` is trained; None without one that
        differs."""
        return self.store.replaced_by(study_record(plan, reproduce=self.reproduce))

    def new_hypotheses(self, plan: Plan) -> tuple[list[int], str]:
        """What `plan` would add to its campaign: numbers of hypotheses, and a sentence, "" for none."""
        record = study_record(plan, reproduce=self.reproduce)
        numbers = campaigns.new_hypotheses(record, self.store)
        return numbers, campaigns.counted(record, numbers)

    def plan_of_all(self) -> Plan:
        """The plan up to the last declared look."""
        plan = self.plan()
        return self.plan(dict.fromkeys(plan.arms, plan.ablation.looks[-1])) if plan.ablation.looks else plan

    def _make(self, ablation: LoadedAblation, due: Mapping[str, int] | None, seconds: float | None) -> Plan:
        return make_plan(ablation, self.data, self.store, self.machine, seeds_now=due, seconds=seconds)

    def train(
        self,
        *,
        on_event: Listener = ignore,
        tracker: TrackerFactory | None = None,
        executor: Executor | None = None,
    ) -> TrainedStudy:
        """Write the study's record, train the unfinished runs, and follow them, stage by stage.

        executor: where runs execute; processes of this machine by default. A failed run does not affect the others; the
        next call retries it. Raises Preempted when stopped, with everything saved.
        """
        due: dict[str, int] | None = None
        endings: dict[str, Ending] = {}
        finished_before: set[str] = set()
        searched = False
        while True:
            plan, record = self._record(due, on_event)
            if plan.searches and not searched:  # once: a search that is still open afterwards has failed
                self._search(plan, on_event, tracker, executor)
                searched = True
                continue
            runs = plan.runs()
            pending = [run for run in runs if not is_finished(run, self.store)]
            finished_before |= {run.id for run in runs} - {run.id for run in pending} - endings.keys()
            endings |= self._train(plan, runs, pending, record, on_event, tracker, executor)
            failed = any(endings.get(run.id, "done") not in ("done", "found") for run in runs)
            if plan.tuning and not plan.searches and not failed:
                continue
            due = None if failed or plan.tuning else more_seeds(record, self.store, plan)
            if due is None:
                self._conclude(record)
                foreign = [run for run, ending in endings.items() if ending == "found"]
                trained: dict[str, Ending] = {run: ending for run, ending in endings.items() if ending != "found"}
                return TrainedStudy(record=record, endings=trained, found=len(finished_before) + len(foreign))

    def declare(self, on_event: Listener = ignore) -> list[Job]:
        """Write the study's record and the job.json of every unfinished run of its present stage, for workers; -> those
        jobs. None are left when the study is at its end. Raises ConfigError for a study with searches, whose trials
        follow from each other."""
        due: dict[str, int] | None = None
        while True:
            if self.plan().searches:
                hint = "--executor slurm or ray, or none: then the command itself hands out one trial after another"
                raise ConfigError("its arms are tuned first, trial after trial", where=self.name, hint=hint)
            plan, record = self._record(due, on_event)
            pending = [run for run in plan.runs() if not is_finished(run, self.store)]
            jobs = [with_copy(job_of(run, self.store, plan)) for run in longest_first(pending, plan)]
            for job in jobs:
                job.write()
            due = None if jobs or plan.tuning else more_seeds(record, self.store, plan)
            if due is None:
                if not jobs:
                    self._conclude(record)
                return jobs

    def _record(self, due: Mapping[str, int] | None, on_event: Listener) -> tuple[Plan, StudyRecord]:
        """The plan of the present stage, with its record, which is written."""
        plan = self.plan(due)
        record = with_history(study_record(plan, reproduce=self.reproduce), self.store)
        if kept := self.store.replaced_by(record):
            on_event(Message(replacing(self.name, kept)))
        record, problems = campaigns.declare(record, self.store)
        if problems:
            on_event(Message(f"the ledger of this store is damaged: {problems[0]}; see gpt2lab ledger"))
        self.store.write_study(record)
        keep_sources((arm.arm.config for arm in plan.arms.values()), self.store)
        return plan, record

    def _conclude(self, record: StudyRecord) -> None:
        """Write what came out into the ledger."""
        if record.contrasts:
            campaigns.conclude(record, judge(record, self.store), self.store)

    def _search(
        self, plan: Plan, on_event: Listener, tracker: TrackerFactory | None, executor: Executor | None
    ) -> None:
        """Run the searches of all arms to their end, in parallel."""
        from gpt2lab.sweep.declaration import sweep_record
        from gpt2lab.sweep.drive import run_searches  # Optuna is slow to import, and few studies need it

        ablation, baseline = plan.ablation, plan.baseline
        assert ablation.tune is not None
        record = sweep_record(
            sweep=ablation.name, scale=ablation.scale, part_of=self.name,
            question=f"Which settings suit each arm best? {ablation.question}", settings=ablation.tune,
            config=baseline.arm.config, costs=baseline.costs, data=plan.data, machine=plan.machine, floor=plan.floor,
            smallest_effect=ablation.smallest_effect, reproduce=self.reproduce,
        )  # fmt: skip
        run_searches(plan.searches, record, self.store, on_event=on_event, tracker=tracker, executor=executor)

    def _train(
        self, plan: Plan, runs: Sequence[Run], todo: Sequence[Run], record: StudyRecord, on_event: Listener,
        tracker: TrackerFactory | None, executor: Executor | None,
    ) -> dict[str, Ending]:  # fmt: skip
        """One stage: train `todo` and follow all of `runs`."""
        title = f"{self.name}: {plan.ablation.question}"
        progress = {run.id: RunProgress(run.arm, label(run, plan), run.id, run.config.training.steps) for run in runs}
        by_id = {run.id: run for run in todo}
        executor = executor or executor_for(plan.machine)
        with Driver(self.store, record, title, executor.capacity, on_event, tracker, progress=progress) as driver:
            scheduler = Scheduler(executor, driver.tick, lambda run_id: is_finished(by_id[run_id], self.store))
            endings = scheduler.run([job_of(run, self.store, plan) for run in longest_first(todo, plan)])
            driver.tick()
            return endings


def confirmation(screen: LoadedAblation, store: Store) -> LoadedAblation | None:
    """The study that the ablation of a screen declares to follow it: the best arms by their means, on seeds after all
    that the screen's record has ever named. None while runs of the screen have no result, or where none is declared.
    Raises ConfigError where no arm is left, or no seed."""
    name, rule = f"{screen.name}@{screen.scale}", screen.confirm
    if rule is None or name not in store.studies():
        return None
    record = store.study(name)
    values: dict[str, list[float]] = {arm: [] for arm in screen.arms}
    for run in collect(record, store):
        if run.value is None or run.arm not in values:
            return None
        values[run.arm].append(run.value)
    sign = -1.0 if reading(record.metric).higher_is_better else 1.0
    means = {arm: sign * fmean(values[arm]) for arm, entry in screen.arms.items()
             if arm != screen.baseline and not entry.control and values[arm]}  # fmt: skip
    best = sorted((arm for arm, mean in means.items() if math.isfinite(mean)), key=means.__getitem__)[: rule.best]
    if not best:
        raise ConfigError("every arm failed, so none can be confirmed", where=name, hint=f"gpt2lab report {name}")
    used = {*record.seeds, *(int(seed) for arm in record.arms.values() for seed in arm.runs)}
    used |= {seed for past in record.earlier for seed in past.seeds or ()}
    try:
        seeds = seed_list(range(max(used) + 1, max(used) + 1 + rule.seeds))
    except ValueError as error:
        raise ConfigError(str(error), where="confirm.seeds", hint="fewer seeds") from error
    arms = {arm: entry for arm, entry in screen.arms.items() if arm in {screen.baseline, *best}}
    screened = Screened(study=name, declaration=record.hash, arms=list(means), seeds=list(record.seeds))
    contrasts = tuple(c for c in screen.contrasts if c.weights.keys() <= arms.keys())
    return replace(
        screen, name=variant_name(f"{screen.name}-confirm"), arms=arms, seeds=seeds, contrasts=contrasts, screen=False,
        confirm=None, screened=screened, baseline_seeds=None, looks=(), budgets=(), budget_arms=(),
    )  # fmt: skip


def with_own_data(ablation: LoadedAblation, data: Prepared, progress: DataProgress | None) -> dict[str, Arm]:
    """The arms, each with its own data where that is not the baseline's. Raises ConfigError for other validation
    text: bits per byte of different texts cannot be compared."""
    arms, common = dict(ablation.arms), ablation.arms[ablation.baseline].config.data.written()
    problems = []
    for name, arm in ablation.arms.items():
        if arm.config.data.written() != common:
            arms[name] = replace(arm, data=(own := prepare(arm.config.data, progress=progress)))
            if own.validation_text != data.validation_text:
                sizes = [f"{d.manifest['splits']['validation']['bytes']:,} bytes" for d in (own, data)]
                problem = f"its validation text ({sizes[0]}) is not the baseline's ({sizes[1]})"
                problems.append(Problem(f"arm {name}", problem))
    if problems:
        raise ConfigError(problems, hint="corpus `several` in the base, weighed by `data.batches` in each arm")
    return arms


def adopt_runs(study: Study, say: Callable[[str], None]) -> list[Adoption]:
    """Adopt runs of older code that the new code reproduces bit for bit; -> what became of every group. Runs of tried
    rates are adopted first, since the runs at the best rates depend on them."""
    every: list[Adoption] = []
    while True:
        plan = study.plan_of_all()
        without_candidates = without_old_runs(plan, study.store)
        outcomes = adopt(plan, study.store, say)
        for outcome in outcomes:
            say(str(outcome))
        every += outcomes
        if not plan.tuning or not outcomes or not all(outcome.adopted for outcome in outcomes):
            break
    for line in without_candidates:
        say(line)
    count = sum(len(outcome.adopted) for outcome in every)
    say(f"{study.name}: {plural(count, 'run')} kept" if count else f"{study.name}: nothing to keep")
    return every


def list_adoptable(study: Study, say: Callable[[str], None]) -> list[ReplayGroup]:
    """Report which runs could be adopted, and from which run each group would be replayed."""
    plan = study.plan_of_all()
    adoptable = groups(plan, study.store)
    for group in adoptable:
        for run in group.candidates:
            say(f"{run.new.arm} seed {run.new.seed}: {run.old.id} differs in code alone")
        say(f"{group}: {group.replayable.id if group.replayable else 'none of them'} can be replayed")
    for line in without_old_runs(plan, study.store):
        say(line)
    return adoptable


def job_of(run: Run, store: Store, plan: Plan) -> Job:
    """The job for a worker. The first seed of each arm is replayable by later code."""
    seeds = plan.arms[run.arm].runs
    return job_for(
        run,
        store,
        plan.data_of(run.arm),
        flops_per_token=plan.arms[run.arm].costs.flops_per_token,
        threads=plan.machine.threads,
        replayable=bool(seeds) and run.id == seeds[0].id,
    )


def more_seeds(record: StudyRecord, store: Store, plan: Plan) -> dict[str, int] | None:
    """Seeds due for each arm at the next declared look: more for arms in an open contrast; None without open contrasts
    or further looks. With looks that were declared too late, all seeds are due."""
    looks = plan.ablation.looks
    if not looks or plan.look is None or plan.look >= looks[-1]:
        return None
    if record.history and record.history.looks != list(looks):
        return dict.fromkeys(plan.arms, looks[-1])
    open_arms = {name for c in judge(record, store).contrasts if not c.settled for name in c.weights}
    if not open_arms:
        return None
    next_look = looks[looks.index(plan.look) + 1]
    return {name: next_look if name in open_arms else len(arm.runs) for name, arm in plan.arms.items()}


def longest_first(runs: Sequence[Run], plan: Plan) -> list[Run]:
    """The order of starting: seed by seed, and the costliest first within a seed, so that no long run starts last while
    cores are idle."""
    turns, seconds = dict[str, int](), dict[str, float]()
    for arm in plan.arms.values():
        for turn, run in enumerate(arm.all_runs()):
            turns.setdefault(run.id, turn)
            seconds[run.id] = arm.seconds * tokens_of(run.config) / arm.tokens
    return sorted(runs, key=lambda run: (turns[run.id], -seconds[run.id]))


def label(run: Run, plan: Plan) -> str:
    """A run's label within its arm: its seed, with the tried rate or budget, or `as written` for untuned settings."""
    arm = plan.arms[run.arm]
    if plan.tuning and arm.tuning and run.id in arm.tuning.labels:
        return f"{run.seed} {arm.tuning.labels[run.id]}"
    if run.id not in {candidate.id for candidate in arm.runs} and run.id in {candidate.id for candidate in arm.shared}:
        return f"{run.seed} as written"
    budget = next((b for b, runs in arm.curve.items() if run.id in {candidate.id for candidate in runs}), 1.0)
    return str(run.seed) if budget == 1 else f"{run.seed} {budget:g}x"
