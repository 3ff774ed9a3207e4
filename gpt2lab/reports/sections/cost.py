"""What training costs: size, work, speed and memory of every arm, against its loss."""

from __future__ import annotations

from gpt2lab.basics.text import DASH, change, memory, quantity
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary, speed_change
from gpt2lab.reports.tables import Cell, Table

NOTE = (
    "The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median over runs, "
    "memory the maximum; both depend on the load of the machine. Speeds are not compared if those of single runs "
    "overlap, or if one arm was trained after the other. MFU: the model's FLOPs per second over the peak that the "
    "runs' result.json names."
)
DECLARED = {"Parameters": "parameters", "Non-embedding": "non_embedding_parameters", "Active": "active_parameters",
            "FLOPs per token": "flops_per_token", "Tokens": "tokens"}  # fmt: skip


@section(order=50, title="What it costs")
def costs(read: StudyRead) -> Section:
    return Section(table=_table(read), note=NOTE)


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
