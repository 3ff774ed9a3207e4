"""How a sweep was done: what was declared, what pruning saved, where it ran, and what its answer does not say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt2lab.analysis.pruning import audit, replay, savings
from gpt2lab.report.across import duration
from gpt2lab.report.sweep.axes import DIVERGED, FINISHED, PRUNED
from gpt2lab.report.sweep.read import RATE, ReadSweep, Search
from gpt2lab.results import scope_text
from gpt2lab.text import plural, quantity, setting

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


def declared(read: ReadSweep) -> list[str]:
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
        told.append(f"No trial was begun after {duration(record['time_budget'])}.")
    if record.get("max_failures") is not None:
        told.append(f"It gives up after {plural(record['max_failures'], 'failed trial')}.")
    return told


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


def pruning(read: ReadSweep) -> list[str]:
    """What pruning saved, in tokens, and what the audit found; nothing where no pruner was declared."""
    record = read.record
    if (record.get("pruner") or {}).get("name") in (None, "none"):
        return []
    return [one for search in read.searches.values() for one in _saved(read, search)]


def _saved(read: ReadSweep, search: Search) -> list[str]:
    label, record = "" if read.single else f"{search.label}: ", read.record
    steps = int(search.record["steps"])
    if not record.get("audit_pruning"):
        told = [str(savings(search.trials, search.record["tokens"] * len(search.seeds)))]
        if search.counts[PRUNED]:
            told.append(
                "What those trials would have reached is not known; with --audit-pruning all are trained to their end, "
                "and the page tells how often the eventual best would have been stopped."
            )
        return [label + " ".join(told)]
    found = audit(search.trials, steps, maximize=search.maximize)
    told = [str(found) if found else "No trial finished, so the audit tells nothing of the pruner."]
    return [label + told[0], *(f"{label}{one}" for one in _replayed(read, search, steps))]


def _replayed(read: ReadSweep, search: Search, steps: int) -> list[str]:
    """What the median rule does to the audited curves in other orders."""
    pruner = read.record["pruner"]
    if pruner["name"] != "median":
        return []
    done = [trial for trial in search.trials if trial["outcome"] in (FINISHED, DIVERGED)]
    curves = [[(step, value) for step, _, value in trial["curve"] or () if value is not None] for trial in done]
    finals = [math.nan if trial["value"] is None else trial["value"] for trial in done]
    found = replay(
        curves, finals, startup=int(pruner.get("startup_trials") or 0), warmup=steps * (pruner.get("warmup") or 0.0),
        maximize=search.maximize,
    )  # fmt: skip
    return [found.told(read.unit)] if found else []


def limits(read: ReadSweep) -> list[str]:
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
    return told


def facts(read: ReadSweep) -> list[tuple[str, str]]:
    """Where and on what it ran."""
    record = read.record
    stack: Mapping[str, Any] = record.get("stack") or {}
    device = " ".join(str(stack[k]) for k in ("device", "device_name") if stack.get(k))
    tokens = sum(trial.get("tokens") or 0 for search in read.searches.values() for trial in search.trials)
    flops = sum(
        (trial.get("tokens") or 0) * (search.record.get("flops_per_token") or 0)
        for search in read.searches.values()
        for trial in search.trials
    )
    workers = {str(t["worker"]) for search in read.searches.values() for t in search.trials if t.get("worker")}
    found = [
        ("Data", (record.get("scope") or {}).get("data")),
        ("Scale", record.get("scale")),
        ("Trained", f"{quantity(tokens)} tokens" + (f", {quantity(flops, 'FLOP')}" if flops else "")),
        ("Workers", plural(len(workers), "process").replace("processs", "processes") if workers else ""),
        ("Storage", record.get("storage")),
        ("Code", f"git commit {stack['git_commit']}" if stack.get("git_commit") else "not under version control"),
        ("Software", f"torch {stack.get('torch')}, Python {stack.get('python')}, {stack.get('platform')}"),
        ("Device", device),
        ("Declared", f"{record.get('created')}, record {record.get('hash')}"),
        ("Updated", record.get("updated")),
    ]
    return [(key, str(value)) for key, value in found if value]
