"""Runs as rows: what each is, what it reached, which studies use it; filtered, sorted and compared."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from operator import ge, gt, le, lt
from typing import Any

import yaml

from gpt2lab.basics.text import damage_text
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError, unknown
from gpt2lab.records import SINGLE, StudyRecord, SweepRecord, labelled_runs
from gpt2lab.schema import flatten
from gpt2lab.store import RunFolder, Store, read_json, write_json
from gpt2lab.store.files import sha256

Row = dict[str, Any]
COLUMNS = (
    "id", "status", "study", "arm", "seed", "changes", "step", "val_loss", "seconds", "tokens_per_second", "ended",
    "tags", "note",
)  # fmt: skip
"""Of a row, in the order of a CSV file; `studies`, `components` and `damage` are beside them."""
ALIASES = {"val": "val_loss", "loss": "val_loss", "run": "id", "name": "study", "age": "ended"}
LISTING, FORMAT = "listing.json", 1
CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|!=|==|=|<|>|~)\s*(.*?)\s*")


@dataclass(frozen=True)
class Use:
    """What a run is in a study or sweep."""

    study: str
    arm: str
    seed: str
    changes: Mapping[str, Any]
    components: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.study} {self.arm} seed {self.seed}"


def uses(store: Store, on_damage: Callable[[DataFault], None]) -> dict[str, list[Use]]:
    """Run id -> what studies and sweeps use it for, those with current declarations first."""
    found: dict[str, list[Use]] = {}
    reads: list[tuple[Callable[[str], Any], list[str]]] = [
        (store.study, [*store.studies(), *store.earlier()]),
        (store.sweep, [*store.sweeps(), *store.earlier(kind="sweep")]),
    ]
    for read, names in reads:
        for name in names:
            try:
                record = read(name)
            except DataFault as fault:
                on_damage(fault)
                continue
            for run, use in _of_sweep(record) if isinstance(record, SweepRecord) else _of_study(record):
                found.setdefault(run, []).append(use)
    return found


def _of_study(record: StudyRecord) -> Iterator[tuple[str, Use]]:
    shared = dict(_settings(record.reproduce)) if record.design != SINGLE else {}
    seeds: dict[tuple[str, str], str] = {}
    for name, seed, run in labelled_runs(record.arms):
        seeds.setdefault((name, run), seed)
    for (name, run), seed in seeds.items():
        label = dict(item.split("=", 1) for item in name.split() if "=" in item) if record.design == SINGLE else {}
        arm = record.arms[name]
        yield run, Use(record.name, name, seed, {**shared, **label, **arm.changes}, arm.components)


def _of_sweep(record: SweepRecord) -> Iterator[tuple[str, Use]]:
    shared = dict(_settings(record.reproduce))
    for label, search in record.searches.items():
        named = f"{label} " if len(record.searches) > 1 else ""
        for trial in search.trials:
            for seed, run in trial.runs.items():
                changes = {**shared, **search.changes, **trial.settings}
                yield run, Use(record.name, f"{named}trial {trial.index:03d}", seed, changes, search.components)


def _settings(command: str) -> Iterator[tuple[str, str]]:
    """What a command line sets by `--set`, or a call in Python by `overrides`."""
    try:
        call = ast.parse(command, mode="eval").body
    except SyntaxError:
        with contextlib.suppress(ValueError):
            yield from (_pair(value) for option, value in pairwise(shlex.split(command)) if option == "--set")
        return
    for argument in call.keywords if isinstance(call, ast.Call) else ():
        if argument.arg == "overrides":
            yield from map(_pair, ast.literal_eval(argument.value))


def _pair(setting: str) -> tuple[str, str]:
    key, _, value = setting.partition("=")
    return key, value


def run_rows(store: Store, on_damage: Callable[[DataFault], None]) -> list[Row]:
    """Every run of the store, the newest first."""
    used, facts = uses(store, on_damage), facts_of_runs(store)
    rows = [run_row(used.get(run, []), found) for run, found in facts.items()]
    return sorted(rows, key=lambda row: row["ended"] or "", reverse=True)


def facts_of_runs(store: Store, ids: Iterable[str] | None = None) -> dict[str, Row]:
    """Run id -> what its files say, of all runs or those of `ids`.

    What was found of runs that have ended is kept in `listing.json`, with sums over the names, sizes and times of their
    files, and read again where those have changed. Who trains runs calls this at the end, so that later lists of
    thousands are quick.
    """
    kept, facts, ended = _kept(store), dict[str, Row](), dict[str, Row]()
    for folder in store.runs() if ids is None else map(store.run, ids):
        stamp = sha256(repr(list(folder.stamps())).encode())[:32]
        known = kept.get(folder.id)
        current = facts[folder.id] = known["facts"] if known and known["stamp"] == stamp else facts_of(folder)
        if current["status"] in ("finished", "diverged"):
            ended[folder.id] = {"stamp": stamp, "facts": current}
    listed = ended if ids is None else kept | ended
    if listed != kept:
        with contextlib.suppress(Gpt2labError):  # a folder that cannot be written can be read
            write_json(store.root / LISTING, {"format": FORMAT, "runs": listed}, indent=None)
    return facts


def _kept(store: Store) -> dict[str, Row]:
    """Run id -> {"stamp", "facts"} of earlier calls; nothing where they are of another version, or damaged."""
    try:
        record = read_json(store.root / LISTING) or {}
    except Gpt2labError:
        return {}
    return dict(record["runs"]) if record.get("format") == FORMAT else {}


def run_row(used: Sequence[Use], facts: Row) -> Row:
    """One run; of a damaged one `damage` says which file it is and what to do. facts: what `facts_of` found."""
    row: Row = dict.fromkeys(COLUMNS) | {"changes": {}, "components": {}} | facts
    if used:
        first = used[0]
        row |= {"study": first.study, "arm": first.arm, "seed": first.seed}
        row |= {"changes": dict(first.changes), "components": dict(first.components)}
    row["studies"] = [str(use) for use in used]
    return row


def facts_of(folder: RunFolder) -> Row:
    """What the files of a run say, whatever study uses it."""
    try:
        result = folder.result()
    except DataFault:
        result = None
    status = folder.status() if result is None else "diverged" if result["status"] == "diverged" else "finished"
    damage = folder.damage() if status in ("damaged", "failed", "partial") else None
    row: Row = {"id": folder.id, "step": 0, "val_loss": None, "seconds": None, "ended": None, "tags": [], "note": None}
    row |= {"status": "damaged" if damage else status, "damage": damage and damage_text(damage)}
    if damage is None:
        journal, result, remarks = folder.rows(), result or {}, folder.remarks()
        losses = [line["metrics"]["val/loss"] for line in journal if "val/loss" in line["metrics"]]
        row |= {"step": journal[-1]["step"] if journal else 0, "val_loss": losses[-1] if losses else None}
        row |= {"seconds": journal[-1].get("seconds") if journal else None, **remarks}
        row |= {"tokens_per_second": result.get("tokens_per_second"), "ended": result.get("finished_at")}
    if row["ended"] is None and folder.metrics.exists():
        row["ended"] = datetime.fromtimestamp(folder.metrics.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return row


def selected(rows: Sequence[Row], where: str | None, store: Store) -> list[Row]:
    """The rows for which all conditions hold: `arm=rotary and val<2.0 and optim.lr>=0.002`. Keys are columns, slots of
    components, and settings of the config; the operators are =, !=, <, <=, >, >= and ~ (contains). Raises
    ConfigError."""
    selected = list(rows)
    for part in re.split(r"\s+and\s+", where.strip()) if where else ():
        match = CONDITION.fullmatch(part)
        if match is None:
            raise ConfigError(f"'{part}' is not KEY=VALUE", where="--where", hint='--where "arm=rotary and val<2.0"')
        if re.search(r"\sor\s", part):
            hint = "one command for each, or ~ for a part of a text: arm~rot"
            raise ConfigError("conditions are joined by 'and' only", where="--where", hint=hint)
        key, operator, wanted = match.groups()
        key = ALIASES.get(key, key)
        values = {row["id"]: _value(row, key, store) for row in selected}
        if selected and all(value is ABSENT for value in values.values()):
            known = {*COLUMNS, *ALIASES, *(slot for row in selected for slot in row["components"])}
            raise ConfigError(unknown("column", key, known), where="--where", hint="or a setting, as optim.lr<0.01")
        selected = [row for row in selected if _holds(values[row["id"]], operator, wanted)]
    return selected


ABSENT = object()


def _value(row: Row, key: str, store: Store) -> Any:
    """A column, the component in a slot, or a setting of the run's config."""
    if key in row:
        return row[key]
    if key in row["components"]:
        return row["components"][key]
    config = config_of(store.run(row["id"])) if row["status"] != "damaged" else {}
    named = {name.rpartition(".")[2]: value for name, value in config.items()} | config
    return named.get(key, ABSENT)


