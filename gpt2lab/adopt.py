"""Keep finished runs when only code changed, if it still trains the same bits.

A run's id names its code, so every edit of what trains makes new ids, also an edit that changes no bit: a faster kernel
call, a renamed variable. `adopt` puts that to the test. It takes one old run of each kind, trains its first steps and
its last ones again with the code that is there now, and compares losses, weights, optimizer state and evaluation bit
for bit. Only if all are equal, the old runs of that kind are kept under their new ids, with a note of where they are
from. What happens in between is not replayed: the note says so by being there.

Layer: beside the executors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.batches import Batches
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import DataFault, LockHeld
from gpt2lab.identity import digest
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.plan import Plan
from gpt2lab.runner import evaluated
from gpt2lab.runs import Run, is_finished
from gpt2lab.store import RunFolder, Store, now, write_json
from gpt2lab.training.checkpoints import checkpoints, load_latest
from gpt2lab.training.loop import steps
from gpt2lab.training.precision import choose_device, set_threads
from gpt2lab.training.state import TrainState
from gpt2lab.why import CODE, without_code

FIRST = 5
"""Steps trained again from the start: they hold initial weights, warm-up and the first batches."""

COPIED = ("metrics.jsonl", "run.log")
"""Files that are appended to; the others are replaced as a whole, so two runs can share them."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A run of the plan that is not finished, and a finished one that differs from it in code alone."""

    new: Run
    old: RunFolder


@dataclass(frozen=True)
class Outcome:
    """How one kind of runs came out: `adopted` new ids, or why none was."""

    kind: str
    adopted: tuple[str, ...] = ()
    refused: str = ""


def candidates(plan: Plan, store: Store) -> list[Candidate]:
    """What could be adopted for the runs that are due and not finished; the newest old run for each."""
    wanted = [run for run in plan.runs() if not is_finished(run, store) and store.run(run.id).status() == "absent"]
    known: dict[str, list[tuple[str, RunFolder]]] = {}
    for folder in store.runs() if wanted else ():
        record = folder.identity() or {}
        if "identity" in record and folder.status() == "finished":
            key = digest(without_code(record["identity"]))
            known.setdefault(key, []).append((str(record.get("created", "")), folder))
    found = []
    for run in wanted:
        olds = known.get(digest(without_code(run.identity)), [])
        if olds:
            found.append(Candidate(run, max(olds, key=lambda item: item[0])[1]))
    return found


def adopt(plan: Plan, store: Store, say: Say = lambda text: None) -> list[Outcome]:
    """Replay one old run of every kind and keep the others of its kind if its bits come out the same.

    A kind is what shares the old code, the settings but for the learning rate, and the new code.
    """
    found = candidates(plan, store)
    kinds: dict[str, list[Candidate]] = {}
    for one in found:
        kinds.setdefault(_kind(one), []).append(one)
    outcomes = []
    for group in kinds.values():
        arms = ", ".join(dict.fromkeys(one.new.arm for one in group))
        witness = _witness(group, store)
        if witness is None:
            outcomes.append(Outcome(arms, refused="no run of this kind kept a checkpoint to replay from"))
            continue
        say(f"{arms}: replaying {witness.id}")
        wrong = replay(witness, plan.data, plan.machine.threads)
        if wrong is None:
            kept = tuple(one.new.id for one in group if keep(one, store))
            outcomes.append(Outcome(arms, adopted=kept))
        else:
            outcomes.append(Outcome(arms, refused=wrong))
    return outcomes


def _kind(one: Candidate) -> str:
    old = (one.old.identity() or {})["identity"]
    return digest([_recipe(old), {part: old[part] for part in CODE}, {part: one.new.identity[part] for part in CODE}])


