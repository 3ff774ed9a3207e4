"""The noise floor: the spread of repeats of one recipe, measured by a study of repeats and kept in the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
from pydantic import TypeAdapter

from gpt2lab.analysis.statistics import no_spread
from gpt2lab.basics.text import plural
from gpt2lab.errors import Gpt2labError
from gpt2lab.identity import digest
from gpt2lab.store import Store, now, read_json, write_json

if TYPE_CHECKING:
    from gpt2lab.config import Config
    from gpt2lab.data.prepared import Prepared
    from gpt2lab.inspection.costs import Costs
    from gpt2lab.planning.machine import Machine
    from gpt2lab.planning.plan import Plan

SIZES_ALIKE = 0.05
"""Share by which the parameters of a baseline may differ from those of the recipe whose noise is used."""

LEVEL = 0.95
DIFFERENCES = {
    "stack": "another software stack or device",
    "tokens": "another length of training",
    "data": "other data",
    "evaluation": "other validation tokens",
    "size": "another size",
}


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A measured noise floor; `low` and `high` bound the sd (chi-square, 95 %)."""

    scale: str
    sd: float
    low: float
    high: float
    df: int
    values: Mapping[str, float]
    """final loss by seed"""
    runs: tuple[str, ...]
    failed: int
    same_seed: Mapping[str, Any]
    """{"runs": n, "identical": bool, "sd": float} of repeats with one seed; empty where none were made"""
    parameters: int
    tokens: int
    data: str
    evaluation: str
    stack: Mapping[str, str]
    """torch, device"""
    created: str

    @property
    def age(self) -> str:
        """`measured today`, `measured 12 days ago`."""
        created = datetime.fromisoformat(self.created)
        days = (datetime.now(UTC) - (created if created.tzinfo else created.replace(tzinfo=UTC))).days
        return "measured today" if days < 1 else f"measured {plural(days, 'day')} ago"

    def as_record(self) -> dict[str, Any]:
        """The part of it in a study's record."""
        names = ("scale", "sd", "low", "high", "df", "failed", "created", "tokens")
        return {key: getattr(self, key) for key in names} | {"runs": len(self.values), "stack": dict(self.stack)}


def make_floor(
    plan: Plan, values: Mapping[str, float], runs: Sequence[str], failed: int, repeats: Sequence[float]
) -> Floor:
    """Of a study of repeats, from final losses by seed (failed runs left out), and the losses of repeats with one
    seed."""
    array = np.array(list(values.values()))
    df = len(array) - 1
    sd = 0.0 if no_spread(array) else float(array.std(ddof=1))
    tails = 2 * scipy.special.gammaincinv(df / 2, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    low, high = (float(sd * math.sqrt(df / tail)) for tail in tails)
    same = np.array(list(repeats))
    identical = bool(len(same) > 1 and np.all(same == same[0]))
    same_seed = {"runs": len(same), "identical": identical, "sd": float(same.std(ddof=1))} if len(same) > 1 else {}
    return Floor(
        scale=plan.ablation.scale, sd=sd, low=low, high=high, df=df, values=dict(values), runs=tuple(runs),
        failed=failed, same_seed=same_seed, parameters=plan.baseline.costs.parameters, created=now(),
        **_place(plan.baseline.arm.config, plan.data, plan.machine),
    )  # fmt: skip


def _place(config: Config, data: Prepared, machine: Machine) -> dict[str, Any]:
    """What a floor is valid for, in addition to its scale."""
    from gpt2lab.evaluation.validation import evaluation_key  # imports torch, which a list of floors does not need

    return {
        "tokens": config.training.steps * config.training.batch_tokens,
        "data": data.fingerprint,
        "evaluation": evaluation_key({**config.evaluation.spec(config.model.block_size), "contexts": []}),
        "stack": {"torch": machine.torch, "device": machine.device},
    }


def write_floor(floor: Floor, store: Store) -> None:
    """Write it to the store; a floor measured again under the same conditions is replaced."""
    where = {k: v for k, v in asdict(floor).items() if k in ("scale", "tokens", "data", "evaluation", "stack")}
    write_json(store.folder("noise") / f"{floor.scale}-{digest(where)[:12]}.json", asdict(floor))


def floors(store: Store) -> Iterator[Floor]:
    """Every floor that the store holds; a damaged file is left out."""
    folder = store.root / "noise"
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            floor = TypeAdapter(Floor).validate_python(read_json(path))
            datetime.fromisoformat(floor.created)
        except (Gpt2labError, ValueError):
            continue
        yield floor


def find_floor(
    store: Store, scale: str, config: Config, data: Prepared, machine: Machine, costs: Costs
) -> tuple[Floor | None, str]:
    """The floor that is valid for this baseline, or None and the reason.

    Contexts do not count, and neither do the rate and the arm's own components while the size is about the same: it is
    a floor of the scale, used for planning and for borrowed noise only.
    """
    place = _place(config, data, machine)
    mismatches = []
    for floor in floors(store):
        if floor.scale == scale:
            differing = [key for key, value in place.items() if getattr(floor, key) != value]
            differing += ["size"] * (abs(floor.parameters / costs.parameters - 1) > SIZES_ALIKE)
            if not differing:
                return floor, ""
            mismatches.append(differing)
    if not mismatches:
        return None, "none has been measured"
    return None, "the one that was measured is for " + " and ".join(
        DIFFERENCES[key] for key in min(mismatches, key=len)
    )
