"""What training costs: size, work, speed and memory of every arm, against its loss."""

from __future__ import annotations

import math

from gpt2lab.basics.text import DASH, change, memory, quantity
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary, speed_change
from gpt2lab.reports.sections.scaling import worth
from gpt2lab.reports.sections.tuned import cost_points
from gpt2lab.reports.tables import Cell, Table

NOTE = (
    "The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median over runs, "
    "memory the largest of them; both depend on what else the machine was doing. Speeds are not compared where "
    "those of single runs overlap."
)
DECLARED = {"Parameters": "parameters", "Non-embedding": "non_embedding_parameters", "Active": "active_parameters",
            "FLOPs per token": "flops_per_token", "Tokens": "tokens"}  # fmt: skip


@section(order=50, title="What it costs")
def costs(read: StudyRead) -> Section:
    return Section(table=_table(read), note=NOTE, points=[*_per_second(read), *cost_points(read)])


def _table(read: StudyRead) -> Table | None:
    """Every arm, and how it compares with the baseline; MFU where it is known."""
    base, reference = read.study.arms[read.baseline], read.arms[read.baseline]
    with_mfu = any(arm.mfu is not None for arm in read.arms.values())

    def cells(arm: Summary) -> dict[str, Cell | str | None]:
        def compared(shown: str, value: float | None, of_baseline: float | None) -> Cell:
            return Cell(shown, "" if arm.arm == read.baseline else change(value, of_baseline))

        entry, peak = read.study.arms[arm.arm], arm.peak_memory_bytes
        declared = {title: (getattr(entry, key), getattr(base, key)) for title, key in DECLARED.items()}
        return {
            **{
                f"{title}:number": compared(quantity(value), value, other) for title, (value, other) in declared.items()
            },
            "Tokens per second:number": Cell(quantity(arm.tokens_per_second), speed_change(arm, reference)),
            "Peak memory:number": compared(memory(peak), peak, reference.peak_memory_bytes),
            "MFU:number": f"{100 * arm.mfu:.1f} %" if arm.mfu is not None else DASH if with_mfu else None,
        }

    return read.arm_table(cells)


def _per_second(read: StudyRead) -> list[str]:
    """Arms that win per token and lose, or may lose, per second."""
    reference = read.arms[read.baseline]
    base, sentences = reference.tokens_per_second, []
    for c in read.verdicts.contrasts:
        arm = read.arms.get(c.arm)
        speed = arm.tokens_per_second if arm and speed_change(arm, reference) else None
        if not c.word.startswith(("better", "likely better")) or c.against != read.baseline:
            continue
        if not speed or not base or speed >= base:
            continue
        slower = f"{c.arm} wins per token, but trains at {100 * speed / base:.0f} % of the baseline's speed here"
        reach = read.once(worth).in_tokens.get(c.arm)
        if reach is None or not math.isfinite(reach.value):
            sentences.append(f"{slower}; whether it wins per second, only a `budget_curve` of the baseline can tell.")
            continue
        ratio = reach.value * speed / base
        result = "still wins" if ratio > 1 else "loses"
        sentences.append(
            f"{slower}: per second it {result}, since its loss takes the baseline {ratio:.2f} times as long."
        )
    return sentences