def _recipe(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that one replay speaks for: all but the rate and the length."""
    settings = {section: dict(values) for section, values in identity["settings"].items()}
    for section, key in (("optim", "lr"), ("optim", "warmup_steps"), ("training", "steps")):
        settings.get(section, {}).pop(key, None)
    return settings


def _witness(group: Sequence[Candidate], store: Store) -> RunFolder | None:
    """A run of the old code that can be replayed: one of the group, else any that shares recipe and code."""
    for one in group:
        if any(checkpoints(one.old.replay)):
            return one.old
    wanted = (group[0].old.identity() or {})["identity"]
    for folder in store.runs():
        own = (folder.identity() or {}).get("identity")
        alike = own and all(own[part] == wanted[part] for part in CODE) and _recipe(own) == _recipe(wanted)
        if alike and folder.status() == "finished" and any(checkpoints(folder.replay)):
            return folder
    return None


def replay(old: RunFolder, data: Prepared, threads: int) -> str | None:
    """Train the first and the last steps of a finished run again, with the code that is there now; the store is only
    read.  -> None when every bit is as before, else what differs first."""
    set_threads(threads)
    text, identity = old.config(), (old.identity() or {}).get("identity", {})
    if text is None:
        return "its config is gone"
    if identity.get("data") != data.fingerprint:
        return "its data is not that of the plan"
    config = config_from_text(text)
    logged = {row["step"]: row["metrics"] for row in old.rows()}
    start = _fresh(config)
    wrong = _retrained(start, config, data, logged, until=min(FIRST, config.training.steps))
    if wrong:
        return wrong
    again = _fresh(config)
    try:
        if load_latest(old.replay, again) is None:
            return "it kept no checkpoint to replay from"
    except DataFault as fault:
        return str(fault)
    return (
        _retrained(again, config, data, logged, until=config.training.steps)
        or _unlike_final(again, config, old)
        or _evaluated(again, config, data, old, identity)
    )


def _fresh(config: Config) -> TrainState:
    model = build_model(config.model, seed=config.seed, device=choose_device(config.training.device))
    return TrainState(model, build_optimizers(config.optim, model.params()))


def _retrained(
    state: TrainState, config: Config, data: Prepared, logged: Mapping[int, Mapping[str, float]], *, until: int
) -> str | None:
    """Train `state` on to step `until` and hold every step against the journal."""
    block, training = config.model.block_size, config.training
    batches = Batches(data.train, block, training.batch_tokens // block, config.seed)
    for record in steps(state, batches, config.optim, training, seed=config.seed, stop_at=until):
        before = logged.get(record.step, {})
        for name, value in record.metrics.items():
            if name in before and before[name] != value:
                return f"step {record.step}: {name} is {value!r}, was {before[name]!r}"
    return None


def _unlike_final(state: TrainState, config: Config, old: RunFolder) -> str | None:
    """What differs from the final checkpoint, weights and optimizer state alike."""
    kept = _fresh(config)
    try:
        loaded = load_latest(old.checkpoints, kept)
    except DataFault as fault:
        return str(fault)
    if loaded is None or loaded.step != state.step:
        return "its final weights are gone"
    ours, theirs = ({k: s.state_dict()[k] for k in ("model", "optimizers")} for s in (state, kept))
    for name, a, b in _tensors(ours, theirs):
        if not torch.equal(a, b):
            return f"after the last step {name} differs by up to {float((a.double() - b.double()).abs().max()):.3g}"
    return None


def _tensors(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tensors at the same place of two trees."""
    if isinstance(a, Tensor):
        yield name, a, b
    elif isinstance(a, Mapping):
        for key in a:
            yield from _tensors(a[key], b[key], f"{name}.{key}" if name else str(key))
    elif isinstance(a, (list, tuple)):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _tensors(x, y, f"{name}.{index}")


def _evaluated(
    state: TrainState, config: Config, data: Prepared, old: RunFolder, identity: Mapping[str, Any]
) -> str | None:
    """What differs when the final weights are evaluated again."""
    record, _ = evaluated(cast(GPT, state.model), config, data, str(identity.get("device")), config.evaluation)
    before = old.evaluation(record["key"])
    if before is None:
        return None
    for part in ("metrics", "contexts"):
        if before.get(part) != record[part]:
            return f"the final evaluation gives other {part}: {record[part]}, was {before.get(part)}"
    return None


def keep(one: Candidate, store: Store) -> bool:
    """Put the old run's files under the new id; False when another process is at it. The result comes last, so a kill
    leaves a run that is trained on from its final weights, which is nothing."""
    target = store.run(one.new.id)
    try:
        with target.lock():
            if target.result() is not None:
                return False
            for path in sorted(one.old.path.rglob("*")):
                name = path.relative_to(one.old.path)
                if path.is_file() and not path.is_symlink() and str(name) not in ("run.json", "lock", "result.json"):
                    _share(path, target.path / name)
            record = dict(one.old.identity() or {})
            created = {"created": now(), "adopted_from": one.old.id, "first_created": record.get("created")}
            target.write_identity({**record, **created, "id": one.new.id, "identity": one.new.identity})
            write_json(target.path / "result.json", one.old.result() or {})
    except LockHeld:
        return False
    return True


def _share(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy of one that is, or across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.name in COPIED:
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
