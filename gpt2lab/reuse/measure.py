"""Measure something new of runs that are finished: metrics on their final weights, kept below each run.

A value is computed once: its key names the metric, its options, the tokens and the code that it follows from.
Layer: beside the executors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.items import TaskContrast
from gpt2lab.analysis.results import StudyRun, cleaned, collect, failure_ceiling
from gpt2lab.analysis.studies import judge_runs
from gpt2lab.analysis.verdicts import Contrast
from gpt2lab.basics.text import damage_text
from gpt2lab.config import Config, config_from_text
from gpt2lab.data.prepared import Prepared, find_prepared
from gpt2lab.data.shards import prepare
from gpt2lab.errors import ConfigError, DataFault, command
from gpt2lab.evaluation.metrics import Subject, apply, metric
from gpt2lab.evaluation.tasks import Tell
from gpt2lab.identity import PLUGIN, choices, component_code, core_code, digest, parse, reached
from gpt2lab.model import GPT, build_model
from gpt2lab.records import StudyRecord
from gpt2lab.registry import Choice, Misfit, Slot
from gpt2lab.runner import sequences_at_once
from gpt2lab.store import RunFolder, Store, now
from gpt2lab.training.checkpoints import FILES, MODEL, checkpoints, damage
from gpt2lab.training.precision import choose_device, set_threads
from gpt2lab.training.state import canonical, weight_problems, weights_of

Progress = Callable[[int, int, str], None]
"""Called with targets done, targets in all, and what is being measured."""

UNDECLARED = "measured after the fact, not declared"
HARNESS = (("gpt2lab.evaluation.metrics", "apply"), ("gpt2lab.evaluation.metrics", "Subject"))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Values of one run by name. `reused`: how many metrics had been measured before."""

    id: str
    values: Mapping[str, float]
    reused: int


@dataclass(frozen=True, kw_only=True)
class StudyMeasured:
    """A study's metrics. `verdicts`: by value name, descriptive numbers only. `missing`: runs without a value, with the
    reason. `reused`: how many values had been measured before, of how many in all."""

    study: str
    verdicts: Mapping[str, Verdicts]
    missing: Sequence[StudyRun] = field(default=())
    reused: int = 0
    metrics: int = 0
    contrasts: Sequence[TaskContrast] = ()
    """of tasks, by seeds and questions"""

    def as_record(self) -> dict[str, Any]:
        """Values and differences as plain data. Intervals are not adjusted for the family: nothing is claimed."""
        missing = [{"arm": r.arm, "seed": r.seed, "run": r.id, "status": r.status, "reason": r.reason}
                   for r in self.missing]  # fmt: skip
        metrics = {
            name: {"arms": [_arm_record(arm) for arm in found.arms],
                   "contrasts": [_contrast_record(contrast) for contrast in found.contrasts]}
            for name, found in self.verdicts.items()
        }  # fmt: skip
        tasks = [contrast.to_json() for contrast in self.contrasts]
        return {"study": self.study, "metrics": metrics, "tasks": tasks, "missing": missing, "reused": self.reused}


def _arm_record(arm: Any) -> dict[str, Any]:
    counts = {"n": arm.n, "failed": arm.failed, "missing": arm.missing}
    return {"arm": arm.name, "mean": arm.mean, "sd": arm.sd, **counts, "values": dict(arm.values)}


def _contrast_record(contrast: Contrast) -> dict[str, Any]:
    comparable = contrast.word != "not comparable"
    return {
        "arm": contrast.arm,
        "against": contrast.against,
        "difference": contrast.difference if comparable else None,
        "low": contrast.raw_low if comparable else None,
        "high": contrast.raw_high if comparable else None,
        "n": [contrast.n_arm, contrast.n_against],
        "failed": [contrast.failed_arm, contrast.failed_against],
        "word": "exploratory" if comparable else "not comparable",
        "reason": contrast.reason,
    }


def read_metrics(written: Sequence[str]) -> list[Choice]:
    """`name` or `name,option=value,...` as choices; every metric that needs no option when none is written.

    Raises ConfigError.
    """
    if not written:
        return [metric.read(known.name) for known in metric if known.parameters.keys() == known.defaults().keys()]
    read: list[Choice] = []
    for text in dict.fromkeys(written):
        name, *options = text.split(",")
        given = dict(option.partition("=")[::2] for option in options)
        try:
            read.append(metric.read({**given, "name": name}))
        except Misfit as misfit:
            raise ConfigError(str(misfit), where=f"--metric {text}", hint="gpt2lab eval --help") from None
    return list(dict.fromkeys(read))


