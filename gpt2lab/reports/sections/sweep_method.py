"""How a sweep was done: what was declared, where it ran, and what its answer does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import Search, SweepRead
from gpt2lab.reports.sections.method import where_it_ran
from gpt2lab.results import RATE, scope_text
from gpt2lab.text import plural, quantity, setting, time_taken

SAMPLERS = {
    "tpe": "TPE (Bergstra et al. 2011), which learns from earlier trials",
    "random": "points drawn at random",
    "grid": "every point of a grid",
    "qmc": "Sobol's points, spread evenly",
}
PRUNERS = {
    "median": "a trial stops when it is worse than the median of earlier trials at as many tokens",
    "successive_halving": "at every rung only the better share goes on (successive halving)",
    "hyperband": "several brackets of successive halving (Hyperband)",
}

OPTIONS = {
    "median": ("startup_trials", "warmup"),
    "successive_halving": ("warmup", "reduction"),
    "hyperband": ("warmup", "reduction"),
}


@section(order=100, title="Method", of="sweep")
def declared(read: SweepRead) -> Section:
    """What was declared before the first trial, in sentences."""
    record = read.record
    sampler = record.get("sampler") or {}
    seed = f", seed {sampler['seed']}" if sampler.get("seed") is not None else ""
    drawn = f", the first {sampler['startup']} at random" if sampler.get("startup") else ""
    seeds = ", ".join(map(str, sorted({seed for search in read.searches.values() for seed in search.seeds})))
    tokens = quantity((record.get("evaluation") or {}).get("tokens"))
    told = [
        f"Sampler: {SAMPLERS.get(str(sampler.get('name')), sampler.get('name'))}{drawn}{seed}; "
        f"{plural(read.slots, 'trial')} in all{'' if read.single else ' over all searches'}, whoever works on "
        "them and however often it is started.",
        _pruner(record),
        f"Value of a trial: its final {record['metric']}, on the same {tokens} validation tokens for all; "
        f"{_goal(record)}. Tuning seeds: {seeds}, which judge nothing else.",
    ]
    for search in read.searches.values():
        told += [f"{'' if read.single else search.label + ': '}{_space(search)}"]
        if search.record.get("changes"):
            changed = ", ".join(f"{key} = {value}" for key, value in search.record["changes"].items())
            told.append(f"{search.label} changes the base: {changed}.")
    if record.get("time_budget"):
        told.append(f"No trial was begun after {time_taken(record['time_budget'])}.")
    if record.get("max_failures") is not None:
        told.append(f"It gives up after {plural(record['max_failures'], 'failed trial')}.")
    return Section(points=told)


def _goal(record: Mapping[str, Any]) -> str:
    return "higher is better" if record.get("direction") == "maximize" else "lower is better"


def _pruner(record: Mapping[str, Any]) -> str:
    pruner = record.get("pruner") or {"name": "none"}
    if pruner.get("name") in (None, "none"):
        return "Pruner: none; every trial was trained to its end."
    rule = PRUNERS.get(str(pruner["name"]), str(pruner["name"]))
    asked = OPTIONS.get(str(pruner["name"]), ())
    options = ", ".join(f"{key.replace('_', ' ')} {pruner[key]}" for key in asked if pruner.get(key) is not None)
    told = f"Pruner: {rule}{f' ({options})' if options else ''}; it sees evaluations at fixed token counts."
    return told + (" It was audited only: no trial was stopped." if record.get("audit_pruning") else "")


def _space(search: Search) -> str:
    """`Space: optim.lr 0.0002 to 0.2 (log); model.norm layernorm, rmsnorm.`"""
    parts = []
    for one in search.record["space"]:
        axis = search.axes[one["name"]]
        if axis.choices:
            text = f"{axis.name} {', '.join(axis.choices)}"
        else:
            step = f", step {setting(one['step'])}" if one.get("step") else ""
            text = f"{axis.name} {setting(axis.low)} to {setting(axis.high)} ({'log' if axis.log else 'linear'}{step})"
        when = " and ".join(f"{key} is {value}" for key, value in (one.get("when") or {}).items())
        parts.append(f"{text}, only where {when}" if when else text)
    return f"Space: {'; '.join(parts)}."


@section(order=110, title="What this shows, and what it does not", of="sweep")
def limits(read: SweepRead) -> Section:
    """What the answer holds for."""
    record = read.record
    caveat = f" Caveat of this scale: {record['caveat']}." if record.get("caveat") else ""
    moved = "another size, length of training, batch or data moves the best settings"
    told = [f"It holds {scope_text(record)}; {moved}.{caveat}"]
    if any(RATE in search.axes for search in read.searches.values()):
        told.append(
            "With AdamW the decay of weights is the product of rate and weight decay, so a search over rates also "
            "searches the decay."
        )
    told.append(
        "A search chooses settings; it compares nothing. Whether two ways to build a model differ, an ablation tells "
        "on seeds that no search has seen."
    )
    if not read.single:
        told.append("Searches that differ in how well their space fits them differ in how well they were tuned.")
    return Section(points=told)


@section(order=120, title="How to reproduce", of="sweep")
def reproduce(read: SweepRead) -> Section:
    """Where and on what it ran."""
    record = read.record
    tokens = sum(trial.get("tokens") or 0 for _, trial in read.trials)
    flops = sum((trial.get("tokens") or 0) * (s.record.get("flops_per_token") or 0) for s, trial in read.trials)
    workers = {str(trial["worker"]) for _, trial in read.trials if trial.get("worker")}
    found = [
        ("Data", (record.get("scope") or {}).get("data")),
        ("Scale", record.get("scale")),
        ("Trained", f"{quantity(tokens)} tokens" + (f", {quantity(flops, 'FLOP')}" if flops else "")),
        ("Workers", plural(len(workers), "process").replace("processs", "processes") if workers else ""),
        ("Storage", record.get("storage")),
        *where_it_ran(record),
        ("Updated", record.get("updated")),
    ]
    facts = [(key, str(value)) for key, value in found if value]
    return Section(code=record["reproduce"], facts=facts)