def _holds(value: Any, operator: str, wanted: str) -> bool:
    if value is ABSENT or value is None:
        return operator == "!="
    if isinstance(value, list):
        present = wanted in value
        return present if operator in ("=", "==", "~") else not present if operator == "!=" else False
    if operator == "~":
        return wanted.lower() in str(value).lower()
    if operator in ("=", "==", "!="):
        text = str(value)
        same = wanted in (text, text.partition("@")[0]) or _number(text) == _number(wanted) is not None
        return same == (operator != "!=")
    compares: Callable[[Any, Any], bool] = {"<": lt, "<=": le, ">": gt, ">=": ge}[operator]
    measured, limit = _number(str(value)), _number(wanted)
    if measured is None or limit is None:
        return compares(str(value), wanted)
    return compares(measured, limit)  # a loss that is no number is neither above nor below


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def ordered(rows: Sequence[Row], by: str | None) -> list[Row]:
    """Sorted by a column, `-val` the other way round; runs without a value come last. Raises ConfigError."""
    if by is None:
        return list(rows)
    key = ALIASES.get(by.lstrip("-"), by.lstrip("-"))
    if key not in COLUMNS:
        raise ConfigError(unknown("column", key, [*COLUMNS, *ALIASES]), where="--sort", hint="--sort val")
    numbered = [row for row in rows if isinstance(row[key], (int, float)) and row[key] == row[key]]
    texts = [row for row in rows if row[key] not in (None, "", []) and not isinstance(row[key], (int, float))]
    with_values = sorted(numbered, key=lambda row: row[key]) + sorted(texts, key=lambda row: str(row[key]))
    if by.startswith("-"):
        with_values.reverse()
    placed = {row["id"] for row in with_values}
    return [*with_values, *(row for row in rows if row["id"] not in placed)]


def config_of(folder: RunFolder) -> dict[str, Any]:
    """The resolved config by dotted key, every scalar as it is written; nothing where it is damaged."""
    try:
        return dict(flatten(yaml.load(folder.config() or "{}", Loader=yaml.BaseLoader)))
    except (DataFault, yaml.YAMLError):
        return {}


def curve_of(folder: RunFolder, metric: str = "val/loss") -> list[tuple[int, float]]:
    """(step, value) of one metric. Raises DataFault."""
    return [(row["step"], row["metrics"][metric]) for row in folder.rows() if metric in row["metrics"]]


def sparkline(values: Sequence[float], width: int = 56) -> str:
    """A curve in one line of text, its least value lowest."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    if len(finite) > width:
        finite = [finite[round(i * (len(finite) - 1) / (width - 1))] for i in range(width)]
    low, high = min(finite), max(finite)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 0] for value in finite)


def seconds_since(moment: str | None) -> float | None:
    """None for what is no moment."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment or "")).total_seconds()
    except (ValueError, TypeError):
        return None


def age(moment: str | None) -> str:
    """How long ago a moment was: `4 min`, `3 h`, `12 d`."""
    seconds = seconds_since(moment)
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
