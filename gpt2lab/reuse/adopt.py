"""Keep finished runs when only code changed, if it still trains the same bits.

A run's id names its code, so every edit of what trains makes new ids, also an edit that changes no bit: a faster kernel
call, a renamed variable. `adopt` puts that to the test: it replays one old run of each group with the code that is
there now. Losses, gradient norms and rates of the first and last steps are compared with the journal, weights and
optimizer state with the final checkpoint, and the final evaluation with its record. Only if all bits are equal, the old
runs of that group are kept under their new ids, with a note of where they are from. The steps between are not replayed.

Layer: above the runner.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gpt2lab.basics.text import plural
from gpt2lab.config import Config, config_from_text
from gpt2lab.data.curricula import batches_of, optim_of
from gpt2lab.data.files import data_home
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import DataFault, EnvironmentFault, Gpt2labError, LockHeld
from gpt2lab.evaluation.windows import validation_documents
from gpt2lab.identity import digest
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_averaging, build_optimizers
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.reuse.why import CODE, without_code
from gpt2lab.runner import REPLAYED, evaluated
from gpt2lab.store import RunFolder, Store, now, publish_folder, temporary_beside, write_json
from gpt2lab.training.checkpoints import checkpoints, load_latest
from gpt2lab.training.compiling import compiled
from gpt2lab.training.loop import steps
from gpt2lab.training.precision import choose_device, loss_scaler, set_threads
from gpt2lab.training.state import TrainState

FIRST_STEPS = 5
"""How many steps are trained again from the start: they hold initial weights, warm-up and the first batches."""

ANY_VALUE = ("optim.lr", "optim.warmup_steps", "training.steps")
"""Settings in which runs of one group may differ, besides their seeds: they choose numbers, not code."""

COPIED = ("metrics.jsonl", "run.log", "error.log")
"""Files that are appended to; the others are replaced as a whole, so two runs can share them."""

NOT_ADOPTED = ("run.json", "lock")

Say = Callable[[str], None]
Logged = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Candidate:
    """A run of the plan that is not there, and a finished one that differs from it in code alone."""

    new: Run
    old: RunFolder


@dataclass(frozen=True)
class ReplayGroup:
    """Candidates whose runs one replay represents, and the old run to be replayed; None when none can be."""

    candidates: tuple[Candidate, ...]
    replayable: RunFolder | None

    def __str__(self) -> str:
        """The arms."""
        return ", ".join(dict.fromkeys(candidate.new.arm for candidate in self.candidates))

    def as_record(self) -> dict[str, Any]:
        """Plain data."""
        runs = [{"old": c.old.id, "new": c.new.id, "arm": c.new.arm, "seed": c.new.seed} for c in self.candidates]
        return {"group": str(self), "runs": runs, "replayable": self.replayable and self.replayable.id}


@dataclass(frozen=True)
class Adoption:
    """The result for a group of runs: `adopted` new ids, or why none was."""

    group: str
    adopted: tuple[str, ...] = ()
    refused: str = ""

    def __str__(self) -> str:
        adopted = plural(len(self.adopted), "run") + " kept" if self.adopted else "another process was there first"
        return f"{self.group}: {f'refused: {self.refused}' if self.refused else adopted}"


def candidates(plan: Plan, store: Store) -> list[Candidate]:
    """What could be adopted for the runs that are due and not there; the newest old run for each."""
    wanted = [run for run in plan.runs() if store.run(run.id).status() == "absent"]
    finished = [run for run in store.runs() if run.status() == "finished" and _identity(run)] if wanted else []
    finished.sort(key=lambda run: str((run.identity() or {}).get("created", "")))
    newest = {digest(without_code(_identity(run))): run for run in finished}
    pairs = ((run, newest.get(digest(without_code(run.identity)))) for run in wanted)
    return [Candidate(new, old) for new, old in pairs if old]


def without_old_runs(plan: Plan, store: Store) -> list[str]:
    """For each arm with runs that are due and for which nothing can be adopted: how many, and why."""
    with_old_run = {candidate.new.id for candidate in candidates(plan, store)}
    reasons = Counter[tuple[str, str]]()
    for run in plan.runs():
        if run.id not in with_old_run and not is_finished(run, store):
            absent = store.run(run.id).status() == "absent"
            reason = "no finished run differs in code alone" if absent else "already begun under its new id"
            reasons[run.arm, reason] += 1
    return [f"{arm}: {count} due, {reason}" for (arm, reason), count in reasons.items()]


def groups(plan: Plan, store: Store) -> list[ReplayGroup]:
    """The candidates, grouped where one replay represents all: same old code, same recipe, same new code."""
    by_key: dict[str, list[Candidate]] = {}
    for candidate in candidates(plan, store):
        key = digest([_recipe(_identity(candidate.old)), {part: candidate.new.identity[part] for part in CODE}])
        by_key.setdefault(key, []).append(candidate)
    return [ReplayGroup(tuple(group), _replayable([run.old for run in group], store)) for group in by_key.values()]


def _replayable(group: list[RunFolder], store: Store) -> RunFolder | None:
    """A run of the old code that can be replayed: one of the group, else any of the same recipe."""
    recipe = _recipe(_identity(group[0]))
    others = (run for run in store.runs() if _identity(run) and _recipe(_identity(run)) == recipe)
    return next((run for runs in (group, others) for run in runs if can_be_replayed(run)), None)


def _identity(run: RunFolder) -> dict[str, Any]:
    """Empty where it is not known, or damaged."""
    identity: dict[str, Any] = {}
    with contextlib.suppress(DataFault):
        identity = (run.identity() or {}).get("identity") or {}
    return identity


def _recipe(identity: Mapping[str, Any]) -> str:
    """Hash of all in an identity but the seed and what ANY_VALUE names."""
    settings = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in ANY_VALUE}
        for section, values in identity["settings"].items()
    }
    return digest({**identity, "settings": settings, "seed": None, "repeat": None})


def adopt(plan: Plan, store: Store, say: Say = lambda text: None) -> list[Adoption]:
    """Replay one old run of every group, and keep the whole group if its bits come out the same."""
    outcomes = []
    for group in groups(plan, store):
        if group.replayable is None:
            outcomes.append(Adoption(str(group), refused="no run of this kind kept a checkpoint to replay from"))
            continue
        say(f"{group}: replaying {group.replayable.id}")
        try:
            evaluation = replay(group.replayable, plan.data_of(group.candidates[0].new.arm), plan.machine.threads)
        except Refused as reason:
            outcomes.append(Adoption(str(group), refused=str(reason)))
        else:
            adopted = [candidate.new.id for candidate in group.candidates if keep(candidate, store, evaluation)]
            outcomes.append(Adoption(str(group), adopted=tuple(adopted)))
    return outcomes


def keep(candidate: Candidate, store: Store, evaluation: str | None) -> bool:
    """Put the old run's files under the new id, all at once; False when another process was there before.

    evaluation: key of the only evaluation to be kept, since it alone was repeated.
    """
    target = store.run(candidate.new.id)
    try:
        with target.lock():
            if _names(target.path) != {"lock"}:
                return False
            for leftover in store.root.glob(f".{target.id}.*.partial"):  # of a process that was killed here
                shutil.rmtree(leftover, ignore_errors=True)
            temporary = temporary_beside(target.path)
            try:
                _fill(temporary, candidate, evaluation)
                return _put(temporary, target.path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except LockHeld:
        return False


def _put(temporary: Path, final: Path) -> bool:
    """Let a complete folder take the place of one that holds nothing but the lock, which we have; False when another
    process came in between. A process that waits for that lock notices that its file is gone."""
    (final / "lock").unlink()
    try:
        final.rmdir()
        publish_folder(temporary, final)
    except (OSError, EnvironmentFault):
        if _names(final):
            return False
        raise
    return True


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _fill(folder: Path, candidate: Candidate, evaluation: str | None) -> None:
    """The old run in a fresh folder: its files, and a run.json of its own that says where they are from."""
    folder.mkdir()
    for path in _files(candidate.old.path, evaluation):
        _share(path, folder / path.relative_to(candidate.old.path))
    before = candidate.old.identity() or {}
    new = {
        "id": candidate.new.id,
        "identity": candidate.new.identity,
        "created": now(),
        "first_created": before.get("first_created", before.get("created")),
        "adopted_from": candidate.old.id,
    }
    write_json(folder / "run.json", {**before, **new})


def _files(old: Path, evaluation: str | None) -> Iterator[Path]:
    """Every file of the old run that counts for the new one."""
    for path in sorted(old.rglob("*")):
        inside = path.relative_to(old)
        hidden = any(part.startswith(".") for part in inside.parts)
        excluded = str(inside) in NOT_ADOPTED or (inside.parts[0] == "evaluations" and path.stem != evaluation)
        if path.is_file() and not (path.is_symlink() or hidden or excluded):
            yield path


def _share(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy of one that is, or across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name not in COPIED:
        try:
            os.link(source, target)
            return
        except OSError:  # some file systems have one name for each file
            pass
    shutil.copy2(source, target)


# Replaying


class Refused(Exception):
    """Why a replay does not stand for the old run: the first difference, or what is missing."""


def can_be_replayed(run: RunFolder) -> bool:
    """Whether a finished run kept a checkpoint from shortly before its end, or is so short that none is needed."""
    if run.status() != "finished":
        return False
    steps = int((run.result() or {}).get("steps") or 0)
    return 0 < steps <= REPLAYED or any(checkpoints(run.replay))


def replay(old: RunFolder, data: Prepared, threads: int) -> str | None:
    """Replay a finished run on `threads` CPU threads, those that it had; -> key of the evaluation that came out the
    same, None when the old run has none. Raises Refused."""
    set_threads(threads)
    try:
        return _replay(old, data)
    except Refused:
        raise
    except Gpt2labError as error:
        raise Refused(str(error)) from error
    except Exception as error:  # the code under test may fail in any way; the other runs go on
        raise Refused(f"it fails with {type(error).__name__}: {error}") from error


def _replay(old: RunFolder, data: Prepared) -> str | None:
    text, identity = old.config(), (old.identity() or {}).get("identity", {})
    if text is None:
        raise Refused("its config is gone")
    if identity.get("data") != data.fingerprint:
        raise Refused("its data is not that of the plan")
    config = config_from_text(text)
    if config.branch:
        raise Refused(f"it branches from {config.branch}, and its first steps are not replayed")
    logged = {row["step"]: row["metrics"] for row in old.rows()}
    multiplier = config.optim.multiplier(config.training.steps)
    for step, metrics in logged.items():
        if "train/lr" in metrics:
            rate = {"train/lr": config.optim.lr * multiplier(step - 1)}
            _compare_numbers(step, rate, {"train/lr": metrics["train/lr"]})
    is_compiled = bool(identity.get("compiled"))
    state = _fresh(config, is_compiled)
    if config.training.steps > REPLAYED:
        _retrain(_fresh(config, is_compiled), config, data, logged, until=FIRST_STEPS)
        if load_latest(old.replay, state) is None:
            raise Refused("it kept no checkpoint to replay from")
    _retrain(state, config, data, logged, until=config.training.steps)
    _compare_checkpoint(state, config, old)
    return _evaluate_again(state, config, data, old, str(identity.get("device")))


def _fresh(config: Config, is_compiled: bool = False) -> TrainState:
    device = choose_device(config.training.device)
    model = build_model(config.model, seed=config.seed, device=device)
    if is_compiled:
        compiled(model, data_home() / "compiled")
    scaler = loss_scaler(config.training.precision, device)
    average = build_averaging(config.optim, model.params(), config.training.steps)
    return TrainState(model, build_optimizers(config.optim, model.params()), scaler=scaler, averaging=average)


def _retrain(state: TrainState, config: Config, data: Prepared, logged: Logged, *, until: int) -> None:
    """Train `state` on to step `until`, and compare every step that was logged with the journal."""
    batches = batches_of(config, data)
    optim = optim_of(config, batches)
    for record in steps(state, batches, optim, config.training, seed=config.seed, stop_at=until):
        now, before = (
            {k: v for k, v in metrics.items() if k.startswith("train/")}
            for metrics in (record.metrics, logged.get(record.step, {}))
        )
        if now and before:
            _compare_numbers(record.step, now, before)


def _compare_numbers(step: int, now: Mapping[str, float], before: Mapping[str, float]) -> None:
    for name in dict.fromkeys([*before, *now]):
        x, y = now.get(name), before.get(name)
        if x != y:
            apart = f" ({abs(x - y):.2g} apart)" if x is not None and y is not None else ""
            raise Refused(f"step {step}: {name} is {x!r}, was {y!r}{apart}")


def _compare_checkpoint(state: TrainState, config: Config, old: RunFolder) -> None:
    """Compare weights and optimizer state with the final checkpoint."""
    final = _fresh(config)
    loaded = load_latest(old.checkpoints, final)
    if loaded is None or loaded.step != state.step:
        raise Refused("its final weights are gone")
    new, before = (dict(_leaves({k: s.state_dict()[k] for k in ("model", "optimizers")})) for s in (state, final))
    for name in dict.fromkeys([*before, *new]):
        if name not in new or name not in before:
            raise Refused(f"after step {state.step} {name} is {'gone' if name in before else 'new'}")
        if not same_bits(new[name], before[name]):
            raise Refused(f"after step {state.step} {name} differs{_distance(new[name], before[name])}")


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a tree of mappings and lists, by dotted name."""
    inner = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if inner is None:
        yield name, tree
    else:
        for key, value in inner:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors have the same type, shape and bytes, so that 0 and -0 differ; other values, are equal."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _distance(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        count = int((a != b).sum())
        far = float((a.double() - b.double()).abs().max())
        return f" in {count} of {a.numel()} numbers, by up to {far:.2g}"
    return ""


def _evaluate_again(state: TrainState, config: Config, data: Prepared, old: RunFolder, device: str) -> str | None:
    """Evaluate the final weights again and compare metrics, contexts, and the loss of each window."""
    model = cast(GPT, state.model)
    with state.evaluated():
        record, windows = evaluated(model, config, data, device, config.evaluation, validation_documents(data))
    key = str(record["key"])
    before, old_windows = old.evaluation(key), old.windows(key)
    if before is None:
        return None
    now = json.loads(json.dumps({**record, "windows": windows.record(key)}))  # as it would be read back
    for part in ("metrics", "contexts"):
        if before.get(part) != now.get(part):
            raise Refused(f"the final evaluation gives other {part}: {now.get(part)}, was {before.get(part)}")
    if old_windows is not None and old_windows != now["windows"]:
        raise Refused("the final evaluation gives other losses of single windows")
    return key
