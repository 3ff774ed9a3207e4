"""What differs between two runs, part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import Planned

from gpt2lab.errors import ConfigError
from gpt2lab.identity import component_code, core_code, sources
from gpt2lab.reuse.why import keep_sources, why, without_code
from gpt2lab.store import RunFolder, Store, write_json

Write = Callable[..., RunFolder]


@pytest.fixture
def write(tmp_path: Path, planned: Planned) -> Write:
    """A run's folder with the identity of the tiny plan's baseline, changed in some parts."""
    identity = planned().baseline.runs[0].identity
    count = iter(range(10))

    def write_run(**changes: Any) -> RunFolder:
        run = Store(tmp_path / "runs").run(f"{next(count):016x}")
        run.write_identity({"id": run.id, "identity": identity | changes})
        return run

    return write_run


def told(a: RunFolder, b: RunFolder) -> list[str]:
    return [str(one) for one in why(a, b, Store(a.path.parent))]


def test_the_same_identity_differs_in_nothing(write: Write) -> None:
    assert told(write(), write()) == []


def test_every_part_is_told_in_words(write: Write, planned: Planned) -> None:
    rotary = planned().arms["rotary"].runs[1].identity
    a = write()
    b = write(settings=rotary["settings"], seed=1, data="d" * 64, torch="9.9", threads=7)
    found = told(a, b)
    assert "model.position.name: learned -> rotary" in found
    assert "seed: 0 -> 1" in found
    assert any(line.startswith("prepared data (fingerprint): ") and line.endswith("-> dddddddddddd") for line in found)
    assert any(line.startswith("torch version: ") and line.endswith(" -> 9.9") for line in found)
    assert "CPU threads: 1 -> 7" in found


def test_code_is_told_by_its_definitions(write: Write, tmp_path: Path, planned: Planned) -> None:
    config = planned().baseline.arm.config
    store = Store(tmp_path / "runs")
    keep_sources([config], store)
    kept = sources(config)
    assert core_code() in kept and component_code(config.model.mlp[0]) in kept
    changed = dict(kept[core_code()])
    gone, edited = sorted(changed)[:2]
    del changed[gone]
    changed[edited] += "\nmore = 1"
    changed["gpt2lab.model:fresh"] = "fresh = 2"
    write_json(tmp_path / "runs/code" / f"{'e' * 32}.json", changed)
    found = why(write(), write(core="e" * 64), store)
    assert {str(one) for one in found} == {
        f"core code: {gone.replace(':', '.')} gone",
        f"core code: {edited.replace(':', '.')} changed",
        "core code: gpt2lab.model.fresh added",
    }
    assert any("+more = 1" in one.code for one in found)
    unknown = told(write(), write(core="f" * 64))
    assert len(unknown) == 1 and "the store does not know" in unknown[0]


def test_only_code_differs_or_more_does(write: Write, planned: Planned) -> None:
    identity = planned().baseline.runs[0].identity
    other_code = identity | {"core": "x", "components": dict.fromkeys(identity["components"], "y")}
    assert without_code(other_code) == without_code(identity)
    for change in ({"seed": 1}, {"components": {"mlp=other": "y"}}):
        assert without_code(identity | change) != without_code(identity)


def test_a_run_that_never_began_has_no_identity(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it never began"):
        told(write(), Store(tmp_path / "runs").run("f" * 16))
