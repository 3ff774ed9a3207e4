"""What published studies say of contrasts like those of a plan: how often the arm that won at its scale also won at a
larger one.

The counts are in `reports/published/predictions.json`, which `gpt2lab report --all --publish` makes from the published
studies (reports/prediction.py); it is installed with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt2lab.basics.shipped import shipped_folder
from gpt2lab.store import read_json

if TYPE_CHECKING:
    from gpt2lab.planning.plan import Plan

FILE = "predictions.json"
DOCUMENT = "docs/does-small-predict-large.md"


def changed_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The slots and settings that two arms change differently: `position` for model.position and its options."""
    keys = [key for key in {*one, *other} if one.get(key) != other.get(key)]
    return sorted({key.split(".")[1] if "." in key else key for key in keys})


def counts_at(scale: str) -> list[Mapping[str, Any]]:
    """The counts whose smaller side is `scale`: {"small", "large", "part", "same", "of"} each; [] without a record."""
    folder = shipped_folder()
    file = folder / "reports" / "published" / FILE if folder else None
    if file is None or not file.is_file():
        return []
    record = read_json(file)
    return [count for count in record["counts"] if count["small"] == scale] if record else []


def lines(plan: Plan) -> list[str]:
    """A sentence for each slot or setting in which contrasts of the plan differ, where published studies compared such
    contrasts with larger scales."""
    ablation = plan.ablation
    pairs = [contrast.weights for contrast in ablation.contrasts if len(contrast.weights) == 2]
    arms = {name: entry.arm.changes for name, entry in plan.arms.items()}
    parts = sorted({part for one, other in pairs for part in changed_parts(arms[one], arms[other])})
    sentences = []
    for part in parts:
        counts = [count for count in counts_at(ablation.scale) if count["part"] == part]
        if counts:
            shares = "; ".join(f"{count['same']} of {count['of']} also won {count['large']}" for count in counts)
            sentences.append(f"published contrasts in {part}: of the arms that won at {ablation.scale}, {shares}")
    return [*sentences, f"what that is worth: {DOCUMENT}"] if sentences else []
