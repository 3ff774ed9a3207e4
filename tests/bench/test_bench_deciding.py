"""Seeds that designs need, on losses whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.deciding import deciding


def test_a_large_difference_takes_three_seeds_and_none_is_never_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dice, rows = np.random.default_rng(0), ["arm,seed,value"]
    for arm, mean in (("plain", 2.0), ("better", 1.5), ("same", 2.0)):
        rows += [f"{arm},{seed},{mean + 0.01 * dice.standard_normal()}" for seed in range(8)]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    deciding(tmp_path / "results.csv", "plain", smallest_effect=0.1, orders=10)
    better, same = (
        " ".join(part.split()) for part in capsys.readouterr().out.partition("better ")[2].split("same ", 1)
    )
    assert better.startswith("-0.5") and "found 1.00" in better and better.count("better 1.00") == 2
    assert "found" not in same and same.count("no difference") == 3