def measure_study(
    name: str, store: Store, metrics: Sequence[Choice], *, progress: Progress | None = None
) -> StudyMeasured:
    """Metrics of every finished run of a study; see `over_study`."""
    return over_study(name, store, lambda run: measure(run, metrics, progress=progress), count=len(metrics))


def over_study(name: str, store: Store, each: Callable[[RunFolder], Measured], *, count: int) -> StudyMeasured:
    """Measure every finished run of a study, and set arms against each other: descriptive numbers without a verdict.

    each: measures `count` things of a run. Runs without a value are listed with the reason. Raises ConfigError when no
    run can be measured, and what `each` raises, but for a run that is damaged.
    """
    study = cleaned(store.study(name))
    ceiling = failure_ceiling(study)
    runs = collect(study, store)
    values: dict[str, Mapping[str, float]] = {}
    settled: list[StudyRun] = []
    reused = 0
    for run in runs:
        done = run
        if run.value is not None and not run.value < ceiling:  # NaN as well
            nothing = replace(run, status="failed", reason="it learned nothing", value=math.nan)
            done = run if run.status == "diverged" else nothing
        elif run.status in ("finished", "unevaluated"):
            try:
                measured = each(store.run(run.id))
            except DataFault as fault:  # one damaged run must not cost the others
                done = replace(run, status="damaged", value=None, reason=damage_text(fault))
            else:
                values[run.id], reused = measured.values, reused + measured.reused
                done = replace(run, status="finished", reason=None)
        settled.append(done)
    if not values:
        reasons = "; ".join(dict.fromkeys(f"{run.arm} seed {run.seed}: {run.reason}" for run in settled))
        raise ConfigError(f"no run can be measured ({reasons})", where=study.name, hint=f"gpt2lab show {runs[0].id}"
                          if runs else "gpt2lab runs")  # fmt: skip
    names = list(dict.fromkeys(name for of_run in values.values() for name in of_run))
    return StudyMeasured(
        study=study.name,
        verdicts={name: described(study, settled, name, values) for name in names},
        missing=[run for run in settled if run.id not in values],
        reused=reused,
        metrics=count * len(values),
    )


def described(
    study: StudyRecord, runs: Sequence[StudyRun], name: str, values: Mapping[str, Mapping[str, float]]
) -> Verdicts:
    """The study's contrasts in one measured value, all exploratory: the study declared another metric."""
    arms = {arm: entry.with_(exploratory=UNDECLARED) for arm, entry in study.arms.items()}
    changed = study.with_(arms=arms, metric=name, looks=[], bracketed=False, history=None)
    measured = [replace(run, value=values[run.id].get(name) if run.id in values else run.value) for run in runs]
    return judge_runs(changed, measured)


def measure(run: RunFolder, metrics: Sequence[Choice], *, progress: Progress | None = None) -> Measured:
    """The metrics of a finished run, from its newest checkpoint; what was measured before is read, not computed.

    Raises what `ended` raises, and DataFault when weights or data are gone or damaged.
    """
    config, result = ended(run)
    keys = {choice: measurement_key(choice, config) for choice in metrics}
    records = {choice: run.evaluation(key) for choice, key in keys.items()}
    reused = sum(record is not None for record in records.values())
    if reused < len(keys):
        with threads(result["stack"]["threads"]):
            subject = subject_of(run, config, result)
            for choice in [choice for choice, record in records.items() if record is None]:
                said = replace(subject, tell=reporter(progress, f"{choice} of {run.id}"))
                spec = {"tokens": subject.total, "block_size": subject.block_size}
                records[choice] = record = {
                    **measured_with(keys[choice], choice, subject.device),
                    "metric": choice.name, "spec": spec, "values": apply(choice, said),
                }  # fmt: skip
                run.write_evaluation(record)
    values = {name: value for record in records.values() if record for name, value in record["values"].items()}
    return Measured(id=run.id, values=values, reused=reused)


def ended(run: RunFolder) -> tuple[Config, Mapping[str, Any]]:
    """Config and result of a finished run. Raises ConfigError for one that is not finished or has diverged, DataFault
    for one that lost its config."""
    result = run.result()
    if result is None:
        raise ConfigError(f"{run.status()}: only finished runs can be measured", where=run.id, hint="gpt2lab runs")
    if result["status"] == "diverged":
        raise ConfigError("it diverged: there are no final weights", where=run.id, hint="gpt2lab runs")
    return config_of(run), result


