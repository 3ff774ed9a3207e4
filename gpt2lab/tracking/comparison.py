"""What MLflow shows of a study beyond its runs: verdicts as numbers and as a table, and a page that draws arms
rather than seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2lab.basics.text import BASELINE_COLOUR, arm_colour, clean, interval, number, signed
from gpt2lab.tracking.addresses import mlflow_name

Table = dict[str, list[Any]]

BETWEEN = " vs "
"""Between the two arms of a contrast in the name of a metric."""
NUMBERS = {"difference": "difference", "low": "low", "high": "high", "p": "p_holm", "n": "n_arm",
           "n_against": "n_against"}  # fmt: skip
"""Metric of a contrast -> its name in verdicts.json."""
SECTIONS = {"val": 1, "train": 3, "val-final": 3}
"""Sections of charts that come first -> charts side by side; MLflow would sort `diag` before them."""
SEED, OTHER = "seed", "auxiliary"
"""Roles of a study's runs: a seed of an arm, and a run that finds a rate or a curve."""
ROLE = "gpt2lab.role"
"""The tag that has the role."""


def shared_view(parent: str, study: Mapping[str, Any]) -> str:
    """State of MLflow's page of runs, as the tag of an experiment that a link can name. Of a study, the seeds of each
    arm are grouped: their mean and range are drawn. Of a sweep, what was tried is drawn against the loss.

    Charts that the state lacks are added by MLflow at the end of their section.
    """
    grouped = study.get("kind") != "sweep"
    role = f" and tags.`{ROLE}` = '{SEED}'" if grouped else ""
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'{role}",
        "orderByKey": "metrics.`val/loss`",
        "orderByAsc": True,
        "compareRunCharts": [] if grouped else [_trials_chart(study)],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "columns": columns}
            for name, columns in SECTIONS.items()
        ],
        "isAccordionReordered": True,
    }
    if grouped:
        by_arm = {"mode": "tag", "groupByData": "gpt2lab.arm"}
        state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": [by_arm]}
    return json.dumps(state)


def _trials_chart(study: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each trial, through its settings and its final loss."""
    settings = [list(arm["params"].items()) for arm in study["arms"].values()]
    tried = dict.fromkeys(name for arm in settings for name, value in arm if isinstance(value, (int, float)))
    return {
        "type": "PARALLEL",
        "uuid": "trials",
        "metricSectionId": "val",
        "selectedParams": [],
        "selectedMetrics": [*(mlflow_name(f"trial/{name}") for name in tried), "val-final/loss"],
        "showAllRuns": True,
        "isGenerated": False,
        "deleted": False,
    }


def colour_of(study: Mapping[str, Any], arm: str) -> str | None:
    """As in the figures of the report; None for trials of a sweep."""
    if study.get("baseline") is None:
        return None
    others = [name for name in study["arms"] if name != study["baseline"]]
    return arm_colour(others.index(arm)) if arm in others else BASELINE_COLOUR


def contrast_numbers(contrasts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of the study's run: `rotary vs learned/difference`, and so on."""
    return {
        f"{c['arm']}{BETWEEN}{c['against']}/{name}": float(c[key])
        for c in contrasts
        for name, key in NUMBERS.items()
        if c[key] is not None
    }


def contrast_table(contrasts: Sequence[Mapping[str, Any]]) -> Table:
    """`columns` and `data`, as MLflow keeps tables."""
    columns = ["arm", "against", "verdict", *NUMBERS]
    data = [[c["arm"], c["against"], c["word"], *(c[key] for key in NUMBERS.values())] for c in contrasts]
    return {"columns": columns, "data": data}


def contrast_note(contrasts: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown, short, for the description of the study's run."""

    def cells(c: Mapping[str, Any]) -> list[str]:
        difference = f"{signed(c['difference'])} {interval(c['low'], c['high'])}"
        return [c["arm"], c["against"], c["word"], difference, number(c["p_holm"], 2), f"{c['n_arm']}"]

    head = ["arm", "against", "verdict", "difference", "Holm p", "n"]
    rows = [head, ["---"] * len(head), *map(cells, contrasts)]
    return "\n".join(f"| {' | '.join(clean(cell).replace('|', '/') for cell in row)} |" for row in rows)
