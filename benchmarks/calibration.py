"""`calibration`: the table of critical values that the package carries, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gpt2lab.analysis.calibration import TABULATED, actual_levels

BANK = Path("gpt2lab/analysis/banks/calibration.npy")


def calibration(out: Annotated[Path, typer.Option(help="The file to write.")] = BANK) -> None:
    """Compute the actual levels for the usual numbers of seeds, which takes half a minute."""
    np.save(out, np.stack([actual_levels(sizes) for sizes in TABULATED]))
    print(f"{out}: {len(TABULATED)} pairs of numbers of seeds")
