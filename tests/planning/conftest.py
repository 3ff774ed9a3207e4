"""A tiny ablation over local text, and its plan; nothing here trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_text
from tiny_plan import ABLATION, TINY, Planned

from gpt2lab.data.shards import prepare
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.planning.machine import probe
from gpt2lab.planning.plan import Plan, make_plan
from gpt2lab.planning.runs import known_costs
from gpt2lab.store import Store


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset's file, beside its text of some 9,000 bytes."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(text=write_text(tmp_path / "text.txt")))
    return file


@pytest.fixture
def planned(preset: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of an ablation's text on a machine of four cores; keywords go to `load_ablation`, and `jobs`."""
    monkeypatch.chdir(preset.parent)
    monkeypatch.setattr("gpt2lab.planning.machine.usable_cores", lambda: 4)

    def plan(text: str = ABLATION, *, jobs: int | None = None, **options: object) -> Plan:
        file = preset.parent / "ablation.yaml"
        file.write_text(text)
        ablation = load_ablation(file, **options)  # type: ignore[arg-type]
        data = prepare(ablation.arms[ablation.baseline].config.data)
        store, baseline = Store(preset.parent / "runs"), ablation.arms[ablation.baseline].config
        machine = probe(store, baseline.training, known_costs(baseline).flops_per_token, jobs)
        return make_plan(ablation, data, store, machine)

    return plan
