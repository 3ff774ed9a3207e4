"""`components`: the training step with each component, next to that of canonical GPT-2."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Annotated

import typer

from benchmarks import options as o
from benchmarks.sides import Engine, work_named
from benchmarks.step import WARM_UP_STEPS
from benchmarks.turns import timed
from gpt2lab.cli.options import print_json
from gpt2lab.errors import ConfigError, unknown
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS

STEPS = 3
"""Steps of each side in a block."""


def components(
    slot: Annotated[str | None, typer.Argument(help="Only this slot.", metavar="[SLOT]")] = None,
    config: o.Size = "nano",
    precision: o.Precision = "fp32",
    blocks: o.Blocks = 3,
    threads: o.Threads = 1,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Time our training step with each component, in turns with canonical GPT-2's."""
    place = o.chosen_device(device, threads, *o.precisions(precision, "fp32"))
    slots = (*MODEL_SLOTS, "optimizer")
    if slot is not None and slot not in slots:
        raise ConfigError(unknown("slot", slot, slots), where="SLOT")
    work = work_named(config)
    canonical = Engine(work, precision, place)  # type: ignore[arg-type]
    timed(canonical, WARM_UP_STEPS, place)
    found = []
    for name in [slot] if slot else slots:
        for component in SLOTS[name]:
            side = Engine(replace(work, choice=SLOTS[name].read(component.name)), precision, place)  # type: ignore[arg-type]
            timed(side, WARM_UP_STEPS, place)
            pairs = [[timed(one, STEPS, place)["seconds"] for one in (side, canonical)] for _ in range(blocks)]
            each, ratio = median(own for own, _ in pairs), median(own / other for own, other in pairs)
            found.append({"slot": name, "component": component.name, "milliseconds": 1000 * each, "ratio": ratio})
    if json_:
        print_json({"rows": found})
        return
    table = o.table_of("", "ms per step", "of canonical")
    for row in found:
        table.add_row(f"{row['slot']}={row['component']}", f"{row['milliseconds']:.4g}", f"{row['ratio']:.2f} x")
    o.show(table, f"configuration {config} ({blocks} blocks of {STEPS} steps each, {place.type}, {precision})")