def config_of(run: RunFolder) -> Config:
    """The config of a run that has begun. Raises DataFault where it is gone."""
    text = run.config()
    if text is None:
        what = "no config.yaml: what it trains is not known"
        raise DataFault(what, where=str(run.path), hint=command("ls", run.path))
    return config_from_text(text, str(run.path / "config.yaml"))


def reporter(progress: Progress | None, what: str) -> Tell:
    """`progress` for one thing that is measured."""
    return (lambda done, total: progress(done, total, what)) if progress else (lambda done, total: None)


def measured_with(key: str, choice: Choice, device: torch.device) -> dict[str, Any]:
    """The part of a measurement's record that all kinds have: its key and options, and what it was made with."""
    stack = {"torch": torch.__version__, "device": device.type, "threads": torch.get_num_threads()}
    return {"key": key, "options": dict(choice.options), "stack": stack, "measured_at": now()}


def measurement_key(choice: Choice, config: Config) -> str:
    """Names the metric; changes with its options, the tokens, and all code that its values follow from."""
    parts = {
        "metric": choice.full(),
        "tokens": config.evaluation.tokens,
        "block_size": config.model.block_size,
        "code": code_behind(metric, choice, HARNESS, config),
    }
    return f"{choice.name}-{digest(parts)[:16]}"


def code_behind(slot: Slot, choice: Choice, harness: Sequence[tuple[str, str]], config: Config) -> list[str]:
    """Hashes of a metric's or task's definition with the `harness` that applies it and all that they reach (of its
    whole module where it has no definition there), and of the model's code."""
    factory = slot[choice.name].factory
    names = parse(factory.__module__).definitions
    roots = [factory.__name__] if factory.__qualname__ in names else list(names)
    texts = reached([*harness, *((factory.__module__, name) for name in roots)])
    measuring = digest({PLUGIN.sub("plugin", key): text for key, text in texts.items()})
    return [measuring, core_code(), *map(component_code, choices(config))]


def subject_of(run: RunFolder, config: Config, result: Mapping[str, Any]) -> Subject:
    """The run's final model on the validation tokens that it was judged on."""
    data = data_of(run, config)
    model: GPT = build_model(config.model, seed=config.seed, device=choose_device(config.training.device))
    load_weights(model, run, int(result["steps"]))
    return subject_on(data, model, config)


def subject_on(data: Prepared, model: GPT, config: Config, *, tell: Tell = lambda done, total: None) -> Subject:
    """A model on validation text, of which as many tokens as `config` says are scored, at most all."""
    return Subject(
        model=model,
        tokens=data.validation,
        block_size=model.config.block_size,
        total=min(config.evaluation.total(data.validation), len(data.validation) - 1),
        batch_sequences=sequences_at_once(config, next(model.parameters()).device.type),
        byte_lengths=data.byte_lengths,
        data=data,
        precision=config.training.precision,
        tell=tell,
    )


def data_of(run: RunFolder, config: Config) -> Prepared:
    """The prepared data that the run was trained on: as it lies there, or prepared again from the same text."""
    wanted = ((run.identity() or {}).get("identity") or {}).get("data")
    data = find_prepared(wanted) or prepare(config.data)
    if data.fingerprint != wanted:
        what = f"its data is gone: the text gives fingerprint {data.fingerprint[:12]}, it had {str(wanted)[:12]}"
        raise DataFault(what, where=run.id, hint="gpt2lab data list")
    return data


def load_weights(model: GPT, run: RunFolder, step: int) -> None:
    """The run's weights after its last step, into `model`. Raises DataFault when they are not there as written."""
    newest = next(checkpoints(run.checkpoints), None)
    if newest is None:
        raise DataFault(
            "no checkpoint: the final weights are gone", where=str(run.checkpoints), hint=command("ls", run.path)
        )
    saved_step, path = newest
    reason = damage(path, saved_step, FILES)
    if reason is None and saved_step != step:
        reason = f"it holds step {saved_step}, the run ended at step {step}"
    if reason is None:
        try:
            saved = canonical(load_file(path / MODEL))
        except (OSError, SafetensorError) as error:
            reason = f"cannot be read: {error}"
    if reason is not None:
        raise DataFault(f"damaged: {reason}", where=str(path), hint=f"gpt2lab show {run.id}")
    problems = weight_problems(model, saved)
    if problems:
        raise DataFault(problems, hint="the code of the model has changed since")
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(saved[name])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with the run's number of CPU threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(before)
